import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_unlearnable.augment import CropFlip
from hf_unlearnable.budget import Budget
from hf_unlearnable.draws import Draws
from hf_unlearnable.images import to_float, to_uint8
from hf_unlearnable.pgd import Pgd

LINF, L2 = Budget("linf", 8 / 255), Budget("l2", 0.5)
INNER = Pgd(budget=Budget("linf", 4 / 255), steps=3, step_size=1.6 / 255, direction="max", init="uniform")
DRAW = Pgd(budget=Budget("linf", 4 / 255), steps=0, direction="max", init="uniform")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, size: int = 6, *, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, 3, size, size, generator=generator(seed), dtype=dtype)


def pixels(count: int, size: int = 6, seed: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=generator(seed), dtype=torch.uint8)


class Smooth(nn.Module):
    """A network without kinks whose gradients are never zero, so that no sign hangs on a rounding."""

    def __init__(self, size: int = 6, classes: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(5)
            self.first = nn.Linear(3 * size * size, 16, dtype=torch.float64)
            self.last = nn.Linear(16, classes, dtype=torch.float64)
        self.pictures = 0
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.pictures += len(x)
        self.calls += 1
        return self.last(torch.tanh(3 * self.first(x.flatten(1))))


def labels(count: int) -> Tensor:
    return torch.arange(count) % 4


def cross_entropy(model: nn.Module, y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, rows: F.cross_entropy(model(z), y[rows], reduction="none")


def linear(w: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, rows: (z * w[rows]).flatten(1).sum(1)


# Closed forms: the loss is <w, x + delta>.


@pytest.mark.parametrize("direction", ["min", "max"])
def test_linf_goes_to_the_corner_inside_the_box(direction: Any) -> None:
    x, w = pictures(5), pictures(5, seed=3) - 0.5
    sign = 1 if direction == "max" else -1
    pgd = Pgd(budget=LINF, steps=6, step_size=2 / 255, direction=direction)
    delta = pgd.run(linear(w), x)
    expected = (x + sign * LINF.epsilon * w.sign()).clamp(0, 1) - x
    assert torch.allclose(delta, expected, atol=1e-12)
    free = replace(pgd, box=None).run(linear(w), x)
    assert torch.allclose(free, sign * LINF.epsilon * w.sign(), atol=1e-12)
    assert not torch.allclose(free, expected, atol=1e-3)


@pytest.mark.parametrize("direction", ["min", "max"])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_l2_goes_along_the_gradient(direction: Any, scale: float) -> None:
    x, w = torch.full((5, 3, 6, 6), 0.5), (pictures(5, seed=3, dtype=torch.float32) - 0.5)
    sign = 1 if direction == "max" else -1
    delta = Pgd(budget=L2, steps=7, step_size=0.1, direction=direction).run(linear(scale * w), x)
    expected = sign * L2.epsilon * w / w.flatten(1).norm(dim=1)[:, None, None, None]
    assert torch.allclose(delta, expected, atol=1e-6)


def test_the_loss_moves_with_every_step() -> None:
    x, w = pictures(5) * 0.5 + 0.25, pictures(5, seed=3) - 0.5
    for budget, step_size in ((LINF, 1.6 / 255), (L2, 0.1)):
        for direction in ("min", "max"):
            losses: list[Tensor] = []

            def loss(z: Tensor, rows: Tensor, losses: list[Tensor] = losses) -> Tensor:
                losses.append(linear(w)(z, rows).detach())
                return linear(w)(z, rows)

            Pgd(budget=budget, steps=5, step_size=step_size, direction=direction).run(loss, x)
            moved = torch.stack(losses).diff(dim=0)
            assert moved.shape == (4, 5)
            assert ((moved > 1e-4) if direction == "max" else (moved < -1e-4)).all()


def test_steps_in_numbers() -> None:
    x = torch.tensor([0.5, 0.0, 1.0, 0.25]).view(1, 1, 1, 4)
    w = torch.tensor([1.0, -2.0, 3.0, 0.0]).view(1, 1, 1, 4)
    pgd = Pgd(budget=Budget("linf", 0.1), steps=3, step_size=0.03, direction="max")
    assert pgd.run(linear(w), x).flatten().tolist() == pytest.approx([0.09, 0, 0, 0])
    assert replace(pgd, steps=4).run(linear(w), x).flatten().tolist() == pytest.approx([0.1, 0, 0, 0])
    assert replace(pgd, direction="min").run(linear(w), x).flatten().tolist() == pytest.approx([-0.09, 0.09, -0.09, 0])


# A slow and obvious oracle: one picture, one copy and one step at a time.


def oracle(pgd: Pgd, model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
    random = generator(seed)

    def project(delta: Tensor, at: Tensor, budget: Budget) -> Tensor:
        if budget.norm == "linf":
            delta = delta.clamp(-budget.epsilon, budget.epsilon)
        elif delta.norm() > budget.epsilon:
            delta = delta * budget.epsilon / delta.norm()
        return delta if pgd.box is None else (at + delta).clamp(*pgd.box) - at

    def start(which: Pgd, shape: tuple[int, ...]) -> Tensor:
        if which.init == "zero":
            return torch.zeros(shape, dtype=x.dtype)
        u = torch.rand(shape, generator=random)
        if which.init == "normal" or which.budget.norm == "l2":
            normal = math.sqrt(2) * torch.erfinv(2 * u.double() - 1)
        if which.init == "normal":
            return normal * which.budget.epsilon
        if which.budget.norm == "linf":
            return ((2 * u - 1) * which.budget.epsilon).to(x)
        radius = torch.rand((len(u), 1), generator=random).flatten() * which.budget.epsilon
        return torch.stack([n / n.norm() * r for n, r in zip(normal, radius, strict=True)])

    def gradient(at: Tensor, n: int) -> Tensor:
        leaf = at.clone().requires_grad_()
        value = F.cross_entropy(model(leaf[None]), y[n : n + 1])
        return torch.autograd.grad(value, leaf)[0]

    def step(which: Pgd, delta: Tensor, g: Tensor) -> Tensor:
        unit = g.sign() if which.budget.norm == "linf" else g / g.norm()
        return delta + (which.step_size if which.direction == "max" else -which.step_size) * unit

    delta = torch.stack([project(d, x[n], pgd.budget) for n, d in enumerate(start(pgd, tuple(x.shape)))])
    for _ in range(pgd.steps):
        total = torch.zeros_like(x)
        drawn = None
        if pgd.augmentation is not None:
            drawn = pgd.augmentation.draw(len(x) * pgd.eot, generator=random)
        for copy in range(pgd.eot):
            inside = None if pgd.inner is None else start(pgd.inner, tuple(x.shape))
            for n in range(len(x)):
                leaf = (x[n] + delta[n]).clone().requires_grad_()
                z = leaf
                if pgd.augmentation is not None and drawn is not None:
                    place = n * pgd.eot + copy
                    mine = {name: values[place : place + 1] for name, values in drawn.items()}
                    z = pgd.augmentation.apply(leaf[None], mine)[0]
                a = z.detach()
                if pgd.inner is not None and inside is not None:
                    found = project(inside[n], a, pgd.inner.budget)
                    for _ in range(pgd.inner.steps):
                        found = project(step(pgd.inner, found, gradient(a + found, n)), a, pgd.inner.budget)
                    a = a + found
                g = gradient(a, n)
                # straight-through: d/d(delta) of <t(x + delta), stopgrad(g)>
                total[n] += torch.autograd.grad((z * g).sum(), leaf)[0] / pgd.eot
        delta = torch.stack([project(step(pgd, delta[n], total[n]), x[n], pgd.budget) for n in range(len(x))])
    return delta


CONFIGURATIONS = {
    "HYPO": Pgd(budget=LINF, steps=5, step_size=1.6 / 255, direction="min"),
    "HYPO in L2": Pgd(budget=L2, steps=5, step_size=0.1, direction="min"),
    "AT": Pgd(budget=Budget("linf", 4 / 255), steps=5, step_size=0.8 / 255, direction="max", init="uniform"),
    "AT in L2": Pgd(budget=L2, steps=5, step_size=0.1, direction="max", init="uniform"),
    "TAP": Pgd(
        budget=LINF,
        steps=6,
        step_size=0.4 / 255,
        direction="min",
        init="normal",
        augmentation=CropFlip(padding=1),
    ),
    "MMM": Pgd(
        budget=LINF,
        steps=3,
        step_size=1.6 / 255,
        direction="min",
        init="uniform",
        augmentation=CropFlip(padding=1),
        eot=5,
    ),
    "SEM": Pgd(
        budget=LINF,
        steps=3,
        step_size=1.6 / 255,
        direction="min",
        init="uniform",
        augmentation=CropFlip(padding=2),
        eot=3,
        inner=DRAW,
    ),
    "REM": Pgd(
        budget=LINF,
        steps=3,
        step_size=1.6 / 255,
        direction="min",
        init="uniform",
        augmentation=CropFlip(padding=2),
        eot=3,
        inner=INNER,
    ),
    "REM in L2": Pgd(
        budget=L2,
        steps=3,
        step_size=0.2,
        direction="min",
        init="uniform",
        eot=2,
        inner=Pgd(budget=Budget("l2", 0.2), steps=2, step_size=0.08, direction="max", init="uniform"),
    ),
    "no box": Pgd(budget=LINF, steps=4, step_size=4 / 255, direction="min", init="uniform", box=None),
}
assert not any(pgd.chunk for pgd in CONFIGURATIONS.values())


@pytest.mark.parametrize("chunk", [None, 1, 2, 4, 7, 1000])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_equals_the_oracle(name: str, chunk: int | None) -> None:
    pgd, model, x, y = CONFIGURATIONS[name], Smooth(), pictures(4), labels(4)
    delta = replace(pgd, chunk=chunk).run(cross_entropy(model, y), x, model=model, draws=generator(7))
    expected = oracle(pgd, model, x, y, 7)
    # float32 uniforms reach the normal quantiles by another formula
    assert torch.allclose(delta, expected, atol=2e-6 if pgd.init != "uniform" or pgd.budget.norm == "l2" else 1e-12)
    assert delta.abs().max() > 0.5 / 255


def test_the_configurations_differ() -> None:
    model, x, y = Smooth(), pictures(4), labels(4)
    found = [
        replace(CONFIGURATIONS["REM"], inner=inner).run(cross_entropy(model, y), x, draws=generator(7))
        for inner in (None, DRAW, INNER)
    ]
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in ((found[0], found[1]), (found[1], found[2])))


def test_the_gradient_of_the_expectation_is_the_mean_of_the_single_ones() -> None:
    """One L2 step from zero shows the direction of the gradient itself."""
    model, x, y, augmentation = Smooth(), pictures(4) * 0.5 + 0.25, labels(4), CropFlip(padding=2)
    pgd = Pgd(budget=L2, steps=1, step_size=0.1, direction="max", augmentation=augmentation, eot=6)
    delta = pgd.run(cross_entropy(model, y), x, draws=generator(3))
    draws = augmentation.draw(4 * 6, generator=generator(3))
    gradients = []
    for copy in range(6):
        leaf = x.clone().requires_grad_()
        z = augmentation.apply(
            leaf, {name: values.view(4, 6, *values.shape[1:])[:, copy] for name, values in draws.items()}
        )
        gradients.append(torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), leaf)[0])
    mean = torch.stack(gradients).mean(0)
    assert torch.allclose(delta, 0.1 * mean / mean.flatten(1).norm(dim=1)[:, None, None, None], atol=1e-12)


def test_crop_and_flip_have_an_exact_gradient() -> None:
    x = pictures(2, 4).requires_grad_()
    augmentation = CropFlip(padding=2)
    draws = augmentation.draw(2, generator=generator(5))
    assert torch.autograd.gradcheck(lambda x: augmentation.apply(x, draws), (x,))


# Budgets and boxes.


def test_a_budget_of_zero_gives_x_and_costs_nothing() -> None:
    for norm in ("linf", "l2"):
        model = Smooth()
        pgd = Pgd(budget=Budget(norm, 0), steps=5, step_size=0.1, direction="max", init="uniform")
        delta = pgd.run(cross_entropy(model, labels(3)), pictures(3))
        assert (delta == 0).all()
        assert model.calls == 0


def test_an_inner_budget_of_zero_is_none() -> None:
    model, x, y = Smooth(), pictures(3), labels(3)
    plain = Pgd(budget=LINF, steps=3, step_size=2 / 255, direction="min", augmentation=CropFlip(padding=1))
    expected = plain.run(cross_entropy(model, y), x, draws=generator())
    passes = model.pictures
    with_zero = replace(plain, inner=replace(INNER, budget=Budget("linf", 0)))
    assert torch.equal(with_zero.run(cross_entropy(model, y), x, draws=generator()), expected)
    assert model.pictures == 2 * passes


@pytest.mark.parametrize("budget", [LINF, L2])
def test_no_steps_give_the_start_projected(budget: Budget) -> None:
    x = pictures(4)
    start = pictures(4, seed=9) * 3 - 1.5
    delta = Pgd(budget=budget, steps=0, direction="max").run(linear(x), x, start=start)
    assert torch.equal(delta, (budget.project(start)).clamp(-x, 1 - x))
    assert (budget.distance(delta) <= budget.epsilon * (1 + 1e-9)).all()
    assert ((x + delta >= 0) & (x + delta <= 1)).all()


@pytest.mark.parametrize("init", ["uniform", "normal"])
@pytest.mark.parametrize("budget", [LINF, L2])
def test_random_starts_fill_the_ball(budget: Budget, init: Any) -> None:
    x = torch.full((400, 3, 6, 6), 0.5)
    delta = Pgd(budget=budget, steps=0, direction="max", init=init).run(linear(x), x, draws=generator())
    sizes = budget.distance(delta)
    assert (sizes <= budget.epsilon * (1 + 1e-6)).all()
    assert delta.mean().abs() < budget.epsilon / 100
    if (budget, init) == (L2, "uniform"):
        assert sizes.sort().values.div(budget.epsilon).sub(torch.linspace(0, 1, 400)).abs().max() < 0.1
    elif init == "uniform":
        assert delta.abs().mean() == pytest.approx(budget.epsilon / 2, rel=0.01)
    else:
        # 0.63 is E min(|N(0, 1)|, 1)
        assert delta.abs().mean() == pytest.approx(0.6313 * LINF.epsilon, rel=0.01) or budget == L2


@pytest.mark.parametrize("epsilon", [8 / 255, 1 / 255, 0.0314, 0.03, 0.5 / 255])
def test_published_pixels_keep_the_budget(epsilon: float) -> None:
    """Every level, pushed up and down to the end by a network that is sure of itself."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    w = torch.ones(2, 3, 16, 16)
    w[1] = -1
    budget = Budget("linf", epsilon).whole()
    x = to_float(levels)
    delta = Pgd(budget=budget, steps=9, step_size=epsilon / 5 + 1e-6, direction="max").run(linear(w), x)
    assert delta.abs().max() <= torch.tensor(budget.epsilon)
    assert (x + delta).min() >= 0
    assert (x + delta).max() <= 1
    published = to_uint8(x + delta)
    Budget("linf", epsilon).check(levels, published)
    moved = (published.int() - levels.int()).abs().amax().item()
    assert moved == math.floor(epsilon * 255 + 1e-6)


def test_the_box_comes_after_the_projection() -> None:
    """A pixel outside the box ends on its border, at the price of the budget."""
    x = torch.full((1, 1, 1, 1), 1.5)
    delta = Pgd(budget=LINF, steps=1, step_size=0.1, direction="max").run(linear(x), x)
    assert delta.item() == -0.5


# Randomness of one row.


def keyed(rows: Tensor, key: int = 11) -> Draws:
    return Draws(key, "test", rows)


@pytest.mark.parametrize("name", ["AT", "AT in L2", "TAP", "SEM", "REM", "REM in L2"])
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    pgd, model, batch, y = CONFIGURATIONS[name], Smooth(), pixels(5), labels(5)
    pgd = replace(pgd, steps=11 if name == "TAP" else pgd.steps)

    def run(rows: list[int], pgd: Pgd, key: int = 11) -> Tensor:
        part = batch[rows]
        x = to_float(part).double()
        return pgd.run(cross_entropy(model, y[rows]), x, model=model, draws=keyed(part, key))

    whole = run([0, 1, 2, 3, 4], pgd)
    assert torch.allclose(run([3], pgd), whole[[3]], atol=1e-12)
    assert torch.allclose(run([4, 1, 0], pgd), whole[[4, 1, 0]], atol=1e-12)
    assert torch.allclose(run([0, 1, 2, 3, 4], replace(pgd, chunk=3)), whole, atol=1e-12)
    assert torch.equal(run([0, 1, 2, 3, 4], pgd), whole)
    assert not torch.allclose(run([0, 1, 2, 3, 4], pgd, key=12), whole, atol=1e-4)


class Recorded:
    """Draws that remember what they were asked for."""

    def __init__(self, draws: Draws) -> None:
        self.draws, self.purposes = draws, list[str]()

    def uniform(self, *shape: int, purpose: str) -> Tensor:
        self.purposes.append(purpose)
        return self.draws.uniform(*shape, purpose=purpose)


@pytest.mark.parametrize("name", ["SEM", "REM", "REM in L2"])
def test_no_number_is_used_twice(name: str) -> None:
    """But for the views by which restarts are compared."""
    batch, y, model = pixels(3), labels(3), Smooth()
    pgd, draws = replace(CONFIGURATIONS[name], restarts=2), Recorded(keyed(batch))
    pgd.run(cross_entropy(model, y), to_float(batch).double(), draws=draws)
    once = [purpose for purpose in draws.purposes if "choice" not in purpose]
    assert len(set(once)) == len(once)
    images = 2 * (1 + pgd.steps * pgd.eot)
    assert len(once) == (2 * images if pgd.budget.norm == "l2" else images + 2)


@pytest.mark.parametrize("steps", [3, 25])
def test_keyed_views_come_from_one_stream_a_row(steps: int) -> None:
    """Ten steps at a time: another order would change the pixels of published poisons."""
    batch, method = pixels(2), CropFlip(padding=30)
    pgd = Pgd(budget=LINF, steps=steps, step_size=0.01, direction="min", augmentation=method, eot=4, init="uniform")
    views = pgd._views(keyed(batch), 2, "views")
    drawn = [next(views) for _ in range(steps)]
    for row in range(2):
        seed = int(keyed(batch).uniform(1, purpose="views")[row].item() * 2**53)
        stream = generator(seed)
        for first in range(0, steps, 10):
            expected = method.draw(min(steps, 10) * 4, generator=stream)
            for name, values in expected.items():
                found = torch.cat([step[name][row] for step in drawn[first : first + 10]])
                assert torch.equal(found, values[: len(found)])


def test_keyed_views_differ_between_rows_steps_and_copies() -> None:
    batch = pixels(6)
    pgd = Pgd(
        budget=LINF, steps=25, step_size=0.01, direction="min", augmentation=CropFlip(padding=30), eot=4, init="uniform"
    )
    views = pgd._views(keyed(batch), 6, "views")
    drawn = [next(views) for _ in range(25)]
    assert all(step["top"].shape == (6, 4) for step in drawn)
    # 61 x 61 x 2 places for 600 views: with few doubles if they are independent, and many if any axis repeats
    places = {
        (int(step["top"][n, k]), int(step["left"][n, k]), bool(step["mirrored"][n, k]))
        for step in drawn
        for n in range(6)
        for k in range(4)
    }
    assert len(places) > 520


def test_a_generator_gives_the_same_run_and_the_next_another() -> None:
    model, x, y, pgd = Smooth(), pictures(3), labels(3), CONFIGURATIONS["SEM"]
    random = generator(4)
    first = pgd.run(cross_entropy(model, y), x, draws=random)
    second = pgd.run(cross_entropy(model, y), x, draws=random)
    assert torch.equal(pgd.run(cross_entropy(model, y), x, draws=generator(4)), first)
    assert not torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("name", ["AT", "TAP", "SEM"])
def test_randomness_without_draws_is_an_error(name: str) -> None:
    x = pictures(2)
    with pytest.raises(ValueError, match="needs draws"):
        CONFIGURATIONS[name].run(linear(x), x, start=x if name == "SEM" else None)


def test_draws_of_another_batch_are_an_error() -> None:
    with pytest.raises(ValueError, match="expected draws for the 3 rows of x, got them for 4"):
        CONFIGURATIONS["AT"].run(linear(pictures(3)), pictures(3), draws=keyed(pixels(4)))


def test_a_start_replaces_the_random_one() -> None:
    x, w, start = pictures(3) * 0.5 + 0.25, pictures(3, seed=3) - 0.5, pictures(3, seed=4) * 0.01
    pgd = Pgd(budget=LINF, steps=1, step_size=1 / 255, direction="min", init="uniform")
    before = start.clone(), x.clone()
    assert torch.allclose(pgd.run(linear(w), x, start=start), start - w.sign() / 255, atol=1e-12)
    assert torch.equal(start, before[0])
    assert torch.equal(x, before[1])
    half = pgd.run(linear(w), x.float(), start=start.half())
    assert half.dtype == torch.float32


# Restarts.


@pytest.mark.parametrize("direction", ["min", "max"])
def test_restarts_keep_the_best_of_every_row(direction: Any) -> None:
    """Single runs from the same starts, and for every row the best of them."""
    batch, y, model = pixels(8), labels(8), Smooth()
    x = to_float(batch).double()
    loss = cross_entropy(model, y)
    single = Pgd(budget=Budget("linf", 0.3), steps=2, step_size=0.1, direction=direction, init="uniform")
    several = replace(single, restarts=4).run(loss, x, draws=keyed(batch))
    runs = [
        replace(single, init="zero").run(
            loss,
            x,
            start=single.budget.inside(keyed(batch).uniform(3, 6, 6, purpose=f"pgd start {restart}"), torch.zeros(8)),
        )
        for restart in range(4)
    ]
    losses = torch.stack([loss(x + delta, torch.arange(8)).detach() for delta in runs])
    best = losses.argmin(0) if direction == "min" else losses.argmax(0)
    assert len(set(best.tolist())) > 1
    assert torch.allclose(several, torch.stack(runs)[best, torch.arange(8)], atol=1e-12)


@pytest.mark.parametrize("inner", [None, DRAW])
def test_restarts_are_judged_by_the_same_views(inner: Pgd | None) -> None:
    """What is judged at the end is x + delta under the same crops, flips and inner draws: delta alone differs."""
    judged: list[Tensor] = []
    model, batch, y = Smooth(), pixels(4), labels(4)
    x = to_float(batch).double().clamp(0.2, 0.8)

    def loss(z: Tensor, rows: Tensor) -> Tensor:
        if not z.requires_grad:
            judged.append(z)
        return cross_entropy(model, y)(z, rows)

    pgd = replace(CONFIGURATIONS["SEM"], budget=Budget("linf", 1e-9), step_size=1e-9, restarts=3, inner=inner)
    pgd.run(loss, x, model=model, draws=keyed(batch))
    assert len(judged) == 3
    assert torch.allclose(judged[0], judged[1], atol=1e-8)
    assert torch.allclose(judged[0], judged[2], atol=1e-8)
    assert not torch.allclose(judged[0][0], judged[0][1], atol=1e-3)


# Cost.


@pytest.mark.parametrize("chunk", [None, 1, 3, 8])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_passes_are_steps_times_copies(name: str, chunk: int | None) -> None:
    pgd, model, count = replace(CONFIGURATIONS[name], chunk=chunk), Smooth(), 4
    backwards = 0

    def count_backward(gradient: Tensor) -> None:
        nonlocal backwards
        backwards += len(gradient)

    def loss(z: Tensor, rows: Tensor) -> Tensor:
        assert len(z) <= (chunk or 1000)
        logits = model(z)
        logits.register_hook(count_backward)
        return F.cross_entropy(logits, labels(count)[rows], reduction="none")

    pgd.run(loss, pictures(count), draws=generator())
    inner = 0 if pgd.inner is None else pgd.inner.steps
    assert model.pictures == backwards == count * pgd.steps * pgd.eot * (1 + inner)
    if chunk is None:
        assert model.calls == pgd.steps * (1 + inner)


def test_restarts_cost_one_more_forward_pass_each() -> None:
    model, pgd = Smooth(), replace(CONFIGURATIONS["REM"], restarts=2)
    pgd.run(cross_entropy(model, labels(4)), pictures(4), draws=generator())
    assert model.pictures == 4 * pgd.eot * 2 * (pgd.steps * (1 + INNER.steps) + 1 + INNER.steps)


# The state of the model and the caller's contexts.


class Normalised(nn.Module):
    """Batch statistics and dropout: other pictures in the batch change the answer in training mode."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(5)
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())
            self.head = nn.Linear(64, 4)
        self.head.weight.requires_grad_(False)
        self.body[2].eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def state(model: nn.Module) -> list[Any]:
    modes = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    return [modes, grads, [parameter.grad for parameter in model.parameters()]]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_frozen_and_then_as_it_was(fails: bool) -> None:
    model, x, y = Normalised(), pictures(4, dtype=torch.float32), labels(4)
    before = state(model)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    assert before[0] == [True, True, True, True, False, True, True]
    assert before[1] == [True, True, True, True, False, True]
    calls = 0

    def loss(z: Tensor, rows: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        if fails and calls == 2:
            raise RuntimeError("out of memory")
        return F.cross_entropy(model(z), y[rows], reduction="none")

    pgd = Pgd(budget=LINF, steps=3, step_size=0.01, direction="max")
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            pgd.run(loss, x, model=model)
    else:
        pgd.run(loss, x, model=model)
    assert state(model) == before
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


def test_no_gradient_reaches_parameters_that_are_not_frozen() -> None:
    model = Smooth()
    CONFIGURATIONS["REM"].run(cross_entropy(model, labels(4)), pictures(4), draws=generator())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_works_without_gradients_around_it() -> None:
    model, x, y, pgd = Smooth(), pictures(4), labels(4), CONFIGURATIONS["REM"]
    expected = pgd.run(cross_entropy(model, y), x, model=model, draws=generator())
    with torch.no_grad():
        found = pgd.run(cross_entropy(model, y), x, model=model, draws=generator())
        assert not torch.is_grad_enabled()
    assert torch.equal(found, expected)
    assert not found.requires_grad
    wanting = x.clone().requires_grad_()
    found = pgd.run(cross_entropy(model, y), wanting, model=model, draws=generator())
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert wanting.grad is None


def test_autocast_keeps_the_dtype_and_the_way() -> None:
    model, x, y = Normalised(), pictures(4, dtype=torch.float32), labels(4)
    pgd = replace(CONFIGURATIONS["REM"], steps=5)
    dtypes = set()

    def loss(z: Tensor, rows: Tensor) -> Tensor:
        logits = model(z)
        dtypes.add((z.dtype, logits.dtype))
        return F.cross_entropy(logits, y[rows], reduction="none")

    with torch.autocast("cpu", dtype=torch.bfloat16):
        delta = pgd.run(loss, x, model=model, draws=generator())
    assert dtypes == {(torch.float32, torch.bfloat16)}
    assert delta.dtype == torch.float32
    assert (LINF.distance(delta) <= torch.tensor(LINF.epsilon)).all()
    expected = pgd.run(loss, x, model=model, draws=generator())
    assert F.cosine_similarity(delta.flatten(1), expected.flatten(1)).min() > 0.8


def test_channels_last_gives_the_same() -> None:
    model, x, y = Normalised().double(), pictures(4), labels(4)
    pgd = CONFIGURATIONS["SEM"]
    expected = pgd.run(cross_entropy(model, y), x, model=model, draws=generator())
    other = x.to(memory_format=torch.channels_last)
    assert torch.allclose(pgd.run(cross_entropy(model, y), other, model=model, draws=generator()), expected, atol=1e-12)


# What breaks.


@pytest.mark.parametrize("budget", [LINF, L2])
def test_nan_names_the_step_and_the_row(budget: Budget) -> None:
    x, calls = pictures(5), 0

    def loss(z: Tensor, rows: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        factor = torch.ones(len(z), dtype=z.dtype)
        if calls >= 3:
            factor[3] = torch.nan
        return (z * z).flatten(1).sum(1) * factor

    pgd = Pgd(budget=budget, steps=4, step_size=0.01, direction="max")
    with pytest.raises(FloatingPointError, match=r"^row 3 of the batch: .* at step 3 of 4 \(1 of 5 rows\)$"):
        pgd.run(loss, x)


@pytest.mark.parametrize("chunk", [5, None])
@pytest.mark.parametrize("where", ["inner", "outer"])
def test_nan_of_copies_and_of_the_inner_adversary(where: str, chunk: int | None) -> None:
    """One NaN of one pixel in one copy, met by the inner adversary alone or by the outer gradient alone."""
    model, y = Smooth(), labels(4)
    pgd = replace(CONFIGURATIONS["REM"], chunk=chunk)
    a_step = (1 + INNER.steps) * (pgd.eot if chunk else 1)
    calls = 0

    def hook(gradient: Tensor, wanted: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[wanted.nonzero()[-1, 0], 0, 2, 2] = torch.nan
        return gradient

    def loss(z: Tensor, rows: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        is_inner = z.is_leaf
        if calls > a_step and is_inner == (where == "inner") and (rows == 2).any():
            z = z * 1
            z.register_hook(lambda gradient: hook(gradient, rows == 2))
        return cross_entropy(model, y)(z, rows)

    with pytest.raises(FloatingPointError, match=r"^row 2 of the batch: .* at step 2 of 3 \(1 of 4 rows\)$"):
        pgd.run(loss, pictures(4), draws=generator())


def test_nan_at_the_end_of_a_restart() -> None:
    def loss(z: Tensor, rows: Tensor) -> Tensor:
        losses = z.flatten(1).sum(1)
        return losses if z.requires_grad else torch.where(rows == 1, torch.nan, losses)

    pgd = Pgd(budget=LINF, steps=2, step_size=0.01, direction="max", init="uniform", restarts=2)
    with pytest.raises(FloatingPointError, match="^row 1 of the batch: .* at the end of restart 0"):
        pgd.run(loss, pictures(3), draws=generator())


def test_a_picture_with_nan_is_named() -> None:
    x = pictures(3)
    x[1, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="^row 1 of the batch: .* at step 1 of 2"):
        Pgd(budget=LINF, steps=2, step_size=0.01, direction="max").run(cross_entropy(Smooth(), labels(3)), x)


def test_one_loss_a_picture() -> None:
    x, model = pictures(3), Smooth()
    pgd = Pgd(budget=LINF, steps=2, step_size=0.01, direction="max")
    with pytest.raises(ValueError, match=r'expected one loss a picture, \(3,\), got \(\): reduction="none"'):
        pgd.run(lambda z, rows: F.cross_entropy(model(z), labels(3)), x)


def test_bad_pictures_and_starts() -> None:
    pgd = Pgd(budget=LINF, steps=2, step_size=0.01, direction="max")
    with pytest.raises(TypeError, match="expected float pictures, got torch.uint8"):
        pgd.run(linear(pictures(2)), pixels(2))
    with pytest.raises(ValueError, match=r"x \(2, 3, 6, 6\) and start \(1, 3, 6, 6\)"):
        pgd.run(linear(pictures(2)), pictures(2), start=pictures(1))
    with pytest.raises(ValueError, match=r"x \(3, 6, 6\)$"):
        pgd.run(linear(pictures(2)), pictures(2)[0])


def test_no_pictures() -> None:
    x = pictures(0)
    assert CONFIGURATIONS["REM"].run(linear(x), x, draws=generator()).shape == (0, 3, 6, 6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_budget_of_nothing_takes_steps_of_nothing(norm: Literal["linf", "l2"]) -> None:
    x = pictures(2)
    pgd = Pgd(budget=Budget(norm, 0.0), steps=3, step_size=0.0, direction="max", init="uniform")
    assert not pgd.run(linear(x), x, draws=generator()).any()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"budget": Budget("l0", 1)}, 'norm "linf" or "l2", got "l0"'),
    ({"direction": "up"}, 'direction is "min" or "max", got \'up\''),
    ({"init": "ones"}, "init is"),
    ({"steps": -1}, "steps is at least 0, got -1"),
    ({"eot": 0}, "eot is at least 1, got 0"),
    ({"restarts": 0}, "restarts is at least 1, got 0"),
    ({"chunk": 0}, "chunk is at least 1, got 0"),
    ({"step_size": 0.0}, "step_size is a positive number, got 0.0 for 3 steps"),
    ({"step_size": -0.1}, "step_size is a positive number"),
    ({"step_size": math.nan}, "step_size is a positive number"),
    ({"box": (1.0, 0.0)}, "box is"),
    ({"restarts": 2}, "2 restarts need an init"),
    ({"eot": 2}, "2 copies would be equal"),
    ({"eot": 2, "inner": replace(INNER, init="zero")}, "2 copies would be equal"),
    ({"inner": CONFIGURATIONS["REM"]}, "an inner adversary has neither"),
    ({"inner": replace(INNER, restarts=2)}, "an inner adversary has neither"),
    ({"inner": replace(INNER, augmentation=CropFlip())}, "an inner adversary has neither"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    # replaced after the fact: a literal of another kind is caught by the type checker of the tests before it gets here
    pgd = Pgd(budget=LINF, steps=3, step_size=0.01, direction="min")
    for name, value in settings.items():
        object.__setattr__(pgd, name, value)
    with pytest.raises(ValueError, match=message):
        pgd.__post_init__()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_device_gives_what_the_cpu_gives(name: str) -> None:
    pgd, model, batch, y = CONFIGURATIONS[name], Smooth(), pixels(4), labels(4)
    expected = pgd.run(cross_entropy(model, y), to_float(batch).double(), draws=keyed(batch))
    model, y, batch = model.cuda(), y.cuda(), batch.cuda()
    found = pgd.run(cross_entropy(model, y), to_float(batch).double(), draws=keyed(batch))
    assert found.device.type == "cuda"
    assert torch.allclose(found.cpu(), expected, atol=1e-9)
