"""A (q, eta)-learnability certificate: how well weights near a surrogate's can do, smoothed over Gaussian noise."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_unlearnable.keys import Key, torch_generator

NORMAL = NormalDist()


def quantile_index(
    draws: int, *, eta: float, quantile: float = 0.9, sigma: float = 0.25, confidence: float = 0.99
) -> int | None:
    """Which of the ascending accuracies bounds the quantile (from 1); None where none does: abstain.

        q' = Phi(Phi^-1(q) + eta / sigma);   k* = min { k >= ceil(q' N) : P[Bin(N, q') <= k - 1] > c }

    Args:
        draws: N, how many noisy weights were drawn.
        eta: L2 radius of the weights.
        quantile: q in (0, 1).
        sigma: standard deviation of the noise on every weight.
        confidence: c in (0, 1).

    Raises:
        ValueError: a number outside its range.

    Source: METHODS_NEW N44. Deviations: none.
    """
    _check(draws, quantile, sigma, confidence)
    if not eta >= 0:
        raise ValueError(f"eta is at least 0, got {eta}")
    shifted = NORMAL.cdf(NORMAL.inv_cdf(quantile) + eta / sigma)
    if shifted >= 1:
        return None
    k = torch.arange(1, draws + 1, dtype=torch.float64)
    at_most = _log_binomial(draws, shifted).logcumsumexp(0)[:-1]  # of k - 1
    enough = (k >= math.ceil(shifted * draws)) & (at_most > math.log(confidence))
    return int(enough.nonzero()[0]) + 1 if bool(enough.any()) else None


def _log_binomial(draws: int, p: float) -> Float[Tensor, " n"]:
    """log P[Bin(draws, p) = k] for k = 0 to draws."""
    k = torch.arange(draws + 1, dtype=torch.float64)
    ratios = torch.log(draws + 1 - k[1:]) - torch.log(k[1:])
    ways = torch.cat([torch.zeros(1, dtype=torch.float64), ratios.cumsum(0)])
    return ways + k * math.log(p) + (draws - k) * math.log1p(-p)


def largest_eta(draws: int, *, quantile: float = 0.9, sigma: float = 0.25, confidence: float = 0.99) -> float | None:
    """The radius below which something is certified; None where there is none.

        eta = sigma (Phi^-1((1 - c)^(1/N)) - Phi^-1(q))

    The bound is open: at the radius itself, in exact arithmetic, one abstains.

    Raises:
        ValueError: a number outside its range.

    Source: METHODS_NEW N44. Deviations: none.
    """
    _check(draws, quantile, sigma, confidence)
    eta = sigma * (NORMAL.inv_cdf((1 - confidence) ** (1 / draws)) - NORMAL.inv_cdf(quantile))
    return eta if eta > 0 else None


def _check(draws: int, quantile: float, sigma: float, confidence: float) -> None:
    if draws < 1 or not sigma > 0:
        raise ValueError(f"expected at least one draw and a positive sigma, got draws={draws} and sigma={sigma}")
    if not 0 < quantile < 1 or not 0 < confidence < 1:
        raise ValueError(f"quantile and confidence lie in (0, 1), got {quantile} and {confidence}")


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The accuracies of noisy weights, from which `bound` reads what is certified.

    Args:
        accuracies: ascending.
        unperturbed: the accuracy without noise.
        sigma: standard deviation of the noise on every weight.
        quantile: q.
        confidence: c, for one radius; over several radii together it is less.
    """

    accuracies: tuple[float, ...]
    unperturbed: float
    sigma: float
    quantile: float
    confidence: float

    def bound(self, eta: float) -> float | None:
        """The certified accuracy within the L2 radius `eta` of the weights; None: abstain.

        What it says: with this confidence over the draws, for every single theta' with ||theta' - theta|| <= eta
        (over the trainable weights), the accuracy of theta' + sigma xi, xi standard normal, is at most this value with
        probability q or more. It speaks of this architecture, of weights near this one surrogate, of noisy weights
        (theta' itself may do better), and of the accuracy that was measured (one test set, not its distribution). It
        says nothing about networks trained from elsewhere, about other architectures, or about radii beyond.
        """
        k = quantile_index(
            len(self.accuracies), eta=eta, quantile=self.quantile, sigma=self.sigma, confidence=self.confidence
        )
        return None if k is None else self.accuracies[k - 1]

    @property
    def largest_eta(self) -> float | None:
        """The radius below which something is certified; None: nowhere."""
        return largest_eta(len(self.accuracies), quantile=self.quantile, sigma=self.sigma, confidence=self.confidence)


def certify(
    model: nn.Module,
    accuracy: Callable[[nn.Module], float],
    *,
    sigma: float = 0.25,
    draws: int = 1000,
    quantile: float = 0.9,
    confidence: float = 0.99,
    seed: Key,
    progress: bool = True,
) -> Certificate:
    """Measure the accuracy of the weights under Gaussian noise, for a (q, eta)-learnability certificate.

        a_i = Acc(theta + sigma xi_i),   xi_i ~ N(0, I)

    `Certificate.bound` says what the numbers certify, and what not. The noise goes to a copy of `model`, afresh from
    the kept weights at every draw, and to all parameters that require gradients (BatchNorm's scale and shift too);
    buffers such as BatchNorm's running statistics stay as they are.

    Args:
        model: the surrogate, trained on the published rows. How it was trained matters: one trained under weight noise
            gives another certificate than one that was not; report both.
        accuracy: of the copy it is given, which is in evaluation mode, without gradients: the share in [0, 1] of clean
            test rows that it gets right.
        sigma: standard deviation of the noise on every weight.
        draws: N; a larger radius needs more (0.33 with 1,000 at the defaults, 0.5 with 8,920).
        quantile: q in (0, 1).
        confidence: c in (0, 1).
        seed: of the noise; a draw's depends on its number and on the device, not on how many there are.

    Raises:
        ValueError: a number outside its range, an accuracy outside [0, 1], no trainable parameter.

    Source: METHODS_NEW N44 (certified data learnability, NDSS 2025).
    Deviations: none (there the noise is subtracted again, with rounding that adds up).
    """
    _check(draws, quantile, sigma, confidence)
    noisy = copy.deepcopy(model).eval()
    weights = [parameter for parameter in noisy.parameters() if parameter.requires_grad]
    if not weights:
        raise ValueError("expected trainable parameters, got none that require gradients")
    kept = [weight.detach().clone() for weight in weights]
    device = weights[0].device

    def measured() -> float:
        with torch.no_grad():
            value = float(accuracy(noisy))
        if not 0 <= value <= 1:
            raise ValueError(f"accuracy: expected a share in [0, 1], got {value}")
        return value

    unperturbed, found = measured(), []
    for draw in tqdm(range(draws), desc="weight noise", unit="draw", disable=not progress, leave=False):
        generator = torch_generator(seed, "weight noise", draw, device=device)
        with torch.no_grad():
            for weight, centre in zip(weights, kept, strict=True):
                xi = torch.randn(centre.shape, generator=generator, device=device, dtype=centre.dtype)
                weight.copy_(centre + sigma * xi)
        found.append(measured())
    return Certificate(
        accuracies=tuple(sorted(found)),
        unperturbed=unperturbed,
        sigma=sigma,
        quantile=quantile,
        confidence=confidence,
    )
