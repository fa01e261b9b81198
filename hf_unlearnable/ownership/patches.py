"""LSP's patches in published pictures: the mean colours of the classes, and the vertices they are compared with."""

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float

from hf_unlearnable.images import Picture
from hf_unlearnable.ownership.evidence import ClassTest, Moments, Settled, Unprovable
from hf_unlearnable.poisons.lsp import LspPoison, _parts, _vertices

Size: TypeAlias = tuple[int, int]

_SMALL = 96
_RIDGE = 0.1
_MOST_VALUES = 3072


class PatchEvidence:
    """Mean patch colours of the classes: those of a class stand out towards its vertex c_y.

    With m_y the mean colours of a class less those of the other classes and C the covariance of single pictures'
    colours within classes (and a multiple of the identity), a vertex c has the score c^T C^-1 m_y.

    Raises:
        Unprovable: more patch colours than a covariance can be kept of.
    """

    def __init__(self, poison: LspPoison, original_size: Size | None) -> None:
        self._poison, self._original = poison, original_size
        self._found: dict[Size, Moments] = {}

    def add(self, pictures: Sequence[Picture], labels: Sequence[int]) -> None:
        sizes: dict[Size, list[int]] = {}
        for row, picture in enumerate(pictures):
            sizes.setdefault((picture.pixels.shape[1], picture.pixels.shape[2]), []).append(row)
        for size, rows in sizes.items():
            once, patch = self._as_made(size)
            down, across = _averages(size[0], once[0], patch), _averages(size[1], once[1], patch)
            grid = len(down), len(across)
            if 3 * math.prod(grid) > _MOST_VALUES:
                raise Unprovable(f"expected at most {_MOST_VALUES} patch colours a picture, got {3 * math.prod(grid)}")
            pixels = torch.stack([pictures[row].pixels for row in rows]).to(torch.float32).numpy() / 255
            colours = np.einsum("ih,bchw,jw->bijc", down, pixels, across, optimize=True)
            moments = self._found.setdefault(grid, Moments(3 * math.prod(grid)))
            moments.add(colours.reshape(len(rows), -1), [labels[row] for row in rows])

    def settle(self, poison: LspPoison) -> Settled:
        most = max(self._found, key=lambda grid: self._found[grid].rows, default=None)
        if most is None:
            return Settled(rows=0, labels=(), tests=())
        moments = self._found[most]
        return Settled(rows=moments.rows, labels=moments.labels, tests=_tests(poison, moments))

    def _as_made(self, size: Size) -> tuple[Size, int]:
        """The size of these pictures when they were made, and their patch."""
        once = self._original or size
        return once, self._poison.patch or (8 if min(once) < _SMALL else 32)


def _tests(poison: LspPoison, moments: Moments) -> Iterator[ClassTest]:
    labels, means = moments.labels, moments.means()
    precision = moments.precision(_RIDGE)
    vertices = _vertices(poison.seed, means.shape[1], 1 << max(labels).bit_length())[list(labels)]
    total = means.sum(0)
    for i, label in enumerate(labels):
        direction = precision @ (means[i] - (total - means[i]) / (len(labels) - 1))
        yield ClassTest(
            label=label,
            own=vertices[i],
            draw=lambda generator, count, taken=vertices[:i]: draw_vertices(generator, count, taken),
            score=lambda some, direction=direction: some @ direction,
            size=means.shape[1],
        )


def draw_vertices(
    generator: np.random.Generator, count: int, taken: Float[np.ndarray, "t f"]
) -> Float[np.ndarray, "n f"]:
    """Vertices (entries -1 and 1) of LSP's law, one a row: any but those taken by other classes, all as likely."""
    features = taken.shape[1]
    known = np.packbits(taken > 0, axis=1)
    bits = np.empty((count, features), dtype=np.uint8)
    waiting = np.arange(count)
    while len(waiting):
        packed = generator.integers(0, 256, (len(waiting), known.shape[1]), dtype=np.uint8)
        bits[waiting] = np.unpackbits(packed, axis=1, count=features)
        again = np.packbits(bits[waiting], axis=1)
        clash = np.zeros(len(waiting), dtype=bool)
        for other in known:
            clash |= (again == other).all(1)
        waiting = waiting[clash]
    return 2.0 * bits - 1


def _averages(now: int, once: int, patch: int) -> Float[np.ndarray, "n pixels"]:
    """What every pixel of a side of `now` pixels adds to the mean of every patch of that side when it had `once`."""
    ends = np.cumsum(_parts(once, patch)) * (now / once)
    starts = np.concatenate([[0.0], ends[:-1]])
    pixels = np.arange(now)
    shares = np.minimum(pixels + 1, ends[:, None]) - np.maximum(pixels, starts[:, None])
    shares = np.maximum(shares, 0)
    return (shares / shares.sum(1, keepdims=True)).astype(np.float32)
