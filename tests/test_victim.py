import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_unlearnable.augment import CropFlip, augment
from hf_unlearnable.batches import Batches
from hf_unlearnable.defenses.base import Defense, describe
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.keys import torch_generator
from hf_unlearnable.recipes import Recipe, recipe
from hf_unlearnable.report import curves
from hf_unlearnable.result import Result, summary
from hf_unlearnable.training import Unfinished
from hf_unlearnable.victim import evaluate, train, train_to_end

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = Recipe(name="quick", epochs=3, batch_size=16, learning_rate=0.05, schedule="cosine")
LENGTH = 3 * 6  # steps of QUICK on 103 rows, of which 10 are held out


def make_batches(rows: int = 103, classes: int = 3, seed: int = 0, size: int = 8) -> Batches:
    """Classes that differ a little in brightness."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    x = torch.randint(0, 200, (rows, 3, size, size), generator=generator) + 25 * labels.view(-1, 1, 1, 1)
    names = tuple(f"class{i}" for i in range(classes))
    return Batches(pixels=x.clamp(0, 255).to(torch.uint8), labels=labels, classes=names)


def network(seed: int = 0, dropout: float = 0.2, classes: int = 3) -> nn.Sequential:
    """Convolution, BatchNorm and dropout: everything that a resumed training could get wrong."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(72, classes),
        )


def noisy(model: nn.Module, x: Tensor, y: Tensor, *, progress: float, generator: torch.Generator) -> Tensor:
    """A defense that draws."""
    return F.cross_entropy(model(x + 0.1 * torch.randn(x.shape, generator=generator)), y)


def run(accelerator: Accelerator, **changes) -> tuple[nn.Module, Result]:
    model = changes.pop("model", None) or network()
    how = {"recipe": QUICK, "defense": noisy, "seed": 0, "progress": False, **changes}
    data = how.pop("train", make_batches()), how.pop("test", make_batches(50, seed=1))
    return model, train(model, *data, accelerator=accelerator, **how)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(one[0] == two[0] and torch.equal(one[1], two[1]) for one, two in pairs)


# -------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("nesterov", [False, True])
def test_training_equals_the_plain_loop(accelerator: Accelerator, nesterov: bool) -> None:
    batches, test = make_batches(53), make_batches(20, seed=1)
    ours = dataclasses.replace(QUICK, epochs=None, steps=11, nesterov=nesterov, gradient_clip=0.5, crop_padding=0.25)
    model, result = run(
        accelerator,
        model=network(dropout=0),
        train=batches,
        test=test,
        recipe=ours,
        defense=Erm(),
        seed=4,
        validation_fraction=0.0,
    )

    plain, step, losses, right = network(dropout=0).to(memory_format=torch.channels_last), 0, {}, {}
    optimizer = torch.optim.SGD(plain.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4, nesterov=nesterov)
    for epoch in range(3):
        order = torch.randperm(53, generator=torch_generator(4, "order", epoch))
        for index in order.split(16):
            if step == 11:
                break
            x = augment(batches.pixels[index], CropFlip(padding=2), generator=torch_generator(4, "augment", step))
            optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 11)) / 2
            optimizer.zero_grad()
            logits = plain((x.float() / 255).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, batches.labels[index])
            loss.backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
            step += 1
            losses.setdefault(epoch, []).append((loss.item(), len(index)))
            right[epoch] = right.get(epoch, 0) + int((logits.argmax(1) == batches.labels[index]).sum())
    assert same_weights(model, plain)
    means = [sum(loss * n for loss, n in seen) / sum(n for _, n in seen) for seen in losses.values()]
    assert [point.train_loss for point in result.curve] == pytest.approx(means, rel=1e-5)
    rows = [sum(n for _, n in seen) for seen in losses.values()]
    assert rows == [53, 53, 48]
    assert [point.train_accuracy for point in result.curve] == pytest.approx([right[e] / rows[e] for e in range(3)])
    assert [(point.epoch, point.steps) for point in result.curve] == [(1, 4), (2, 8), (3, 11)]
    plain.eval()
    predicted = plain(test.pixels.float() / 255).argmax(1)
    assert result.test_accuracy == pytest.approx((predicted == test.labels).float().mean().item())
    assert (result.validation_accuracy, result.best_test_accuracy, result.best_epoch) == (None, None, None)
    assert (result.train_rows, result.validation_rows, result.test_rows) == (53, 0, 20)


def test_a_seed_gives_one_training(accelerator: Accelerator) -> None:
    (a, first), (b, again), (c, other) = run(accelerator), run(accelerator), run(accelerator, seed=1)
    assert same_weights(a, b)
    assert not same_weights(a, c)
    assert dataclasses.replace(again, seconds=first.seconds) == first
    assert other.train_digest == first.train_digest


def test_dropout_differs_between_steps(accelerator: Accelerator) -> None:
    masks: list[Tensor] = []

    def watch(model: nn.Module, x: Tensor, y: Tensor, *, progress: float, generator: torch.Generator) -> Tensor:
        masks.append(F.dropout(torch.ones(64), 0.5))
        return F.cross_entropy(model(x), y)

    run(accelerator, defense=watch)
    assert len({tuple(mask.tolist()) for mask in masks}) == LENGTH


class Crash(RuntimeError):
    pass


@dataclasses.dataclass
class At:
    """`noisy`, with something else happening before one of its calls."""

    call: int
    act: Callable[[], object]
    calls: int = 0

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, progress: float, generator: torch.Generator
    ) -> Tensor:
        self.calls += 1
        if self.calls == self.call:
            self.act()
        return noisy(model, x, y, progress=progress, generator=generator)


def crash() -> None:
    raise Crash


def named_like_noisy(defense: Defense) -> Defense:
    def wrapped(*arguments, **keywords) -> Tensor:
        return defense(*arguments, **keywords)

    wrapped.__qualname__ = noisy.__qualname__
    return wrapped


@pytest.mark.parametrize("call", [1, 2, 5, 6, 7, 12, 18])
def test_a_crashed_training_resumes_bit_for_bit(accelerator: Accelerator, tmp_path: Path, call: int) -> None:
    whole, expected = run(accelerator)
    file = tmp_path / "inner" / "checkpoint.safetensors"
    how = {"checkpoint": file, "checkpoint_seconds": 0.0}
    with pytest.raises(Crash):
        run(accelerator, defense=named_like_noisy(At(call, crash)), **how)
    assert file.exists() == (call > 1)
    counter = At(0, crash)
    model, result = run(accelerator, defense=named_like_noisy(counter), **how)
    assert counter.calls == LENGTH - (call - 1)
    assert same_weights(model, whole)
    assert dataclasses.replace(result, seconds=expected.seconds) == expected
    assert os.listdir(file.parent) == [file.name]
    counter.calls = 0
    model, result = run(accelerator, defense=named_like_noisy(counter), **how)
    assert counter.calls == 0
    assert same_weights(model, whole)
    assert result.curve == expected.curve


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_resumes_bit_for_bit(accelerator: Accelerator, tmp_path: Path, number: int) -> None:
    whole, expected = run(accelerator)
    file = tmp_path / "checkpoint.safetensors"
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    kill = At(8, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt, match="step 8 of 18"):
        run(accelerator, defense=named_like_noisy(kill), checkpoint=file)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    model, result = run(accelerator, checkpoint=file)
    assert same_weights(model, whole)
    assert result.curve == expected.curve


def test_time_up_at_every_step_gives_the_same_training(accelerator: Accelerator, tmp_path: Path) -> None:
    whole, expected = run(accelerator)
    file, result, stops = tmp_path / "checkpoint.safetensors", None, 0
    while result is None:
        try:
            model, result = run(accelerator, checkpoint=file, max_minutes=0.0)
        except Unfinished as error:
            stops += 1
            assert f"step {stops} of 18" in str(error)  # noqa: PT017
    assert stops == LENGTH - 1
    assert same_weights(model, whole)
    assert result.curve == expected.curve
    with pytest.raises(ValueError, match="needs a checkpoint"):
        run(accelerator, max_minutes=1.0)


def test_a_checkpoint_of_another_training_is_refused(accelerator: Accelerator, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Unfinished):
        run(accelerator, checkpoint=file, max_minutes=0.0)
    others = {
        "recipe.learning_rate is 0.05 there and 0.1 here": {"recipe": dataclasses.replace(QUICK, learning_rate=0.1)},
        "seed is 0 there and 1 here": {"seed": 1},
        "defense.name is 'noisy' there and 'erm' here": {"defense": Erm()},
        "train_digest": {"train": make_batches(seed=9)},
        "test_digest": {"test": make_batches(50, seed=9)},
        "initial_weights": {"model": network(seed=9)},
        "validation_fraction": {"validation_fraction": 0.2},
    }
    for message, changes in others.items():
        with pytest.raises(ValueError, match=f"of another training: {message}"):
            run(accelerator, checkpoint=file, **changes)
    whole = file.read_bytes()
    save_file({}, file, metadata={"hf_unlearnable": "{}"})
    with pytest.raises(ValueError, match="expected a checkpoint of a training"):
        run(accelerator, checkpoint=file)
    file.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="expected a checkpoint of a training"):
        run(accelerator, checkpoint=file)
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="delete it to start anew"):
        run(accelerator, checkpoint=file)


def test_a_checkpoint_is_no_pickle_and_has_all_there_is(accelerator: Accelerator, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"
    model, _ = run(accelerator, checkpoint=file)
    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
        kept = json.loads(opened.metadata()["hf_unlearnable"])
    assert names == {f"module.model.{n}" for n in model.state_dict()} | {
        f"optimizer.sgd.{n}.momentum_buffer" for n, _ in enumerate(model.parameters())
    }
    assert (kept["state"]["step"], kept["run"]["seed"]) == (LENGTH, 0)


def test_a_loss_that_is_not_finite_stops_and_names_the_step(accelerator: Accelerator, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"

    def diverges(model: nn.Module, x: Tensor, y: Tensor, *, progress: float, generator: torch.Generator) -> Tensor:
        return F.cross_entropy(model(x), y) * (math.nan if progress >= 8 / LENGTH else 1.0)

    with pytest.raises(FloatingPointError, match="at step 9 of 18: lower the learning rate"):
        run(accelerator, defense=diverges, checkpoint=file, checkpoint_seconds=0.0)
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["hf_unlearnable"])["state"]["step"] == 8
        assert all(opened.get_tensor(name).isfinite().all() for name in opened.keys())  # noqa: SIM118
    with pytest.raises(FloatingPointError):
        run(accelerator, recipe=dataclasses.replace(QUICK, learning_rate=1e30))


def test_progress_and_generator_reach_the_defense(accelerator: Accelerator) -> None:
    seen: list[tuple[float, float, bool, tuple]] = []

    def watch(model: nn.Module, x: Tensor, y: Tensor, *, progress: float, generator: torch.Generator) -> Tensor:
        assert x.dtype == torch.float32
        assert 0 <= x.min() <= x.max() <= 1
        draw = torch.rand(1, generator=generator).item()
        seen.append((progress, draw, all(module.training for module in model.modules()), tuple(x.shape)))
        return F.cross_entropy(model(x), y)

    run(accelerator, defense=watch)
    assert [progress for progress, *_ in seen] == [step / LENGTH for step in range(LENGTH)]
    assert len({draw for _, draw, _, _ in seen}) == LENGTH
    assert all(training for _, _, training, _ in seen)
    assert [shape[0] for *_, shape in seen] == [16, 16, 16, 16, 16, 13] * 3


def test_drop_last_leaves_out_the_rest(accelerator: Accelerator) -> None:
    _, result = run(accelerator, recipe=dataclasses.replace(QUICK, drop_last=True))
    assert [point.steps for point in result.curve] == [5, 10, 15]
    with pytest.raises(ValueError, match="no whole batch of 128"):
        run(accelerator, recipe=recipe("rem40k", steps=3))


def test_train_accuracy_is_unknown_where_the_defense_shows_other_rows(accelerator: Accelerator) -> None:
    def twice(model: nn.Module, x: Tensor, y: Tensor, *, progress: float, generator: torch.Generator) -> Tensor:
        return F.cross_entropy(model(torch.cat([x, x])), torch.cat([y, y]))

    _, result = run(accelerator, defense=twice)
    assert {point.train_accuracy for point in result.curve} == {None}


def test_evaluate_every_some_epochs_and_at_the_end(accelerator: Accelerator) -> None:
    quick = dataclasses.replace(QUICK, epochs=5)
    _, result = run(accelerator, recipe=quick, evaluate_every=2)
    assert [point.test_accuracy is not None for point in result.curve] == [False, True, False, True, True]
    assert result.test_accuracy == result.curve[-1].test_accuracy
    _, dense = run(accelerator, recipe=quick)
    assert result.curve[-1] == dense.curve[-1]


@pytest.mark.parametrize("length", [{"epochs": 3}, {"epochs": None, "steps": 15}])
def test_to_the_end_is_a_training_on_all_rows_that_is_evaluated_once(accelerator: Accelerator, length: dict) -> None:
    how = {"recipe": dataclasses.replace(QUICK, **length), "defense": Erm(), "accelerator": accelerator, "seed": 0}
    rows, test = make_batches(), make_batches(seed=1)
    one, other = network(), network()
    found = train_to_end(one, rows, test, **how, progress=False)
    expected = train(other, rows, test, **how, validation_fraction=0.0, progress=False)
    assert same_weights(one, other)
    assert [point.test_accuracy is not None for point in found.curve] == [False, False, True]
    assert found.test_accuracy == expected.test_accuracy
    assert found.curve[-1].steps == expected.curve[-1].steps


def test_best_is_chosen_on_validation_rows_alone(accelerator: Accelerator) -> None:
    _, result = run(accelerator, recipe=dataclasses.replace(QUICK, epochs=8))
    scores = [point.validation_accuracy for point in result.curve]
    best = scores.index(max(scores))  # type: ignore[type-var]
    assert (result.best_epoch, result.best_validation_accuracy) == (best + 1, scores[best])
    assert result.best_test_accuracy == result.curve[best].test_accuracy
    assert result.validation_accuracy == scores[-1]
    assert (result.train_rows, result.validation_rows) == (93, 10)


def test_classes_are_matched_by_name(accelerator: Accelerator) -> None:
    test = make_batches(50, seed=1)
    turned = Batches(pixels=test.pixels, labels=2 - test.labels, classes=test.classes[::-1])
    _, expected = run(accelerator, test=test)
    _, result = run(accelerator, test=turned)
    assert result.confusion == expected.confusion
    named = Batches(pixels=test.pixels, labels=test.labels, classes=("class0", "class1", "cat"))
    with pytest.raises(ValueError, match="got 'cat'"):
        run(accelerator, test=named)


def test_what_does_not_fit_is_refused_before_training(accelerator: Accelerator) -> None:
    with pytest.raises(ValueError, match=r"logits of shape \(2, 3\) .* got \(2, 5\)"):
        run(accelerator, model=network(classes=5))
    with pytest.raises(ValueError, match=r"test pictures of \(8, 8\) pixels .* got \(9, 9\)"):
        run(accelerator, test=make_batches(20, size=9))
    with pytest.raises(ValueError, match="at least one test row"):
        run(accelerator, test=make_batches(20).select([]))
    with pytest.raises(ValueError, match="evaluate_every"):
        run(accelerator, evaluate_every=0)


def test_processes_that_do_not_know_of_each_other_are_refused(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started, but the accelerator knows of 1.*cpu=True"):
        run(accelerator)


def test_modes_and_hooks_are_restored(accelerator: Accelerator) -> None:
    model = network()
    model[1].eval()
    run(accelerator, model=model)
    assert [module.training for module in model] == [True, False, True, True, True, True]
    assert model.training
    assert not model._forward_hooks
    broken = network().eval()
    with pytest.raises(Crash):
        run(accelerator, model=broken, defense=At(3, crash))
    assert not any(module.training for module in broken.modules())
    assert not broken._forward_hooks


def test_frozen_parameters_stay(accelerator: Accelerator) -> None:
    model = network()
    model[0].requires_grad_(False)
    run(accelerator, model=model)
    assert torch.equal(model[0].weight, network()[0].weight)
    assert not torch.equal(model[5].weight, network()[5].weight)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]


def test_evaluate_counts(accelerator: Accelerator) -> None:
    model, batches = network(), make_batches(47)
    counts = torch.zeros(3, 3, dtype=torch.int64)
    model.eval()
    for x, y in zip(batches.pixels, batches.labels, strict=True):
        counts[y, model(x[None].float() / 255).argmax()] += 1
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert torch.equal(evaluate(model, batches, accelerator=accelerator), counts)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training


def test_half_precision_floats_are_refused() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    bf16 = Accelerator(cpu=True, mixed_precision="bf16")
    _, result = run(bf16)
    assert result.hardware["precision"] == "bf16"
    bf16.state._mixed_precision = "fp16"
    try:
        with pytest.raises(ValueError, match="float32 or bf16"):
            run(bf16)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


# ------------------------------------------------------------------------------------------------------- processes

TWO = """
import json, sys, torch
from accelerate import Accelerator
from torch import nn
sys.path.insert(0, sys.argv[2])
from tests.test_victim import QUICK, make_batches, plain
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.victim import train
accelerator = Accelerator(cpu=True)
model = plain()
data = make_batches(), make_batches(50, seed=1)
result = train(model, *data, recipe=QUICK, defense=Erm(), accelerator=accelerator, seed=0)
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
every = accelerator.gather(weights[None])
if accelerator.is_main_process:
    result.save(sys.argv[1])
    assert torch.equal(every[0], every[1]), "the processes' weights differ"
accelerator.end_training()
"""


def plain() -> nn.Sequential:
    """A network without BatchNorm and dropout, which sees a batch as the sum of its rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)
        )


def test_two_processes_give_the_curve_of_one(accelerator: Accelerator, tmp_path: Path) -> None:
    script, saved = tmp_path / "two.py", tmp_path / "result.json"
    script.write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [*command, str(saved), root], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = Result.load(saved)
    _, one = run(accelerator, model=plain(), defense=Erm())
    assert two.hardware["processes"] == 2
    for ours, theirs in zip(one.curve, two.curve, strict=True):
        assert theirs.train_loss == pytest.approx(ours.train_loss, rel=1e-5)
        assert dataclasses.replace(theirs, train_loss=ours.train_loss) == ours
    assert (two.confusion, two.validation_accuracy) == (one.confusion, one.validation_accuracy)
    assert done.stderr.count("training: 100%") == 1, "one bar, on the main process"


# --------------------------------------------------------------------------------------------------------- results


def test_results_survive_their_file(accelerator: Accelerator, tmp_path: Path) -> None:
    _, result = run(accelerator)
    result.save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json") == result
    assert os.listdir(tmp_path) == ["result.json"]
    for text in ("{}", "[1]", "no json", json.dumps({"schema": 99})):
        (tmp_path / "result.json").write_text(text)
        with pytest.raises(ValueError, match="expected a result of schema 1"):
            Result.load(tmp_path / "result.json")


def test_class_accuracies_and_chance(accelerator: Accelerator) -> None:
    test = make_batches(50, seed=1)
    test = test.select([i for i in range(50) if test.labels[i] != 1])
    _, result = run(accelerator, test=test)
    counts = np.array(result.confusion)
    assert counts.sum() == result.test_rows == len(test)
    assert result.test_accuracy == pytest.approx(np.trace(counts) / counts.sum())
    assert result.class_accuracy[1] is None
    for i in (0, 2):
        assert result.class_accuracy[i] == pytest.approx(counts[i, i] / counts[i].sum())
    assert result.chance == pytest.approx(torch.bincount(test.labels).max().item() / len(test))


def test_summary_in_closed_form(accelerator: Accelerator) -> None:
    _, result = run(accelerator)
    three = [dataclasses.replace(result, test_accuracy=a, seed=i) for i, a in enumerate((0.1, 0.2, 0.6))]
    told = summary(three)
    assert told["seeds"] == [0, 1, 2]
    assert told["test_accuracy"] == pytest.approx({"mean": 0.3, "std": math.sqrt(0.07), "min": 0.1, "max": 0.6})
    assert summary([result])["test_accuracy"]["std"] is None
    nothing = dataclasses.replace(result, best_test_accuracy=None)
    assert summary([result, nothing])["best_test_accuracy"] is None


def test_describe() -> None:
    assert describe(Erm()) == {"name": "erm"}
    assert describe(noisy) == {"name": "noisy"}
    assert describe(At(3, crash))["call"] == 3


def test_curves_are_drawn(accelerator: Accelerator, tmp_path: Path) -> None:
    for name, fraction in (("with.png", 0.1), ("without.png", 0.0)):
        _, result = run(accelerator, validation_fraction=fraction)
        curves(result, tmp_path / name)
        picture = np.asarray(PIL.Image.open(tmp_path / name).convert("RGB"))
        assert picture.shape == (480, 1200, 3)
        assert (picture == (0xD5, 0x5E, 0x00)).all(2).sum() > 100, "the test accuracy"
        assert ((picture == (0xE6, 0x9F, 0x00)).all(2).sum() > 40) == (fraction > 0), "the validation accuracy"
    assert sorted(os.listdir(tmp_path)) == ["with.png", "without.png"]
