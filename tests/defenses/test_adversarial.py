"""Adversarial training: its pictures are the worst of the ball, and the model gets its modes back."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_unlearnable import create_network
from hf_unlearnable.defenses.adversarial import Adversarial
from hf_unlearnable.defenses.base import describe
from hf_unlearnable.defenses.erm import Erm


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    """Logits of a linear map: the worst picture is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3 * 4 * 4, generator=generator(5)))
        self.seen: list[tuple[Tensor, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((x.detach(), self.training))
        return x.flatten(1) @ self.weight.T


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    x = 0.3 + 0.4 * torch.rand(6, 3, 4, 4, generator=generator(1))
    return x, torch.tensor([0, 1, 0, 1, 1, 0])


@pytest.mark.parametrize(("norm", "steps"), [("linf", 10), ("l2", 60)])
def test_on_a_linear_model_it_finds_the_worst_picture(norm: Any, steps: int, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model, radius = Linear().train(), 0.05
    loss = Adversarial(norm=norm, radius=radius, pgd_steps=steps)(model, x, y, progress=0.0, generator=generator())
    slope = model.weight.detach()[1 - y] - model.weight.detach()[y]
    worst = slope.sign() if norm == "linf" else slope / slope.norm(dim=1, keepdim=True)
    expected = x + radius * worst.view_as(x)
    shown, training = model.seen[-1]
    assert training
    assert not any(mode for _, mode in model.seen[:-1])
    assert len(model.seen) == steps + 1
    if norm == "linf":
        assert torch.allclose(shown, expected, atol=1e-6)
    else:
        delta = (shown - x).flatten(1)
        assert torch.allclose(delta.norm(dim=1), torch.full((6,), radius))
        assert F.cosine_similarity(delta, worst).min() > 0.99
    assert loss.item() == pytest.approx(F.cross_entropy(model(shown), y).item())
    loss.backward()
    assert model.weight.grad is not None


def test_pictures_stay_in_the_ball_and_the_box() -> None:
    x = torch.rand(8, 3, 4, 4, generator=generator(2)).round()
    y = torch.arange(8) % 2
    for norm, radius in (("linf", 8 / 255), ("l2", 0.5)):
        model = Linear()
        Adversarial(norm=norm, radius=radius)(model, x, y, progress=0.5, generator=generator())  # type: ignore[arg-type]
        shown = model.seen[-1][0]
        delta = (shown - x).flatten(1)
        assert shown.min() >= 0
        assert shown.max() <= 1
        distance = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        assert distance.max() <= radius + 1e-6


def test_a_radius_of_zero_is_plain_training(batch: tuple[Tensor, Tensor]) -> None:
    x, y = torch.rand(6, 3, 16, 16, generator=generator(3)), batch[1]
    losses = []
    for defense in (Erm(), Adversarial(radius=0.0)):
        model = create_network("tiny", num_classes=2, image_size=16, seed=0)
        losses.append(defense(model, x, y, progress=0.0, generator=generator()).item())
    assert losses[0] == losses[1]


def test_the_generator_decides_and_the_model_is_left_as_it_was(batch: tuple[Tensor, Tensor]) -> None:
    x, y = torch.rand(6, 3, 16, 16, generator=generator(3)), batch[1]
    model = create_network("tiny", num_classes=2, image_size=16, seed=0)
    model.backbone.features[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    defense = Adversarial(pgd_steps=2)
    losses = []
    for seed in (0, 0, 1):
        model.load_state_dict(before)
        losses.append(defense(model, x, y, progress=0.0, generator=generator(seed)).item())
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] > Erm()(model, x, y, progress=0.0, generator=generator()).item()
    assert model.training
    assert not model.backbone.features[1].training
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


def test_what_it_is_goes_into_results() -> None:
    told = describe(Adversarial(radius=2 / 255))
    assert told == {"name": "adversarial", "norm": "linf", "radius": 2 / 255, "pgd_steps": 10, "pgd_step_size": None}


@pytest.mark.parametrize("wrong", [{"radius": 2.0}, {"radius": -0.1}, {"pgd_steps": -1}, {"pgd_step_size": -1.0}])
def test_bad_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="epsilon|steps|step_size"):
        Adversarial(**wrong)
