"""Projected gradient descent: the one signed or normalised gradient loop of poisons and of adversarial training."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hf_unlearnable.augment import Augmentation, Draws
from hf_unlearnable.budget import Budget, normal_quantiles
from hf_unlearnable.environment import keep_freed_memory
from hf_unlearnable.networks import frozen

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(z, rows) -> (n,): one loss for every picture of z (n, c, h, w); rows (n,) are the rows of x that they come from."""

# How many steps' views are drawn ahead when they are keyed by row. It orders the numbers of a stream: another value
# changes the pixels of published poisons.
_STEPS_A_DRAW = 10


@runtime_checkable
class RowDraws(Protocol):
    """Randomness that belongs to the pictures, such as the `Draws` of a poison: a row's numbers are its own."""

    def uniform(self, *shape: int, purpose: str) -> Tensor:
        """Uniform numbers in [0, 1), (b, *shape): the same for equal pictures, shapes and purposes."""
        ...


Randomness: TypeAlias = RowDraws | torch.Generator | None


@dataclass(frozen=True, kw_only=True)
class Pgd:
    """Descent or ascent of a loss in the pixels, inside a budget and the box.

        g      = d/d(delta) 1/m sum_{k<=m} loss(a_k),   a_k = z_k + stopgrad(inner(z_k)),   z_k = t_k(x + delta)
        delta <- box(project(delta -+ step_size * direction(g)))          (- for "min", + for "max")

    with sign(g) or g / ||g|| as the direction, as the budget's norm has it. Projection comes before the box, and both
    also follow the start. x + delta then lies in the box and delta in an L-inf budget exactly ("l2": up to the rounding
    of a norm). Pixels of whole 255ths keep an L-inf budget of whole 255ths (`Budget.whole`) when they are published.

    `inner` is the adversary of robust methods: a Pgd of its own in the frame of the transformed picture z. What it adds
    is a constant for the gradient ("straight-through"). A single uniform draw is one without steps:

        Pgd(budget=Budget("linf", 4 / 255), steps=0, direction="max", init="uniform")

    One run costs steps * eot * (1 + inner.steps) forward-backward passes of a picture; several restarts add
    restarts * eot * inner.steps of them and restarts * eot forward passes. An epsilon of 0 costs none.

    Args:
        budget: "linf" or "l2".
        steps: how often delta moves; 0 leaves it at its start.
        step_size: length of a step in the budget's norm and unit, a fraction of the value range (0.8 / 255); 0 only
            in a budget of 0.
        direction: "min" or "max", what becomes of the loss.
        init: where delta starts: "zero"; "uniform" in the ball (`Budget.inside`); "normal", N(0, 1) * epsilon for every
            value, projected.
        box: the values that x + delta may take, or None for no bounds.
        augmentation: the random transformation t, differentiable where gradients are to flow; drawn anew for every
            picture, step and copy.
        eot: m, copies of a picture in the expectation over t and the inner adversary's start.
        inner: the inner adversary, with neither augmentation nor inner adversary nor restarts of its own.
        restarts: how many random starts; for every picture the delta with the best final loss is kept. That loss is
            the mean over m views which are the same for all restarts where randomness is keyed by row.
        chunk: the most pictures in one pass through the network, copies counted; None for all at once. It bounds
            memory and changes no draw.

    Raises:
        ValueError: a number outside its range, a norm of "l0", copies or restarts that could not differ.

    Source: Madry et al. 2018 (the loop); Athalye et al. 2018 (the expectation); METHODS 5 (EM), 6 (REM), 7 (MMM),
    8 (TAP), 9 (HYPO), 11 (EntF), 21 (adversarial training) and METHODS_NEW N2 (SEM) are this loop with other arguments.
    Deviations: delta itself is kept in the box after every step. REM, SEM and MMM project onto the budget alone and
    clip x + delta on its way into t, which stops the gradient of a pixel that has left the box: here it comes back.
    """

    budget: Budget
    steps: int
    step_size: float = 0.0
    direction: Literal["min", "max"]
    init: Literal["zero", "uniform", "normal"] = "zero"
    box: tuple[float, float] | None = (0.0, 1.0)
    augmentation: Augmentation | None = None
    eot: int = 1
    inner: "Pgd | None" = None
    restarts: int = 1
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.budget.norm == "l0":
            raise ValueError('expected a budget of norm "linf" or "l2", got "l0"')
        if self.direction not in ("min", "max"):
            raise ValueError(f'direction is "min" or "max", got {self.direction!r}')
        if self.init not in ("zero", "uniform", "normal"):
            raise ValueError(f'init is "zero", "uniform" or "normal", got {self.init!r}')
        for name, value, least in (
            ("steps", self.steps, 0),
            ("eot", self.eot, 1),
            ("restarts", self.restarts, 1),
            ("chunk", 1 if self.chunk is None else self.chunk, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is at least {least}, got {value}")
        still = self.step_size == 0 and self.steps > 0 and self.budget.epsilon > 0
        if not math.isfinite(self.step_size) or self.step_size < 0 or still:
            raise ValueError(f"step_size is a positive number, got {self.step_size} for {self.steps} steps")
        if self.box is not None and not self.box[0] < self.box[1]:
            raise ValueError(f"box is (lowest, highest) value, got {self.box}")
        if self.restarts > 1 and self.init == "zero":
            raise ValueError(f'{self.restarts} restarts need an init of "uniform" or "normal", got "zero"')
        if self.inner is not None and (
            self.inner.augmentation is not None or self.inner.inner is not None or self.inner.restarts > 1
        ):
            raise ValueError("an inner adversary has neither augmentation nor inner adversary nor restarts")
        if self.eot > 1 and self.augmentation is None and (self.inner is None or self.inner.init == "zero"):
            raise ValueError(f"{self.eot} copies would be equal: eot needs an augmentation or an inner random start")

    def run(
        self,
        loss: Loss,
        x: Tensor,
        *,
        model: nn.Module | None = None,
        start: Tensor | None = None,
        draws: Randomness = None,
    ) -> Float[Tensor, "b c h w"]:
        """The delta for every row of `x`, without a graph. `x` and `start` are left as they are.

        Works under `torch.no_grad()` and under autocast (delta keeps x's dtype). What a row is given does not depend
        on the others, as far as loss and model treat rows apart and `draws` is keyed by row.

        Args:
            loss: one loss for every picture, (z, rows) -> (n,), where z may hold several copies of a row:
                `lambda z, rows: F.cross_entropy(model(z), y[rows], reduction="none")`.
            x: float pictures (b, c, h, w) inside the box.
            model: what `loss` runs: in evaluation mode and with frozen parameters meanwhile, then as it was found.
                Pass the plain network, not its DistributedDataParallel wrapper.
            start: (b, c, h, w), where delta begins instead of at `init`, once projected; with restarts, the first one.
            draws: where the randomness comes from, if there is any: the `Draws` of a poison, so that what a row is
                given does not depend on its batch; or a generator (on any device) for training loops, so that it does.

        Raises:
            FloatingPointError: a gradient, or the final loss of a restart, is not finite; names the step and the row.
            TypeError: `x` is not of a float type.
            ValueError: `x` or `start` has another shape than (b, c, h, w), `loss` returns another shape than (n,), or
                there is randomness without `draws`.
        """
        if not x.is_floating_point():
            raise TypeError(f"expected float pictures, got {x.dtype}")
        if x.ndim != 4 or (start is not None and start.shape != x.shape):
            shapes = f"x {tuple(x.shape)}" + ("" if start is None else f" and start {tuple(start.shape)}")
            raise ValueError(f"expected pictures (b, c, h, w) and a start of that shape, got {shapes}")
        if x.device.type == "cpu":
            keep_freed_memory()
        x = x.detach()
        if len(x) == 0 or self.budget.epsilon == 0:
            return self._fence(x)(torch.zeros_like(x))
        flags: list[_Flag] = []
        with contextlib.nullcontext() if model is None else frozen(model), torch.enable_grad():
            delta = self._best(loss, x, start, draws, flags)
        _raise_if_broken(flags)
        return delta

    def _best(
        self,
        loss: Loss,
        x: Tensor,
        start: Tensor | None,
        draws: Randomness,
        flags: list["_Flag"],
    ) -> Tensor:
        choice: Draws = next(self._views(draws, len(x), "pgd views choice")) if self.restarts > 1 else {}
        best = lowest = x
        for restart in range(self.restarts):
            if start is None or restart > 0:
                start = self._start(draws, x.shape, x, f"pgd start {restart}")
            views = self._views(draws, len(x), f"pgd views {restart}") if self.steps > 0 else iter(())

            def gradient(x_adv: Tensor, step: int, views: Iterator[Draws] = views, restart: int = restart) -> Tensor:
                return self._objective(loss, x_adv, next(views), draws, f"{restart} {step}", differentiate=True)

            delta = self._move(gradient, x, start, flags, f" of restart {restart}" if self.restarts > 1 else "")
            if self.restarts == 1:
                return delta
            final = self._objective(loss, x + delta, choice, draws, "choice", differentiate=False)
            flags.append((f"at the end of restart {restart}", ~final.isfinite()))
            final = final if self.direction == "min" else -final
            if restart == 0:
                best, lowest = delta, final
            else:
                best = torch.where((final < lowest)[:, None, None, None], delta, best)
                lowest = torch.minimum(final, lowest)
        return best

    def _move(
        self,
        gradient: Callable[[Tensor, int], Tensor],
        x: Tensor,
        start: Tensor,
        flags: list["_Flag"],
        place: str = "",
    ) -> Tensor:
        """The loop itself."""
        fence = self._fence(x)
        delta = fence(start.detach().to(x))
        rate = self.step_size if self.direction == "max" else -self.step_size
        for step in range(self.steps):
            slope = gradient(x + delta, step)
            flags.append((f"at step {step + 1} of {self.steps}{place}", ~slope.isfinite().flatten(1).all(1)))
            delta = fence(delta.add_(self.budget.direction(slope), alpha=rate))
        return delta

    def _objective(
        self,
        loss: Loss,
        x_adv: Tensor,
        views: Draws,
        draws: Randomness,
        purpose: str,
        *,
        differentiate: bool,
    ) -> Tensor:
        """Every row's mean loss over its copies, or the gradient of that; NaN where the inner adversary met NaN."""
        count = len(x_adv)
        inner = self.inner if self.inner is not None and self.inner.budget.epsilon > 0 else None
        most = self.chunk or count * self.eot
        copies_at_once, rows_at_once = min(max(1, most // count), self.eot), min(most, count)
        total = torch.zeros_like(x_adv) if differentiate else x_adv.new_zeros(count)
        for first in range(0, self.eot, copies_at_once):
            copies = range(first, min(first + copies_at_once, self.eot))
            starts = None
            for top in range(0, count, rows_at_once):
                part = slice(top, min(top + rows_at_once, count))
                leaf = x_adv[part].detach().requires_grad_(differentiate)
                z = _repeat(leaf, len(copies))
                rows = _repeat(torch.arange(part.start, part.stop, device=x_adv.device), len(copies))
                if self.augmentation is not None:
                    some = {name: drawn[part, copies.start : copies.stop] for name, drawn in views.items()}
                    z = self.augmentation.apply(z, {name: drawn.flatten(0, 1) for name, drawn in some.items()})
                if inner is not None:
                    if starts is None:
                        shape, names = (count, *z.shape[1:]), [f"pgd inner {purpose} {copy}" for copy in copies]
                        starts = torch.stack([inner._start(draws, shape, z, name) for name in names], 1)
                    found, broken = inner._answer(loss, z.detach(), rows, starts[part].flatten(0, 1))
                    z = z + found
                    total[part][broken.view(-1, len(copies)).any(1)] = torch.nan
                losses = _each(loss, z, rows).view(-1, len(copies)).sum(1) / self.eot
                total[part].add_(torch.autograd.grad(losses.sum(), leaf)[0] if differentiate else losses.detach())
        return total

    def _answer(self, loss: Loss, z: Tensor, rows: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """As an inner adversary: what it adds to z, and which pictures had a gradient that is not finite."""

        def gradient(z_adv: Tensor, step: int) -> Tensor:
            leaf = z_adv.requires_grad_()
            return torch.autograd.grad(_each(loss, leaf, rows).sum(), leaf)[0]

        flags: list[_Flag] = []
        found = self._move(gradient, z, start, flags)
        none = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        return found, torch.stack([none, *(flag for _, flag in flags)]).any(0)

    def _fence(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Projection, then the box, of deltas around x; in a new tensor.

        The bounds are differences to x, so that neither rounding takes delta out of the budget nor x + delta out of a
        box of [0, 1].
        """
        if self.box is None:
            return self.budget.project
        below, above = self.box[0] - x, self.box[1] - x
        return lambda delta: self.budget.project(delta).clamp_(below, above)

    def _start(self, draws: Randomness, shape: Sequence[int], like: Tensor, purpose: str) -> Tensor:
        if self.init == "zero":
            return like.new_zeros(shape)
        uniform = _uniform(draws, shape, purpose)
        if self.init == "normal":
            delta = normal_quantiles(uniform) * self.budget.epsilon
        else:
            radius = uniform.new_zeros(shape[0])
            if self.budget.norm == "l2":
                radius = _uniform(draws, (shape[0], 1), f"{purpose} radius").flatten()
            delta = self.budget.inside(uniform, radius)
        return delta.to(like)

    def _views(self, draws: Randomness, count: int, purpose: str) -> Iterator[Draws]:
        """What the augmentation is given at one step after the other: tensors that begin with (count, eot)."""
        if self.augmentation is None:
            while True:
                yield {}
        if isinstance(draws, torch.Generator):
            while True:
                drawn = self.augmentation.draw(count * self.eot, generator=draws)
                yield {name: values.unflatten(0, (count, self.eot)) for name, values in drawn.items()}
        seeds = (_uniform(draws, (count, 1), purpose).double() * 2**53).long().flatten().tolist()
        streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        ahead = max(1, min(self.steps, _STEPS_A_DRAW))
        while True:
            each = [self.augmentation.draw(ahead * self.eot, generator=stream) for stream in streams]
            block = {name: torch.stack([drawn[name] for drawn in each]) for name in each[0]}
            for step in range(ahead):
                yield {name: drawn[:, step * self.eot : (step + 1) * self.eot] for name, drawn in block.items()}


_Flag: TypeAlias = tuple[str, Bool[Tensor, "b"]]


def _raise_if_broken(flags: Sequence[_Flag]) -> None:
    """One look at the device for the whole run."""
    if not flags:
        return
    found = torch.stack([flag for _, flag in flags]).nonzero()
    if len(found):
        when, row = found[0].tolist()
        rows = len(found[found[:, 0] == when])
        raise FloatingPointError(
            f"row {row} of the batch: expected a finite loss and gradient, got NaN or infinity {flags[when][0]} "
            f"({rows} of {len(flags[when][1])} rows)"
        )


def _uniform(draws: Randomness, shape: Sequence[int], purpose: str) -> Tensor:
    if draws is None:
        raise ValueError("a random start or augmentation needs draws: a poison's Draws, or a torch.Generator")
    if isinstance(draws, torch.Generator):
        return torch.rand(tuple(shape), generator=draws, device=draws.device)
    drawn = draws.uniform(*shape[1:], purpose=purpose)
    if len(drawn) != shape[0]:
        raise ValueError(f"expected draws for the {shape[0]} rows of x, got them for {len(drawn)}")
    return drawn


def _repeat(x: Tensor, copies: int) -> Tensor:
    """Copies of every row beside each other; a view where there is one."""
    return x if copies == 1 else x.unsqueeze(1).expand(-1, copies, *x.shape[1:]).flatten(0, 1)


def _each(loss: Loss, z: Tensor, rows: Tensor) -> Tensor:
    losses = loss(z, rows)
    if losses.shape != (len(z),):
        raise ValueError(f'expected one loss a picture, ({len(z)},), got {tuple(losses.shape)}: reduction="none"')
    return losses
