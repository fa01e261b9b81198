"""Adversarial training."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_unlearnable.budget import Budget
from hf_unlearnable.images import Images, Labels
from hf_unlearnable.pgd import Pgd


@dataclass(frozen=True)
class Adversarial:
    """AT: training on the worst pictures within a radius.

        min_f mean CE(f(x + delta), y),   delta = argmax_{||delta|| <= radius} CE(f(x + delta), y)

    delta is found in evaluation mode, from a random start, by steps in the norm's steepest direction; the step of f is
    on x + delta alone. A radius of 0 is plain training.

    Args:
        norm: "linf" or "l2" (Euclidean, over all values of a picture in [0, 1]).
        radius: of the ball, a fraction of the value range for "linf".
        pgd_steps: steps of the ascent.
        pgd_step_size: their length in the norm; None for radius / 5.

    Raises:
        ValueError: a radius outside its range, a step size that is not positive, fewer than no steps.

    Source: Madry et al. 2018; numbers, radius and order are those of REM's and MMM's repositories (METHODS 21).
    Deviations: "l2" starts at a uniform direction and a uniform length (there: a small cube).
    """

    name: ClassVar[str] = "adversarial"

    norm: Literal["linf", "l2"] = "linf"
    radius: float = 4 / 255
    pgd_steps: int = 10
    pgd_step_size: float | None = None

    def __post_init__(self) -> None:
        _ = self.pgd

    @property
    def pgd(self) -> Pgd | None:
        """The ascent."""
        budget = Budget(self.norm, self.radius)
        if self.radius == 0:
            return None
        size = self.radius / 5 if self.pgd_step_size is None else self.pgd_step_size
        return Pgd(budget=budget, steps=self.pgd_steps, step_size=size, direction="max", init="uniform")

    def __call__(
        self, model: nn.Module, x: Images, y: Labels, *, progress: float, generator: torch.Generator
    ) -> Tensor:
        if self.pgd is not None:

            def loss(z: Tensor, rows: Tensor) -> Tensor:
                return F.cross_entropy(model(z).float(), y[rows], reduction="none")

            x = x + self.pgd.run(loss, x, model=model, draws=generator)
        return F.cross_entropy(model(x), y)
