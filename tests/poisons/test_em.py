"""EM: the rounds against a slow loop, the class means by hand, the bank, and what stops it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from hf_unlearnable.augment import CropFlip, ResizedCropFlip
from hf_unlearnable.batches import Batches
from hf_unlearnable.draws import Draws
from hf_unlearnable.erasing import UeraserAugmentation
from hf_unlearnable.fitting import Setup
from hf_unlearnable.poisons.em import REM_RECIPE, EmPoison, views
from hf_unlearnable.poisons.em_fit import ClasswiseFit, EmFit, SamplewiseFit
from hf_unlearnable.poisons.noise_bank import NoiseBank
from hf_unlearnable.poisons.robust_em import RobustFit, SemPoison
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.surrogate import Surrogate
from hf_unlearnable.training import Unfinished, as_input, own_randomness
from tests.conftest import make_dataset, noise_pictures, pixels

LABELS = [i % 4 for i in range(40)]
SMALL: dict[str, Any] = {"pgd_steps": 2, "pgd_step_size": 3 / 255, "train_steps_per_round": 3, "max_rounds": 2}
KINDS: dict[str, dict[str, Any]] = {
    "samplewise": {},
    "classwise": {"mode": "classwise", "pgd_steps": 1, "search_fraction": 0.5},
    "rem-repo": {"variant": "rem-repo"},
    "views": {"noise_views": "crop_flip"},
    "adaptive": {"noise_views": "ueraser"},
}


def make_batches() -> Batches:
    u = torch.from_numpy(noise_pictures(40)).permute(0, 3, 1, 2).contiguous()
    return Batches(pixels=u, labels=torch.tensor(LABELS), classes=tuple(f"class{i}" for i in range(4)))


@pytest.fixture(scope="module")
def batches() -> Batches:
    return make_batches()


def recipe_of(poison: EmPoison, **changes: Any) -> Recipe:
    length = {"steps": 4, "drop_last": False} if poison.variant == "rem-repo" else {}
    return replace(poison.recipe, batch_size=16, **length, **changes)


def quick(poison: EmPoison, **changes: Any) -> dict[str, Any]:
    return {"recipe": recipe_of(poison), "backbone": "tiny", "seed": 1, "progress": False, **changes}


def fit_of(poison: EmPoison, batches: Batches, accelerator: Accelerator, **changes: Any) -> EmFit:
    setup = Setup(train=batches, recipe=recipe_of(poison, **changes), backbone="tiny", seed=1, accelerator=accelerator)
    fit = poison.fitting(setup)
    assert isinstance(fit, EmFit)
    return fit


@pytest.fixture(scope="module")
def surrogates(batches: Batches) -> dict[str, Surrogate]:
    found = {}
    for name, changes in KINDS.items():
        poison = EmPoison(**{**SMALL, **changes})
        found[name] = poison.fit(batches, accelerator=Accelerator(cpu=True), **quick(poison))
    return found


@pytest.fixture(scope="module")
def source() -> Any:
    return make_dataset(noise_pictures(40), LABELS)


# The arithmetic.


def train_slowly(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    network.train()
    optimizer.zero_grad()
    F.cross_entropy(network(x), y).backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
    optimizer.step()


def descend_slowly(network: nn.Module, x: Tensor, y: Tensor, delta: Tensor, steps: int, size: float) -> Tensor:
    """The official order: a step, the budget, the box; here with the box at the end too."""
    network.eval()
    shown = (x + delta).clamp(0, 1)
    for _ in range(steps):
        leaf = shown.clone().requires_grad_()
        slope = torch.autograd.grad(F.cross_entropy(network(leaf), y), leaf)[0]
        eta = (shown - size * slope.sign() - x).clamp(-8 / 255, 8 / 255)
        shown = (x + eta).clamp(0, 1)
    return shown - x


def test_two_rounds_are_the_slow_ones(batches: Batches, accelerator: Accelerator) -> None:
    fit = fit_of(EmPoison(**SMALL), batches, accelerator)
    assert isinstance(fit, SamplewiseFit)
    network = fit.setup.network()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    fixed = [fit.fixed(number)[1] for number in range(3)]
    assert torch.cat(fixed).sort().values.tolist() == list(range(40))
    assert [len(rows) for rows in fixed] == [16, 16, 8]
    x, y = batches.pixels.float() / 255, batches.labels
    delta, trained = torch.zeros_like(x), 0
    for done in range(2):
        with own_randomness(fit.setup.device):
            found = [fit.step(done * 6 + place) for place in range(6)]
        for _ in range(3):
            rows = fixed[trained % 3]
            train_slowly(network, optimizer, x[rows] + delta[rows], y[rows])
            trained += 1
        for rows in fixed:
            delta[rows] = descend_slowly(network, x[rows], y[rows], delta[rows], 2, 3 / 255)
        far = (fit.delta.float() - delta).abs() > 1e-4
        assert far.float().mean() < 0.002, "a few signs of gradients near zero may differ"
        delta = fit.delta.float()
        network.eval()
        with torch.no_grad():
            wrong = (network(x + delta).argmax(1) != y).float().mean().item()
        assert found[-1]["error"].item() == pytest.approx(wrong)
        assert fit.state == {"rounds": done + 1, "error": pytest.approx(wrong), "wrong": 0}
        assert [set(one) for one in found] == [{"loss"}] * 3 + [{"noise loss"}] * 2 + [{"noise loss", "error"}]
    for name, value in fit.modules["network"].state_dict().items():
        assert torch.allclose(value.float(), network.state_dict()[name].float(), atol=2e-3), name


def test_training_batches_go_on_where_the_last_round_ended(batches: Batches, accelerator: Accelerator) -> None:
    fit = fit_of(EmPoison(**{**SMALL, "train_steps_per_round": 2}), batches, accelerator)
    shown = [fit.shown(number)[0].pixels for number in range(5)]
    fixed = [batches.pixels[fit.fixed(number)[1]] for number in (0, 1, 2, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(shown, fixed, strict=True))
    asked: list[int] = []
    fit.shown = lambda number: asked.append(number) or SamplewiseFit.shown(fit, number)  # type: ignore[method-assign, arg-type, func-returns-value]
    with own_randomness(fit.setup.device):
        for step in range(10):
            fit.step(step)
    assert asked == [0, 1, 2, 3]


def test_batches_are_not_in_the_order_of_the_rows(batches: Batches, accelerator: Accelerator) -> None:
    by_class = batches.select(batches.labels.argsort(stable=True))
    fit = fit_of(EmPoison(**SMALL), by_class, accelerator)
    for number in range(3):
        assert len(fit.fixed(number)[0].labels.unique()) > 1


def test_class_noise_is_the_mean_of_its_pictures_noise(batches: Batches, accelerator: Accelerator) -> None:
    fit = fit_of(EmPoison(**{**SMALL, **KINDS["classwise"], "pgd_step_size": 5 / 255}), batches, accelerator)
    assert isinstance(fit, ClasswiseFit)
    assert (fit.moves, fit.length, len(fit.rows)) == (2, 3 + 2 + 2, 20)
    assert torch.bincount(fit.rows.labels).tolist() == [5] * 4
    with own_randomness(fit.setup.device):
        for done in range(3):
            for place in range(3):
                fit.step(done * 7 + place)
            network, table = fit.modules["network"], fit.table.clone()
            stream = fit.rows.epoch(done, key=fit.key, batch_size=16)
            for place, batch in enumerate(stream):
                x, y = as_input(batch.pixels), batch.labels
                delta = descend_slowly(network, x, y, table[y], 1, 5 / 255)
                for label in range(4):
                    if (y == label).any():
                        table[label] = delta[y == label].mean(0)
                network.train()
                fit.step(done * 7 + 3 + place)
                assert (fit.table - table).abs().max() < 1e-6 or (
                    (fit.table - table).abs() > 1e-6
                ).float().mean() < 0.01
                table = fit.table.clone()
            fit.step(done * 7 + 5)
            fit.step(done * 7 + 6)
            x, y = as_input(fit.rows.pixels), fit.rows.labels
            network.eval()
            with torch.no_grad():
                wrong = (network(x + table[y]).argmax(1) != y).float().mean().item()
            assert fit.state["error"] == pytest.approx(wrong)
    assert 0 < table.abs().max() <= 8 / 255


def test_a_class_that_a_batch_lacks_keeps_its_noise(batches: Batches, accelerator: Accelerator) -> None:
    poison = EmPoison(**{**SMALL, **KINDS["classwise"]})
    setup = Setup(
        train=batches, recipe=replace(poison.recipe, batch_size=2), backbone="tiny", seed=1, accelerator=accelerator
    )
    fit = poison.fitting(setup)
    assert isinstance(fit, ClasswiseFit)
    fit.table.fill_(1 / 255)
    before, batch = fit.table.clone(), next(fit.rows.epoch(0, key=fit.key, batch_size=2))
    fit.search(3, 0, 0)
    changed = (fit.table != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == batch.labels.unique().tolist()


def test_the_network_is_trained_on_all_rows_and_the_noise_made_on_some(
    batches: Batches, accelerator: Accelerator
) -> None:
    fit = fit_of(EmPoison(mode="classwise", search_fraction=0.2, train_steps_per_round=3), batches, accelerator)
    seen = torch.cat([fit.shown(number)[0].pixels for number in range(3)])
    assert len(np.unique(seen.flatten(1).numpy(), axis=0)) == 40
    assert len(fit.rows) == 8


@pytest.mark.parametrize("augmentation", ["none", "crop_flip", "resized_crop_flip", "ueraser"])
def test_views_are_for_noise_and_network(augmentation: Any, batches: Batches, accelerator: Accelerator) -> None:
    fit = fit_of(EmPoison(**SMALL, noise_views=augmentation), batches, accelerator)
    known = {"none": None, "crop_flip": CropFlip(padding=4), "resized_crop_flip": ResizedCropFlip()}
    expected = {**known, "ueraser": UeraserAugmentation()}[augmentation]
    assert fit.augmentation == fit.noise.augmentation == expected
    shown: list[Tensor] = []
    fit.modules["network"].register_forward_pre_hook(lambda module, x: shown.append(x[0].detach().clone()))
    with own_randomness(fit.setup.device):
        fit.step(0)
        fit.step(3)
    plain, searched = (as_input(fit.fixed(0)[0].pixels) for _ in range(2))
    assert torch.equal(shown[0], plain) == (augmentation == "none"), "the training"
    assert torch.equal(shown[1], searched) == (augmentation == "none"), "the search"
    delta = fit.tensors["delta"][fit.fixed(0)[1]].float()
    assert torch.equal(shown[-1], plain + delta), "errors are counted without views"
    own = fit_of(EmPoison(**SMALL), batches, accelerator, augmentation="flip")
    assert own.augmentation == CropFlip(padding=0, flip=0.5), "the recipe's, where the poison has none"
    assert own.noise.augmentation is None


def test_parts_of_ueraser_are_switched_off() -> None:
    switched = {name: views(name, (32, 32)) for name in ("plasma", "shuffle", "plasma-shuffle", "ueraser")}
    assert all(isinstance(one, UeraserAugmentation) for one in switched.values())
    settings = {n: (v.brightness, v.contrast, v.shuffle, v.trivial) for n, v in switched.items()}  # type: ignore[union-attr]
    assert settings == {
        "plasma": (0.5, 0.5, 0.0, False),
        "shuffle": (0.0, 0.0, 0.5, False),
        "plasma-shuffle": (0.5, 0.5, 0.5, False),
        "ueraser": (0.5, 0.5, 0.5, True),
    }


# What ends it.


def test_it_ends_at_the_error_at_the_rounds_or_at_the_recipes_length(
    batches: Batches, accelerator: Accelerator
) -> None:
    def ended(poison: EmPoison, **changes: Any) -> tuple[int, float, int]:
        how = quick(poison, accelerator=accelerator, recipe=recipe_of(poison, **changes))
        known = poison.fit(batches, **how).provenance
        assert known["curve"][-1]["error"] == pytest.approx(known["state"]["error"])
        return known["steps"], known["state"]["error"], known["state"]["rounds"]

    steps, error, rounds = ended(EmPoison(**SMALL, stop_error=1.0))
    assert (steps, rounds) == (6, 1)
    assert ended(EmPoison(**SMALL, stop_error=error)) == (6, error, 1), "at most, not below"
    assert ended(EmPoison(**SMALL, stop_error=0.0))[::2] == (12, 2)
    assert ended(EmPoison(**{**SMALL, "max_rounds": 9}, stop_error=0.0), steps=7)[::2] == (18, 3)


def test_the_cost(batches: Batches, accelerator: Accelerator) -> None:
    fit = fit_of(EmPoison(), batches, accelerator)
    assert fit.total == 100 * (10 + 3)
    assert fit.passes * 13 == pytest.approx(10 + 3 * (20 + 1 / 3))
    fit = fit_of(EmPoison(mode="classwise", search_fraction=0.5), batches, accelerator)
    assert fit.passes * 14 == pytest.approx(10 + 2 + 2 / 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_stopped_at_every_step_gives_the_same_surrogate(
    kind: str, batches: Batches, surrogates: dict[str, Surrogate], accelerator: Accelerator, tmp_path: Path
) -> None:
    poison, whole = EmPoison(**{**SMALL, **KINDS[kind]}), surrogates[kind]
    how, found, stops = quick(poison, accelerator=accelerator), None, 0
    while found is None:
        try:
            found = poison.fit(batches, checkpoint=tmp_path / "c.safetensors", max_minutes=0.0, **how)
        except Unfinished:
            stops += 1
    assert stops == whole.provenance["steps"] - 1 > 2
    assert found.secret() == whole.secret()
    assert found.provenance["curve"] == whole.provenance["curve"]
    assert found.provenance["state"] == whole.provenance["state"]
    if kind == "samplewise":
        assert poison.fit(batches, **{**how, "seed": 2}).secret() != whole.secret()


TWO = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from accelerate import Accelerator
from tests.poisons.test_em import KINDS, SMALL, make_batches, quick
from hf_unlearnable.poisons.em import EmPoison, views
from hf_unlearnable.training import Unfinished
accelerator = Accelerator(cpu=True)
for kind in ("samplewise", "classwise"):
    poison, batches = EmPoison(**{**SMALL, **KINDS[kind], "train_steps_per_round": 1}), make_batches()
    how = quick(poison, accelerator=accelerator)
    whole, found, stops = poison.fit(batches, **how), None, 0
    while found is None:
        try:
            found = poison.fit(batches, checkpoint=f"{sys.argv[2]}/{kind}.safetensors", max_minutes=0.0, **how)
        except Unfinished:
            stops += 1
    assert stops >= 7, stops
    secrets = torch.tensor([list(whole.secret()), list(found.secret())])
    every = accelerator.gather(secrets)
    assert (every == every[0]).all(), (kind, "the processes' or the resumed surrogate differs")
    if kind == "samplewise":
        assert (whole.tensors["bank.noise"] != 0).flatten(1).any(1).all(), "a row was left out"
    assert whole.provenance["state"]["rounds"] == 2
accelerator.end_training()
"""


def test_two_processes_make_one_surrogate(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    root = str(Path(__file__).parent.parent.parent)
    done = subprocess.run(
        [*command, root, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


# What pictures are given.


def test_the_bank_is_mapped_as_it_was_made(surrogates: dict[str, Surrogate], batches: Batches, source: Any) -> None:
    known = surrogates["samplewise"]
    noise = known.tensors["bank.noise"].permute(0, 2, 3, 1).numpy().astype(int)
    before, after = pixels(source).astype(int), pixels(EmPoison.from_surrogate(known).apply(source)).astype(int)
    assert np.array_equal(after, before + noise), "noise in the box needs no clipping"
    assert set(np.abs(noise[(before > 8) & (before < 247)]).ravel()) <= {0, 2, 3, 5, 6, 8}, "steps of 3, ended at 8"
    positive = pixels(EmPoison.from_surrogate(known, positive_only=True).apply(source)).astype(int)
    assert np.array_equal(positive, before + noise.clip(0))


def test_the_class_table_is_mapped_as_it_was_made(surrogates: dict[str, Surrogate], source: Any) -> None:
    table = surrogates["classwise"].tensors["delta"].permute(0, 2, 3, 1).numpy()[LABELS]
    before = pixels(source)
    for positive_only, delta in ((False, table), (True, table.clip(0))):
        poison = EmPoison.from_surrogate(surrogates["classwise"], positive_only=positive_only)
        expected = np.rint((before / np.float32(255) + delta).clip(0, 1) * 255)
        assert (pixels(poison.apply(source)) != expected).mean() < 1e-4, "values at half a level may round either way"


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_mapping_gives_the_same_pixels(
    kind: str, surrogates: dict[str, Surrogate], source: Any, tmp_path: Path
) -> None:
    path = surrogates[kind].save(tmp_path / "s.safetensors")
    changes = {"noise": "regenerate"} if kind == "views" else {}
    poison = EmPoison.from_surrogate(path, **changes)
    assert poison == EmPoison.from_surrogate(surrogates[kind], **changes)
    expected = pixels(poison.apply(source))
    order = np.random.default_rng(0).permutation(40)
    found = (
        pixels(source.map(poison, batched=True, batch_size=7, keep_in_memory=True)),
        pixels(source.select(order).map(poison, keep_in_memory=True))[order.argsort()],
        pixels(poison.apply(source, num_proc=2)),
    )
    some = 0.002 if kind in ("rem-repo", "views") else 0.0  # gradients near zero, by a network in other batches
    assert [bool((one != expected).mean() <= some) for one in found] == [True] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_is_kept_and_used(kind: str, batches: Batches, accelerator: Accelerator) -> None:
    u = batches.pixels.clone()
    u[:, :, :16] = torch.tensor([0, 255], dtype=torch.uint8).repeat(8)[:, None]
    extreme = replace(batches, pixels=u)
    changes = {**SMALL, **KINDS[kind], "pgd_steps": 3, "epsilon": 5.7 / 255, "pgd_step_size": 4 / 255}
    poison = EmPoison(**changes)
    known = poison.fit(extreme, **quick(poison, accelerator=accelerator))
    poisoned = EmPoison.from_surrogate(known).change(u, extreme.labels, [f"row {i}" for i in range(40)])
    assert (poisoned.int() - u.int()).abs().max() == 5


@pytest.mark.parametrize("kind", ["samplewise", "rem-repo", "views"])
def test_the_noise_lowers_the_loss_of_the_surrogate(
    kind: str, surrogates: dict[str, Surrogate], batches: Batches
) -> None:
    x, y = as_input(batches.pixels), batches.labels
    network = surrogates[kind].network()
    for noise in ("bank", "regenerate"):
        poison = EmPoison.from_surrogate(surrogates[kind], noise=noise)
        poisoned = poison.perturb(x, y, Draws(1, "em", batches.pixels))
        before, after = (F.cross_entropy(network(z), y, reduction="none") for z in (x, poisoned))
        assert (after < before).float().mean() > 0.8, noise


def test_random_starts_belong_to_key_and_picture(surrogates: dict[str, Surrogate], source: Any) -> None:
    known = surrogates["rem-repo"]
    first, again = (pixels(EmPoison.from_surrogate(known, seed=seed).apply(source)) for seed in (7, 8))
    assert (first != again).mean() > 0.1
    assert np.array_equal(first, pixels(EmPoison.from_surrogate(known, seed=7).apply(source)))


def test_unknown_pictures_are_refused_or_given_noise(surrogates: dict[str, Surrogate], source: Any) -> None:
    for kind, some in (("samplewise", 0.0), ("views", 0.002)):
        known = surrogates[kind]
        strange = make_dataset([*noise_pictures(40)[:2], *noise_pictures(2, seed=5)], [0, 3, 2, 3])
        strict = EmPoison.from_surrogate(known, seed=3)
        with pytest.raises(ValueError, match=r"picture 1 of 4 here.* one of the 40 pictures.*label 3 for it \(3 are"):
            strict.apply(strange)
        poison = EmPoison.from_surrogate(known, seed=3, unknown="regenerate")
        found = pixels(poison.apply(strange))
        assert np.array_equal(found[0], pixels(strict.apply(source))[0])
        made = pixels(EmPoison.from_surrogate(known, seed=3, noise="regenerate").apply(strange))
        assert (found[1:] != made[1:]).mean() <= some
        assert (found[1:] != pixels(strange)[1:]).any((1, 2, 3)).all()


def test_without_a_bank(batches: Batches, accelerator: Accelerator, surrogates: dict[str, Surrogate]) -> None:
    poison = EmPoison(**SMALL, noise="regenerate")
    known = poison.fit(batches, **quick(poison, accelerator=accelerator))
    assert not [name for name in known.tensors if not name.startswith("network.")]
    own = {name: value for name, value in surrogates["samplewise"].tensors.items() if name.startswith("network.")}
    assert all(torch.equal(known.tensors[name], value) for name, value in own.items())
    assert EmPoison.from_surrogate(known).noise == "regenerate"
    with pytest.raises(ValueError, match="holds no noise of known pictures"):
        EmPoison.from_surrogate(known, noise="bank")


def test_the_bank_knows_rows_and_labels(surrogates: dict[str, Surrogate], batches: Batches) -> None:
    bank = NoiseBank.in_surrogate(surrogates["samplewise"])
    digests = Draws(1, "em", batches.pixels).digests
    assert bank.find(digests, LABELS) == list(range(40))
    assert bank.find(digests, [(label + 1) % 4 for label in LABELS]) == [None] * 40


# Settings and errors.


def test_what_is_filled_in() -> None:
    def told(poison: EmPoison) -> tuple[Any, ...]:
        return poison.pgd_steps, poison.pgd_step_size, poison.stop_error, poison.noise_views

    assert told(EmPoison()) == (20, 0.8 / 255, 0.01, "none")
    assert told(EmPoison(mode="classwise")) == (1, 0.8 / 255, 0.1, "none")
    assert told(EmPoison(variant="rem-repo")) == (10, 1.6 / 255, 0.01, "crop_flip")
    assert told(EmPoison(mode="classwise", pgd_steps=4, stop_error=0.0)) == (4, 0.8 / 255, 0.0, "none")
    usual = EmPoison().recipe
    assert (usual.batch_size, usual.schedule, usual.learning_rate, usual.gradient_clip) == (512, "constant", 0.1, 5.0)
    assert (usual.momentum, usual.weight_decay, usual.augmentation, usual.drop_last) == (0.9, 5e-4, "none", False)
    assert EmPoison(variant="rem-repo").recipe == REM_RECIPE
    assert (REM_RECIPE.steps, REM_RECIPE.batch_size, REM_RECIPE.augmentation) == (5000, 128, "crop_flip")
    assert EmPoison().recipe is EmPoison.recipe


def test_the_variant_is_rems_loop_without_an_adversary(batches: Batches, accelerator: Accelerator) -> None:
    poison = EmPoison(variant="rem-repo")
    setup = Setup(train=batches, recipe=recipe_of(poison), backbone="tiny", seed=0, accelerator=accelerator)
    fit = poison.fitting(setup)
    assert isinstance(fit, RobustFit)
    assert (fit.adversary, fit.penalty, fit.passes) == (None, None, 11)
    assert (fit.noise.init, fit.noise.direction, fit.noise.eot) == ("uniform", "min", 1)


def test_the_surrogates_settings_come_back(surrogates: dict[str, Surrogate]) -> None:
    poison = EmPoison.from_surrogate(surrogates["classwise"])
    assert (poison.mode, poison.pgd_steps, poison.search_fraction, poison.num_classes) == ("classwise", 1, 0.5, 4)
    assert poison.budget_for(32, 32).epsilon == 8 / 255
    assert EmPoison.from_surrogate(surrogates["rem-repo"]).recipe == REM_RECIPE


def test_errors_say_what_does_not_fit(
    surrogates: dict[str, Surrogate], batches: Batches, accelerator: Accelerator
) -> None:
    known = surrogates["samplewise"]
    poison = EmPoison.from_surrogate(known)
    with pytest.raises(ValueError, match="a surrogate for 'sem', got one for 'em'"):
        SemPoison.from_surrogate(known)
    for changes in ({"epsilon": 4 / 255}, {"mode": "classwise"}, {"pgd_steps": 3}, {"max_rounds": 3}):
        with pytest.raises(ValueError, match="was settled when the surrogate was trained"):
            EmPoison.from_surrogate(known, **changes)
    with pytest.raises(ValueError, match="expected pictures of 32 x 32 pixels .* got 16 x 40"):
        poison.apply(make_dataset(noise_pictures(3, 16, 40), [0, 1, 2]))
    with pytest.raises(ValueError, match="expected the surrogate's 4 classes, got 3"):
        poison.apply(make_dataset(noise_pictures(6), [i % 3 for i in range(6)], classes=3))
    fresh = EmPoison(**SMALL)
    with pytest.raises(ValueError, match="none of class 4"):
        fresh.fit(replace(batches, classes=(*batches.classes, "empty")), **quick(fresh, accelerator=accelerator))
    with pytest.raises(FloatingPointError, match=r"at step \d+ of 12"):
        fresh.fit(batches, **quick(fresh, accelerator=accelerator, recipe=recipe_of(fresh, learning_rate=1e30)))
    few = EmPoison(mode="classwise", search_fraction=0.05)
    with pytest.raises(ValueError, match=r"a row of class \d among the 2 of 40 rows .* search_fraction, which is 0.05"):
        few.fit(batches, **quick(few, accelerator=accelerator))
    few = EmPoison(mode="classwise", search_fraction=0.3)
    with pytest.raises(ValueError, match="a batch of 16 among the 12 of 40 rows"):
        few.fit(batches, **quick(few, accelerator=accelerator, recipe=recipe_of(few, drop_last=True)))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"epsilon": 2.0}, "epsilon"),
        ({"epsilon": 0.6}, "epsilon is at most 127/255"),
        ({"pgd_steps": 0}, "pgd_steps is at least 1"),
        ({"pgd_step_size": -1.0}, "step_size"),
        ({"variant": "rem-repo", "mode": "classwise"}, 'got mode="classwise"'),
        ({"train_steps_per_round": 0}, "train_steps_per_round is at least 1"),
        ({"max_rounds": 0}, "max_rounds is at least 1"),
        ({"stop_error": 1.5}, "stop_error is a fraction"),
        ({"stop_error": float("nan")}, "stop_error is a fraction"),
        ({"search_fraction": 0.0}, "search_fraction is a fraction"),
    ],
)
def test_bad_settings(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        EmPoison(**wrong)


@pytest.mark.parametrize("name", ["mode", "variant", "noise_views", "noise", "unknown"])
def test_unknown_words(name: str) -> None:
    poison = EmPoison()
    object.__setattr__(poison, name, "nonsense")
    with pytest.raises(ValueError, match=f"{name} is one of .* got 'nonsense'"):
        poison.__post_init__()
