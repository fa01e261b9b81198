"""The blur: the textbook's sum, a width a picture, and a warning where it would be none."""

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.ndimage import correlate1d
from torch import Tensor

from hf_unlearnable.defenses.blur import GaussianBlur
from hf_unlearnable.draws import FreshDraws
from tests.conftest import make_dataset, noise_pictures, pixels


def fresh(x: Tensor, seed: int = 0) -> FreshDraws:
    return FreshDraws(len(x), torch.Generator().manual_seed(seed))


def pictures(rows: int = 3, height: int = 24, width: int = 40) -> Tensor:
    return torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(1))


def bell(sigma: float, radius: int) -> np.ndarray:
    weights = np.array([math.exp(-(t**2) / (2 * sigma**2)) for t in range(-radius, radius + 1)])
    return weights / weights.sum()


@pytest.mark.parametrize(("sigma", "size"), [(0.8, None), (2.0, None), (1.5, 3)])
def test_it_is_the_mirrored_convolution(sigma: float, size: int | None) -> None:
    x = pictures()
    radius = math.ceil(3 * sigma) if size is None else size // 2
    oracle = x.double().numpy()
    for axis in (2, 3):
        oracle = correlate1d(oracle, bell(sigma, radius), axis=axis, mode="mirror")
    found = GaussianBlur(sigma=(sigma,), kernel_size=size).alter(x, None, fresh(x))
    assert torch.allclose(found.double(), torch.from_numpy(oracle), atol=1e-6)


def test_every_picture_has_a_width_of_its_own_in_the_range() -> None:
    point = torch.zeros(400, 3, 25, 25)
    point[:, :, 12, 12] = 1
    found = GaussianBlur(sigma=(0.7, 2.0)).alter(point, None, fresh(point))
    assert torch.equal(found[:, 0], found[:, 2])
    assert torch.allclose(found.sum((2, 3)), torch.ones(400, 3), atol=1e-5)
    sigmas = (found[:, 0, 12, 12] / found[:, 0, 12, 13]).log().mul(2).rsqrt()
    assert sigmas.min() == pytest.approx(0.7, abs=0.02)
    assert sigmas.max() == pytest.approx(2.0, abs=0.02)
    assert sigmas.mean() == pytest.approx(1.35, abs=0.06)


def test_the_generator_decides_and_x_is_left_alone() -> None:
    x = pictures(1)
    kept = x.clone()
    found = [GaussianBlur().alter(x, None, fresh(x, seed)) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(x, kept)


def test_isss_blur_is_the_identity_and_says_so() -> None:
    with pytest.warns(UserWarning, match="is the identity"):
        blur = GaussianBlur(sigma=(0.1,), kernel_size=3)
    x = pictures()
    assert torch.equal(blur.alter(x, None, fresh(x)), x)
    with pytest.warns(UserWarning, match="is the identity"):
        GaussianBlur(sigma=(2.0,), kernel_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GaussianBlur(sigma=(0.5,))


def test_the_warning_comes_where_half_a_level_begins() -> None:
    """A checkerboard is what a blur changes most."""
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    x = board.float().expand(1, 3, 16, 16).contiguous()
    for sigma, changes in ((0.25, False), (0.3, True)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            blur = GaussianBlur(sigma=(sigma,))
        assert bool(caught) is not changes
        levels = (blur.alter(x, None, fresh(x)) * 255).round()
        assert bool((levels != x * 255).any()) is changes


def test_row_batch_and_mixed_sizes_give_the_same_pixels(small: Dataset) -> None:
    blur = GaussianBlur(seed=3)
    expected = pixels(small.map(blur, keep_in_memory=True))
    assert np.array_equal(pixels(small.map(blur, batched=True, batch_size=7)), expected)
    assert (pixels(small.map(replace(blur, seed=4), batched=True)) != expected).any((1, 2, 3)).mean() > 0.9
    mixed = make_dataset([*noise_pictures(3), *noise_pictures(2, 24, 40), *noise_pictures(3, seed=1)], [0] * 8)
    for one, other in zip(mixed.map(blur, batched=True), mixed.map(blur), strict=True):
        assert np.array_equal(np.asarray(one["img"]), np.asarray(other["img"]))


def test_a_picture_smaller_than_the_kernel() -> None:
    x = pictures(1, 6, 40)
    with pytest.raises(ValueError, match="more than 6 pixels a side for a kernel of 13, got 6 x 40"):
        GaussianBlur().alter(x, None, fresh(x))
    assert GaussianBlur(kernel_size=11).alter(x, None, fresh(x)).shape == x.shape


@pytest.mark.parametrize(
    "wrong",
    [{"sigma": ()}, {"sigma": (0.0,)}, {"sigma": (2.0, 1.0)}, {"sigma": (1.0, 2.0, 3.0)}, {"sigma": (math.inf,)}],
)
def test_bad_widths(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="sigma is one positive width or"):
        GaussianBlur(**wrong)


@pytest.mark.parametrize("size", [4, -1, 0])
def test_bad_kernels(size: int) -> None:
    with pytest.raises(ValueError, match="kernel_size is odd and positive"):
        GaussianBlur(kernel_size=size)
