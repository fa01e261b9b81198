import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from hf_unlearnable.poisons import neural_tangent
from hf_unlearnable.poisons.neural_tangent import learnt, tangent_kernel

W, B = 1.76, 0.18


def rows(count: int, inputs: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(count, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loops(x: Tensor, z: Tensor, layers: int) -> float:
    """The recursion of METHODS 10 for one pair, in plain numbers."""
    p, q, r = (float(a @ b) / len(x) for a, b in ((x, x), (x, z), (z, z)))
    hat = 0.0
    for _ in range(layers):
        p, q, r = (W * k + B for k in (p, q, r))
        theta = q + W * hat
        hat = theta * (4 / math.pi) / math.sqrt((1 + 2 * p) * (1 + 2 * r) - 4 * q * q)
        q = 2 / math.pi * math.asin(2 * q / math.sqrt((1 + 2 * p) * (1 + 2 * r)))
        p, r = (2 / math.pi * math.asin(2 * k / (1 + 2 * k)) for k in (p, r))
    return hat


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_the_kernel_is_that_of_the_recursion(layers: int) -> None:
    x, z = rows(3), rows(4, seed=1)
    found = tangent_kernel(x, z, layers=layers)
    expected = torch.tensor([[by_loops(a, b, layers) for b in z] for a in x], dtype=torch.float64)
    assert torch.allclose(found, expected, rtol=1e-12)
    assert torch.allclose(found, tangent_kernel(z, x, layers=layers).T, rtol=1e-13)


def test_the_diagonal_in_closed_form() -> None:
    x = rows(4)
    k = W * x.square().mean(1) + B
    one = 4 / math.pi * k / (1 + 4 * k).sqrt()
    assert torch.allclose(tangent_kernel(x, x, layers=1).diagonal(), one, rtol=1e-13)
    k = W * (2 / math.pi) * (2 * k / (1 + 2 * k)).arcsin() + B
    two = 4 / math.pi * (k + W * one) / (1 + 4 * k).sqrt()
    assert torch.allclose(tangent_kernel(x, x, layers=2).diagonal(), two, rtol=1e-13)


def of_a_wide_network(x: Tensor, layers: int, width: int, seed: int) -> Tensor:
    """The kernel of one random network by autograd: the inner products of its outputs' gradients, mean over outputs.

    One random sign for every output: in the mean over signs, <d(s f(x)), d(s f(z))> is the sum over the outputs.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [x.shape[1], *[width] * layers]
    weights = [torch.randn(a, b, generator=generator, dtype=x.dtype) for a, b in itertools.pairwise(sizes)]
    biases = [torch.randn(b, generator=generator, dtype=x.dtype) for b in sizes[1:]]
    signs = torch.randint(0, 2, (width,), generator=generator) * 2.0 - 1
    leaves, slopes = [leaf.requires_grad_() for leaf in (*weights, *biases)], []
    for picture in x:
        hidden = picture
        for weight, bias in zip(weights, biases, strict=True):
            hidden = (hidden @ weight * (W / len(weight)) ** 0.5 + bias * B**0.5).erf()
        parts = torch.autograd.grad((hidden * signs).sum() / width**0.5, leaves)
        slopes.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(slopes) @ torch.stack(slopes).T


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_kernel_is_that_of_wide_random_networks(layers: int) -> None:
    """Up to four standard errors, about 6 %, and a hundredth for the width being finite."""
    x = torch.stack([*rows(2), torch.zeros(12, dtype=torch.float64)]) * 1.5
    found = torch.stack([of_a_wide_network(x, layers, 300, seed) for seed in range(40)])
    expected = tangent_kernel(x, x, layers=layers)
    assert ((found.mean(0) - expected).abs() < 4 * found.std(0) / 40**0.5 + 0.01 * expected).all()
    assert (found.std(0) / 40**0.5 < 0.025 * expected).all()


@pytest.mark.parametrize("time", [0.001, 0.3, 40.0])
def test_what_is_learnt_is_what_gradient_descent_learns(time: float) -> None:
    x, other = rows(9), rows(5, seed=1)
    targets = torch.eye(3, dtype=torch.float64)[torch.arange(9) % 3]
    kernel = tangent_kernel(x, x)
    ridged = kernel + 1e-4 * kernel.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    found, on_other = torch.zeros_like(targets), torch.zeros(5, 3, dtype=torch.float64)
    steps = 4_000
    coefficients = torch.zeros_like(targets)
    for _ in range(steps):
        residual = targets - ridged @ coefficients
        half = targets - ridged @ (coefficients + time / steps / 2 * residual)
        coefficients = coefficients + time / steps * half
    found = learnt(kernel, targets, time)
    assert torch.allclose(found, coefficients, rtol=1e-5, atol=1e-9)
    on_other = tangent_kernel(other, x) @ found
    assert torch.allclose(on_other, tangent_kernel(other, x) @ coefficients, rtol=1e-5)


def test_in_the_end_it_is_kernel_regression() -> None:
    x, targets = rows(6), rows(6, 2, seed=3)
    kernel = tangent_kernel(x, x)
    ridged = kernel + 1e-2 * kernel.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    found = learnt(kernel, targets, 1e9, ridge=1e-2)
    assert torch.allclose(found, torch.linalg.solve(ridged, targets), rtol=1e-9)


@pytest.mark.parametrize("time", [1e-3, 0.5, 100.0])
def test_gradients_are_finite_differences(time: float) -> None:
    x, targets, held = rows(4, 5), torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0]], rows(2, 5, seed=2)

    def outputs(block: Tensor) -> Tensor:
        return tangent_kernel(held, block) @ learnt(tangent_kernel(block, block), targets, time)

    assert torch.autograd.gradcheck(outputs, x.requires_grad_(), eps=1e-6, atol=1e-8)


def test_equal_rows_have_a_finite_gradient() -> None:
    """Their eigenvalues coincide, where the derivatives of the eigenvectors are infinite."""
    x = torch.cat([rows(3), rows(3), rows(3)]).requires_grad_()
    targets = torch.eye(3, dtype=torch.float64)[[0, 1, 2] * 3]

    def total(block: Tensor) -> Tensor:
        return learnt(tangent_kernel(block, block), targets, 2.0).square().sum()

    slope = torch.autograd.grad(total(x), x)[0]
    assert bool(slope.isfinite().all())
    assert torch.allclose(slope[:3], slope[6:], rtol=1e-6)
    step = torch.zeros_like(x)
    step[1, 4] = 1e-5
    difference = (total(x.detach() + step) - total(x.detach() - step)) / 2e-5
    assert float(slope[1, 4]) == pytest.approx(float(difference), rel=1e-5)


def test_divided_differences() -> None:
    """Against the definition in many digits."""

    def exactly(w: Fraction, time: Fraction) -> Fraction:
        term, total = time, Fraction(0)
        for k in range(2, 60):
            total += term
            term = -term * time * w / k
        return total

    time = Fraction(1, 80)
    values = [Fraction(1, 1000), Fraction(1, 1000) + Fraction(1, 10**9), Fraction(1), Fraction(80), Fraction(80, 1) / 7]
    values += [Fraction(1) + Fraction(1, 3000), Fraction(80) + Fraction(1, 10**7), Fraction(7, 100)]
    w = torch.tensor([float(v) for v in values], dtype=torch.float64)
    found = neural_tangent._divided(w, float(time))
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            c = a + Fraction(1, 10**12) if a == b else a
            expected = (exactly(c, time) - exactly(b, time)) / (c - b)
            assert float(found[i, j]) == pytest.approx(float(expected), rel=1e-9)
