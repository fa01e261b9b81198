"""RSK + FF: the kernel's law, scipy's cosines, and the black border."""

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.fft import dctn, idctn
from scipy.signal import correlate2d
from torch import Tensor

from hf_unlearnable.defenses.sharpen import RandomSharpening, dct_matrix, low_pass
from hf_unlearnable.draws import Draws, FreshDraws
from tests.conftest import make_dataset, noise_pictures, pixels


def fresh(count: int, seed: int = 0) -> FreshDraws:
    return FreshDraws(count, torch.Generator().manual_seed(seed))


def pictures(rows: int = 3, height: int = 24, width: int = 40) -> Tensor:
    return torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_the_kernels_law() -> None:
    kernels = RandomSharpening().kernels(40_000, fresh(40_000)).double()
    middle, others = kernels[:, 0], -kernels[:, 1:]
    assert middle.mean() == pytest.approx(2.5, abs=0.003)
    assert middle.std() == pytest.approx(0.1, abs=0.003)
    given = others - (middle[:, None] - 1) / 4
    assert given.mean(0).abs().max() < 0.003
    assert given.std(0).sub(0.1).abs().max() < 0.003
    correlations = torch.corrcoef(torch.cat([middle[:, None], given], 1).t()) - torch.eye(5)
    assert correlations.abs().max() < 0.02
    assert kernels.sum(1).mean() == pytest.approx(1.0, abs=0.005)
    assert kernels.sum(1).std() == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("filtered", [True, False])
def test_against_a_loop_over_pictures(size: tuple[int, int], filtered: bool) -> None:
    x = pictures(4, *size)
    defense = RandomSharpening(frequency_filter=filtered, spread=0.3)
    found = defense.alter(x, None, fresh(4))
    kernels = defense.kernels(4, fresh(4)).double().numpy()
    rows, columns = int(0.3 * (size[0] - 2)), int(0.3 * (size[1] - 2))
    assert size != (32, 32) or rows * columns == 81
    for n in range(4):
        c, above, left, right, below = kernels[n]
        kernel = np.array([[0, above, 0], [left, c, right], [0, below, 0]])
        for channel in range(3):
            oracle = correlate2d(x[n, channel].double().numpy(), kernel, mode="valid").clip(0, 1)
            assert oracle.shape == (size[0] - 2, size[1] - 2)
            if filtered:
                spectrum = dctn(oracle, norm="ortho")
                spectrum[rows:], spectrum[:, columns:] = 0, 0
                oracle = idctn(spectrum, norm="ortho").clip(0, 1)
            inner = found[n, channel, 1:-1, 1:-1].double().numpy()
            assert np.allclose(inner, oracle, atol=2e-6)
    border = torch.ones(size, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert found.shape == x.shape
    assert not found[:, :, border].any()


def test_the_cosines_are_scipys_and_orthonormal() -> None:
    eye = np.eye(30)
    assert np.allclose(dct_matrix(30).numpy(), dctn(eye, axes=0, norm="ortho"))
    assert torch.allclose(dct_matrix(30) @ dct_matrix(30).t(), torch.eye(30, dtype=torch.float64))


def test_the_filter_is_idempotent_and_keeps_81_frequencies() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    once = low_pass(30, 0.3, like=like)
    assert torch.allclose(once @ once, once)
    assert torch.allclose(once, once.t())
    both = torch.kron(once, once)
    assert torch.linalg.matrix_rank(both) == 81
    assert torch.allclose(low_pass(30, 1.0, like=like), torch.eye(30, dtype=torch.float64))


def test_the_fixed_kernel_needs_no_randomness() -> None:
    x = pictures(2)
    fixed = RandomSharpening(random=False)
    assert fixed.kernels(2, fresh(2)).tolist() == [[2.5, -0.375, -0.375, -0.375, -0.375]] * 2
    assert torch.equal(fixed.alter(x, None, fresh(2, 0)), fixed.alter(x, None, fresh(2, 1)))
    assert torch.allclose(fixed.alter(x, None, fresh(2)), RandomSharpening(spread=0.0).alter(x, None, fresh(2)))


def test_the_generator_decides_and_every_picture_has_its_own_kernel() -> None:
    x = pictures(1).expand(2, -1, -1, -1)
    kept = x.clone()
    found = [RandomSharpening().alter(x, None, fresh(2, seed)) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0][0], found[0][1])
    assert torch.equal(x, kept)


def test_stored_pictures_take_the_picture_s_own_kernel() -> None:
    u = torch.from_numpy(noise_pictures(5)).permute(0, 3, 1, 2).contiguous()
    defense = RandomSharpening(seed=4)
    float32 = defense.alter(u.float() / 255, None, Draws(4, "rsk-ff", u)) * 255
    assert (defense.change(u, None, [""] * 5).float() - float32).abs().max() < 0.501


def test_row_batch_and_mixed_sizes_give_the_same_pixels(small: Dataset) -> None:
    defense = RandomSharpening()
    expected = pixels(small.map(defense, keep_in_memory=True))
    assert np.array_equal(pixels(small.map(defense, batched=True, batch_size=7)), expected)
    mixed = make_dataset([*noise_pictures(3), *noise_pictures(2, 24, 40), *noise_pictures(3, seed=1)], [0] * 8)
    for one, other in zip(mixed.map(defense, batched=True), mixed.map(defense), strict=True):
        assert np.array_equal(np.asarray(one["img"]), np.asarray(other["img"]))


def test_a_picture_too_small_for_a_frequency() -> None:
    assert RandomSharpening().alter(pictures(1, 6, 6), None, fresh(1)).shape == (1, 3, 6, 6)
    with pytest.raises(ValueError, match="leaves a frequency on each axis, got 5 x 40, 3 x 38 inside the border"):
        RandomSharpening().alter(pictures(1, 5, 40), None, fresh(1))


@pytest.mark.parametrize("wrong", [{"spread": -0.1}, {"keep": 0.0}, {"keep": 1.5}])
def test_bad_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="spread|keep"):
        RandomSharpening(**wrong)
