"""Orthogonal regularisation: the penalty in closed form, and what it pulls the weights to."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_unlearnable import create_network
from hf_unlearnable.defenses.base import describe
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.defenses.orthogonal import OrthogonalRegularization, non_orthogonality


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta").to_empty(device="cpu")
    layer.weight.data.copy_(weight)
    return layer


def test_closed_forms() -> None:
    square = torch.linalg.qr(torch.randn(6, 6, generator=generator())).Q
    assert non_orthogonality(linear(square)).item() == pytest.approx(0, abs=1e-9)
    assert non_orthogonality(linear(square[:4])).item() == pytest.approx(0, abs=1e-9)
    assert non_orthogonality(linear(square[:, :4])).item() == pytest.approx(2, rel=1e-5)  # a projection: trace 6 - 4
    assert non_orthogonality(linear(2 * torch.eye(5))).item() == 5 * (4 - 1) ** 2
    assert non_orthogonality(linear(torch.zeros(3, 7))).item() == 3
    assert non_orthogonality(nn.Sequential(linear(torch.zeros(3, 7)), linear(2 * torch.eye(5)))).item() == 48
    assert non_orthogonality(nn.BatchNorm2d(3)).item() == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_it_sums_over_convolutions_and_linear_layers(groups: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1), nn.Linear(5, 3))
    total = 0.0
    for layer in (model[0], model[2], model[3]):
        rows = [row.flatten().double() for row in layer.weight.detach()]
        total += sum((float(a @ b) - (i == j)) ** 2 for i, a in enumerate(rows) for j, b in enumerate(rows))
    assert non_orthogonality(model).item() == pytest.approx(total, rel=1e-5)


def test_its_gradient_is_four_times_the_excess_times_the_weights() -> None:
    layer = linear(torch.randn(4, 7, generator=generator(2)))
    non_orthogonality(layer).backward()
    weight = layer.weight.detach()
    assert layer.weight.grad is not None
    assert torch.allclose(layer.weight.grad, 4 * (weight @ weight.T - torch.eye(4)) @ weight, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 6])
def test_the_loss_is_cross_entropy_and_the_penalty(rows: int) -> None:
    x = torch.rand(rows, 3, 24, 40, generator=generator(3))
    y = torch.arange(rows) % 3
    losses = []
    for defense in (Erm(), OrthogonalRegularization(strength=0.0), OrthogonalRegularization(strength=0.02)):
        model = create_network("tiny", num_classes=3, image_size=(24, 40), seed=0)
        losses.append(defense(model, x, y, progress=0.0, generator=generator()))
    penalty = non_orthogonality(model).item()
    assert penalty > 1
    assert losses[0].item() == losses[1].item()
    assert losses[2].item() == pytest.approx(losses[0].item() + 0.02 * penalty, rel=1e-5)
    losses[2].backward()
    assert all(weight.grad is not None for weight in model.parameters())
    assert all(module.training for module in model.modules())


def test_training_makes_the_rows_orthonormal() -> None:
    model = nn.Sequential(nn.Flatten(), linear(0.3 * torch.randn(4, 12, generator=generator(4))))
    x, y = torch.rand(8, 3, 2, 2, generator=generator(5)), torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.parameters(), 0.002)
    for _ in range(300):
        optimizer.zero_grad()
        OrthogonalRegularization(strength=10)(model, x, y, progress=0.0, generator=generator()).backward()
        optimizer.step()
    assert non_orthogonality(model).item() < 1e-3


def test_the_penalty_keeps_float32_under_autocast() -> None:
    model = nn.Sequential(nn.Flatten(), linear(torch.randn(4, 12, generator=generator(4))))
    x, y = torch.zeros(2, 3, 2, 2), torch.tensor([0, 1])
    model[1].bias.data.zero_()
    defense = OrthogonalRegularization(strength=1.0)
    expected = defense(model, x, y, progress=0.0, generator=generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = defense(model, x, y, progress=0.0, generator=generator())
    assert found.item() == expected.item()


def test_what_it_is_goes_into_results() -> None:
    assert describe(OrthogonalRegularization()) == {"name": "orthogonal", "strength": 1e-4}


@pytest.mark.parametrize("wrong", [{"strength": -1.0}, {"strength": float("inf")}])
def test_bad_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="^strength: expected"):
        OrthogonalRegularization(**wrong)


def test_frozen_layers_stay_frozen() -> None:
    model = create_network("tiny", num_classes=3, image_size=16, seed=0)
    model.backbone.features.requires_grad_(False)
    x, y = torch.rand(2, 3, 16, 16, generator=generator()), torch.tensor([0, 1])
    OrthogonalRegularization()(model, x, y, progress=0.0, generator=generator()).backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained == {name for name, weight in model.named_parameters() if weight.requires_grad} != set()
