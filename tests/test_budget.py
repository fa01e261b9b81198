import math

import pytest
import torch

from hf_unlearnable import Budget
from hf_unlearnable.budget import normal_quantiles

DELTA = torch.linspace(-0.2, 0.2, 4 * 3 * 5 * 7).view(4, 3, 5, 7)[torch.tensor([2, 0, 3, 1])]


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.05), ("l2", 0.7), ("l0", 3.0)])
def test_projection(norm: str, epsilon: float) -> None:
    budget = Budget(norm, epsilon)
    projected = budget.project(DELTA)
    assert (budget.distance(projected) <= epsilon * (1 + 1e-6)).all()
    assert torch.allclose(budget.project(projected), projected, atol=1e-7)
    inside = projected * 0.5 if norm != "l0" else projected
    assert torch.allclose(budget.project(inside), inside)
    assert torch.equal(budget.project(DELTA[:1]), projected[:1])


def test_distances_against_loops() -> None:
    for row, delta in enumerate(DELTA):
        values = [abs(v) for v in delta.flatten().tolist()]
        changed = sum(any(delta[c, i, j] != 0 for c in range(3)) for i in range(5) for j in range(7))
        assert Budget("linf", 1).distance(DELTA)[row] == pytest.approx(max(values))
        assert Budget("l2", 1).distance(DELTA)[row] == pytest.approx(math.sqrt(sum(v * v for v in values)), rel=1e-5)
        assert Budget("l0", 1).distance(DELTA)[row] == changed


def test_l0_keeps_the_largest_pixels() -> None:
    delta = torch.zeros(1, 3, 2, 2)
    delta[0, 0, 0, 0], delta[0, 1, 1, 0], delta[0, 2, 1, 1] = 0.1, -0.5, 0.3
    kept = Budget("l0", 2).project(delta)
    assert kept[0, 0, 0, 0] == 0
    assert kept[0, 1, 1, 0] == -0.5
    assert kept[0, 2, 1, 1] == pytest.approx(0.3)


@pytest.mark.parametrize(("epsilon", "allowed"), [(8 / 255, 8), (0.0314, 8), (0.03, 7), (0, 0), (4 / 255, 4)])
def test_linf_is_checked_in_whole_levels(epsilon: float, allowed: int) -> None:
    clean = torch.full((5, 3, 4, 4), 100, dtype=torch.uint8)
    for sign in (-1, 1):
        poisoned = clean.clone()
        poisoned[3, 1, 2, 2] = 100 + sign * allowed
        Budget("linf", epsilon).check(clean, poisoned)
        poisoned[3, 1, 2, 2] = 100 + sign * (allowed + 1)
        with pytest.raises(ValueError, match=f"row 3 of the batch: .*{allowed}/255, got {allowed + 1}/255"):
            Budget("linf", epsilon).check(clean, poisoned)
        with pytest.raises(ValueError, match="^row 77: "):
            Budget("linf", epsilon).check(clean, poisoned, ["", "", "", "row 77", ""])


def test_levels_do_not_wrap_around() -> None:
    clean, poisoned = torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match="got 255/255"):
        Budget("linf", 8 / 255).check(clean, poisoned)


def test_l2_grants_rounding_and_no_more() -> None:
    clean = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    Budget("l2", 0).check(clean, clean)
    slack = 0.5 / 255 * math.sqrt(3 * 32 * 32)
    for levels, ok in ((1, True), (3, False)):
        poisoned = clean + levels
        distance = levels / 255 * math.sqrt(3 * 32 * 32)
        budget = Budget("l2", distance - slack - (-1e-4 if ok else 1e-4))
        if ok:
            budget.check(clean, poisoned)
        else:
            with pytest.raises(ValueError, match="expected l2"):
                budget.check(clean, poisoned)


def test_l0_counts_pixels_not_channels() -> None:
    clean = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    poisoned = clean.clone()
    poisoned[0, :, 1, 1] = 255
    Budget("l0", 1).check(clean, poisoned)
    poisoned[0, 0, 2, 1] = 1
    with pytest.raises(ValueError, match="at most 1 pixels, got 2 pixels"):
        Budget("l0", 1).check(clean, poisoned)


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 8), ("linf", -1), ("l2", math.nan), ("l2", math.inf)])
def test_bad_epsilons(norm: str, epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon"):
        Budget(norm, epsilon)


def test_unknown_norm() -> None:
    budget = Budget("l2", 1)
    object.__setattr__(budget, "norm", "max")
    with pytest.raises(ValueError, match='"linf", "l2", "l0", got \'max\''):
        budget.__post_init__()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scale", [1.0, 1e-36, 1e36])
def test_direction_is_the_steepest_ascent(norm: str, scale: float) -> None:
    gradient = DELTA.clone()
    gradient[:, 0, 0, 0] = 0
    direction = Budget(norm, 1).direction(gradient * scale)
    if norm == "linf":
        assert torch.equal(direction, gradient.sign())
    else:
        for row, g in zip(direction, gradient.double(), strict=True):
            assert torch.allclose(row.double(), g / g.square().sum().sqrt(), atol=1e-6)
    for other in torch.randn(20, *DELTA.shape, generator=torch.Generator().manual_seed(0)):
        rival = other / Budget(norm, 1).distance(other)[:, None, None, None]
        assert ((rival * gradient).flatten(1).sum(1) < (direction * gradient).flatten(1).sum(1)).all()
    assert (Budget(norm, 1).direction(torch.zeros_like(DELTA)) == 0).all()
    assert torch.equal(Budget(norm, 1).direction(gradient[2:3]), Budget(norm, 1).direction(gradient)[2:3])


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 8 / 255), ("l2", 0.7)])
def test_uniform_numbers_become_deltas_inside(norm: str, epsilon: float) -> None:
    uniform = torch.rand(500, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    uniform[0, 0, 0, :3] = torch.tensor([0.0, 0.5, 1 - 2**-24])
    radius = torch.linspace(0, 1, 500)
    budget = Budget(norm, epsilon)
    delta = budget.inside(uniform, radius)
    assert delta.isfinite().all()
    if norm == "linf":
        assert torch.allclose(delta, (2 * uniform - 1) * epsilon)
        assert delta.abs().max() <= torch.tensor(epsilon)
    else:
        assert torch.allclose(budget.distance(delta), radius * epsilon, atol=1e-6)
        moments = budget.direction(delta[1:]).square().mean(0) * 105  # 1 for every value of a uniform direction
        assert (moments - 1).abs().max() < 0.35
    assert delta.mean().abs() < epsilon / 100


def test_l0_has_neither_direction_nor_random_deltas() -> None:
    with pytest.raises(ValueError, match='got "l0"'):
        Budget("l0", 1).direction(DELTA)
    with pytest.raises(ValueError, match='got "l0"'):
        Budget("l0", 1).inside(DELTA, DELTA[:, 0, 0, 0])


@pytest.mark.parametrize(
    ("epsilon", "levels"), [(8 / 255, 8), (0.0314, 8), (0.03, 7), (0.9 / 255, 0), (1, 255), (8 / 255 - 1e-9, 8)]
)
def test_whole_levels(epsilon: float, levels: int) -> None:
    assert Budget("linf", epsilon).whole() == Budget("linf", levels / 255)
    assert Budget("l2", epsilon).whole() == Budget("l2", epsilon)


def test_normal_quantiles() -> None:
    found = normal_quantiles(torch.tensor([0.0, 0.025, 0.5, 0.975, 1.0]))
    assert found.tolist() == pytest.approx([-5.42, -1.96, 0, 1.96, 5.29], abs=0.005)
