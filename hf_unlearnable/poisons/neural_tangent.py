"""The neural tangent kernel of an infinitely wide network, and what gradient descent under it predicts."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LAYERS = 5
WEIGHT_VARIANCE = 1.76
BIAS_VARIANCE = 0.18


def tangent_kernel(
    x: Float[Tensor, "n d"],
    z: Float[Tensor, "m d"],
    *,
    layers: int = LAYERS,
    weight_variance: float = WEIGHT_VARIANCE,
    bias_variance: float = BIAS_VARIANCE,
) -> Float[Tensor, "n m"]:
    """The tangent kernel of layers times (dense, erf), all infinitely wide, between the rows of x and those of z.

        dense: k = s k^ + b,   Theta = k + s Theta^       (s, b: weight_variance, bias_variance)
        erf:   k^ = 2/pi arcsin(c),   Theta^ = 2/pi Theta c' / sqrt(1 - c^2)
               with c' = 2 / sqrt((1 + 2 k(x, x)) (1 + 2 k(z, z))) and c = c' k(x, z)

    from k^(x, z) = <x, z> / d and Theta^ = 0. The parametrisation is the tangent one: weights N(0, s / width) and
    biases N(0, b). k(x, z)^2 <= k(x, x) k(z, z) keeps c below 1 and away from it.

    Source: Jacot et al. 2018; Williams 1997 (the integrals of erf); METHODS 10.
    """
    inputs = x.shape[1]
    kernel, own, others = x @ z.T / inputs, x.square().sum(1) / inputs, z.square().sum(1) / inputs
    tangent = torch.zeros_like(kernel)
    for _ in range(layers):
        kernel, own, others = (weight_variance * k + bias_variance for k in (kernel, own, others))
        tangent = torch.add(kernel, tangent, alpha=weight_variance)
        inverse = (2 * (1 + 2 * own).rsqrt())[:, None] * (1 + 2 * others).rsqrt()
        sine = kernel * inverse
        tangent = tangent * inverse * (1 - sine.square()).rsqrt() * (2 / math.pi)
        kernel = sine.arcsin() * (2 / math.pi)
        own, others = (2 / math.pi * (2 * k / (1 + 2 * k)).arcsin() for k in (own, others))
    return tangent


def learnt(
    kernel: Float[Tensor, "n n"], targets: Float[Tensor, "n k"], time: float, *, ridge: float = 1e-4
) -> Float[Tensor, "n k"]:
    """What a network has learnt of its training rows after gradient descent for a time, as coefficients of its kernel.

    From zero outputs, under the loss 1/2 sum (f - targets)^2 and its gradient flow,

        f_t(x*) = Theta(x*, rows) C,   C = Theta_r^-1 (I - e^{-t Theta_r}) targets,

    Theta_r = kernel + ridge * mean(diagonal) * I. Differentiable in the kernel, also where eigenvalues coincide.

    Args:
        kernel: symmetric and positive semi-definite, float64.
        time: t, with the learning rate and the loss's denominator in it.
        ridge: what is added to the diagonal, as a share of its mean; above 0.

    Source: Lee et al. 2019 (the flow); Daleckii and Krein 1965 (the derivative of a function of a matrix).
    """
    level = ridge * kernel.diagonal().mean()
    found: Tensor = _Flow.apply(kernel + level * torch.eye(len(kernel)).to(kernel), targets, time)  # type: ignore[assignment]
    return found


class _Flow(torch.autograd.Function):
    """h(Theta) targets with h(w) = (1 - e^{-t w}) / w, through the eigenvalues w and vectors V of Theta.

    dh(Theta) = V (H * (V^T dTheta V)) V^T with the divided differences H_ij = (h(w_i) - h(w_j)) / (w_i - w_j), and
    h' on the diagonal: nothing is divided by a difference near zero.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, targets: Tensor, time: float) -> Tensor:
        values, vectors = torch.linalg.eigh(kernel)
        ctx.save_for_backward(values, vectors, targets)
        ctx.time = time
        return vectors @ (_h(values, time)[:, None] * (vectors.T @ targets))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        values, vectors, targets = ctx.saved_tensors
        inner = (vectors.T @ gradients[0]) @ (vectors.T @ targets).T
        return vectors @ (_divided(values, ctx.time) * inner) @ vectors.T, None, None


def _h(values: Tensor, time: float) -> Tensor:
    return -torch.expm1(-time * values) / values


def _divided(values: Tensor, time: float) -> Tensor:
    """(h(a) - h(b)) / (a - b) for all pairs; where they nearly coincide, h' half way, as good to the second order."""
    a, b = values[:, None], values
    gap, middle = a - b, time * (a + b) / 2
    near = (time * gap).abs() < 1e-5
    far = (_h(a, time) - _h(b, time)) / torch.where(near, 1.0, gap)
    tiny = middle.abs() < 1e-3
    safe = torch.where(tiny, 1.0, middle)
    exact = (safe * torch.exp(-safe) + torch.expm1(-safe)) / safe.square()
    series = -1 / 2 + middle / 3 - middle.square() / 8 + middle**3 / 30
    return torch.where(near, time**2 * torch.where(tiny, series, exact), far)
