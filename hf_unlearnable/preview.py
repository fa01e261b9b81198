"""A picture of what was done: clean, poisoned and magnified difference for rows of several classes."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from hf_unlearnable.images import Picture

SHOWN = 256
"""Pixels of the shorter side (of the longer one, four times as many) that are enough for a preview."""


@dataclass(frozen=True)
class Pair:
    """One row before and after."""

    row: int
    class_name: str
    clean: Picture
    poisoned: Picture


def thinned(picture: Picture) -> Picture:
    """Of a picture that is larger than it would be shown, every n-th row and column, in memory of its own."""
    short, long = sorted(picture.pixels.shape[1:])
    step = max(1, short // SHOWN, long // (4 * SHOWN))
    alpha = picture.alpha
    return Picture(picture.pixels[:, ::step, ::step].clone(), None if alpha is None else alpha[::step, ::step].clone())


def draw(pairs: Sequence[Pair], path: str | Path, *, title: str) -> None:
    """A PNG with one column a row: clean, poisoned, and their difference, magnified around mid-grey.

    Raises:
        ValueError: no rows.
    """
    if not pairs:
        raise ValueError("a preview needs at least one row")
    magnify = _magnification(pairs)
    figure = Figure(figsize=(1.35 * len(pairs) + 1.1, 4.9), dpi=110, layout="constrained")
    axes = figure.subplots(3, len(pairs), squeeze=False)
    for column, pair in enumerate(pairs):
        before, after = pair.clean.pixels.int(), pair.poisoned.pixels.int()
        difference = (128 + magnify * (after - before)).clamp(0, 255)
        for axis, pixels in zip(axes[:, column], (before, after, difference), strict=True):
            axis.imshow(pixels.permute(1, 2, 0).to(torch.uint8).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        axes[0, column].set_title(f"{pair.class_name}\nrow {pair.row}", fontsize=8)
    for axis, name in zip(axes[:, 0], ("clean", "poisoned", f"difference\nx {magnify}"), strict=True):
        axis.set_ylabel(name, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(str(path))


def draw_published(pictures: Sequence[Picture], names: Sequence[str], *, title: str) -> bytes:
    """A PNG of published pictures alone: a clean picture beside its published one would give away what was added.

    Raises:
        ValueError: no pictures.
    """
    if not pictures:
        raise ValueError("a preview needs at least one row")
    figure = Figure(figsize=(1.35 * len(pictures) + 0.4, 2.2), dpi=110, layout="constrained")
    for axis, picture, name in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures, names, strict=True):
        axis.imshow(picture.pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(name, fontsize=8)
    figure.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _magnification(pairs: Sequence[Pair]) -> int:
    """The largest power of two, at most 16, that leaves 95 % of the differences inside the range of a picture."""
    sizes = torch.cat([(p.poisoned.pixels.float() - p.clean.pixels.float()).abs().flatten()[:1_000_000] for p in pairs])
    typical = float(sizes.sort().values[int(0.95 * (len(sizes) - 1))])
    return next((power for power in (16, 8, 4, 2) if power * typical <= 128), 1)
