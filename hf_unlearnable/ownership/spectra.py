"""CUDA's filters in published pictures: the spectra of the classes, and the decoys they are compared with."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float

from hf_unlearnable.images import Picture
from hf_unlearnable.keys import numpy_generator
from hf_unlearnable.ownership.evidence import ClassTest, Moments, Settled, Unprovable
from hf_unlearnable.poisons.cuda import CudaPoison

Size: TypeAlias = tuple[int, int]
Setting: TypeAlias = tuple[int, float, int, float, float]  # filter, blur, tile, and the scale of each axis

_SMALL = 96
_LEAST_TILE, _SMALL_TILE, _LARGE_TILE = 8, 20, 32
_LUMA = torch.tensor([0.299, 0.587, 0.114])
_DARK = 1e-6  # added to powers: a tenth of what rounding to 256 levels leaves
_FINE = 0.2  # cycles a pixel: pictures are weighted by their contrast above
_RIDGE, _UNKNOWN_WEIGHT = 2.0, 0.3
_MEAN_DRAWS = 4096


class FilterEvidence:
    """Mean log power spectra of the classes, which the right filters explain: log P_y = log|K_y|^2 + what is natural.

    Every picture's luma is cut into overlapping tiles under a Hann window; the logarithm of their mean power is taken
    frequency by frequency, and its mean over the class is weighted by the pictures' contrast. With d_y the spectrum of
    a class less that of the others (of which the filters of classes tested before have been taken out), a filter K has
    the score

        <d_y, phi> / |phi|,   phi = log|K|^2 - E log|K|^2,   <u, v> = u^T C^-1 v

    where C is the covariance of single pictures' spectra within classes and a multiple of the identity. The gain of
    the method (1 / max) and changes that befall all pictures alike fall out.

    Raises:
        Unprovable: a setting in which the key gives all classes the same filter.
    """

    def __init__(self, poison: CudaPoison, original_size: Size | None) -> None:
        if poison.mode == "universal":
            raise Unprovable(
                'mode="universal" gives every class the same filter: nothing to tell without clean pictures'
            )
        if poison.blur == 0 or poison.kernel_size == 1:
            raise Unprovable("with these settings no filter changes a picture")
        self._poison, self._original = poison, original_size
        self._found: dict[Setting, Moments] = {}

    def add(self, pictures: Sequence[Picture], labels: Sequence[int]) -> None:
        sizes: dict[Size, list[int]] = {}
        for row, picture in enumerate(pictures):
            sizes.setdefault((picture.pixels.shape[1], picture.pixels.shape[2]), []).append(row)
        for size, rows in sizes.items():
            setting, border = self._setting(size)
            if setting[2] < _LEAST_TILE:
                continue
            logs, contrasts = _log_spectra([pictures[row] for row in rows], setting, border)
            moments = self._found.setdefault(setting, Moments(logs.shape[1]))
            moments.add(logs, [labels[row] for row in rows], contrasts)

    def settle(self, poison: CudaPoison) -> Settled:
        most = max(self._found, key=lambda setting: self._found[setting].rows, default=None)
        if most is None:
            return Settled(rows=0, labels=(), tests=())
        moments = self._found[most]
        return Settled(rows=moments.rows, labels=moments.labels, tests=_tests(poison, moments, most))

    def _setting(self, size: Size) -> tuple[Setting, Size]:
        """How pictures of this size are read, and the pixels at each edge that zero padding has touched."""
        original = self._original or size
        small = min(original) < _SMALL
        k = self._poison.kernel_size or (3 if small else 9)
        blur = self._poison.blur if self._poison.blur is not None else (0.3 if small else 0.06)
        scales = size[0] / original[0], size[1] / original[1]
        border = math.ceil(k // 2 * scales[0]), math.ceil(k // 2 * scales[1])
        inner = min(size[0] - 2 * border[0], size[1] - 2 * border[1])
        return (k, blur, min(_SMALL_TILE if small else _LARGE_TILE, inner), *scales), border


def _tests(poison: CudaPoison, moments: Moments, setting: Setting) -> Iterator[ClassTest]:
    k, blur = setting[:2]
    waves, rate = _waves(setting), poison.poison_rate
    usual = _usual(setting)
    labels, precision = moments.labels, moments.precision(_RIDGE)
    which = [_filter_of(poison, label) for label in labels]
    filters = poison.filters(max(which) + 1, kernel_size=k, blur=blur).numpy().reshape(-1, k * k)[which]
    metric = precision.astype(np.float32)
    explained = moments.means() - rate * usual
    weights = np.full(len(labels), _UNKNOWN_WEIGHT)
    for i, label in enumerate(labels):
        others = np.arange(len(labels)) != i
        direction = precision @ (explained[i] - np.average(explained[others], axis=0, weights=weights[others]))

        def score(some: np.ndarray, direction: np.ndarray = direction) -> np.ndarray:
            features = _log_gains(some, waves) - usual
            lengths = np.sqrt(((features @ metric) * features).sum(1))
            return features @ direction.astype(np.float32) / np.maximum(lengths, 1e-12)

        yield ClassTest(
            label=label,
            own=filters[i],
            draw=lambda generator, count: draw_filters(generator, count, k, blur),
            score=score,
            size=len(usual),
        )
        explained[i] += rate * (usual - _log_gains(filters[i : i + 1], waves)[0])
        weights[i] = 1


def _filter_of(poison: CudaPoison, label: int) -> int:
    permuted = poison.mode == "permuted" and poison.num_classes is not None
    return (label + 1) % poison.num_classes if permuted else label  # type: ignore[operator]


@lru_cache(maxsize=32)
def _usual(setting: Setting) -> Float[np.ndarray, " f"]:
    """E log|K|^2 of CUDA's law, float32, by draws that are the same for all keys."""
    generator = numpy_generator(0, "ownership", "mean of the filters")
    return _log_gains(draw_filters(generator, _MEAN_DRAWS, *setting[:2]), _waves(setting)).mean(0)


def draw_filters(generator: np.random.Generator, count: int, k: int, blur: float) -> Float[np.ndarray, "n p"]:
    """Filters of CUDA's law, k * k weights a row: from U(0, blur), one of them, at a random place, 1."""
    filters = generator.uniform(0, blur, (count, k * k))
    filters[np.arange(count), generator.integers(0, k * k, count)] = 1
    return filters


def _log_gains(filters: Float[np.ndarray, "n p"], waves: tuple[np.ndarray, np.ndarray]) -> Float[np.ndarray, "n f"]:
    """log|K(f)|^2 of every filter, float32."""
    some = filters.astype(np.float32)
    return np.log((some @ waves[0]) ** 2 + (some @ waves[1]) ** 2 + np.float32(1e-3))


def _waves(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of the phase of every weight at every frequency, in pixels of the pictures as they were made."""
    k, _, tile, *scales = setting
    frequencies = _places(tile, *scales) / tile * np.array(scales)
    rows, columns = np.mgrid[:k, :k].reshape(2, -1)
    phases = 2 * np.pi * (np.outer(rows, frequencies[:, 0]) + np.outer(columns, frequencies[:, 1]))
    return np.cos(phases).astype(np.float32), np.sin(phases).astype(np.float32)


@lru_cache(maxsize=32)
def _places(tile: int, down: float, across: float) -> np.ndarray:
    """Half of the tile's frequencies (m, 2), in waves a tile: no mean, and none that enlarging has left empty."""
    top, low = tile // 2, -((tile - 1) // 2)
    found = [(i, j) for i in range(top + 1) for j in range(low, top + 1) if i > 0 or j > 0]
    twice = [(i, j) for i, j in found if j < 0 and i in (0, tile / 2)]
    kept = [(i, j) for i, j in found if (i, j) not in twice and max(i * down, abs(j) * across) <= tile / 2]
    return np.array(kept)


def _log_spectra(pictures: Sequence[Picture], setting: Setting, border: Size) -> tuple[np.ndarray, np.ndarray]:
    """log power (b, f) of pictures of one size, and the weight of each: the root of its power at fine scales."""
    _, _, tile, *scales = setting
    top, left = border
    pixels = torch.stack([picture.pixels for picture in pictures]).to(torch.float32) / 255
    luma = (pixels * _LUMA[:, None, None]).sum(1)[:, top : pixels.shape[2] - top, left : pixels.shape[3] - left]
    window = torch.hann_window(tile + 2, periodic=False)[1:-1]
    window = torch.outer(window, window)
    places = _places(tile, *scales)
    powers = np.empty((len(pictures), len(places)))
    step = max(1, 2**24 // (4 * luma[0].numel()))
    for start in range(0, len(pictures), step):
        tiles = luma[start : start + step].unfold(1, tile, max(1, tile // 2)).unfold(2, tile, max(1, tile // 2))
        waves = torch.fft.fft2((tiles - tiles.mean((-1, -2), keepdim=True)) * window)
        power = waves.abs().square().mean((1, 2)) / window.square().sum()
        powers[start : start + step] = power.numpy()[:, places[:, 0], places[:, 1]]
    fine = np.hypot(places[:, 0], places[:, 1]) > _FINE * tile
    return np.log(powers + _DARK), np.sqrt(powers[:, fine].mean(1) + _DARK)
