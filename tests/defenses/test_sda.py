"""Adversarial noise: as strong as the radius, against the network that was fitted."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from hf_unlearnable.batches import Batches
from hf_unlearnable.defenses.base import describe
from hf_unlearnable.defenses.sda import AdversarialNoise, logits
from hf_unlearnable.draws import FreshDraws
from hf_unlearnable.images import to_float
from tests.conftest import make_dataset, noise_pictures, pixels

QUICK: dict[str, Any] = {"fit_epochs": 10, "hidden": 48, "fit_batch_size": 20, "fit_learning_rate": 0.03}


def fresh(count: int) -> FreshDraws:
    return FreshDraws(count, torch.Generator().manual_seed(0))


def batches(rows: int = 120, height: int = 8, width: int = 12) -> Batches:
    """Each class has a brightness of its own."""
    labels = torch.arange(rows) % 3
    u = torch.randint(0, 60, (rows, 3, height, width), generator=torch.Generator().manual_seed(1))
    return Batches(
        pixels=(u + 80 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels=labels, classes=("dark", "grey", "bright")
    )


@pytest.fixture(scope="module")
def fitted() -> AdversarialNoise:
    return AdversarialNoise(**QUICK).fit(batches(), seed=0)


def floats(defense: AdversarialNoise) -> dict[str, Tensor]:
    assert defense.tensors is not None
    return {name: tensor for name, tensor in defense.tensors.items() if "." in name}


def test_the_network_learns_under_attack(fitted: AdversarialNoise) -> None:
    train = batches()
    assert logits(floats(fitted), to_float(train.pixels)).argmax(1).eq(train.labels).float().mean() > 0.9
    attacked = fitted.alter(to_float(train.pixels), train.labels, fresh(120))
    assert logits(floats(fitted), attacked).argmax(1).eq(train.labels).float().mean() > 0.8


def test_the_noise_raises_the_loss_and_keeps_radius_and_box(fitted: AdversarialNoise) -> None:
    train = batches()
    x = to_float(train.pixels)
    kept = x.clone()
    found = fitted.alter(x, train.labels, fresh(120))
    delta = found - x
    assert delta.abs().max() <= 8 / 255 + 1e-7
    assert delta.abs().flatten(1).amax(1).min() > 7.9 / 255
    assert found.min() >= 0
    assert found.max() <= 1
    before, after = (F.cross_entropy(logits(floats(fitted), z), train.labels, reduction="none") for z in (x, found))
    assert (after > before).all()
    assert torch.equal(x, kept)
    assert not found.requires_grad


def test_one_step_is_the_sign_of_the_gradient(fitted: AdversarialNoise) -> None:
    x, y = torch.full((3, 3, 8, 12), 0.5), torch.arange(3)
    leaf = x.clone().requires_grad_()
    F.cross_entropy(logits(floats(fitted), leaf), y).backward()
    assert leaf.grad is not None
    one = AdversarialNoise(tensors=fitted.tensors, pgd_steps=1, pgd_step_size=2 / 255)
    assert torch.allclose(one.alter(x, y, fresh(3)) - x, leaf.grad.sign() * 2 / 255, atol=1e-7)


def test_a_picture_alone_gets_the_same_noise(fitted: AdversarialNoise) -> None:
    train = batches()
    x = to_float(train.pixels[:5])
    together = fitted.alter(x, train.labels[:5], fresh(5))
    alone = torch.cat([fitted.alter(x[i : i + 1], train.labels[i : i + 1], fresh(1)) for i in range(5)])
    assert (together != alone).float().mean() < 0.01


def test_row_batch_and_apply_give_the_same_pixels(small: Dataset) -> None:
    defense = AdversarialNoise(**QUICK).fit(Batches.load(small, progress=False), seed=0)
    expected = pixels(small.map(defense, keep_in_memory=True))
    assert (pixels(small.map(defense, batched=True, batch_size=7)) != expected).mean() < 0.01
    assert (pixels(defense.apply(small)) != expected).mean() < 0.01
    assert np.abs(expected.astype(int) - pixels(small)).max() == 8


def test_fit_depends_on_seed_and_rows_and_pickles(fitted: AdversarialNoise) -> None:
    with torch.no_grad():
        again = AdversarialNoise(**QUICK).fit(batches(), seed=0, progress=True)
    other = AdversarialNoise(**QUICK).fit(batches(), seed=1)
    assert again == fitted != other
    assert describe(again)["learned"] == fitted.learned != other.learned
    assert fitted.cache_state() != other.cache_state() != AdversarialNoise(**QUICK).cache_state()
    known = pickle.loads(pickle.dumps(fitted))  # noqa: S301
    assert known == fitted
    assert all(torch.equal(known.tensors[name], tensor) for name, tensor in (fitted.tensors or {}).items())
    assert all(not tensor.requires_grad for tensor in floats(fitted).values())
    assert floats(AdversarialNoise(fit_epochs=1).fit(batches(20), seed=0))["inner.weight"].shape == (288, 288)


def test_what_does_not_fit_is_told(fitted: AdversarialNoise) -> None:
    x, y = torch.full((2, 3, 8, 12), 0.5), torch.tensor([0, 3])
    with pytest.raises(ValueError, match="expected labels, got none"):
        fitted.alter(x, None, fresh(2))
    with pytest.raises(ValueError, match="expected labels in 0 to 2, as fitted, got 0 to 3"):
        fitted.alter(x, y, fresh(2))
    with pytest.raises(ValueError, match=r"expected pictures of 8 x 12 pixels .* got 12 x 8"):
        fitted.alter(x.transpose(2, 3), y, fresh(2))
    with pytest.raises(ValueError, match=r"AdversarialNoise has learnt nothing yet: call \.fit"):
        AdversarialNoise().alter(x, y, fresh(2))
    with pytest.raises(ValueError, match="AdversarialNoise has learnt nothing yet"):
        make_dataset(noise_pictures(2), [0, 1]).map(AdversarialNoise())
    large = Batches(pixels=torch.zeros(1, 3, 80, 80, dtype=torch.uint8), labels=torch.zeros(1).long(), classes=("a",))
    with pytest.raises(ValueError, match="set a smaller `hidden`"):
        AdversarialNoise().fit(large, seed=0)


@pytest.mark.parametrize(
    "wrong", [{"radius": -1.0}, {"pgd_steps": -1}, {"fit_step_size": -1.0}, {"fit_epochs": 0}, {"hidden": 0}]
)
def test_bad_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="epsilon|steps|step_size|positive"):
        AdversarialNoise(**wrong)
