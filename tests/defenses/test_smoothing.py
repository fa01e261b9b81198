"""Randomised smoothing: the noise of the training, and the vote of the prediction."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_unlearnable import create_network
from hf_unlearnable.defenses import smoothing
from hf_unlearnable.defenses.base import Predicts, describe
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.defenses.smoothing import Smoothing


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(rows: int, height: int = 24, width: int = 40) -> Tensor:
    return torch.rand(rows, 3, height, width, generator=generator(9))


class Corner(nn.Module):
    """Class 2 where the value in the corner is above a half, class 0 elsewhere; never class 1."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        value = x[:, 0, 0, 0] - 0.5
        return torch.stack([-value, torch.full_like(value, -9.0), value], 1)


def test_training_sees_gaussian_noise_that_is_not_clamped() -> None:
    x, y = pictures(64), torch.arange(64) % 3
    model = Corner()
    loss = Smoothing(sigma=0.3)(model, x, y, progress=0.0, generator=generator())
    (seen,) = model.seen
    noise = seen - x
    assert noise.mean().item() == pytest.approx(0, abs=0.003)
    assert noise.std().item() == pytest.approx(0.3, rel=0.01)
    assert noise.abs().gt(0.6).float().mean().item() == pytest.approx(math.erfc(2 / math.sqrt(2)), rel=0.05)
    assert seen.min() < 0
    assert seen.max() > 1
    assert loss.item() == F.cross_entropy(Corner()(seen), y).item()


def test_votes_have_the_probability_of_the_noise() -> None:
    x = torch.zeros(3, 3, 4, 6)
    x[:, 0, 0, 0] = torch.tensor([0.5, 0.8, 0.1])
    counts = Smoothing(sigma=0.5, votes=4000).predict(Corner(), x, generator=generator())
    above = torch.special.ndtr((x[:, 0, 0, 0] - 0.5) / 0.5)
    expected = torch.stack([1 - above, torch.zeros(3), above], 1)
    assert torch.allclose(counts / 4000, expected, atol=0.025)
    assert torch.equal(counts.sum(1), torch.full((3,), 4000.0))


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_a_pass_is_bounded_and_no_vote_is_lost(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothing, "_PIXELS_A_PASS", 5 * 24 * 40)
    model, x = Corner(), pictures(rows)
    counts = Smoothing(votes=11).predict(model, x, generator=generator())
    assert torch.equal(counts.sum(1), torch.full((rows,), 11.0))
    sizes = [len(seen) for seen in model.seen]
    assert sum(sizes) == 11 * rows
    assert max(sizes) <= max(5, rows)
    assert len(sizes) == {1: 3, 3: 11, 7: 11}[rows]
    one = torch.cat(model.seen).view(-1, rows, 3, 24, 40)
    by_hand = torch.stack([Corner()(copy).argmax(1) for copy in one])
    assert torch.equal(counts, torch.stack([(by_hand == c).sum(0) for c in range(3)], 1).float())
    assert len({float(copy[0, 0, 0, 0]) for copy in one}) == 11, "every copy has noise of its own"


def test_without_noise_it_is_plain_training_and_prediction() -> None:
    x, y = pictures(5), torch.arange(5) % 3
    losses = []
    for defense in (Erm(), Smoothing(sigma=0.0)):
        model = create_network("tiny", num_classes=3, image_size=(24, 40), seed=0)
        losses.append(defense(model, x, y, progress=0.0, generator=generator()).item())
    assert losses[0] == losses[1]
    model = create_network("tiny", num_classes=3, image_size=(24, 40), seed=0).eval()
    with torch.no_grad():
        counts = Smoothing(sigma=0.0, votes=7).predict(model, x, generator=generator())
        assert torch.equal(counts, 7.0 * F.one_hot(model(x).argmax(1), 3))


def test_the_generator_decides_and_the_model_is_left_as_it_was() -> None:
    x, y = pictures(6), torch.arange(6) % 3
    model = create_network("tiny", num_classes=3, image_size=(24, 40), seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    defense, losses = Smoothing(votes=30), []
    for seed in (0, 0, 1):
        model.load_state_dict(before)
        losses.append(defense(model, x, y, progress=0.0, generator=generator(seed)).item())
    assert losses[0] == losses[1] != losses[2]
    assert all(module.training for module in model.modules())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    answers = [defense.predict(Corner(), x, generator=generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])
    assert isinstance(defense, Predicts)


def test_what_it_is_goes_into_results() -> None:
    assert describe(Smoothing()) == {"name": "smoothing", "sigma": 0.5, "votes": 100}


@pytest.mark.parametrize("wrong", [{"sigma": -0.1}, {"sigma": float("nan")}, {"votes": 0}])
def test_bad_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
        Smoothing(**wrong)
