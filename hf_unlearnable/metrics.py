"""What was done to the pixels: published uint8 beside clean uint8, picture by picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hf_unlearnable.budget import Budget
from hf_unlearnable.images import Images, Pixels, in_threads

_BLOCK, _LEAST_ROWS = 3072, 64
PSNR_CAP = 100.0
SSIM_WINDOW = 11
VALUES_AT_ONCE, SSIM_VALUES_AT_ONCE = 1_000_000, 200_000
"""Values of pictures that are measured together: as many as caches hold with what is made of them."""


def psnr(clean: Pixels, poisoned: Pixels) -> Float[Tensor, "b"]:
    """Peak signal-to-noise ratio of every picture in dB, 10 log10(255^2 / MSE); 100 for identical pictures.

    Source: METHODS_NEW N40. Deviations: none.
    """
    return _psnr((poisoned.double() - clean.double()).square().flatten(1).mean(1))


def _psnr(error: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
    return (10 * torch.log10(255.0**2 / error)).clamp_max(PSNR_CAP)


def ssim(clean: Pixels, poisoned: Pixels) -> Float[Tensor, "b"]:
    """Structural similarity of every picture (Wang's form), the mean over channels and the valid region.

    11 x 11 Gaussian window of sigma 1.5, population covariance, K1 = 0.01, K2 = 0.03, data range 255.

    Raises:
        ValueError: pictures smaller than the window.

    Source: METHODS_NEW N40 ("wang"). Deviations: none.
    """
    if min(clean.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {SSIM_WINDOW} pixels a side, got {tuple(clean.shape[2:])}")
    few = max(1, SSIM_VALUES_AT_ONCE // clean[0].numel())
    return torch.cat([_ssim(x, y) for x, y in zip(clean.split(few), poisoned.split(few), strict=True)])


def _ssim(clean: Pixels, poisoned: Pixels) -> Float[Tensor, "b"]:
    """A band of rows after the other: of a photograph, all of it in float32 would take gigabytes."""
    height, width = clean.shape[2] - SSIM_WINDOW + 1, clean.shape[3]
    rows = max(_LEAST_ROWS, SSIM_VALUES_AT_ONCE // (3 * width))
    total = torch.zeros(len(clean), dtype=torch.float64, device=clean.device)
    for start in range(0, height, rows):
        count = min(rows, height - start)
        x, y = (some[:, :, start : start + count + SSIM_WINDOW - 1].float() for some in (clean, poisoned))
        total += _similarity(x, y).flatten(1).mean(1).double() * (count / height)
    return total.float()


def _similarity(x: Images, y: Images) -> Float[Tensor, "b c h2 w2"]:
    mean_x, mean_y = _smooth(x), _smooth(y)
    squares, product = mean_x.square() + mean_y.square(), mean_x * mean_y
    variances = _smooth(x * x + y * y) - squares
    covariance = _smooth(x * y) - product
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * product + c1) * (2 * covariance + c2)
    return top / ((squares + c1) * (variances + c2))


def _smooth(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
    """The windows' means, along one axis after the other: a multiply-add of whole arrays for each of its 11 weights."""
    offsets = torch.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    weights = (window / window.sum()).tolist()
    for axis in (3, 2):
        places = x.shape[axis] - SSIM_WINDOW + 1
        total = x.narrow(axis, 0, places) * weights[0]
        for start in range(1, SSIM_WINDOW):
            total.add_(x.narrow(axis, start, places), alpha=weights[start])
        x = total
    return x


@dataclass
class PixelReport:
    """Collects what was done to the pixels, batch by batch; memory grows by a few numbers a row.

    Args:
        perceptual_every: PSNR and SSIM are measured on every n-th row (the rest on all rows).
    """

    perceptual_every: int = 1
    _rows: dict[str, list[np.ndarray]] = field(default_factory=dict)
    _kept: dict[Budget, int] = field(default_factory=dict)
    _counts: np.ndarray = field(default_factory=lambda: np.zeros(4, dtype=np.int64))
    """Values in all; those at a bound in L-inf, changed to an end of the range, changed."""

    def update(
        self, clean: Sequence[Tensor], poisoned: Sequence[Tensor], rows: list[int], budget: Budget | None = None
    ) -> None:
        """Add pictures of one size, in threads.

        Args:
            clean, poisoned: uint8 pictures of shape (3, height, width).
            rows: their places in the split.
            budget: what was promised for them.

        Raises:
            ValueError: a row exceeds the budget; names it.
        """
        few = max(1, VALUES_AT_ONCE // clean[0].numel())
        parts = [slice(start, start + few) for start in range(0, len(rows), few)]
        if budget is not None:
            self._kept[budget] = self._kept.get(budget, 0) + len(rows)

        def measured(part: slice) -> tuple[dict[str, np.ndarray], np.ndarray]:
            return self._measured(_together(clean[part]), _together(poisoned[part]), rows[part], budget)

        for columns, counts in in_threads(measured, parts):
            self._counts += counts
            for name, column in columns.items():
                self._add(name, column)

    def _measured(
        self, clean: Pixels, poisoned: Pixels, rows: list[int], budget: Budget | None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The measures of each row, and what `_counts` counts."""
        if budget is not None:
            budget.check(clean, poisoned, [f"row {row}" for row in rows])
        old, new = clean.flatten(1).numpy(), poisoned.flatten(1).numpy()
        changed = old != new
        size = np.maximum(old, new)
        size -= np.minimum(old, new)
        squares = size.astype(np.uint16)
        squares *= squares
        error = _row_sums(squares)
        pixels = changed.reshape(len(rows), 3, -1)
        columns = {
            "row": np.asarray(rows),
            "linf_levels": size.max(1),
            "l2": np.sqrt(error) / 255,
            "l0_pixels": np.array([np.count_nonzero(row) for row in pixels[:, 0] | pixels[:, 1] | pixels[:, 2]]),
            "mean_shift_levels": (_row_sums(new) - _row_sums(old)) / new.shape[1],
        }
        at_an_end = new + np.uint8(1) < 2  # 255 + 1 is 0
        bound = math.floor(budget.epsilon * 255 + 1e-6) if budget is not None and budget.norm == "linf" else None
        counts = [
            size.size,
            0 if bound is None else np.count_nonzero(size == bound),
            np.count_nonzero(changed & at_an_end),
            np.count_nonzero(changed),
        ]
        picked = [i for i, row in enumerate(rows) if row % self.perceptual_every == 0]
        if picked:
            columns["perceptual_row"] = columns["row"][picked]
            columns["psnr_db"] = _psnr(torch.from_numpy(error[picked] / new.shape[1])).numpy()
            small = min(clean.shape[2:]) < SSIM_WINDOW
            columns["ssim"] = np.full(len(picked), np.nan) if small else ssim(clean[picked], poisoned[picked]).numpy()
        return columns, np.array(counts, dtype=np.int64)

    def summary(self) -> dict[str, Any]:
        """JSON values: for each measure mean, standard deviation, 5th and 95th percentile, least and largest.

        Raises:
            ValueError: nothing was added.
        """
        if not self._rows:
            raise ValueError("no pictures were measured")
        columns = self._in_order()
        values, at_bound, clipped, changed = self._counts.tolist()
        rows, seen = columns.pop("row"), columns.pop("perceptual_row", np.empty(0, dtype=int))
        result: dict[str, Any] = {
            "rows": len(rows),
            "rows_changed": int((columns["linf_levels"] > 0).sum()),
            "perceptual_rows": len(seen),
            "values_changed": changed / values,
            "values_clipped": clipped / values,
            "ssim_variant": "wang: 11x11 Gaussian, sigma 1.5, valid region, mean of channels",
        }
        result["budgets"] = [{"norm": b.norm, "epsilon": b.epsilon, "kept_by_rows": n} for b, n in self._kept.items()]
        if any(budget.norm == "linf" for budget in self._kept):
            result["values_at_bound"] = at_bound / values
        for name, values in columns.items():
            result[name] = _spread(values)
        if len(seen):
            order = np.argsort(columns["psnr_db"], kind="stable")[:16]
            result["worst_rows_by_psnr"] = seen[order].tolist()
        return result

    def arrays(self) -> dict[str, np.ndarray]:
        """All that was collected, as arrays for a file (without pickle); `add` takes it back."""
        budgets = list(self._kept.items())
        return {
            **self._in_order(),
            "counts": self._counts.copy(),
            "budget_norm": np.array([budget.norm for budget, _ in budgets], dtype=np.str_),
            "budget_epsilon": np.array([budget.epsilon for budget, _ in budgets], dtype=np.float64),
            "budget_kept": np.array([kept for _, kept in budgets], dtype=np.int64),
        }

    def add(self, arrays: Mapping[str, np.ndarray], first: int = 0) -> None:
        """What another report of the same `perceptual_every` collected (`arrays`), its rows counted from `first`.

        The summary of reports added in the order of their rows is that of one report over all rows.
        """
        left = dict(arrays)
        self._counts += left.pop("counts")
        budgets = zip(left.pop("budget_norm"), left.pop("budget_epsilon"), left.pop("budget_kept"), strict=True)
        for norm, epsilon, kept in budgets:
            budget = Budget(norm=str(norm), epsilon=float(epsilon))  # type: ignore[arg-type]
            self._kept[budget] = self._kept.get(budget, 0) + int(kept)
        for name, column in left.items():
            self._add(name, column + first if name in ("row", "perceptual_row") else column)

    def _in_order(self) -> dict[str, np.ndarray]:
        """Every measure in the order of the rows, however they were batched."""
        columns = {name: np.concatenate(parts) for name, parts in self._rows.items()}
        perceptual = {"perceptual_row", "psnr_db", "ssim"}
        orders = {
            name: np.argsort(columns[name], kind="stable") for name in ("row", "perceptual_row") if name in columns
        }
        return {
            name: values[orders["perceptual_row" if name in perceptual else "row"]] for name, values in columns.items()
        }

    def _add(self, name: str, values: np.ndarray) -> None:
        self._rows.setdefault(name, []).append(values)


def _together(pictures: Sequence[Tensor]) -> Pixels:
    return pictures[0][None] if len(pictures) == 1 else torch.stack(list(pictures))


def _row_sums(values: np.ndarray) -> np.ndarray:
    """The sum over each row of numbers of at most 16 bits, int64; faster in 32 bits, as far as these hold it."""
    whole = values.shape[1] // _BLOCK * _BLOCK
    blocks = values[:, :whole].reshape(len(values), -1, _BLOCK).sum(2, dtype=np.uint32)
    return blocks.sum(1, dtype=np.int64) + values[:, whole:].sum(1, dtype=np.int64)


def _spread(values: np.ndarray) -> dict[str, float] | None:
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.percentile(values, [5, 95])
    return {
        "mean": float(values.mean()),
        "sd": float(values.std()),
        "p5": float(low),
        "p95": float(high),
        "least": float(values.min()),
        "largest": float(values.max()),
    }
