"""Pretrained weights, trained further: AdamW, stages that stay as they are, BatchNorm that stays as it is."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jaxtyping import TypeCheckError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_unlearnable.augment import CropFlip, augment
from hf_unlearnable.batches import Batches
from hf_unlearnable.checkpoint import load_checkpoint, save_checkpoint
from hf_unlearnable.defenses.adversarial import Adversarial
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.demo import shapes
from hf_unlearnable.keys import torch_generator
from hf_unlearnable.networks import Network, create_network, freeze_early, frozen
from hf_unlearnable.recipes import Recipe, recipe
from hf_unlearnable.result import Result
from hf_unlearnable.training import Unfinished

from .conftest import load_script
from .test_victim import make_batches, network, run, same_weights

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = recipe("finetune", epochs=2, batch_size=16, learning_rate=0.01)
LENGTH = 2 * 6  # steps of QUICK on 103 rows, of which 10 are held out
STEM, STAGE = ("conv1.", "bn1."), "layer1."


class Temperature(nn.Module):
    """A weight without a shape, as a transformer's logit scale is: AdamW's step count has its shape too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def with_temperature() -> nn.Module:
    return nn.Sequential(network(), Temperature())


def resnet(**options: Any) -> Network:
    """timm's smallest ResNet: a stem with three BatchNorms, four stages, no dropout."""
    return create_network("test_resnet", **{"num_classes": 3, "image_size": 16, "seed": 0, **options})


def partly_frozen() -> Network:
    made = resnet()
    freeze_early(made, 1)
    made.frozen_batch_norm = True
    return made


def without_gradient(model: Network) -> set[str]:
    return {name for name, parameter in model.backbone.named_parameters() if not parameter.requires_grad}


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers() if "running" in name or "tracked" in name}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


# ---------------------------------------------------------------------------------------------------------- AdamW


def test_the_recipe_is_that_of_the_sheet() -> None:
    made = recipe("finetune")
    assert (made.optimizer, made.learning_rate, made.weight_decay) == ("adamw", 1e-4, 0.05)
    assert (made.epochs, made.batch_size, made.augmentation, made.gradient_clip) == (10, 128, "crop_flip", None)
    assert [made.rate(step, 100) for step in (0, 50)] == pytest.approx([1e-4, 5e-5])
    assert Recipe(name="r", epochs=1).optimizer == "sgd"
    with pytest.raises((ValueError, TypeCheckError), match="optimizer"):
        dataclasses.replace(made, optimizer="adam")


def test_adamw_equals_the_plain_loop(accelerator: Accelerator) -> None:
    batches, test = make_batches(53), make_batches(20, seed=1)
    ours = dataclasses.replace(QUICK, epochs=None, steps=11, momentum=0.3, nesterov=True, crop_padding=0.25)
    how = {"train": batches, "test": test, "recipe": ours, "defense": Erm(), "seed": 4, "validation_fraction": 0.0}
    model, _ = run(accelerator, model=network(dropout=0), **how)

    plain, step = network(dropout=0).to(memory_format=torch.channels_last), 0
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)
    for epoch in range(3):
        order = torch.randperm(53, generator=torch_generator(4, "order", epoch))
        for index in order.split(16)[: 11 - step]:
            x = augment(batches.pixels[index], CropFlip(padding=2), generator=torch_generator(4, "augment", step))
            optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * step / 11)) / 2
            optimizer.zero_grad()
            logits = plain((x.float() / 255).contiguous(memory_format=torch.channels_last))
            F.cross_entropy(logits, batches.labels[index]).backward()
            optimizer.step()
            step += 1
    assert step == 11
    assert same_weights(model, plain)


@pytest.mark.parametrize("build", [with_temperature, partly_frozen])
def test_stopped_at_every_step_it_ends_as_if_it_had_not_been(
    accelerator: Accelerator, tmp_path: Path, build: Callable[[], nn.Module]
) -> None:
    data = {"train": make_batches(103, size=16), "test": make_batches(20, size=16, seed=1)}
    if build is with_temperature:
        data = {}
    whole, expected = run(accelerator, model=build(), recipe=QUICK, **data)
    file, result, stops = tmp_path / "checkpoint.safetensors", None, 0
    while result is None:
        try:
            model, result = run(accelerator, model=build(), recipe=QUICK, checkpoint=file, max_minutes=0.0, **data)
        except Unfinished:
            stops += 1
            with safe_open(file, "pt") as opened:
                counts = [opened.get_tensor(name) for name in opened.keys() if name.endswith(".step")]  # noqa: SIM118
            assert {(count.item(), count.dtype) for count in counts} == {(stops, torch.float32)}
    assert stops == LENGTH - 1
    assert same_weights(model, whole)
    assert dataclasses.replace(result, seconds=expected.seconds) == expected
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    with safe_open(file, "pt") as opened:
        names = {name for name in opened.keys() if name.startswith("optimizer.")}  # noqa: SIM118
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert names == {f"optimizer.adamw.{number}.{kind}" for number in range(trained) for kind in kinds}


def test_a_step_count_keeps_its_type_beside_a_weight_without_shape(tmp_path: Path) -> None:
    model = Temperature().to(torch.bfloat16)
    kept: list[torch.optim.AdamW] = []
    for _ in range(2):
        model.zero_grad()
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones((), dtype=torch.bfloat16)).backward()
        optimizer.step()
        kept.append(optimizer)
    one, other = kept
    one.state[model.scale]["step"].fill_(257.0)  # no bfloat16
    trained: Any = {"modules": {}, "run": {}}
    save_checkpoint(tmp_path / "c.safetensors", state={}, optimizers={"adamw": one}, **trained)
    load_checkpoint(tmp_path / "c.safetensors", optimizers={"adamw": other}, **trained)
    assert other.state[model.scale]["step"].dtype == torch.float32
    assert other.state[model.scale]["step"].item() == 257
    assert other.state[model.scale]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: freeze_early(model, 2), "frozen_parameters"),
        (lambda model: model.requires_grad_(True), "frozen_parameters"),
        (lambda model: setattr(model, "frozen_batch_norm", False), "frozen_batch_norm is True there and False here"),
    ],
)
def test_a_checkpoint_of_other_frozen_parts_is_refused(
    accelerator: Accelerator, tmp_path: Path, change: Callable[[Network], Any], message: str
) -> None:
    data = {"train": make_batches(40, size=16), "test": make_batches(20, size=16, seed=1), "recipe": QUICK}
    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Unfinished):
        run(accelerator, model=partly_frozen(), checkpoint=file, max_minutes=0.0, **data)
    other = partly_frozen()
    change(other)
    with pytest.raises(ValueError, match=f"of another training: {message}"):
        run(accelerator, model=other, checkpoint=file, **data)


def test_results_of_before_there_was_an_optimizer_are_read(accelerator: Accelerator, tmp_path: Path) -> None:
    _, result = run(accelerator)
    file = tmp_path / "result.json"
    result.save(file)
    values = json.loads(file.read_text())
    assert values["recipe"].pop("optimizer") == "sgd"
    file.write_text(json.dumps(values))
    assert Result.load(file) == Result.from_values(values) == result
    _, tuned = run(accelerator, recipe=QUICK)
    tuned.save(file)
    assert Result.load(file).recipe == QUICK


# ------------------------------------------------------------------------------------------------- frozen stages


def test_stem_and_stages_are_those_of_timm() -> None:
    every = {name for name, _ in resnet().backbone.named_parameters()}
    stem = {name for name in every if name.startswith(STEM)}
    for stages, expected in (
        (None, set()),
        (-1, set()),
        (0, stem),
        (1, stem | {name for name in every if name.startswith(STAGE)}),
        (4, every - {"fc.weight", "fc.bias"}),
        ("all", every - {"fc.weight", "fc.bias"}),
    ):
        model = resnet()
        freeze_early(model, stages)
        assert without_gradient(model) == expected, stages
    assert len(stem) == 9


def test_a_block_is_the_stage_of_a_transformer() -> None:
    model = create_network("test_vit", num_classes=3, image_size=160, seed=0)
    freeze_early(model, 0)
    assert without_gradient(model) == {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    freeze_early(model, 2)
    parts = {name.split(".")[1] for name in without_gradient(model) if name.startswith("blocks.")}
    assert parts == {"0", "1"}
    assert not any(name.startswith(("norm", "head")) for name in without_gradient(model))


def test_stages_that_are_not_there() -> None:
    for stages in (5, -2):
        model = resnet()
        with pytest.raises(ValueError, match=rf"expected 0 \(the stem alone\) to 4 stages .* got {stages}"):
            freeze_early(model, stages)
        assert not without_gradient(model)
    with pytest.raises(ValueError, match="expected a backbone that groups its parameters by stages.*got Flatten"):
        freeze_early(Network(nn.Flatten()), 0)


def test_frozen_parameters_stay_and_all_others_move(accelerator: Accelerator) -> None:
    data = {"train": make_batches(40, size=16), "test": make_batches(20, size=16, seed=1)}
    model = resnet()
    freeze_early(model, 1)
    before, counted = weights(model), statistics(model)
    still = {f"backbone.{name}" for name in without_gradient(model)}
    run(accelerator, model=model, recipe=QUICK, defense=Adversarial(radius=0.01, pgd_steps=1), **data)
    assert moved(before, weights(model)) == set(before) - still
    assert {f"backbone.{name}" for name in without_gradient(model)} == still
    assert moved(counted, statistics(model)) == set(counted), "running statistics follow the data in frozen stages too"


# ---------------------------------------------------------------------------------------------- frozen BatchNorm


def test_frozen_batch_norm_leaves_its_statistics(accelerator: Accelerator) -> None:
    data = {"train": make_batches(40, size=16), "test": make_batches(20, size=16, seed=1)}
    model, seen = resnet(), []
    model.frozen_batch_norm = True

    def watch(model: nn.Module, x: Tensor, y: Tensor, *, progress: float, generator: torch.Generator) -> Tensor:
        own = norms(model)
        seen.append(({m.training for m in own}, {m.training for m in model.modules() if m not in own}))
        return F.cross_entropy(model(x), y)

    before, counted = weights(model), statistics(model)
    run(accelerator, model=model, recipe=QUICK, defense=watch, **data)
    assert seen == [({False}, {True})] * 6
    assert not moved(counted, statistics(model))
    assert moved(before, weights(model)) == set(before), "scale and shift are trained"
    assert all(module.training for module in model.modules()), "as it was found"


def test_modes_with_frozen_batch_norm() -> None:
    model, x = resnet(), torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for module in norms(model):
        module.running_mean.add_(0.1)  # type: ignore[operator]
    model.frozen_batch_norm = True
    assert model.train() is model
    assert model.training
    assert not any(module.training for module in norms(model))
    modes = [module.training for module in model.modules()]
    shown = model(x)
    with frozen(model):
        assert not any(module.training for module in model.modules())
        assert torch.equal(model(x), shown)
    assert [module.training for module in model.modules()] == modes
    assert not any(module.training for module in model.eval().modules())
    model.frozen_batch_norm = False
    assert all(module.training for module in model.train().modules())
    assert not torch.allclose(model(x), shown)


# ----------------------------------------------------------------------------------------------------- pretrained


def stripes(rows: int, angles: int, seed: int, size: int = 16) -> Batches:
    """Waves across the picture, at one of some angles, under noise: what a first training learns helps the next one."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % angles
    turn, phase = math.pi * labels / angles, 2 * math.pi * torch.rand(rows, generator=generator)
    places = torch.arange(size).float()
    along = turn.cos().view(-1, 1, 1) * places + turn.sin().view(-1, 1, 1) * places.view(-1, 1)
    waves = 0.5 + 0.2 * (1.5 * along + phase.view(-1, 1, 1)).sin()
    x = waves.unsqueeze(1) + 0.2 * torch.randn(rows, 3, size, size, generator=generator)
    pixels = x.clamp(0, 1).mul(255).round().to(torch.uint8)
    return Batches(pixels=pixels, labels=labels, classes=tuple(f"angle{i}" for i in range(angles)))


def test_a_local_file_is_a_better_start_than_chance(accelerator: Accelerator, tmp_path: Path) -> None:
    def tiny(classes: int, **start: Any) -> Network:
        return create_network("tiny", num_classes=classes, image_size=16, seed=1, **start)

    how = {"defense": Erm(), "validation_fraction": 0.0, "evaluate_every": 9}
    first = recipe("tiny", epochs=6, batch_size=32, augmentation="none")
    source, learnt = run(
        accelerator, model=tiny(6), train=stripes(384, 6, 0), test=stripes(96, 6, 1), recipe=first, **how
    )
    assert learnt.test_accuracy > 0.6
    path = tmp_path / "backbone.safetensors"
    save_file({name: value.contiguous() for name, value in source.backbone.state_dict().items()}, path)

    again = recipe("finetune", epochs=2, batch_size=32, learning_rate=2e-3, augmentation="none")
    data = {"train": stripes(96, 4, 2), "test": stripes(200, 4, 3), "recipe": again}
    pretrained = tiny(4, pretrained=str(path))
    assert not moved(weights(source.backbone.features), weights(pretrained.backbone.features))
    assert pretrained.num_classes == 4
    _, tuned = run(accelerator, model=pretrained, **data, **how)
    _, scratch = run(accelerator, model=tiny(4), **data, **how)
    assert tuned.test_accuracy > scratch.test_accuracy + 0.2
    assert tuned.curve[-1].train_loss < scratch.curve[-1].train_loss


def test_a_whole_network_in_place_of_its_backbone(tmp_path: Path) -> None:
    path = str(tmp_path / "victim.safetensors")
    save_file(resnet().state_dict(), path)
    with pytest.raises(ValueError, match=r"has no 'fc.weight'.*named as timm does: without 'backbone\.'"):
        resnet(pretrained=path)
    with pytest.raises(ValueError, match="'cifar_resnet18': .* pictures of more than 64 pixels for 'resnet18'"):
        create_network("resnet18", num_classes=3, image_size=32, seed=0, pretrained=True)


# --------------------------------------------------------------------------------------------------------- script


Call = Callable[..., int]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    for split, rows in shapes(train_rows=60, test_rows=20).items():
        rows.to_parquet(folder / f"{split}.parquet")
    source = create_network("test_resnet", num_classes=7, image_size=32, seed=5)
    for module in norms(source):
        module.running_mean.sub_(0.1)  # type: ignore[operator]
    save_file(source.backbone.state_dict(), folder / "weights.safetensors")
    return folder


@pytest.fixture
def call(data: Path, tmp_path: Path) -> Call:
    script = load_script("train_victim")

    def call(*extra: str, backbone: str = "test_resnet", output: str = "run") -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        given = ["--dataset", str(data / "train.parquet"), "--test-dataset", str(data / "test.parquet"), "--cpu"]
        given += ["--test-split", "train", "--rows", "30", "--no-progress", "--recipe", "finetune", "--epochs", "1"]
        given += ["--batch-size", "8"]
        return script.main([*given, "--backbone", backbone, "--output", str(tmp_path / output), *extra])

    return call


def test_the_script_fine_tunes_a_file(
    call: Call, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(data / "weights.safetensors")
    flags = ["--pretrained", file, "--freeze-stages", "1", "--batch-norm", "frozen"]
    assert call(*flags) == 0
    made, given = load_file(tmp_path / "run" / "seed-0" / "victim.safetensors"), load_file(file)
    made = {name.removeprefix("backbone."): value for name, value in made.items()}
    assert (made["fc.weight"].shape[0], made["mean"].flatten().tolist()) == (10, [0.5, 0.5, 0.5])
    still = {name for name in given if name.startswith((*STEM, STAGE)) or "running" in name or "tracked" in name}
    assert moved({name: value for name, value in given.items() if not name.startswith("fc.")}, made) == {
        name for name in given if name not in still and not name.startswith("fc.")
    }
    result = Result.load(tmp_path / "run" / "seed-0" / "result.json")
    assert (result.recipe.name, result.recipe.optimizer, result.train_rows) == ("finetune", "adamw", 27)
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    assert result.start == {"weights": f"sha256:{digest}", "frozen_stages": 1, "frozen_batch_norm": True}
    noted = json.loads((tmp_path / "run" / "options.json").read_text())
    assert [noted[name] for name in ("pretrained", "freeze_stages", "batch_norm")] == [file, 1, "frozen"]

    capsys.readouterr()
    for extra, message in (
        (flags, "holds this run, finished"),
        (flags[2:], f"holds another run (pretrained='{file}')"),
        (flags[:2] + flags[4:], "holds another run (freeze_stages=1)"),
        (flags[:4], "holds another run (batch_norm='frozen')"),
    ):
        assert call(*extra) == 1
        assert message in capsys.readouterr().err


def test_the_script_trains_the_last_layer_alone(call: Call, data: Path, tmp_path: Path) -> None:
    file = str(data / "weights.safetensors")
    assert call("--pretrained", file, "--freeze-stages", "all", "--batch-norm", "frozen", output="probe") == 0
    made, given = load_file(tmp_path / "probe" / "seed-0" / "victim.safetensors"), load_file(file)
    made = {name.removeprefix("backbone."): value for name, value in made.items()}
    trunk = {name: value for name, value in given.items() if not name.startswith("fc.")}
    assert trunk
    assert not moved(trunk, made)
    start = Result.load(tmp_path / "probe" / "seed-0" / "result.json").start
    assert start is not None
    assert start["frozen_stages"] == "all"
    with pytest.raises(SystemExit):
        call("--freeze-stages", "most", output="wrong")


def test_a_run_of_before_the_flags_goes_on(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--freeze-stages", "-1", output="nothing-frozen") == 0
    assert call() == 0
    one, other = (load_file(tmp_path / run / "seed-0" / "victim.safetensors") for run in ("run", "nothing-frozen"))
    assert not moved(one, other)
    assert Result.load(tmp_path / "run" / "seed-0" / "result.json").start is None
    noted = tmp_path / "run" / "options.json"
    options = json.loads(noted.read_text())
    assert [options.pop(name) for name in ("freeze_stages", "batch_norm")] == [None, "train"]
    assert options["pretrained"] is False
    noted.write_text(json.dumps(options))
    capsys.readouterr()
    assert call() == 1
    assert "holds this run, finished" in capsys.readouterr().err


def test_the_script_says_what_does_not_fit(
    call: Call, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(data / "weights.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    for number, (backbone, flags, message) in enumerate(
        (
            ("test_resnet", ["--pretrained", str(tmp_path / "absent.safetensors")], "absent.safetensors"),
            ("test_resnet", ["--pretrained", str(tmp_path / "broken.safetensors")], "eader"),
            ("test_resnet", ["--pretrained", "weights.pth"], "expected a .safetensors file, got 'weights.pth'"),
            ("resnet18", ["--pretrained", file], "expected weights of resnet18, but: Error"),
            ("resnet18", ["--pretrained"], "no weights on the Hub for 'cifar_resnet18'"),
            ("test_resnet", ["--freeze-stages", "5"], "expected 0 (the stem alone) to 4 stages"),
        )
    ):
        assert call(*flags, backbone=backbone, output=str(number)) == 1, message
        told = capsys.readouterr().err
        assert told.startswith("train_victim.py: ")
        assert message in told
    with pytest.raises(SystemExit, match="2"):
        call("--batch-norm", "eval")
    assert "invalid choice: 'eval'" in capsys.readouterr().err


def test_groups_of_plain_networks_are_stem_stages_and_head() -> None:
    for name, stages in (("tiny", 3), ("vgg11_bn", 4)):
        model = create_network(name, num_classes=3, image_size=32, seed=0)
        freeze_early(model, 0)
        moving = [key for key, weight in model.named_parameters() if weight.requires_grad]
        still = [key for key, weight in model.named_parameters() if not weight.requires_grad]
        assert all(key.startswith(("backbone.features.0.", "backbone.features.1.")) for key in still)
        assert any(key.startswith("backbone.features.") for key in moving)
        freeze_early(model, stages)
        left = [key for key, weight in model.named_parameters() if weight.requires_grad]
        assert all(key.startswith("backbone.classifier") for key in left)
        assert left
