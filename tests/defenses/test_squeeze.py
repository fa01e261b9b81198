"""Squeezing: PIL's own pixels, whatever the batch."""

import io
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset
from torch import Tensor

from hf_unlearnable.defenses.base import describe
from hf_unlearnable.defenses.data import DataDefense
from hf_unlearnable.defenses.squeeze import BitDepth, Grayscale, Jpeg, Webp
from tests.conftest import make_dataset, noise_pictures, pixels

ALL = [Grayscale(), Grayscale(weights="mean"), Jpeg(), Jpeg(quality=90), Webp(), BitDepth(), BitDepth(bits=5)]


def nchw(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def changed(defense: DataDefense, pictures: np.ndarray) -> np.ndarray:
    return defense.change(nchw(pictures), None, [""] * len(pictures)).permute(0, 2, 3, 1).numpy()


def test_grey_is_pils_for_every_colour_of_a_grid_and_at_random() -> None:
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 52, 3)
    for pictures in (grid, np.random.default_rng(0).integers(0, 256, (3, 24, 40, 3), dtype=np.uint8)):
        oracle = np.stack([np.asarray(PIL.Image.fromarray(p).convert("L").convert("RGB")) for p in pictures])
        assert np.array_equal(changed(Grayscale(), pictures), oracle)


def test_the_mean_is_rounded_to_nearest() -> None:
    pictures = np.random.default_rng(1).integers(0, 256, (2, 24, 40, 3), dtype=np.uint8)
    oracle = np.round(pictures.astype(np.float64).mean(3, keepdims=True)).astype(np.uint8).repeat(3, 3)
    assert np.array_equal(changed(Grayscale(weights="mean"), pictures), oracle)


@pytest.mark.parametrize("quality", [1, 10, 50, 95])
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (9, 7)])
def test_jpeg_is_pils_with_its_default_subsampling(quality: int, size: tuple[int, int]) -> None:
    pictures = noise_pictures(12, *size)
    oracle = []
    for picture in pictures:
        buffer = io.BytesIO()
        PIL.Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
        oracle.append(np.asarray(PIL.Image.open(buffer)))
    found = changed(Jpeg(quality=quality), pictures)
    assert np.array_equal(found, np.stack(oracle))
    assert np.array_equal(found[:1], changed(Jpeg(quality=quality), pictures[:1]))
    if quality == 10:
        assert (found != pictures).mean() > 0.9


@pytest.mark.parametrize("quality", [1, 80, 100])
def test_webp_is_pils_with_loss(quality: int) -> None:
    pictures = noise_pictures(12, 24, 40)
    oracle = []
    for picture in pictures:
        buffer = io.BytesIO()
        PIL.Image.fromarray(picture).save(buffer, "WebP", quality=quality)
        assert buffer.getvalue()[12:16] == b"VP8 "
        oracle.append(np.asarray(PIL.Image.open(buffer).convert("RGB")))
    found = changed(Webp(quality=quality), pictures)
    assert np.array_equal(found, np.stack(oracle))
    assert (found != pictures).mean() > 0.5


def test_a_picture_too_large_for_webp_is_named() -> None:
    with pytest.raises(ValueError, match="row 3: expected a picture that WebP can hold"):
        Webp().change(torch.zeros(1, 3, 1, 70_000, dtype=torch.uint8), None, ["row 3"])


def test_a_picture_too_large_for_jpeg_is_named() -> None:
    with pytest.raises(ValueError, match="row 3: expected a picture that JPEG can hold"):
        Jpeg().change(torch.zeros(1, 3, 1, 70_000, dtype=torch.uint8), None, ["row 3"])


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_top_bits_are_kept(bits: int) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    step = 2 ** (8 - bits)
    found = changed(BitDepth(bits=bits), levels)
    assert np.array_equal(found, levels // step * step)
    assert len(np.unique(found)) == 2**bits


@pytest.mark.parametrize("defense", ALL, ids=lambda defense: defense.name)
def test_row_batch_and_mixed_sizes_give_the_same_pixels(defense: DataDefense, small: Dataset) -> None:
    expected = pixels(small.map(defense, keep_in_memory=True))
    assert np.array_equal(pixels(small.map(defense, batched=True, batch_size=7)), expected)
    mixed = make_dataset([*noise_pictures(3), *noise_pictures(2, 24, 40), *noise_pictures(3, seed=1)], [0] * 8)
    for one, other in zip(mixed.map(defense, batched=True), mixed.map(defense), strict=True):
        assert np.array_equal(np.asarray(one["img"]), np.asarray(other["img"]))


def test_what_it_is_goes_into_results() -> None:
    assert describe(Jpeg(quality=30)) == {"name": "jpeg", "version": 1, "seed": 0, "quality": 30}
    assert Jpeg(quality=30).cache_state() != Jpeg().cache_state()


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [(Grayscale, {"weights": "sum"}), (Jpeg, {"quality": 0}), (Jpeg, {"quality": 96}), (Webp, {"quality": 101})],
)
def test_bad_settings(kind: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="weights|quality"):
        kind(**wrong)


@pytest.mark.parametrize("bits", [0, 9])
def test_bad_bits(bits: int) -> None:
    with pytest.raises(ValueError, match="bits is an int from 1 to 8"):
        BitDepth(bits=bits)
