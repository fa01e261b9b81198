"""Inverted filters: what a trainer makes of a few clean pictures that leaked."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hf_unlearnable.batches import Batches, stratified_rows
from hf_unlearnable.defenses.learned import LearnedDefense
from hf_unlearnable.draws import RandomNumbers
from hf_unlearnable.images import Images, Labels, to_float

_SMALL = 96


@dataclass(frozen=True, kw_only=True)
class FilterInversion(LearnedDefense):
    """A trainer who holds some clean pictures of every class beside their published ones, who supposes that a class was
    convolved with one filter and divided by its largest value, and who takes that back: the adaptive attack on CUDA.

        w_i = argmin_w ||x'_i - w * x_i||^2 for every pair,  s_y = mean_i w_i / max(w_i)
        z   = argmin_z ||s_y * z - x'||^2 + strength ||z||^2  by conjugate gradients,  x = z / largest(z)

    By what a picture was divided cannot be known from the published one: its own largest value (the 99.5th percentile)
    becomes 1. Pairs whose clean picture is black tell nothing and are left out.

    Args:
        pairs: leaked pictures of every class; all there are, where a class has fewer.
        kernel_size: k of the supposed filter; None for 3 where a picture's shorter side is below 96 pixels, else 9.
        strength: of the regularisation.
        iterations: of the conjugate gradients.

    Raises:
        ValueError: numbers out of their range; not fitted; in `fit_pairs`: other numbers of rows, sizes or labels
            beside each other, a class without a picture or with black ones alone.

    Source: METHODS_NEW P5, tier 3, and METHODS 25.7 (the least squares). Deviations: the papers give no inversion; its
    form, its regularisation and the number of iterations are ours.
    """

    name: ClassVar[str] = "filter-inversion"

    pairs: int = 1
    kernel_size: int | None = None
    strength: float = 1e-4
    iterations: int = 60

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs < 1 or self.iterations < 1 or not self.strength > 0:
            raise ValueError(
                f"expected positive pairs, iterations and strength, got {self.pairs}, {self.iterations} and "
                f"{self.strength}"
            )
        if self.kernel_size is not None and (self.kernel_size < 1 or self.kernel_size % 2 == 0):
            raise ValueError(f"kernel_size is odd and positive, got {self.kernel_size}")

    @property
    def needs_labels(self) -> bool:
        return True

    def fit(self, train: Batches, *, seed: int, progress: bool = False) -> Self:
        raise ValueError("filters are inverted by leaked pairs: call fit_pairs(published, clean, seed=...)")

    def fit_pairs(self, published: Batches, clean: Batches, *, seed: int) -> Self:
        """With the filters that the leaked rows tell; `seed` draws which rows leaked.

        Args:
            published, clean: the same rows in one order; of `clean`, only those that leaked are looked at.
        """
        if len(published) != len(clean) or published.image_size != clean.image_size:
            raise ValueError(
                f"expected the clean rows behind the published ones, got {len(clean)} of {clean.image_size} pixels "
                f"beside {len(published)} of {published.image_size}"
            )
        if published.classes != clean.classes or not torch.equal(published.labels, clean.labels):
            raise ValueError("expected the clean rows behind the published ones in their order, got other labels")
        k = self.kernel_size or (3 if min(published.image_size) < _SMALL else 9)
        filters = []
        leaked = leaked_rows(published.labels.cpu(), len(published.classes), self.pairs, seed)
        for label, rows in enumerate(leaked):
            if not len(rows):
                raise ValueError(f"expected pictures of every class, got none of class {published.classes[label]!r}")
            found = [filter_between(clean.pixels[row], published.pixels[row], k) for row in rows.tolist()]
            if not (telling := [one / one.max() for one in found if one.max() > 0]):
                name = published.classes[label]
                raise ValueError(
                    f"class {name!r}: expected leaked pictures that are not black, got none in {len(rows)}"
                )
            filters.append(torch.stack(telling).mean(0))
        return self.having_learnt({"filters": torch.stack(filters).float()}, clean)

    def alter(self, x: Images, y: Labels | None, draws: RandomNumbers) -> Images:
        known = self.known(x, y)
        assert y is not None
        found = torch.empty_like(x)
        for label in y.unique().tolist():
            rows = (y == label).nonzero()[:, 0]
            inverse = deconvolved(x[rows], known["filters"][label], strength=self.strength, iterations=self.iterations)
            largest = inverse.flatten(1).quantile(0.995, dim=1)[:, None, None, None]
            found[rows] = inverse / largest.clamp_min(1 / 255)
        return found


def leaked_rows(labels: Labels, classes: int, pairs: int, seed: int) -> list[Tensor]:
    """For every class, up to so many of its rows."""
    found = []
    for label in range(classes):
        rows = (labels == label).nonzero()[:, 0]
        few = min(pairs, len(rows))
        found.append(rows[stratified_rows(torch.zeros_like(rows), few, key=seed)] if few else rows)
    return found


def filter_between(clean: Tensor, published: Tensor, k: int) -> Float[Tensor, "k k"]:
    """The zero-padded k x k cross-correlation that makes most of one picture (uint8) of another: least squares over all
    pixels and channels, in float64."""
    x, target = (to_float(pixels).double().cpu() for pixels in (clean, published))
    windows = F.unfold(x[:, None], k, padding=k // 2).permute(0, 2, 1).reshape(-1, k * k)
    square, right = windows.t() @ windows, windows.t() @ target.reshape(-1)
    slight = 1e-9 * square.diagonal().mean().clamp_min(1e-12) * torch.eye(k * k, dtype=square.dtype)
    return torch.linalg.solve(square + slight, right).view(k, k)


def deconvolved(x: Images, kernel: Float[Tensor, "k k"], *, strength: float, iterations: int) -> Images:
    """argmin_z ||kernel * z - x||^2 + strength ||z||^2 for every picture, with zero padding."""

    def squared(planes: Tensor) -> Tensor:
        return planes.square().sum((1, 2, 3), keepdim=True)

    transposed = kernel.flip(0, 1)
    z, rest = torch.zeros_like(x), correlated(x, transposed)
    direction, size = rest.clone(), squared(rest)
    for _ in range(iterations):
        moved = correlated(correlated(direction, kernel), transposed).add_(direction, alpha=strength)
        step = size / (direction * moved).sum((1, 2, 3), keepdim=True).clamp_min(1e-20)
        z, rest = z + step * direction, rest - step * moved
        before, size = size, squared(rest)
        direction = rest + size / before.clamp_min(1e-20) * direction
    return z


def correlated(x: Images, kernel: Float[Tensor, "k k"]) -> Images:
    """Zero-padded cross-correlation of every plane: one multiply-add of the whole batch for each weight."""
    height, width, pad = *x.shape[2:], len(kernel) // 2
    padded, found = F.pad(x, (pad, pad, pad, pad)), torch.zeros_like(x)
    for row, weights in enumerate(kernel.tolist()):
        for column, weight in enumerate(weights):
            found.add_(padded[..., row : row + height, column : column + width], alpha=weight)
    return found
