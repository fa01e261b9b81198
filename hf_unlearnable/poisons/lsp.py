"""LSP: linearly separable synthetic perturbations."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch

from hf_unlearnable.budget import Budget
from hf_unlearnable.draws import Draws
from hf_unlearnable.images import Images, Labels
from hf_unlearnable.keys import Key, numpy_generator
from hf_unlearnable.poisons.base import Poison

_SMALL = 96


@dataclass(frozen=True, kw_only=True)
class LspPoison(Poison):
    """Every picture gets coloured patches from the cluster of its class: x' = x + R u / ||u||, u = up(z A_y + c_y).

    The clusters are those of scikit-learn's `make_classification`: z ~ N(0, I) is drawn for every picture, A_y with
    entries from U(-1, 1) and the centroid c_y, a vertex of a hypercube, for every class; no two classes share a
    vertex. The 3 * ceil(h / patch) * ceil(w / patch) values are the colours of the patches, which `up` enlarges and
    crops to the picture.

    Args:
        patch: width and height of a patch in pixels; None for 8 where a picture's shorter side is below 96 pixels,
            and 32 otherwise.
        l2_radius: R, the L2 norm of every delta before clipping and rounding, on values in [0, 1]; None for
            6/255 * sqrt(3 h w): 1.304 at 32 x 32 pixels, 9.129 at 224 x 224.
        class_sep: distance of the vertices from the origin along every axis, before scaling. Larger brings the
            pictures of a class closer together.

    Raises:
        ValueError: a patch below 1, a radius or class_sep that is no positive number; a label for which the patches
            have no vertex left.

    Source: "Availability Attacks Create Shortcuts", synthetic perturbations, and its code (METHODS 2).
    Deviations: every picture's point is drawn from the key and the picture, not in the order of the rows, so there is
        no need to count classes. A picture that is no whole number of patches has a colour for every patch it shows
        (the official code then has too few). All coordinates tell vertices apart, not the last 30. Rounds to the
        nearest level where the official code truncates.
    """

    name: ClassVar[str] = "lsp"
    pure: ClassVar[bool] = True

    patch: int | None = None
    l2_radius: float | None = None
    class_sep: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch is not None and self.patch < 1:
            raise ValueError(f"patch is a number of pixels, 1 or more, got {self.patch}")
        if self.l2_radius is not None and not (math.isfinite(self.l2_radius) and self.l2_radius > 0):
            raise ValueError(f"l2_radius is a positive number, got {self.l2_radius}")
        if not (math.isfinite(self.class_sep) and self.class_sep > 0):
            raise ValueError(f"class_sep is a positive number, got {self.class_sep}")

    def budget_for(self, height: int, width: int) -> Budget:
        radius = 6 / 255 * math.sqrt(3 * height * width) if self.l2_radius is None else self.l2_radius
        return Budget("l2", radius)

    def perturb(self, x: Images, y: Labels | None, draws: Draws) -> Images:
        if y is None:
            raise ValueError("expected labels, got none")
        height, width = x.shape[2:]
        patch = self.patch or (8 if min(height, width) < _SMALL else 32)
        heights, widths = _parts(height, patch), _parts(width, patch)
        z = draws.normal(3 * len(heights) * len(widths)).numpy()
        points = _points(self.seed, z, y.cpu().numpy(), self.class_sep).reshape(len(x), len(heights), len(widths), 3)
        areas = np.multiply.outer(heights, widths)[:, :, None]
        norms = np.sqrt((points**2 * areas).reshape(len(x), -1).sum(1))
        colours = points * (self.budget_for(height, width).epsilon / norms)[:, None, None, None]
        delta = np.repeat(np.repeat(colours.astype(np.float32), heights, axis=1), widths, axis=2)
        return x + torch.from_numpy(delta).to(x).permute(0, 3, 1, 2)


def _parts(length: int, patch: int) -> np.ndarray:
    """How many of `length` pixels every patch shows: all of its own, but for the last one."""
    return np.minimum(patch, length - np.arange(0, length, patch))


def _points(key: Key, z: np.ndarray, labels: np.ndarray, class_sep: float) -> np.ndarray:
    """z A_y + c_y for every row: a sum in a fixed order, so that no row depends on the others (a BLAS might)."""
    features = z.shape[1]
    points = np.empty_like(z)
    vertices = _vertices(key, features, 1 << int(labels.max()).bit_length())
    for label in np.unique(labels).tolist():
        rows = labels == label
        mixing = numpy_generator(key, LspPoison.name, "mixing", features, label).uniform(-1, 1, (features, features))
        own = np.ascontiguousarray(z[rows].T)
        total = np.zeros((rows.sum(), features))
        for coordinate, weights in zip(own, mixing, strict=True):
            total += coordinate[:, None] * weights
        points[rows] = total + class_sep * vertices[label]
    return points


@lru_cache(maxsize=32)
def _vertices(key: Key, features: int, count: int) -> np.ndarray:
    """Vertices (entries -1 and 1) of the first `count` classes, each drawn from those that no class before it has."""
    if features < 63 and count > 2**features:
        raise ValueError(
            f"expected labels below {2**features}: pictures of {features // 3} patches have no more vertices; "
            "choose a smaller patch"
        )
    taken: set[bytes] = set()
    vertices = np.empty((count, features))
    for label in range(count):
        generator = numpy_generator(key, LspPoison.name, "vertex", features, label)
        bits = generator.integers(0, 2, features)
        while bits.tobytes() in taken:
            bits = generator.integers(0, 2, features)
        taken.add(bits.tobytes())
        vertices[label] = 2 * bits - 1
    return vertices
