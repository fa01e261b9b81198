"""What a test of ownership is made of: class by class, the key's parameters among decoys of the same law."""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from hf_unlearnable.images import Picture

_VALUES_AT_ONCE = 2**22
_NEARLY_EQUAL = 1e-6


class Unprovable(ValueError):
    """These pictures and this poison allow no proof without the clean pictures; says why."""


@dataclass(frozen=True, kw_only=True)
class ClassTest:
    """One class: what the key gives it, how decoys are drawn, and how well any such parameters fit the pictures.

    Args:
        label: of the class.
        own: the key's parameters.
        draw: `count` parameters of the law that the poison draws them from, one a row; or fewer, if how many does not
            depend on what the key gives to this class.
        score: one number a row, larger where the parameters fit better; it may look at the pictures and at what the
            key gives to the classes tested before, and at nothing else.
        size: how many values the score of one row takes, to cut decoys into blocks.
    """

    label: int
    own: Float[np.ndarray, " p"]
    draw: Callable[[np.random.Generator, int], Float[np.ndarray, "n p"]]
    score: Callable[[Float[np.ndarray, "n p"]], Float[np.ndarray, " n"]]
    size: int

    def rank(self, decoys: int, generator: np.random.Generator, bar: tqdm) -> "Rank":
        """The key's parameters among up to `decoys` others. Scores that agree to a millionth count as equal."""
        own = float(self.score(self.own[None])[0])
        drawn, better, best = 0, 0, -math.inf
        step = max(1, _VALUES_AT_ONCE // self.size)
        for start in range(0, decoys, step):
            count = min(step, decoys - start)
            scores = self.score(self.draw(generator, count))
            near = _NEARLY_EQUAL * max(abs(own), float(np.abs(scores).max(initial=0)))
            better += int((~(scores < own - near)).sum())  # what is no number counts for the decoys
            best = max(best, float(scores.max(initial=-math.inf)))
            drawn += len(scores)
            bar.update(count)
        return Rank(p_value=(1 + better) / (1 + drawn), own=own, best=best if drawn else own, decoys=drawn)


@dataclass(frozen=True, kw_only=True)
class Rank:
    """p = (1 + how many decoys score as high as the key) / (1 + decoys), the key's score and the best decoy's."""

    p_value: float
    own: float
    best: float
    decoys: int


class Evidence(Protocol):
    """Sums over the pictures, from which the tests of all classes follow."""

    def add(self, pictures: Sequence[Picture], labels: Sequence[int]) -> None:
        """Take in a batch of published pictures with the labels of protected classes."""
        ...

    def settle(self, poison: Any) -> "Settled":
        """What the pictures say of this key; the poison has the settings they were read for."""
        ...


@dataclass(frozen=True, kw_only=True)
class Settled:
    """How many pictures count, and the tests of their classes, in the order of the labels."""

    rows: int
    labels: tuple[int, ...]
    tests: Iterable[ClassTest]
    most_decoys: int = sys.maxsize


def combined(p_values: Sequence[float]) -> float:
    """Fisher's combination of independent p-values: the probability that n uniform numbers have so small a product.

        p = exp(-t) sum_{j < n} t^j / j!,   t = -sum_i ln p_i

    P-values of a rank test are at least as large as uniform ones, so that the result is never too small. What a float
    cannot hold is given as the smallest normal float.

    Source: Fisher, "Statistical Methods for Research Workers", section 21.1 (1932); the closed form is the tail of a
        Gamma distribution of whole shape. Deviations: none.
    """
    t = -sum(map(math.log, p_values))
    if t <= 0:
        return 1.0
    logs = [j * math.log(t) - math.lgamma(j + 1) for j in range(len(p_values))]
    top = max(logs)
    log = top - t + math.log(sum(math.exp(value - top) for value in logs))
    return min(1.0, max(math.exp(max(log, -745)), sys.float_info.min))


class Moments:
    """Weighted means of the rows of every class, and the covariance within classes, summed up batch by batch."""

    def __init__(self, features: int) -> None:
        self.rows = 0
        self._weights: dict[int, float] = {}
        self._sums: dict[int, Float[np.ndarray, " f"]] = {}
        self._squares = np.zeros((features, features))

    @property
    def labels(self) -> tuple[int, ...]:
        return tuple(sorted(self._sums))

    def add(
        self, values: Float[np.ndarray, "b f"], labels: Sequence[int], weights: Float[np.ndarray, " b"] | None = None
    ) -> None:
        weights = np.ones(len(values)) if weights is None else weights
        weighted = values * weights[:, None]
        self._squares += weighted.T @ values
        names = np.asarray(labels)
        for label in np.unique(names).tolist():
            own = names == label
            self._weights[label] = self._weights.get(label, 0.0) + float(weights[own].sum())
            self._sums[label] = self._sums.get(label, np.zeros(values.shape[1])) + weighted[own].sum(0)
        self.rows += len(values)

    def means(self) -> Float[np.ndarray, "k f"]:
        """Of the classes in the order of `labels`."""
        return np.stack([self._sums[label] / self._weights[label] for label in self.labels])

    def precision(self, ridge: float) -> Float[np.ndarray, "f f"]:
        """The inverse of the covariance within classes, after `ridge` mean variances are added to every variance."""
        means, weights = self.means(), np.array([self._weights[label] for label in self.labels])
        covariance = (self._squares - (means * weights[:, None]).T @ means) / weights.sum()
        variance = max(np.trace(covariance) / len(covariance), 1e-12)
        return np.linalg.inv(covariance + ridge * variance * np.eye(len(covariance)))
