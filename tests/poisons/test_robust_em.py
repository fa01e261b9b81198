"""REM, SEM and MMM: the loop against a slow one, the penalty in closed form, the cost in passes."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from hf_unlearnable import MinMaxMinPoison, RobustEmPoison, SemPoison, Surrogate, create_network
from hf_unlearnable.augment import CropFlip, ResizedCropFlip
from hf_unlearnable.batches import Batches
from hf_unlearnable.draws import Draws
from hf_unlearnable.fitting import Setup
from hf_unlearnable.keys import torch_generator
from hf_unlearnable.poisons.robust_em import RobustFit, average_randomness
from hf_unlearnable.training import Unfinished, as_input, own_randomness
from tests.conftest import make_dataset, noise_pictures, pixels

METHODS = [RobustEmPoison, SemPoison, MinMaxMinPoison]
SMALL: dict[str, Any] = {
    "pgd_steps": 2,
    "pgd_step_size": 4 / 255,
    "adversarial_steps": 2,
    "adversarial_step_size": 2 / 255,
    "eot": 2,
}


@pytest.fixture(scope="module")
def batches() -> Batches:
    u = torch.from_numpy(noise_pictures(40)).permute(0, 3, 1, 2).contiguous()
    return Batches(pixels=u, labels=torch.arange(40) % 4, classes=tuple(f"class{i}" for i in range(4)))


def quick(method: type[RobustEmPoison], **changes: Any) -> dict[str, Any]:
    recipe = replace(method.recipe, steps=4, batch_size=16)
    return {"recipe": recipe, "backbone": "tiny", "seed": 1, "progress": False, **changes}


@pytest.fixture(scope="module", params=METHODS, ids=lambda method: method.name)
def surrogate(request: pytest.FixtureRequest, batches: Batches) -> Surrogate:
    return request.param(**SMALL).fit(batches, accelerator=Accelerator(cpu=True), **quick(request.param))


def poison_of(surrogate: Surrogate, **changes: Any) -> RobustEmPoison:
    return next(m for m in METHODS if m.name == surrogate.method).from_surrogate(surrogate, **changes)


def test_average_randomness_in_closed_form() -> None:
    for classes in (2, 3, 10, 100):
        one_hot, uniform = torch.eye(classes), torch.full((5, classes), 1 / classes)
        assert average_randomness(one_hot, "paper").item() == pytest.approx((classes - 1) / classes**2)
        code = math.sqrt(0.9) if classes == 10 else 1 - 1 / classes
        assert average_randomness(one_hot, "code").item() == pytest.approx(code)
        for form in ("paper", "code"):
            assert average_randomness(uniform, form).item() == pytest.approx(0, abs=1e-6)
    logits = torch.zeros(3, 10, requires_grad=True)
    average_randomness(logits.softmax(1), "code").backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all(), "at uniform probabilities the norm has no slope"


@pytest.mark.parametrize(("method", "passes"), [(RobustEmPoison, 561), (SemPoison, 61), (MinMaxMinPoison, 62)])
def test_the_papers_cost(
    method: type[RobustEmPoison], passes: int, batches: Batches, accelerator: Accelerator, monkeypatch: Any
) -> None:
    setup = Setup(
        train=batches, recipe=replace(method.recipe, batch_size=40), backbone="tiny", seed=0, accelerator=accelerator
    )
    fit = method().fitting(setup)
    assert fit.passes == passes
    assert fit.total == 5000
    assert [setup.recipe.rate(step, 5000) for step in (1999, 2000, 4000)] == pytest.approx([0.1, 0.01, 0.001])
    fit = method(**SMALL).fitting(setup)
    seen = 0

    class Counted(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            nonlocal seen
            seen += len(x)
            return self.inner(x)

    counted = Counted(fit.modules["network"])
    fit.modules["network"] = counted
    with own_randomness(setup.device):
        fit.step(0)
    assert seen == fit.passes * 40


def test_one_step_is_the_slow_one(batches: Batches, accelerator: Accelerator) -> None:
    """A step of MMM without views and random starts, written out."""
    recipe = replace(MinMaxMinPoison.recipe, steps=4, batch_size=40, augmentation="none", weight_decay=0.0)
    setup = Setup(train=batches, recipe=recipe, backbone="tiny", seed=0, accelerator=accelerator)
    poison = MinMaxMinPoison(**{**SMALL, "eot": 1}, dar_weight=0.7)
    adversary = poison.adversary
    assert adversary is not None
    noise = replace(poison.noise_pgd((32, 32)), init="zero", augmentation=None)
    fit = RobustFit(setup, noise, replace(adversary, init="zero"), "paper", 0.7)
    network = create_network("tiny", num_classes=4, image_size=32, seed=0)
    order = torch.randperm(40, generator=torch_generator(0, "order", 0))
    x, y = batches.pixels[order].float() / 255, batches.labels[order]

    def slope(z: Tensor) -> Tensor:
        leaf = z.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(network(leaf), y, reduction="sum"), leaf)[0].sign()

    network.eval()
    delta = torch.zeros_like(x)
    for _ in range(2):
        delta = (delta - 4 / 255 * slope(x + delta)).clamp(-8 / 255, 8 / 255)
        delta = (x + delta).clamp(0, 1) - x
    shown = ((x + delta) * 255).round() / 255
    attacked = shown
    for _ in range(2):
        attacked = attacked + 2 / 255 * slope(attacked)
        attacked = (shown + (attacked - shown).clamp(-4 / 255, 4 / 255)).clamp(0, 1)
    network.train()
    value = F.cross_entropy(network(attacked), y)
    p = network(x).softmax(1)
    value = value + 0.7 * ((p - 1 / 4) ** 2).mean(1).mean()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9)
    value.backward()
    optimizer.step()
    with own_randomness(setup.device):
        found = fit.step(0)
    assert found["loss"].item() == pytest.approx(value.item(), rel=1e-4)
    expected = network.state_dict()
    for name, value in fit.modules["network"].state_dict().items():
        assert torch.allclose(value.float(), expected[name].float(), atol=1e-4), name


def test_what_the_noise_is_robust_against() -> None:
    inner = {method: method().noise_pgd((32, 32)).inner for method in METHODS}
    assert inner[MinMaxMinPoison] is None
    rem, sem = inner[RobustEmPoison], inner[SemPoison]
    assert rem is not None
    assert sem is not None
    assert (rem.steps, rem.direction, rem.init, rem.budget.epsilon) == (10, "max", "uniform", 4 / 255)
    assert sem == replace(rem, steps=0)
    for method in METHODS:
        plain = method(adversarial_epsilon=0.0)
        assert plain.adversary is None
        assert plain.noise_pgd((32, 32)).inner is None


def test_the_noise_lowers_the_loss_of_the_surrogate(surrogate: Surrogate, batches: Batches) -> None:
    poison = poison_of(surrogate, pgd_steps=10, pgd_step_size=1.6 / 255)
    x, y = as_input(batches.pixels), batches.labels
    poisoned = poison.perturb(x, y, Draws(1, poison.name, batches.pixels))
    network = surrogate.network()
    before, after = (F.cross_entropy(network(z), y, reduction="none") for z in (x, poisoned))
    assert (after < before).float().mean() > 0.9


def test_the_surrogate_runs_in_the_layout_that_its_convolutions_are_fastest_in(
    surrogate: Surrogate, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = poison_of(surrogate)
    seen: list[bool] = []
    last = [module for module in surrogate.network().modules() if isinstance(module, nn.Conv2d)][-1]
    hook = last.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    made = poison.change(batches.pixels[:4], batches.labels[:4], ["row"] * 4)
    hook.remove()
    assert seen
    assert all(seen)
    given: list[torch.Tensor] = []
    monkeypatch.setattr(type(poison), "craft", lambda _, x, *rest: given.append(x) or x)
    poison.perturb(as_input(batches.pixels[:4]).contiguous(), batches.labels[:4], Draws(0, "name", batches.pixels[:4]))
    assert given[0].is_contiguous(memory_format=torch.channels_last)
    assert made.is_contiguous()


def test_published_pixels_keep_the_budget_exactly(surrogate: Surrogate, batches: Batches) -> None:
    source = make_dataset(noise_pictures(40), (torch.arange(40) % 4).tolist())
    before = pixels(source).astype(int)
    for epsilon, allowed in ((8 / 255, 8), (3.9 / 255, 3)):
        difference = abs(pixels(poison_of(surrogate, epsilon=epsilon).apply(source)).astype(int) - before)
        assert difference.max() == allowed


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_training_stopped_at_every_step_gives_the_same_surrogate(
    method: type[RobustEmPoison], batches: Batches, accelerator: Accelerator, tmp_path: Path
) -> None:
    poison, how = method(**SMALL), quick(method, accelerator=accelerator)
    whole, found, stops = poison.fit(batches, **how), None, 0
    while found is None:
        try:
            found = poison.fit(batches, checkpoint=tmp_path / "c.safetensors", max_minutes=0.0, **how)
        except Unfinished:
            stops += 1
    assert stops == 3
    assert found.secret() == whole.secret()
    assert found.provenance["curve"] == whole.provenance["curve"]
    other = poison.fit(batches, **{**how, "seed": 2})
    assert other.secret() != whole.secret()


def test_a_secret_key_trains_too_and_is_not_told(batches: Batches, accelerator: Accelerator) -> None:
    key = bytes(range(32))
    found = SemPoison(**SMALL).fit(batches, **quick(SemPoison, accelerator=accelerator, seed=key))
    assert found.provenance["seed"].startswith("sha256:")
    assert key.hex() not in str(found.provenance)


def test_two_poisons_of_one_surrogate_are_one(surrogate: Surrogate, tmp_path: Path) -> None:
    source = make_dataset(noise_pictures(12), [i % 4 for i in range(12)])
    path = surrogate.save(tmp_path / "s.safetensors")
    first, second = poison_of(surrogate), type(poison_of(surrogate)).from_surrogate(path)
    assert first == second
    assert np.array_equal(pixels(first.apply(source)), pixels(second.apply(source, num_proc=2)))
    other = type(first).from_surrogate(path, seed=7)
    assert (pixels(first.apply(source)) != pixels(other.apply(source))).any()


def test_errors_say_what_does_not_fit(surrogate: Surrogate, batches: Batches, accelerator: Accelerator) -> None:
    poison = poison_of(surrogate)
    other = next(method for method in METHODS if method.name != surrogate.method)
    with pytest.raises(ValueError, match=f"a surrogate for '{other.name}', got one for '{surrogate.method}'"):
        other.from_surrogate(surrogate)
    with pytest.raises(ValueError, match="adversarial_steps was settled when the surrogate was trained, as 2, got 3"):
        poison_of(surrogate, adversarial_steps=3)
    with pytest.raises(TypeError, match="nonsense"):
        poison_of(surrogate, nonsense=1)
    with pytest.raises(ValueError, match="no setting 'younger'"):
        poison_of(replace(surrogate, settings={**surrogate.settings, "younger": 1}))
    with pytest.raises(ValueError, match="for version 1 of .* got one of version 2"):
        poison_of(replace(surrogate, provenance={**surrogate.provenance, "version": 2}))
    with pytest.raises(ValueError, match="expected 5 classes"):
        poison_of(surrogate, num_classes=5)
    fresh = type(poison)(**SMALL)
    source = make_dataset(noise_pictures(8), [i % 4 for i in range(8)])
    with pytest.raises(ValueError, match="has no surrogate: fit one, or use from_surrogate"):
        fresh.apply(source)
    with pytest.raises(ValueError, match="expected pictures of 32 x 32 pixels .* got 16 x 40"):
        poison.apply(make_dataset(noise_pictures(3, 16, 40), [0, 1, 2]))
    with pytest.raises(ValueError, match="expected the surrogate's 4 classes, got 3"):
        poison.apply(make_dataset(noise_pictures(6), [i % 3 for i in range(6)], classes=3))
    swapped = source.rename_column("label", "old").add_column("label", source["label"][:])
    from datasets import ClassLabel

    swapped = swapped.remove_columns("old").cast_column(
        "label", ClassLabel(names=["class1", "class0", "class2", "class3"])
    )
    with pytest.raises(ValueError, match="got 'class1' as class 0 in place of 'class0'"):
        poison.apply(swapped)
    with pytest.raises(ValueError, match="none of class 4"):
        fresh.fit(replace(batches, classes=(*batches.classes, "empty")), **quick(type(poison), accelerator=accelerator))
    with pytest.raises(ValueError, match="at least a batch of 128 rows to train on, got 40"):
        fresh.fit(batches, backbone="tiny", accelerator=accelerator, progress=False)
    recipe = replace(type(poison).recipe, steps=4, batch_size=16, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"at step \d of 4"):
        fresh.fit(batches, **quick(type(poison), accelerator=accelerator, recipe=recipe))


def test_views_of_large_pictures() -> None:
    assert MinMaxMinPoison().noise_pgd((224, 300)).augmentation == CropFlip(padding=28)
    assert MinMaxMinPoison(views="resized_crop_flip").noise_pgd((224, 300)).augmentation == ResizedCropFlip()


@pytest.mark.parametrize("wrong", [{"epsilon": 2.0}, {"pgd_steps": -1}, {"eot": 0}, {"dar_weight": -1.0}])
def test_bad_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="epsilon|steps|eot|dar_weight"):
        MinMaxMinPoison(**wrong)
