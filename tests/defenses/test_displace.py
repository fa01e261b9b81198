"""COIN: scipy's periodic interpolation, one place for three channels."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.ndimage import map_coordinates
from torch import Tensor

from hf_unlearnable.defenses.displace import RandomDisplacement
from hf_unlearnable.draws import FreshDraws
from tests.conftest import make_dataset, noise_pictures, pixels


def fresh(count: int, seed: int = 0) -> FreshDraws:
    return FreshDraws(count, torch.Generator().manual_seed(seed))


def pictures(rows: int = 3, height: int = 24, width: int = 40) -> Tensor:
    return torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(1))


def oracle(x: Tensor, alpha: float, mode: str, seed: int = 0) -> np.ndarray:
    count, _, height, width = x.shape
    moved = (2 * fresh(count, seed).uniform(2, height, width).double().numpy() - 1) * alpha
    rows, columns = np.mgrid[0:height, 0:width]
    found = np.empty(x.shape)
    for n in range(count):
        for channel in range(3):
            places = [rows + moved[n, 0], columns + moved[n, 1]]
            found[n, channel] = map_coordinates(x[n, channel].double().numpy(), places, order=1, mode=mode)
    return found


@pytest.mark.parametrize("alpha", [0.8, 2.0, 3.2, 30.0])
def test_it_is_bilinear_and_periodic(alpha: float) -> None:
    x = pictures()
    found = RandomDisplacement(alpha=alpha).alter(x, None, fresh(3))
    assert np.allclose(found.numpy(), oracle(x, alpha, "grid-wrap"), atol=2e-5)
    assert found.min() >= 0
    assert found.max() <= 1


def test_the_original_wrap_differs_at_the_border_only() -> None:
    x = pictures(4, 32, 32)
    found = RandomDisplacement(alpha=2.0).alter(x, None, fresh(4)).numpy()
    differs = np.abs(found - oracle(x, 2.0, "wrap")) > 1e-4
    assert not differs[:, :, 2:-2, 2:-2].any()
    assert 0.04 < differs.mean() < 0.12


def test_alpha_zero_is_the_identity() -> None:
    x = pictures(1)
    assert torch.equal(RandomDisplacement(alpha=0.0).alter(x, None, fresh(1)), x)


def test_places_are_uniform_and_shared_by_the_channels() -> None:
    height = width = 64
    ramps = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).float() / 64
    x = torch.cat([ramps, ramps[:1]])[None]
    found = RandomDisplacement(alpha=2.0).alter(x, None, fresh(1))
    assert torch.equal(found[:, 0], found[:, 2])
    moved = (found - x)[0, :2, 2:-3, 2:-3].flatten(1) * 64
    assert moved.abs().max() <= 2 + 1e-4
    assert moved.mean(1).abs().max() < 0.08
    assert moved.std(1).sub(4 / 12**0.5).abs().max() < 0.05
    assert torch.corrcoef(moved)[0, 1].abs() < 0.05


def test_the_generator_decides_and_x_is_left_alone() -> None:
    x = pictures(2)
    kept = x.clone()
    found = [RandomDisplacement().alter(x, None, fresh(2, seed)) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(x, kept)


def test_row_batch_and_mixed_sizes_give_the_same_pixels(small: Dataset) -> None:
    defense = RandomDisplacement(seed=9)
    expected = pixels(small.map(defense, keep_in_memory=True))
    assert np.array_equal(pixels(small.map(defense, batched=True, batch_size=7)), expected)
    mixed = make_dataset([*noise_pictures(3), *noise_pictures(2, 24, 40), *noise_pictures(3, seed=1)], [0] * 8)
    for one, other in zip(mixed.map(defense, batched=True), mixed.map(defense), strict=True):
        assert np.array_equal(np.asarray(one["img"]), np.asarray(other["img"]))


@pytest.mark.parametrize("alpha", [-0.5, float("inf"), float("nan")])
def test_bad_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha is a number of pixels"):
        RandomDisplacement(alpha=alpha)
