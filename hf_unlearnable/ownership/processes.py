"""AR's processes in published pictures: the spectra of the classes, and the decoys they are compared with."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hf_unlearnable.images import Picture
from hf_unlearnable.keys import Key, numpy_generator
from hf_unlearnable.ownership.evidence import ClassTest, Moments, Settled, Unprovable
from hf_unlearnable.poisons import ar
from hf_unlearnable.poisons.ar import ArPoison

Size: TypeAlias = tuple[int, int]

_SMALL = 96
_TILE = 16
_DARK = 1e-2  # added to a tile's mean power, by which it is divided: smooth tiles, where noise shows, count most
_RIDGE = 0.1
_TESTED = 6  # the search finds few decoys of later classes, and takes longer to
_MOST_CANDIDATES = 5000
_FIELDS, _SIDE, _MARGIN = 2, 32, 4  # what a process's spectrum is taken from
_AT_ONCE = 500
_MEAN_DRAWS = 300


class ProcessEvidence:
    """Mean power spectra of the classes, to which the right processes have added their own.

    Every picture is cut into overlapping tiles under a Hann window; the power of each channel at each frequency is
    divided by the tile's mean power. With d_y the mean of a class less that of the other classes, a process b has the
    score <d_y, phi> / |phi| with <u, v> = u^T C^-1 v, where phi is the spectrum of fields that b makes of the same two
    starts, less its mean over processes, and C the covariance of single pictures' spectra within classes and a multiple
    of the identity.

    A process is one of the search's candidates that the filters of the classes before it tell apart from their own.
    Given those, it is exchangeable with other candidates that pass the same test (at the same strictness, to which the
    key's search had come by then): these are the decoys of its class. Of later classes there are few, so that p-values
    are larger than uniform ones; the first six labels are tested, and the others only compared with.

    Raises:
        Unprovable: pictures that were resized, in which the processes have no meaning.
    """

    def __init__(self, original_size: Size | None) -> None:
        if original_size is not None:
            raise Unprovable("ar cannot be proved in resized pictures: a process is between neighbouring pixels")
        self._found: dict[bool, Moments] = {}

    def add(self, pictures: Sequence[Picture], labels: Sequence[int]) -> None:
        sizes: dict[Size, list[int]] = {}
        for row, picture in enumerate(pictures):
            sizes.setdefault((picture.pixels.shape[1], picture.pixels.shape[2]), []).append(row)
        for size, rows in sizes.items():
            if min(size) < _TILE:
                continue
            moments = self._found.setdefault(max(size) >= _SMALL, Moments(3 * len(_places())))
            step = max(1, 2**22 // (3 * size[0] * size[1]))
            for start in range(0, len(rows), step):
                some = rows[start : start + step]
                pixels = torch.stack([pictures[row].pixels for row in some]).to(torch.float32) / 255
                moments.add(_spectra(pixels, _DARK), [labels[row] for row in some])

    def settle(self, poison: ArPoison) -> Settled:
        most = max(self._found, key=lambda large: self._found[large].rows, default=None)
        if most is None:
            return Settled(rows=0, labels=(), tests=())
        moments = self._found[most]
        labels = moments.labels[:_TESTED]
        tests = _tests(poison, moments, labels, large=most)
        return Settled(rows=moments.rows, labels=labels, tests=tests, most_decoys=_MOST_CANDIDATES)


def _tests(poison: ArPoison, moments: Moments, labels: tuple[int, ...], *, large: bool) -> Iterator[ClassTest]:
    means, precision = moments.means(), moments.precision(_RIDGE)
    processes = poison.coefficients(labels[-1] + 1, large=large).numpy()
    levels = strictness(poison.seed, processes, large=large)
    filters = processes.copy()
    filters[:, :, 2, 2] = -1
    filters = filters.reshape(-1, 27)
    usual = _usual(large)
    for i, label in enumerate(labels):
        others = np.arange(len(means)) != i
        direction = precision @ (means[i] - means[others].mean(0))

        def score(some: np.ndarray, direction: np.ndarray = direction) -> np.ndarray:
            features = process_spectra(some) - usual
            lengths = np.sqrt(((features @ precision) * features).sum(1))
            return features @ direction / np.maximum(lengths, 1e-12)

        yield ClassTest(
            label=label,
            own=processes[label].reshape(27),
            draw=lambda generator, count, before=filters[:label], level=levels[label]: draw_processes(
                generator, count, before, level, large=large
            ),
            score=score,
            size=means.shape[1],
        )


def draw_processes(
    generator: np.random.Generator, count: int, before: Float[np.ndarray, "t 27"], level: float, *, large: bool
) -> Float[np.ndarray, "n 27"]:
    """Those of `count` candidates of AR's search that the filters `before` answer with at least `level`."""
    candidates = islice(ar._bounded(generator.bytes(32), large), count)
    kept = [process.reshape(27) for process, pattern in candidates if ar._answer_at_least(level, before, pattern)]
    return np.array(kept).reshape(-1, 27)


def strictness(key: Key, processes: Float[np.ndarray, "n 3 3 3"], *, large: bool) -> list[float]:
    """The least response that AR's search asked for when it took each of its first processes, replayed."""
    levels: list[float] = []
    relaxed, in_vain = 1.0, 0
    for process, _ in ar._bounded(key, large):
        if np.array_equal(process, processes[len(levels)]):
            first = ar._LARGE_RESPONSE if large else ar._SMALL_RESPONSE
            levels.append((first if len(levels) < ar._PROCESSES_APART else ar._LATER_RESPONSE) * relaxed)
            in_vain = 0
            if len(levels) == len(processes):
                break
        else:
            in_vain += 1
            if in_vain == ar._PATIENCE:
                relaxed, in_vain = relaxed * ar._RELAXED, 0
    return levels


def process_spectra(processes: Float[np.ndarray, "n 27"]) -> Float[np.ndarray, "n f"]:
    """The mean spectra of the fields, at norm 1, that every process makes of the same starts."""
    side = _SIDE + _MARGIN
    starts = numpy_generator(0, "ownership", "starts of fields").standard_normal((_FIELDS, 3, 4 * side - 4))
    spectra = np.zeros((len(processes), 3 * len(_places())))
    for first in range(0, len(processes), _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        weights = processes[some].reshape(-1, 3, 3, 3)
        for start in starts:
            same = np.broadcast_to(start, (len(weights), *start.shape))
            with np.errstate(over="ignore", invalid="ignore"):
                fields = ar._fields(weights, same, side, side)[:, :, _MARGIN:, _MARGIN:]
            fields = fields / np.sqrt((fields**2).sum((1, 2, 3), keepdims=True))
            spectra[some] += _spectra(torch.from_numpy(np.nan_to_num(fields)), None) / _FIELDS
    return spectra


@lru_cache(maxsize=2)
def _usual(large: bool) -> Float[np.ndarray, " f"]:
    """The mean of `process_spectra` over candidates that are the same for all keys."""
    generator = numpy_generator(0, "ownership", "mean of the processes")
    return process_spectra(draw_processes(generator, _MEAN_DRAWS, np.empty((0, 27)), 0.0, large=large)).mean(0)


@lru_cache(maxsize=1)
def _places() -> np.ndarray:
    """Half of the tile's frequencies (m, 2), without the mean: row (of any sign) and column (0 or more)."""
    top = _TILE // 2
    found = [(i, j) for j in range(top + 1) for i in range(1 - top, top + 1) if i > 0 or j > 0]
    return np.array([(i, j) for i, j in found if not (i < 0 and j in (0, top))])


def _spectra(x: Float[Tensor, "b 3 h w"], dark: float | None) -> Float[np.ndarray, "b f"]:
    """Mean power over tiles of every channel at every frequency; relative to each tile's mean where `dark` is given."""
    window = torch.hann_window(_TILE + 2, periodic=False, dtype=x.dtype)[1:-1]
    tiles = x.unfold(2, _TILE, _TILE // 2).unfold(3, _TILE, _TILE // 2)
    waves = torch.fft.rfft2((tiles - tiles.mean((-1, -2), keepdim=True)) * torch.outer(window, window))
    places = torch.from_numpy(_places())
    power = waves.abs().square()[..., places[:, 0], places[:, 1]]
    if dark is not None:
        power = power / (power.mean((1, 4), keepdim=True) + dark)
    return power.mean((2, 3)).flatten(1).to(torch.float64).numpy()
