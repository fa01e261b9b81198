"""AR: autoregressive perturbations."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hf_unlearnable.budget import Budget
from hf_unlearnable.draws import Draws
from hf_unlearnable.images import Images, Labels
from hf_unlearnable.keys import Key, numpy_generator
from hf_unlearnable.poisons.base import Poison

_SMALL = 96
_BYTES_AT_ONCE = 2**25

# The search for coefficients.
_TRIALS = 3
_TRIAL_FIELD, _TRIAL_MARGIN = 36, 4
_LARGEST_NORM = 50.0
_PROCESSES_APART, _SMALL_RESPONSE, _LARGE_RESPONSE, _LATER_RESPONSE = 10, 10.0, 5.0, 3.0
_PATIENCE, _RELAXED = 5000, 0.8
_CANDIDATES = 1000
_FREQUENCIES = 64


@dataclass(frozen=True, kw_only=True)
class ArPoison(Poison):
    """Every picture gets a pattern of its class's process: x' = x + epsilon s / ||s||, s_i,j = sum_uv b_uv s_i-u,j-v.

    A pixel is foretold by the eight neighbours above and to its left (u, v = 0, 1, 2; b_00 = 0; in each colour channel
    the weights sum to 1). Two rows and two columns of N(0, 1) drawn for the picture start the process, which then runs
    without noise; its first rows and columns are dropped. The filter of a class answers its own patterns with 0.

    Args:
        norm: "l2", or "linf" (for which the paper calls the processes less suited).
        epsilon: the norm of every delta before clipping and rounding, on values in [0, 1]; None for
            sqrt(h w) / 32 ("l2": 1 at 32 x 32 pixels, 7 at 224 x 224) or 8/255 ("linf", in whole 255ths).

    Raises:
        ValueError: an unknown norm, or an epsilon that is no positive number (for "linf": from 1/255 to 1).

    Source: "Autoregressive Perturbations for Data Poisoning" and its code (METHODS 3).
    Deviations: the processes come from the official search, run under the key, not from the published list; a class
        has the same process however many classes follow it. The filters of the classes before it must answer a
        process's pattern with at least 10 for the first ten classes and 3 for later ones (official: 10 for ten
        classes, 3 for a hundred); after 5000 candidates in a row that fail, a fifth less is asked from then on.
        Pictures whose longer side is 96 pixels or more have processes of their own, of which it is also asked that
        they stay bounded on fields of any size (58 of 60 that the official search found for ten classes do not: most
        of their norm ends in the last rows and columns), and 5 in place of 10. The field is 4 rows and columns larger
        than a small picture and 2 larger than a large one (official: 4 at 32 and 96 pixels, 2 at 224).
    """

    name: ClassVar[str] = "ar"

    norm: Literal["l2", "linf"] = "l2"
    epsilon: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in ("l2", "linf"):
            raise ValueError(f'norm is "l2" or "linf", got {self.norm!r}')
        if self.epsilon is not None and not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(f"epsilon is a positive number, got {self.epsilon}")
        if self.norm == "linf" and self.epsilon is not None and not 1 / 255 - 1e-8 < self.epsilon <= 1:
            raise ValueError(f"an L-inf epsilon is at least 1/255 and at most 1, got {self.epsilon}")

    def budget_for(self, height: int, width: int) -> Budget:
        default = 8 / 255 if self.norm == "linf" else math.sqrt(height * width) / 32
        return Budget(self.norm, default if self.epsilon is None else self.epsilon)

    def coefficients(self, num_classes: int, *, large: bool = False) -> Float[Tensor, "n 3 3 3"]:
        """The weights of classes 0 to num_classes - 1, float64: class, channel, and the window with b[0, 0] last.

        The search takes about a second for ten classes (small pictures) and is kept in memory.
        """
        return torch.from_numpy(_coefficients(self.seed, num_classes, large).copy())

    def perturb(self, x: Images, y: Labels | None, draws: Draws) -> Images:
        if y is None:
            raise ValueError("expected labels, got none")
        height, width = x.shape[2:]
        large = max(height, width) >= _SMALL
        margin = 2 if large else 4
        rows, columns = height + margin, width + margin
        labels = y.cpu().numpy()
        weights = _coefficients(self.seed, 1 << max(4, int(labels.max()).bit_length()), large)
        starts = draws.normal(3, 2 * columns + 2 * (rows - 2), purpose="start").numpy()
        budget = self.budget_for(height, width)
        delta = np.empty((len(x), 3, height, width), dtype=np.float32)
        step = max(1, _BYTES_AT_ONCE // (3 * rows * columns * 8))
        for first in range(0, len(x), step):
            some = slice(first, first + step)
            fields = _fields(weights[labels[some]], starts[some], rows, columns)[:, :, margin:, margin:]
            delta[some] = _scaled(fields, budget)
        return x + torch.from_numpy(delta).to(x)


def _scaled(fields: np.ndarray, budget: Budget) -> np.ndarray:
    """Every row at the budget's norm; L-inf in whole 255ths, so that rounding keeps it."""
    flat = fields.reshape(len(fields), -1)
    if budget.norm == "linf":
        sizes, target = np.abs(flat).max(1), math.floor(budget.epsilon * 255 + 1e-6) / 255
    else:
        sizes, target = np.sqrt((flat * flat).sum(1)), budget.epsilon
    return (flat * (target / sizes)[:, None]).reshape(fields.shape)


def _fields(weights: np.ndarray, starts: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The fields (n, c, rows, columns) that weights (n, c, 3, 3) make of starts: two rows, then two columns below them.

    A pixel needs those above it, to its left, and both: the pixels of an anti-diagonal do not need each other, and are
    computed together for all n and c, by products and sums whose order is the same for every pixel.
    """
    count, channels = weights.shape[:2]
    field = np.empty((rows, columns, count * channels))
    lanes = starts.reshape(count * channels, -1).T
    field[:2] = lanes[: 2 * columns].reshape(2, columns, -1)
    field[2:, :2] = lanes[2 * columns :].reshape(rows - 2, 2, -1)
    window = np.ascontiguousarray(weights.reshape(count * channels, 9).T)[:8]
    distances = [(2 - u) * columns + 2 - v for u in range(3) for v in range(3)][:8]
    flat, stride = field.reshape(rows * columns, -1), columns - 1
    products = np.empty((min(rows, columns), count * channels))
    for diagonal in range(4, rows + columns - 1):
        top, bottom = max(2, diagonal - columns + 1), min(rows - 1, diagonal - 2)
        first = top * columns + diagonal - top
        end = first + (bottom - top) * stride + 1
        total, product = flat[first:end:stride], products[: bottom - top + 1]
        np.multiply(flat[first - distances[0] : end - distances[0] : stride], window[0], out=total)
        for distance, weight in zip(distances[1:], window[1:], strict=True):
            np.multiply(flat[first - distance : end - distance : stride], weight, out=product)
            np.add(total, product, out=total)
    return field.reshape(rows, columns, count, channels).transpose(2, 3, 0, 1)


@lru_cache(maxsize=32)
def _coefficients(key: Key, num_classes: int, large: bool) -> np.ndarray:
    return np.stack(list(islice(_search(key, large), num_classes)))


def _search(key: Key, large: bool) -> Iterator[np.ndarray]:
    """The processes (3, 3, 3) of class 0, 1, ...: the first candidates that the filters of those before tell apart."""
    filters = np.empty((0, 27))
    relaxed, in_vain = 1.0, 0
    for process, pattern in _bounded(key, large):
        if len(filters) >= _PROCESSES_APART:
            required = _LATER_RESPONSE
        else:
            required = _LARGE_RESPONSE if large else _SMALL_RESPONSE
        if _answer_at_least(required * relaxed, filters, pattern):
            foretelling = process.copy()
            foretelling[:, 2, 2] = -1
            filters = np.concatenate([filters, foretelling.reshape(1, 27)])
            in_vain = 0
            yield process
        else:
            in_vain += 1
            if in_vain == _PATIENCE:
                relaxed, in_vain = relaxed * _RELAXED, 0


def _answer_at_least(required: float, filters: np.ndarray, pattern: np.ndarray) -> bool:
    """Whether every filter's response to the pattern, the sum of relu(filter * pattern), is at least `required`."""
    windows = np.lib.stride_tricks.sliding_window_view(pattern, (3, 3), axis=(1, 2))
    windows = windows.transpose(0, 3, 4, 1, 2).reshape(27, -1)
    for first in range(0, len(filters), 32):
        if (np.maximum(filters[first : first + 32] @ windows, 0).sum(1) < required).any():
            return False
    return True


def _bounded(key: Key, large: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random processes (3, 3, 3) whose trial patterns keep the largest norm, each with its last pattern, at norm 1.

    Channels are drawn one by one and dropped as soon as they alone break a bound, which spares nearly all of the work
    and leaves the law of what remains as it is.
    """
    block = 0
    while True:
        generator = numpy_generator(key, ArPoison.name, "search", "large" if large else "small", block)
        block += 1
        channels = generator.standard_normal((_CANDIDATES, 3, 3))
        channels[:, 2, 2] = 0
        channels /= channels.sum((1, 2), keepdims=True)
        if large:
            channels = channels[_stay_bounded(channels)]
        squares = np.empty((0, len(channels)))
        patterns = np.empty((0, 0, 0))
        for _ in range(_TRIALS):
            starts = generator.standard_normal((len(channels), 1, 4 * _TRIAL_FIELD - 4))
            with np.errstate(over="ignore", invalid="ignore"):
                fields = _fields(channels[:, None], starts, _TRIAL_FIELD, _TRIAL_FIELD)
                patterns = fields[:, 0, _TRIAL_MARGIN:, _TRIAL_MARGIN:]
                squares = np.concatenate([squares, (patterns**2).sum((1, 2))[None]])
                kept = squares[-1] <= _LARGEST_NORM**2
            channels, patterns, squares = channels[kept], patterns[kept], squares[:, kept]
        whole = len(channels) // 3 * 3
        sums = squares[:, :whole].reshape(_TRIALS, -1, 3).sum(2)
        processes = channels[:whole].reshape(-1, 3, 3, 3)
        last = patterns[:whole].reshape(-1, 3, *patterns.shape[1:])
        for index in np.flatnonzero((sums <= _LARGEST_NORM**2).all(0)):
            yield processes[index], last[index] / math.sqrt(sums[-1, index])


def _stay_bounded(channels: np.ndarray) -> np.ndarray:
    """Whether the process of every channel (n, 3, 3) stays bounded on a field of any size (bool).

    Along a row the process is a recursion of order two. From row to row, so is each of its frequencies, with complex
    weights: it does not grow where the two roots lie in the unit circle (at frequency 0 one of them is 1).
    """
    near, far = channels[:, 2, 1], channels[:, 2, 0]
    along = (np.abs(far) < 1) & (np.abs(near) < 1 - far)
    waves = np.exp(-1j * np.pi * np.linspace(0, 1, _FREQUENCIES + 1))
    shifts = np.stack([waves**2, waves, np.ones_like(waves)])
    own = 1 - channels[:, 2] @ shifts
    above, above_that = (channels[:, 1] @ shifts) / own, (channels[:, 0] @ shifts) / own
    root = np.sqrt(above**2 + 4 * above_that)
    largest = np.maximum(np.abs(above + root), np.abs(above - root)) / 2
    return along & (largest <= 1 + 1e-9).all(1)
