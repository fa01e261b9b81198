import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from hf_unlearnable.augment import CropFlip, ResizedCropFlip, ShiftFlip, take
from hf_unlearnable.batches import Batches
from hf_unlearnable.budget import Budget
from hf_unlearnable.fitting import Setup
from hf_unlearnable.images import to_float
from hf_unlearnable.networks import Network, create_network
from hf_unlearnable.pgd import Pgd
from hf_unlearnable.poisons.classifier_fit import ClassifierFit, cross_entropy
from hf_unlearnable.poisons.entf import EntfPoison
from hf_unlearnable.poisons.tap import TapPoison
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.surrogate import Surrogate
from hf_unlearnable.training import Unfinished, as_input, own_randomness, stream
from tests.conftest import make_dataset, noise_pictures

ROWS = 40
SHORT = Recipe(
    name="short", steps=6, batch_size=12, schedule="step", milestones=(0.5,), nesterov=True, augmentation="none"
)
ADVERSARY = Pgd(budget=Budget("linf", 4 / 255), steps=3, step_size=2 / 255, direction="max", init="uniform")


@pytest.fixture(scope="module")
def rows() -> Batches:
    return Batches.load(make_dataset(noise_pictures(ROWS), [i % 4 for i in range(ROWS)]), progress=False)


@pytest.fixture(autouse=True)
def layers_randomness() -> Iterator[None]:
    """As in `fitting.run`, since these tests call `step` themselves."""
    with own_randomness(torch.device("cpu")):
        yield


def setup(rows: Batches, recipe: Recipe = SHORT, seed: int = 3) -> Setup:
    return Setup(train=rows, recipe=recipe, backbone="tiny", seed=seed, accelerator=Accelerator(cpu=True))


def by_hand(rows: Batches, recipe: Recipe, seed: int, adversary: Pgd | None) -> tuple[Network, list[float]]:
    """The definition, with a loop of its own for the adversary."""
    network = create_network("tiny", num_classes=4, image_size=32, seed=seed)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), 0.02, 0.9, weight_decay=5e-4, nesterov=recipe.nesterov)
    batches, starts = stream(rows, recipe, seed, 0, 1, 0), ClassifierFit(setup(rows, recipe, seed))
    losses = []
    for step in range(6):
        batch = next(batches)
        x, y = as_input(batch.pixels), batch.labels
        x_adv = x
        if adversary is not None:
            network.eval()
            e, a = adversary.budget.epsilon, adversary.step_size
            uniform = torch.rand(x.shape, generator=starts.generator("adversary", step))
            x_adv = (x + ((2 * uniform - 1) * e)).clamp(0, 1)
            for _ in range(adversary.steps):
                leaf = x_adv.clone().requires_grad_()
                slope = torch.autograd.grad(F.cross_entropy(network(leaf), y, reduction="sum"), leaf)[0]
                x_adv = torch.max(torch.min(x_adv + a * slope.sign(), x + e), x - e).clamp(0, 1)
        network.train()
        optimizer.param_groups[0]["lr"] = 0.02 if step < 3 else 0.002
        loss = F.cross_entropy(network(x_adv), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return network, losses


@pytest.mark.parametrize("adversary", [None, ADVERSARY], ids=["plain", "adversarial"])
def test_the_steps_are_those_of_the_definition(rows: Batches, adversary: Pgd | None) -> None:
    recipe = dataclasses.replace(SHORT, learning_rate=0.02)
    fit = ClassifierFit(setup(rows, recipe), adversary)
    assert (fit.total, fit.passes) == (6, 1 if adversary is None else 4)
    losses = [float(fit.step(step)["loss"]) for step in range(6)]
    network, expected = by_hand(rows, recipe, 3, adversary)
    # a sign at a zero of the gradient may fall to the other side
    assert losses == pytest.approx(expected, rel=1e-4 if adversary is None else 2e-3)
    found, wanted = fit.modules["network"].state_dict(), network.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-5 if adversary is None else 2e-3), name
    assert all(module.training for module in fit.modules["network"].modules())


def test_an_adversary_without_radius_is_none(rows: Batches) -> None:
    none = dataclasses.replace(ADVERSARY, budget=Budget("linf", 0.0))
    fits = [ClassifierFit(setup(rows), adversary) for adversary in (None, none, ADVERSARY)]
    losses = [[float(fit.step(step)["loss"]) for step in range(3)] for fit in fits]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_the_adversary_raises_the_loss_of_the_views(rows: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    recipe = dataclasses.replace(SHORT, augmentation="crop_flip")
    fit = ClassifierFit(setup(rows, recipe), ADVERSARY)
    run = Pgd.run

    def watched(self: Pgd, loss: Any, x: torch.Tensor, **given: Any) -> torch.Tensor:
        delta = run(self, loss, x, **given)
        every = torch.arange(len(x))
        with torch.no_grad():
            given["model"].eval()
            seen.append((loss(x, every), loss(x + delta, every)))
            given["model"].train()
        assert (delta != 0).float().mean() > 0.5
        return delta

    monkeypatch.setattr(Pgd, "run", watched)
    for step in range(3):
        fit.step(step)
    assert len(seen) == 3
    for clean, adversarial in seen:
        assert (adversarial > clean).float().mean() > 0.9


@pytest.mark.parametrize(
    ("name", "augmentation"),
    [
        ("crop_flip", CropFlip(padding=4)),
        ("shift_flip", ShiftFlip(shift=0.125)),
        ("resized_crop_flip", ResizedCropFlip()),
        ("none", None),
    ],
)
@pytest.mark.parametrize("adversary", [None, ADVERSARY], ids=["plain", "adversarial"])
def test_pictures_are_shown_as_the_recipe_says(
    rows: Batches, name: Any, augmentation: Any, adversary: Pgd | None
) -> None:
    unmoved = None if adversary is None else dataclasses.replace(adversary, budget=Budget("linf", 0.0))
    fit = ClassifierFit(setup(rows, dataclasses.replace(SHORT, augmentation=name)), unmoved)
    assert fit.augmentation == augmentation
    shown: list[torch.Tensor] = []
    fit.modules["network"].register_forward_pre_hook(lambda _, given: shown.append(given[0].clone()))
    batch = next(stream(rows, SHORT, 3, 0, 1, 0))
    fit.step(0)
    x = to_float(batch.pixels)
    assert torch.equal(shown[0], fit.view(x, batch, "view", 0))
    assert torch.equal(shown[0], x) == (name == "none")


def test_the_views_of_parts_are_those_of_the_whole(rows: Batches) -> None:
    fit = ClassifierFit(setup(rows, dataclasses.replace(SHORT, augmentation="shift_flip")))
    whole = next(stream(rows, SHORT, 3, 0, 1, 0))
    parts = [next(stream(rows, SHORT, 3, rank, 2, 0)) for rank in range(2)]
    views = [fit.view(to_float(part.pixels), part, "view", 0) for part in parts]
    assert torch.equal(torch.cat(views), fit.view(to_float(whole.pixels), whole, "view", 0))
    assert len(take({"a": torch.arange(3)}, slice(0, 0))["a"]) == 0


@pytest.mark.parametrize(
    "poison",
    [TapPoison(), EntfPoison(adversarial_steps=2)],
    ids=["plain", "adversarial"],
)
def test_a_training_that_was_stopped_after_every_step_is_the_same(poison: Any, rows: Batches, tmp_path: Path) -> None:
    recipe = dataclasses.replace(SHORT, augmentation="shift_flip")
    how: dict[str, Any] = {"recipe": recipe, "backbone": "tiny", "seed": 5, "progress": False}
    whole, stops = poison.fit(rows, **how), 0
    while True:
        try:
            found = poison.fit(rows, checkpoint=tmp_path / "c.safetensors", max_minutes=0.0, **how)
            break
        except Unfinished:
            stops += 1
    assert stops == 5
    same = dataclasses.replace(found, provenance=whole.provenance)
    assert same.digest == whole.digest
    assert [point["loss"] for point in found.provenance["curve"]] == [
        point["loss"] for point in whole.provenance["curve"]
    ]
    again = poison.fit(rows, **{**how, "seed": 6})
    assert dataclasses.replace(again, provenance=whole.provenance).digest != whole.digest


def test_the_network_is_trained_on_its_own_rows(rows: Batches) -> None:
    longer = dataclasses.replace(SHORT, steps=60, milestones=(0.8,))
    surrogate = TapPoison().fit(rows, recipe=longer, backbone="tiny", test=rows, progress=False)
    last = surrogate.provenance["curve"][-1]
    assert last["loss"] < 1.0
    assert last["clean accuracy"] > 0.8


def test_a_loss_that_is_not_finite_is_told(rows: Batches) -> None:
    wild = dataclasses.replace(SHORT, learning_rate=1e38)
    with pytest.raises(FloatingPointError, match=r"step \d of 6"):
        TapPoison().fit(rows, recipe=wild, backbone="tiny", progress=False)


def test_a_class_without_rows_is_named(rows: Batches) -> None:
    for poison in (TapPoison(), EntfPoison()):
        with pytest.raises(ValueError, match=r"none of class 3 \(class3\)"):
            poison.fit(rows.select([0, 1, 2]), recipe=SHORT, backbone="tiny", progress=False)


def test_cross_entropy_is_one_loss_a_picture(rows: Batches) -> None:
    network = create_network("tiny", num_classes=4, image_size=32, seed=0).eval()
    z, y = to_float(rows.pixels[:6]), torch.tensor([0, 3, 2])
    found = cross_entropy(network, y)(z, torch.tensor([0, 0, 1, 1, 2, 2]))
    expected = -network(z).log_softmax(1)[range(6), [0, 0, 3, 3, 2, 2]]
    assert torch.allclose(found, expected)


def test_another_surrogate_of_the_same_training_is_equal(rows: Batches) -> None:
    first, second = (TapPoison().fit(rows, recipe=SHORT, backbone="tiny", progress=False) for _ in range(2))
    assert isinstance(first, Surrogate)
    assert all(torch.equal(first.tensors[name], value) for name, value in second.tensors.items())
