"""Budgets: the norm that bounds a perturbation owns its distance, its projection and the check on published pixels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hf_unlearnable.images import Pixels


@dataclass(frozen=True)
class Budget:
    """A bound on delta for one picture.

    Args:
        norm: "linf" (largest change of any channel value), "l2" (Euclidean, over all channel values) or "l0" (number
            of pixels changed in any channel).
        epsilon: the bound; a fraction of the value range [0, 1] for "linf" (`8 / 255`) and "l2", pixels for "l0".
    """

    norm: Literal["linf", "l2", "l0"]
    epsilon: float

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2", "l0"):
            raise ValueError(f'norm is one of "linf", "l2", "l0", got {self.norm!r}')
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise ValueError(f"epsilon is a finite number, 0 or more, got {self.epsilon}")
        if self.norm == "linf" and self.epsilon > 1:
            raise ValueError(f"an L-inf epsilon is a fraction of the value range, such as 8/255, got {self.epsilon}")

    def distance(self, delta: Float[Tensor, "b c h w"]) -> Float[Tensor, "b"]:
        """The size of every row's delta in this norm."""
        if self.norm == "linf":
            return delta.flatten(1).abs().amax(1)
        if self.norm == "l2":
            return delta.flatten(1).norm(dim=1)
        return (delta != 0).any(1).flatten(1).sum(1).to(delta.dtype)

    def project(self, delta: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The nearest delta inside the budget ("l0": the pixels with the largest change are kept)."""
        if self.norm == "linf":
            return delta.clamp(-self.epsilon, self.epsilon)
        if self.norm == "l2":
            norms = self.distance(delta).clamp_min(torch.finfo(delta.dtype).tiny)
            return delta * (self.epsilon / norms).clamp_max(1)[:, None, None, None]
        sizes = delta.square().sum(1).flatten(1)
        keep = min(int(self.epsilon), sizes.shape[1])
        mask = torch.zeros_like(sizes).scatter_(1, sizes.topk(keep, dim=1).indices, 1)
        return delta * mask.view(delta.shape[0], 1, *delta.shape[2:])

    def direction(self, gradient: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Every row's steepest ascent of length 1 in this norm: sign(g) for "linf", g / ||g|| for "l2".

        Rows of zeros stay zeros, and "l2" neither under- nor overflows on gradients of extreme size.

        Raises:
            ValueError: the norm is "l0", which has none.
        """
        if self.norm == "linf":
            return gradient.sign()
        if self.norm == "l2":
            tiny = torch.finfo(gradient.dtype).tiny
            scaled = gradient / gradient.flatten(1).abs().amax(1).clamp_min(tiny)[:, None, None, None]
            return scaled / self.distance(scaled).clamp_min(tiny)[:, None, None, None]
        raise ValueError('steepest ascent is defined for "linf" and "l2", got "l0"')

    def inside(self, uniform: Float[Tensor, "b c h w"], radius: Float[Tensor, "b"]) -> Float[Tensor, "b c h w"]:
        """Random deltas inside the budget from uniform numbers in [0, 1).

        "linf": (2u - 1) * epsilon, uniform in the ball. "l2": a direction uniform on the sphere (from the normal
        quantiles of u) times radius * epsilon: uniform in its length, not in the volume. "linf" leaves `radius` unused.

        Raises:
            ValueError: the norm is "l0".
        """
        if self.norm == "linf":
            return (2 * uniform - 1) * self.epsilon
        if self.norm == "l2":
            return self.direction(normal_quantiles(uniform)) * (radius * self.epsilon)[:, None, None, None]
        raise ValueError('random deltas are defined for "linf" and "l2", got "l0"')

    def whole(self) -> "Budget":
        """The budget that published pixels are held to: "linf" rounded down to whole 255ths, as `check` counts them.

        A delta inside it, added to pixels of whole 255ths, is still inside after rounding to the nearest.
        """
        return Budget("linf", math.floor(self.epsilon * 255 + 1e-6) / 255) if self.norm == "linf" else self

    def slack(self, values: int) -> float:
        """What rounding to whole 255ths may add to the size of a delta of so many channel values.

        It moves each by at most half a level, which "l2" is granted: 0.5/255 * sqrt(3 h w); "linf" and "l0" get none.
        """
        return 0.5 / 255 * math.sqrt(values) if self.norm == "l2" else 0.0

    def check(self, clean: Pixels, poisoned: Pixels, where: Sequence[str] | None = None) -> None:
        """That published uint8 pixels keep the budget, in whole 255ths for "linf".

        What rounding adds is granted (`slack`). `where` names the rows in errors.

        Raises:
            ValueError: some row exceeds it; names the first one, what was allowed and what was found.
        """
        difference = poisoned.to(torch.int16) - clean.to(torch.int16)
        if self.norm == "linf":
            found = difference.abs().flatten(1).amax(1).float()
            allowed = math.floor(self.epsilon * 255 + 1e-6)
            unit = "/255"
        elif self.norm == "l2":
            found = difference.float().flatten(1).norm(dim=1) / 255
            allowed = self.epsilon + self.slack(difference[:1].numel())
            unit = ""
        else:
            found = self.distance(difference.float())
            allowed = self.epsilon
            unit = " pixels"
        over = (found > allowed + 1e-6).nonzero().flatten().tolist()
        if over:
            first = where[over[0]] if where else f"row {over[0]} of the batch"
            raise ValueError(
                f"{first}: expected {self.norm} of at most {allowed:g}{unit}, "
                f"got {found[over[0]].item():g}{unit} ({len(over)} of {len(found)} rows exceed it)"
            )


def normal_quantiles(uniform: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Standard normal numbers from uniform ones in [0, 1); never infinite (at most 5.5 in size)."""
    return torch.special.ndtri(uniform.clamp(2**-25, 1 - 2**-24))
