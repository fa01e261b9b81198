"""CUDA's Gaussian-mixture theory: what the Bayes rule of blurred data is worth on clean data, and a bound on it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from hf_unlearnable.keys import Key, torch_generator

BLOCK = 2**16  # numbers of an array, about: it stays in the processor's cache
Form: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def toeplitz(d: int, a: float) -> Float[Tensor, "d d"]:
    """CUDA's blur of d coordinates: the symmetric tridiagonal Toeplitz matrix T(d; a, 1, a), in float64.

    Args:
        a: the blur in [0, 1/2]; there the matrix is positive definite for every d.

    Raises:
        ValueError: d < 1, or a outside its range.

    Source: CUDA, section 3 (METHODS 1.1). Deviations: none.
    """
    _check(d, a)
    beside = torch.full((d - 1,), a, dtype=torch.float64)
    return torch.eye(d, dtype=torch.float64) + beside.diag(1) + beside.diag(-1)


def toeplitz_eigen(d: int, a: float) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"]]:
    """The eigenvectors and eigenvalues (descending) of `toeplitz`, in closed form: T = Q diag(D) Q.

        Q_ij = sqrt(2 / (d + 1)) sin(i j pi / (d + 1)),   D_i = 1 + 2 a cos(i pi / (d + 1)),   i, j = 1 to d

    Q is symmetric and orthogonal, and the same for every a.

    Raises:
        ValueError: d < 1, or a outside [0, 1/2].

    Source: CUDA, lemma 3 (METHODS 1.1). Deviations: none.
    """
    _check(d, a)
    i = torch.arange(1, d + 1, dtype=torch.float64)
    vectors = math.sqrt(2 / (d + 1)) * torch.sin(torch.outer(i, i) * (math.pi / (d + 1)))
    return vectors, 1 + 2 * a * torch.cos(i * (math.pi / (d + 1)))


def bayes_accuracy(mu: Sequence[float]) -> float:
    """The accuracy of the Bayes rule sign(mu^T x) of the clean mixture: Phi(||mu||), the best of all rules.

    Source: CUDA, lemma 1 (METHODS 1.1). Deviations: none.
    """
    return NormalDist().cdf(math.hypot(*mu))


def _check(d: int, *blurs: float) -> None:
    if d < 1:
        raise ValueError(f"expected at least one dimension, got {d}")
    if not all(0 <= a <= 0.5 for a in blurs):
        raise ValueError(f"a blur a lies in [0, 0.5], got {', '.join(map(str, blurs))}")


@dataclass(frozen=True)
class CleanAccuracy:
    """Shares of clean draws that a rule gets right; `standard_error` is that of the mean."""

    minus: float
    plus: float
    standard_error: float

    @property
    def mean(self) -> float:
        """tau: both classes are as frequent."""
        return (self.minus + self.plus) / 2


@dataclass(frozen=True)
class Mixture:
    """Two Gaussian classes, y = -1 and y = +1, each blurred by its own matrix, and the Bayes rule of the blurred data.

        x | y ~ N(y mu, I),   A_y = T(d; a_y, 1, a_y),   A_y x | y ~ N(y A_y mu, A_y^2)

    Args:
        mu: the mean of class +1; its length is d.
        a_minus: blur of class -1, in [0, 1/2].
        a_plus: blur of class +1, in [0, 1/2].

    Raises:
        ValueError: no dimension, a mean that is not finite, a blur outside its range.

    Source: CUDA, section 3 and lemma 2 (METHODS 1.1). Deviations: none.
    """

    mu: tuple[float, ...]
    a_minus: float
    a_plus: float

    def __post_init__(self) -> None:
        _check(len(self.mu), self.a_minus, self.a_plus)
        if not all(map(math.isfinite, self.mu)):
            raise ValueError(f"mu: expected finite numbers, got {self.mu}")

    def score(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """The Bayes rule P~ of the blurred data, in float64: above 0 for class +1.

            P~(x) = x^T A x + b^T x + c = 2 log( p(x | +1) / p(x | -1) )
            A = A_-1^-2 - A_1^-2,   b = 2 (A_-1^-1 + A_1^-1) mu,   c = 2 sum_i ( ln D_i(a_-1) - ln D_i(a_1) )

        Args:
            x: on the CPU.

        Raises:
            ValueError: x has other dimensions than mu.

        Source: CUDA, lemma 4 (METHODS 1.1). Deviations: none.
        """
        if x.shape[1] != len(self.mu):
            raise ValueError(f"expected points of {len(self.mu)} dimensions, got {x.shape[1]}")
        vectors, _, curvature, slope, constant = self._form()
        turned = x.double() @ vectors
        return turned.square() @ curvature + turned @ slope + constant

    def accuracy(self, draws: int, key: Key) -> CleanAccuracy:
        """The accuracy of P~ on clean draws, by Monte Carlo.

            tau = 1/2 Pr[P~(mu + z) > 0] + 1/2 Pr[P~(-mu - z) <= 0],   z ~ N(0, I)

        Both classes share the draws z, which the key settles: mixtures that differ in their blurs are compared on the
        same points, and swapping the blurs swaps the classes.

        Args:
            draws: how many a class, at least 2.

        Raises:
            ValueError: fewer than 2 draws.

        Source: METHODS 1.1. Deviations: none.
        """
        if draws < 2:
            raise ValueError(f"expected at least 2 draws, got {draws}")
        mu = torch.tensor(self.mu, dtype=torch.float64)
        generator = torch_generator(key, "gaussian mixture")
        minus, plus, both = 0, 0, 0
        block = max(1, BLOCK // len(mu))
        for start in range(0, draws, block):
            size = min(block, draws - start), len(mu)
            x = mu + torch.randn(size, generator=generator, dtype=torch.float64)
            negative, positive = self.score(-x) <= 0, self.score(x) > 0
            minus += int(negative.sum())
            plus += int(positive.sum())
            both += int((negative & positive).sum())
        mean = (minus + plus) / (2 * draws)
        square = (minus + plus + 2 * both) / (4 * draws)  # of a pair's share, which is 0, 1/2 or 1
        error = math.sqrt(max(0.0, square - mean**2) / (draws - 1))
        return CleanAccuracy(minus=minus / draws, plus=plus / draws, standard_error=error)

    def bound(self, points: int = 20_000) -> float:
        """An upper bound on the clean accuracy of P~ (Chernoff), the least over a grid of t.

            tau <= min_t p_1(t) + min_t p_2(t)
            p_1(t) = 1/2 |I - 2 t A|^-1/2 exp( t c_1 + t^2/2 b_1^T (I - 2 t A)^-1 b_1 ),   0 <= t < 1 / (2 lambda_max)
            b_1 = 2 A mu + b,   c_1 = mu^T A mu + b^T mu + c,   lambda_max the largest eigenvalue of A

        and p_2 the same for -A, b_2 = 2 A mu - b, c_2 = -mu^T A mu + b^T mu - c. Every t gives a bound, so that a
        coarse grid only makes it looser; t = 0 gives 1/2, so that it is never above 1. The least p_1 is below 1/2 if
        and only if c_1 + Tr A < 0, the least p_2 if and only if c_2 - Tr A < 0.

        Args:
            points: of the grid of t.

        Raises:
            ValueError: no point.

        Source: CUDA, lemma 5 and theorem 2, corrected as in METHODS 1.1.
        Deviations: the bound as printed is not here, because it is not one. Beside t it has -1/(4 ||b_y|| ||Lambda||)
            where the quadratic form in b_y belongs, so that it tends to 0 as the blurs become alike; p_2 has the
            determinant of p_1; t has no range. With d = 10, ||mu|| = 1 and both blurs 0.3 it says 0, and the accuracy
            is 0.84.
        """
        if points < 1:
            raise ValueError(f"expected at least one value of t, got {points}")
        _, mu, curvature, slope, constant = self._form()
        bent, straight = curvature @ mu.square(), slope @ mu
        plus = _tail(curvature, 2 * curvature * mu + slope, bent + straight + constant, points)
        minus = _tail(-curvature, 2 * curvature * mu - slope, straight - bent - constant, points)
        return plus + minus

    def _form(self) -> Form:
        """In the eigenbasis that both blurs share: the basis, mu, and A (its diagonal), b and c of P~."""
        vectors, minus = toeplitz_eigen(len(self.mu), self.a_minus)
        plus = toeplitz_eigen(len(self.mu), self.a_plus)[1]
        mu = vectors @ torch.tensor(self.mu, dtype=torch.float64)
        curvature, slope = minus**-2 - plus**-2, 2 * (1 / minus + 1 / plus) * mu
        return vectors, mu, curvature, slope, 2 * (minus.log().sum() - plus.log().sum())


def _tail(
    curvature: Float[Tensor, " d"], slope: Float[Tensor, " d"], constant: Float[Tensor, ""], points: int
) -> float:
    """The least 1/2 E exp(t Z) >= 1/2 Pr[Z > 0] over a grid of t; Z = z^T diag(curvature) z + slope^T z + constant."""
    steepest = float(curvature.max())
    if steepest <= 0:  # here only if both blurs act alike: then A = 0, E Z >= 0, and t = 0 is best
        return 0.5
    least = 0.0
    grid = torch.arange(points, dtype=torch.float64) / (2 * steepest * points)
    for t in grid[:, None].split(max(1, BLOCK // len(curvature))):
        bent = 2 * t * curvature
        quadratic = (t * slope).square() / (1 - bent)
        logs = (quadratic - torch.log1p(-bent)).sum(1) / 2 + t[:, 0] * constant
        least = min(least, float(logs.min()))
    return math.exp(least) / 2
