"""What was done to the pixels: published uint8 beside clean uint8, picture by picture."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hf_unlearnable.budget import Budget
from hf_unlearnable.images import Pixels

PSNR_CAP = 100.0
SSIM_WINDOW = 11
VALUES_AT_ONCE = 1_000_000
"""Values of pictures that are measured together: as many as a processor's caches hold."""


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
    x, y = clean.to(torch.float32), poisoned.to(torch.float32)
    mean_x, mean_y = _smooth(x), _smooth(y)
    squares, product = mean_x.square() + mean_y.square(), mean_x * mean_y
    variances = _smooth(x * x + y * y) - squares
    covariance = _smooth(x * y) - product
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * product + c1) * (2 * covariance + c2)
    return (top / ((squares + c1) * (variances + c2))).flatten(1).mean(1)


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
    _values: int = 0
    _at_bound: int = 0
    _clipped: int = 0
    _changed_values: int = 0

    def update(self, clean: Pixels, poisoned: Pixels, rows: list[int], budget: Budget | None = None) -> None:
        """Add pictures of one size; `rows` are their places in the split, `budget` is what was promised for them.

        Raises:
            ValueError: a row exceeds the budget; names it.
        """
        few = max(1, VALUES_AT_ONCE // clean[0].numel())
        for start in range(0, len(rows), few):
            part = slice(start, start + few)
            self._update(clean[part], poisoned[part], rows[part], budget)

    def _update(self, clean: Pixels, poisoned: Pixels, rows: list[int], budget: Budget | None) -> None:
        where = [f"row {row}" for row in rows]
        if budget is not None:
            budget.check(clean, poisoned, where)
            self._kept[budget] = self._kept.get(budget, 0) + len(rows)
        changed = poisoned != clean
        size = torch.maximum(poisoned, clean) - torch.minimum(poisoned, clean)
        exact = (poisoned.to(torch.int16) - clean.to(torch.int16)).double().flatten(1)
        length = exact.norm(dim=1)
        self._values += size.numel()
        self._changed_values += int(changed.count_nonzero())
        if budget is not None and budget.norm == "linf":
            self._at_bound += int((size == math.floor(budget.epsilon * 255 + 1e-6)).count_nonzero())
        at_an_end = poisoned + 1 < 2  # 255 + 1 is 0
        self._clipped += int((changed & at_an_end).count_nonzero())
        self._add("row", np.asarray(rows))
        self._add("linf_levels", size.flatten(1).amax(1).numpy())
        self._add("l2", (length / 255).numpy())
        self._add("l0_pixels", (changed[:, 0] | changed[:, 1] | changed[:, 2]).flatten(1).sum(1).numpy())
        self._add("mean_shift_levels", exact.mean(1).numpy())
        picked = [i for i, row in enumerate(rows) if row % self.perceptual_every == 0]
        if picked:
            self._add("psnr_db", _psnr(length[picked].square() / exact.shape[1]).numpy())
            self._add("perceptual_row", np.asarray(rows)[picked])
            small = min(clean.shape[2:]) < SSIM_WINDOW
            self._add("ssim", np.full(len(picked), np.nan) if small else ssim(clean[picked], poisoned[picked]).numpy())

    def summary(self) -> dict[str, Any]:
        """JSON values: for each measure mean, standard deviation, 5th and 95th percentile, least and largest.

        Raises:
            ValueError: nothing was added.
        """
        if not self._rows:
            raise ValueError("no pictures were measured")
        columns = self._in_order()
        rows, seen = columns.pop("row"), columns.pop("perceptual_row", np.empty(0, dtype=int))
        result: dict[str, Any] = {
            "rows": len(rows),
            "rows_changed": int((columns["linf_levels"] > 0).sum()),
            "perceptual_rows": len(seen),
            "values_changed": self._changed_values / self._values,
            "values_clipped": self._clipped / self._values,
            "ssim_variant": "wang: 11x11 Gaussian, sigma 1.5, valid region, mean of channels",
        }
        result["budgets"] = [{"norm": b.norm, "epsilon": b.epsilon, "kept_by_rows": n} for b, n in self._kept.items()]
        if any(budget.norm == "linf" for budget in self._kept):
            result["values_at_bound"] = self._at_bound / self._values
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
            "counts": np.array([self._values, self._at_bound, self._clipped, self._changed_values], dtype=np.int64),
            "budget_norm": np.array([budget.norm for budget, _ in budgets], dtype=np.str_),
            "budget_epsilon": np.array([budget.epsilon for budget, _ in budgets], dtype=np.float64),
            "budget_kept": np.array([kept for _, kept in budgets], dtype=np.int64),
        }

    def add(self, arrays: Mapping[str, np.ndarray], first: int = 0) -> None:
        """What another report of the same `perceptual_every` collected (`arrays`), its rows counted from `first`.

        The summary of reports added in the order of their rows is that of one report over all rows.
        """
        left = dict(arrays)
        values, at_bound, clipped, changed = left.pop("counts").tolist()
        self._values += values
        self._at_bound += at_bound
        self._clipped += clipped
        self._changed_values += changed
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
