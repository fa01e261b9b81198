import itertools
import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tvf

from hf_unlearnable.augment import Augmentation, CropFlip, ResizedCropFlip, ShiftFlip, augment, take


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
@pytest.mark.parametrize("method", [CropFlip(padding=2), ShiftFlip()])
def test_the_parts_of_several_processes_are_the_whole(method: Augmentation, world: int) -> None:
    x = pictures(17, 6, 6)
    whole = augment(x, method, generator=generator(3))
    draws = method.draw(len(x), generator=generator(3))
    edges = [17 * rank // world for rank in range(world + 1)]
    parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat([method.apply(x[part], take(draws, part)) for part in parts]), whole)


def test_nothing_to_do_is_the_identity() -> None:
    x = pictures(5, 4, 4)
    assert torch.equal(augment(x, CropFlip(padding=0, flip=0), generator=generator()), x)
    assert torch.equal(augment(x, ShiftFlip(shift=0, flip=0), generator=generator()), x)
    assert augment(x, None, generator=generator()) is x
    assert torch.equal(augment(x, CropFlip(padding=0, flip=1), generator=generator()), x.flip(3))
    assert torch.equal(augment(x, ShiftFlip(shift=0, flip=1), generator=generator()), x.flip(3))


@pytest.mark.parametrize("method", [CropFlip(padding=2), ShiftFlip()])
def test_an_empty_part(method: Augmentation) -> None:
    x = pictures(0, 4, 4)
    assert augment(x, method, generator=generator()).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("settings", [{"padding": -1}, {"flip": 1.5}, {"flip": -0.1}])
def test_settings_out_of_range(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        CropFlip(**settings)


@pytest.mark.parametrize("settings", [{"shift": -0.1}, {"shift": 1.5}, {"flip": 1.5}, {"flip": -0.1}])
def test_shift_settings_out_of_range(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ShiftFlip(**settings)


def shift_flip_by_loop(x: Tensor, draws: dict, shift: float) -> Tensor:
    """Bilinear values at shifted places, from the definition."""
    out = torch.zeros_like(x)
    _, _, height, width = x.shape
    for n, i, j in itertools.product(range(len(x)), range(height), range(width)):
        source = width - 1 - j if draws["mirrored"][n] else j
        row = i + shift * height * float(draws["down"][n])
        column = source + shift * width * float(draws["across"][n])
        top, left = math.floor(row), math.floor(column)
        for r, c in itertools.product((top, top + 1), (left, left + 1)):
            if 0 <= r < height and 0 <= c < width:
                out[n, :, i, j] += (1 - abs(row - r)) * (1 - abs(column - c)) * x[n, :, r, c]
    return out


@pytest.mark.parametrize("shift", [0.0, 0.125, 0.4])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 12), (9, 2)])
def test_shift_and_flip_equal_the_loop(shift: float, height: int, width: int) -> None:
    x = pictures(12, height, width, torch.float64)
    before = x.clone()
    method = ShiftFlip(shift=shift)
    draws = method.draw(len(x), generator=generator(3))
    assert 0 < draws["mirrored"].sum() < 12
    assert torch.allclose(method.apply(x, draws), shift_flip_by_loop(x, dict(draws), shift), atol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("side", "index"), [(32, 8), (224, 56)])
def test_the_grid_is_that_of_the_official_transform(side: int, index: int) -> None:
    even, delta = torch.linspace(-1, 1, side), torch.linspace(0, 1, side)[index]
    assert {32: 0.258, 224: 0.251}[side] == pytest.approx(float(delta), abs=1e-3)
    moved = torch.tensor([-1.0, 0.0, 0.5])
    assert torch.allclose(ShiftFlip()._places(moved, side), even + moved[:, None] * delta, atol=1e-6)


def test_a_shift_by_whole_pixels_is_a_crop() -> None:
    x = pictures(3, 32, 32, torch.float32)
    signs = torch.tensor([1.0, 0.5, -1.0])
    mirrored = torch.tensor([False, True, True])
    found = ShiftFlip().apply(x, {"down": signs, "across": -signs, "mirrored": mirrored})
    places = (4 * signs).long()
    cropped = CropFlip(padding=4).apply(x, {"top": 4 + places, "left": 4 - places, "mirrored": mirrored})
    assert torch.allclose(found, cropped, atol=1e-4)
    levels = (255 * x).round().to(torch.uint8)
    whole = ShiftFlip().apply(levels, {"down": signs, "across": -signs, "mirrored": mirrored})
    assert whole.dtype == torch.uint8
    assert torch.equal(whole, (255 * cropped).round().to(torch.uint8))


def test_shifts_fill_their_range_evenly_and_differ_by_picture() -> None:
    draws = ShiftFlip(flip=0.25).draw(50_000, generator=generator())
    for name in ("down", "across"):
        shares = torch.histc(draws[name], 10, -1, 1) / 50_000
        assert (shares - 0.1).abs().max() < 0.01
        assert draws[name].abs().max() <= 1
    assert abs(torch.corrcoef(torch.stack([draws["down"], draws["across"]]))[0, 1]) < 0.02
    assert abs(draws["mirrored"].float().mean().item() - 0.25) < 0.01


def test_the_shift_is_differentiable() -> None:
    x = pictures(2, 5, 6, torch.float64).requires_grad_()
    method = ShiftFlip(shift=0.3)
    draws = method.draw(2, generator=generator(1))
    weights = pictures(2, 5, 6, torch.float64)
    found = torch.autograd.grad((method.apply(x, draws) * weights).sum(), x)[0]
    step = torch.zeros_like(x)
    step[1, 2, 3, 2] = 1e-3
    ahead = (method.apply(x + step, draws) * weights).sum() - (method.apply(x, draws) * weights).sum()
    assert float(found[1, 2, 3, 2]) == pytest.approx(float(ahead.detach()) / 1e-3, rel=1e-4)


# ---------------------------------------------------------------------------------------------- resized crop and flip


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40), (7, 90)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resized_crops_are_torchvisions(height: int, width: int, dtype: torch.dtype) -> None:
    x, method = pictures(24, height, width, dtype), ResizedCropFlip()
    before = x.clone()
    draws = method.draw(len(x), generator=generator())
    found = method.apply(x, draws)
    for n, (top, left, high, wide) in enumerate(zip(*method.windows(height, width, draws), strict=True)):
        box = [int(value) for value in (top, left, high, wide)]
        expected = tvf.resized_crop(x[n], *box, size=[height, width], antialias=True)
        expected = expected.flip(2) if draws["mirrored"][n] else expected
        assert torch.allclose(found[n], expected, atol=2e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_windows_are_distributed_as_torchvisions(height: int, width: int) -> None:
    count = 4000
    method = ResizedCropFlip()
    ours = torch.stack(method.windows(height, width, method.draw(count, generator=generator())), 1)
    picture = torch.zeros(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [RandomResizedCrop.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    reference = torch.tensor(theirs, dtype=torch.float64)
    for column in range(4):
        a, b = ours[:, column].sort().values, reference[:, column].sort().values
        points = torch.unique(torch.cat([a, b]))
        gap = (torch.searchsorted(a, points, right=True) - torch.searchsorted(b, points, right=True)).abs().max()
        assert gap / count < 1.95 * math.sqrt(2 / count)  # Kolmogorov-Smirnov, p = 0.001


def test_windows_of_pictures_that_are_too_long() -> None:
    method = ResizedCropFlip(area=(1.0, 1.0))
    draws = method.draw(5, generator=generator())
    for (height, width), box in (((30, 100), (0, 30, 30, 40)), ((100, 30), (30, 0, 40, 30))):
        for row in torch.stack(method.windows(height, width, draws), 1).tolist():
            assert tuple(row) == box


def test_a_whole_window_is_the_picture() -> None:
    method = ResizedCropFlip(area=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    for x in (pictures(4, 16, 16), pictures(4, 16, 16, torch.float32)):
        assert torch.allclose(augment(x, method, generator=generator()), x, atol=1e-6)
    assert augment(pictures(0, 16, 16), method, generator=generator()).shape == (0, 3, 16, 16)


def test_gradients_flow_through_resized_crops() -> None:
    x, method = pictures(2, 5, 6, torch.float64).requires_grad_(), ResizedCropFlip()
    draws = method.draw(2, generator=generator())
    assert torch.autograd.gradcheck(lambda z: method.apply(z, draws), (x,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"area": (0.0, 1.0)}, "area is"), ({"ratio": (2.0, 1.0)}, "ratio is"), ({"flip": 1.5}, "flip is a probability")],
)
def test_resized_crops_that_make_no_sense(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResizedCropFlip(**settings)
