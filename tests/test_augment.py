import itertools

import pytest
import torch
from torch import Tensor

from hf_unlearnable.augment import CropFlip, augment, take


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, height: int, width: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    x = torch.randint(1, 256, (count, 3, height, width), generator=generator(7), dtype=torch.uint8)
    return x if dtype == torch.uint8 else x.to(dtype) / 255


def crop_flip_by_loop(x: Tensor, top: list[int], left: list[int], mirrored: list[bool], padding: int) -> Tensor:
    out = torch.zeros_like(x)
    _, _, height, width = x.shape
    for n in range(len(x)):
        for i in range(height):
            for j in range(width):
                row, column = top[n] + i - padding, left[n] + j - padding
                if 0 <= row < height and 0 <= column < width:
                    out[n, :, i, width - 1 - j if mirrored[n] else j] = x[n, :, row, column]
    return out


@pytest.mark.parametrize("padding", [0, 1, 4, 9])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 12), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_and_flip_equal_the_loop(padding: int, height: int, width: int, dtype: torch.dtype) -> None:
    x = pictures(24, height, width, dtype)
    before = x.clone()
    method = CropFlip(padding=padding)
    draws = method.draw(len(x), generator=generator(padding))
    expected = crop_flip_by_loop(
        x, draws["top"].tolist(), draws["left"].tolist(), draws["mirrored"].tolist(), method.padding
    )
    assert torch.equal(method.apply(x, draws), expected)
    assert torch.equal(x, before)


def test_flip_and_shift_in_numbers() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0]]).expand(1, 3, 1, 3)
    draws = {"top": torch.tensor([1]), "left": torch.tensor([2]), "mirrored": torch.tensor([True])}
    assert CropFlip(padding=1).apply(x, draws)[0, 0].tolist() == [[0.0, 3.0, 2.0]]


def test_draws_reach_every_place_about_equally() -> None:
    draws = CropFlip(padding=2, flip=0.25).draw(50_000, generator=generator())
    for name in ("top", "left"):
        shares = torch.bincount(draws[name], minlength=5) / 50_000
        assert shares.shape == (5,)
        assert (shares - 0.2).abs().max() < 0.01
    assert abs(draws["mirrored"].float().mean().item() - 0.25) < 0.01
    places = torch.bincount(draws["top"] * 5 + draws["left"], minlength=25) / 50_000
    assert (places - 0.04).abs().max() < 0.005


@pytest.mark.parametrize("world", [2, 3, 7])
def test_the_parts_of_several_processes_are_the_whole(world: int) -> None:
    x = pictures(17, 6, 6)
    method = CropFlip(padding=2)
    whole = augment(x, method, generator=generator(3))
    draws = method.draw(len(x), generator=generator(3))
    edges = [17 * rank // world for rank in range(world + 1)]
    parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat([method.apply(x[part], take(draws, part)) for part in parts]), whole)


def test_nothing_to_do_is_the_identity() -> None:
    x = pictures(5, 4, 4)
    assert torch.equal(augment(x, CropFlip(padding=0, flip=0), generator=generator()), x)
    assert augment(x, None, generator=generator()) is x
    assert torch.equal(augment(x, CropFlip(padding=0, flip=1), generator=generator()), x.flip(3))


def test_an_empty_part() -> None:
    x = pictures(0, 4, 4)
    assert augment(x, CropFlip(padding=2), generator=generator()).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("settings", [{"padding": -1}, {"flip": 1.5}, {"flip": -0.1}])
def test_settings_out_of_range(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        CropFlip(**settings)
