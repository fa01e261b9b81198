from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from hf_unlearnable.augment import ShiftFlip
from hf_unlearnable.batches import Batches
from hf_unlearnable.budget import Budget
from hf_unlearnable.fitting import Setup
from hf_unlearnable.images import to_float
from hf_unlearnable.networks import Network
from hf_unlearnable.pgd import Pgd
from hf_unlearnable.poisons.entf import EntfFit, EntfPoison, pull_loss, push_loss
from hf_unlearnable.poisons.hypo import HypoPoison
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.surrogate import Surrogate
from tests.conftest import make_dataset, noise_pictures, pixels

ROWS = 42
LABELS = [i % 4 for i in range(ROWS)]
SHORT = Recipe(name="short", steps=20, batch_size=21, learning_rate=0.02)
FEW: dict[str, Any] = {"pgd_steps": 4, "pgd_step_size": 2 / 255}
MAY_DIFFER = 40
"""Values out of 129,024 that the network's arithmetic may move to the other side of a boundary."""
MODES = pytest.mark.parametrize("mode", ["push", "pull"])


@pytest.fixture(scope="module")
def source() -> Dataset:
    return make_dataset(noise_pictures(ROWS), LABELS)


@pytest.fixture(scope="module")
def rows(source: Dataset) -> Batches:
    return Batches.load(source, progress=False)


@pytest.fixture(scope="module")
def surrogate(rows: Batches) -> Surrogate:
    poison = EntfPoison(adversarial_steps=2, **FEW)
    return poison.fit(rows, seed=1, recipe=SHORT, backbone="tiny", progress=False)


class Numbers(torch.nn.Module):
    """A backbone whose features are the pictures' own numbers."""

    def forward_features(self, z: Tensor) -> Tensor:
        return z

    def forward_head(self, z: Tensor, pre_logits: bool) -> Tensor:
        return z.flatten(1)


def mapped(poison: EntfPoison, rows: Batches) -> Tensor:
    return poison.change(rows.pixels, rows.labels, [f"row {i}" for i in range(len(rows))])


def test_the_loops_are_those_of_the_paper() -> None:
    push, pull = EntfPoison().noise_pgd(), EntfPoison(mode="pull").noise_pgd()
    assert push == Pgd(
        budget=Budget("linf", 8 / 255),
        steps=300,
        step_size=push.step_size,
        direction="max",
        init="normal",
        augmentation=ShiftFlip(shift=1 / 8, flip=0.5),
        chunk=640,
    )
    assert push.step_size == pytest.approx(0.4 / 255)
    assert pull == replace(push, direction="min")
    assert EntfPoison().adversary == Pgd(
        budget=Budget("linf", 4 / 255), steps=10, step_size=2 / 255, direction="max", init="uniform"
    )
    assert EntfPoison(adversarial_epsilon=0.0).adversary is None


def test_the_recipe_is_that_of_the_paper() -> None:
    recipe, epoch = EntfPoison.recipe, 391
    total = recipe.total_steps(epoch)
    rates = [recipe.rate(epoch * at + shift, total) for at in (75, 90) for shift in (-1, 0)]
    assert total == 100 * epoch
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001])
    assert (recipe.batch_size, recipe.momentum, recipe.nesterov, recipe.weight_decay) == (128, 0.9, False, 5e-4)
    assert recipe.augmentation == "crop_flip"


def test_centroids_are_the_means_of_the_classes(surrogate: Surrogate, rows: Batches) -> None:
    network = surrogate.network()
    centroids = surrogate.tensors["centroids"]
    assert centroids.shape == (4, network.num_features)
    for label in range(4):
        with torch.no_grad():
            own = torch.stack([network.features(to_float(u[None]))[0] for u in rows.pixels[rows.labels == label]])
        assert torch.allclose(centroids[label], own.mean(0), atol=1e-5)
    assert (centroids[0] - centroids[1]).abs().max() > 1e-3


def test_centroids_leave_the_network_as_it_was(rows: Batches) -> None:
    fit = EntfFit(Setup(train=rows, recipe=SHORT, backbone="tiny", seed=0, accelerator=Accelerator(cpu=True)))
    network = fit.modules["network"]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert torch.equal(fit.centroids(), fit.centroids())
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with torch.no_grad():
        next(network.parameters())[0] = torch.nan
    with pytest.raises(FloatingPointError, match="finite features"):
        fit.kept()


def test_the_losses_are_those_of_the_definition() -> None:
    z = torch.rand(7, 3, 1, 2, generator=torch.Generator().manual_seed(0))
    centroids = torch.rand(5, 6, generator=torch.Generator().manual_seed(1))
    y, places = torch.tensor([4, 0, 2]), torch.tensor([0, 0, 1, 1, 2, 2, 2])
    network = Network(Numbers())
    pushed, pulled = push_loss(network, centroids, y)(z, places), pull_loss(network, centroids, y)(z, places)
    for n in range(7):
        own = int(y[places[n]])
        distances = [float(((z[n].flatten() - centre) ** 2).sum()) / 6 for centre in centroids]
        assert float(pushed[n]) == pytest.approx(distances[own], rel=1e-5)
        assert float(pulled[n]) == pytest.approx(min(d for j, d in enumerate(distances) if j != own), rel=1e-5)


def test_own_class_is_never_the_target_however_far_the_others_are() -> None:
    centroids = torch.tensor([[0.0, 0.0, 0.0], [90.0, 0.0, 0.0], [0.0, 70.0, 0.0]])
    z = torch.tensor([0.1, 0.1, 0.0]).view(1, 3, 1, 1).requires_grad_()
    network = Network(Numbers())
    loss = pull_loss(network, centroids, torch.tensor([0]))(z, torch.tensor([0]))
    assert float(loss.detach()) == pytest.approx((0.1**2 + 69.9**2) / 3)
    slope = torch.autograd.grad(loss.sum(), z)[0].flatten()
    assert torch.allclose(slope, torch.tensor([0.2, -139.8, 0.0]) / 3)


def test_the_target_of_pull_is_chosen_again_at_every_step() -> None:
    """From 0.55 (nearest: 0.5) a large first step leads past 0.2, whose pull then takes over."""
    centroids = torch.tensor([[9.0], [0.5], [0.2]]).expand(3, 3)
    network = Network(Numbers())
    loss = pull_loss(network, centroids, torch.tensor([0]))
    pgd = Pgd(budget=Budget("linf", 1.0), steps=2, step_size=0.3, direction="min", box=None)
    x = torch.full((1, 3, 1, 1), 0.55)
    assert torch.allclose(pgd.run(loss, x), torch.tensor(-0.6), atol=1e-6)
    two = pull_loss(network, centroids[:2], torch.tensor([0]))
    assert torch.allclose(pgd.run(two, x), torch.tensor(0.0), atol=1e-6)


@MODES
def test_features_go_where_they_should(surrogate: Surrogate, rows: Batches, mode: Any) -> None:
    found = mapped(EntfPoison.from_surrogate(surrogate, mode=mode, pgd_steps=10), rows)
    network, centroids = surrogate.network(), surrogate.tensors["centroids"]
    loss = (push_loss if mode == "push" else pull_loss)(network, centroids, rows.labels)
    with torch.no_grad():
        before, after = (loss(to_float(u), torch.arange(ROWS)) for u in (rows.pixels, found))
    assert ((after > before) == (mode == "push")).float().mean() > 0.9
    assert after.mean() > 1.05 * before.mean() if mode == "push" else after.mean() < before.mean() / 1.05


def test_an_adversarially_trained_network_is_another(surrogate: Surrogate, rows: Batches) -> None:
    how: dict[str, Any] = {"seed": 1, "recipe": SHORT, "backbone": "tiny", "progress": False}
    plain = EntfPoison(adversarial_epsilon=0.0).fit(rows, **how)
    again = EntfPoison(adversarial_steps=2, mode="pull").fit(rows, **how)
    assert not torch.equal(plain.tensors["centroids"], surrogate.tensors["centroids"])
    assert all(torch.equal(value, again.tensors[name]) for name, value in surrogate.tensors.items())


@MODES
def test_every_way_of_mapping_gives_the_same_pixels(source: Dataset, surrogate: Surrogate, mode: Any) -> None:
    poison = EntfPoison.from_surrogate(surrogate, mode=mode)
    expected = pixels(poison.apply(source))
    order = np.random.default_rng(0).permutation(ROWS)
    for found, wanted in (
        (source.map(poison, batched=True, batch_size=7, keep_in_memory=True), expected),
        (source.select(range(6)).map(poison, keep_in_memory=True), expected[:6]),
        (source.select(order).map(poison, batched=True, keep_in_memory=True), expected[order]),
        (poison.apply(source, num_proc=2), expected),
    ):
        assert (pixels(found) != wanted).sum() <= MAY_DIFFER


@pytest.mark.parametrize(("epsilon", "levels"), [(8 / 255, 8), (2.7 / 255, 2)])
@MODES
def test_the_budget_is_kept_and_used(
    surrogate: Surrogate, rows: Batches, mode: Any, epsilon: float, levels: int
) -> None:
    found = mapped(EntfPoison.from_surrogate(surrogate, mode=mode, epsilon=epsilon), rows)
    assert int((found.int() - rows.pixels.int()).abs().max()) == levels


def test_a_file_gives_the_same_poison(surrogate: Surrogate, rows: Batches, tmp_path: Path) -> None:
    kept = Surrogate.load(surrogate.save(tmp_path / "entf.safetensors"))
    assert kept.digest == surrogate.digest
    first, second = EntfPoison.from_surrogate(kept), EntfPoison.from_surrogate(surrogate)
    assert first == second
    assert torch.equal(mapped(first, rows), mapped(second, rows))
    other = EntfPoison.from_surrogate(surrogate, seed=8)
    assert not torch.equal(mapped(other, rows), mapped(first, rows))


def test_the_networks_own_settings_are_settled(surrogate: Surrogate) -> None:
    for change in ({"adversarial_epsilon": 8 / 255}, {"adversarial_steps": 7}, {"adversarial_step_size": 1 / 255}):
        with pytest.raises(ValueError, match=f"{next(iter(change))} was settled"):
            EntfPoison.from_surrogate(surrogate, **change)
    assert EntfPoison.from_surrogate(surrogate, mode="pull", adversarial_steps=2).adversarial_steps == 2


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"epsilon": 1.5}, "255"),
        ({"pgd_step_size": 0.0}, "step_size is a positive"),
        ({"pgd_steps": -1}, "steps is at least 0"),
        ({"adversarial_steps": -1}, "steps is at least 0"),
        ({"adversarial_epsilon": 2.0}, "255"),
        ({"mode": "pull", "num_classes": 1}, "two classes"),
    ],
)
def test_wrong_settings(wrong: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        EntfPoison(**wrong)


def test_what_does_not_fit_is_refused(surrogate: Surrogate, rows: Batches) -> None:
    one = Batches(pixels=rows.pixels, labels=torch.zeros_like(rows.labels), classes=("only",))
    with pytest.raises(ValueError, match=r"two classes or more.*got 1"):
        EntfPoison(mode="pull").fit(one, recipe=SHORT, backbone="tiny", progress=False)
    poison = EntfPoison.from_surrogate(surrogate)
    with pytest.raises(ValueError, match="expected pictures of 32 x 32 pixels"):
        poison.change(rows.pixels[:, :, :31], rows.labels, [f"row {i}" for i in range(ROWS)])
    with pytest.raises(ValueError, match="expected at most 4 classes .*, got 5"):
        poison.apply(make_dataset(noise_pictures(5), [0, 1, 2, 3, 4], 5))
    with pytest.raises(ValueError, match="expected a surrogate for 'hypo', got one for 'entf'"):
        HypoPoison.from_surrogate(surrogate)


@pytest.mark.parametrize("name", ["mode"])
def test_unknown_words(name: str) -> None:
    poison = EntfPoison()
    object.__setattr__(poison, name, "nonsense")
    with pytest.raises(ValueError, match=f"{name} is .* got 'nonsense'"):
        poison.__post_init__()
