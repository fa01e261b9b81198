"""Operations against torchvision and kornia, a picture at a time; TrivialAugment's and UEraser's draws."""

from collections.abc import Callable
from typing import Any

import kornia
import pytest
import torch
from kornia.augmentation.auto import TrivialAugment as KorniaTrivialAugment
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from hf_unlearnable.augment import Augmentation, augment, take
from hf_unlearnable.policies import OPERATIONS, TrivialAugment, apply_operations

SIZES = [(32, 32), (24, 40), (17, 5)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def levels(count: int, height: int, width: int, seed: int = 7) -> Tensor:
    """uint8 pictures: smooth, noisy, dark, of few values, and of one value."""
    noise = torch.randint(0, 256, (count, 3, height, width), generator=generator(seed), dtype=torch.uint8)
    ramp = torch.linspace(30, 220, height * width).view(height, width).to(torch.uint8)
    noise[::5] = ramp + noise[::5] // 16
    noise[1::5] //= 5
    noise[2::5] = noise[2::5] // 64 * 64
    noise[3::5, 1] = 137
    return noise


def number(name: str) -> int:
    return OPERATIONS.index(name)


def one(x: Tensor, name: str, magnitude: Tensor | float, **options: Any) -> Tensor:
    """A single operation on all pictures."""
    m = torch.as_tensor(magnitude, dtype=x.dtype).expand(len(x))
    return apply_operations(x, torch.full((len(x),), number(name)), m, **options)


BY_TORCHVISION: dict[str, tuple[list[float], Callable[[Tensor, float], Tensor]]] = {
    "identity": ([0], lambda x, m: x),
    "auto_contrast": ([0], lambda x, m: tvf.autocontrast(x)),
    "equalize": ([0], lambda x, m: tvf.equalize((255 * x).round().to(torch.uint8)) / 255),
    "invert": ([0], lambda x, m: tvf.invert(x)),
    "posterize": ([0, 1, 3, 4, 7, 8], lambda x, m: tvf.posterize((255 * x).round().to(torch.uint8), int(m)) / 255),
    "solarize": ([0, 0.31, 0.7, 1], tvf.solarize),
    "offset": ([-0.9, 0.0, 0.4], lambda x, m: kornia.enhance.adjust_brightness(x, m)),
    "brightness": ([0.1, 1, 1.9], tvf.adjust_brightness),
    "contrast": ([0.1, 1, 1.9], tvf.adjust_contrast),
    "color": ([0.1, 1, 1.9], tvf.adjust_saturation),
    "sharpness": ([0.1, 1, 1.9], tvf.adjust_sharpness),
}


@pytest.mark.parametrize("name", BY_TORCHVISION)
@pytest.mark.parametrize("size", SIZES)
def test_photometric_operations_are_torchvisions(name: str, size: tuple[int, int]) -> None:
    x = levels(10, *size).float() / 255
    magnitudes, oracle = BY_TORCHVISION[name]
    for m in magnitudes:
        expected = torch.stack([oracle(picture, m) for picture in x])
        exact = name in ("identity", "equalize", "posterize", "solarize", "invert")
        assert torch.allclose(one(x, name, m), expected, atol=0 if exact else 2e-6, rtol=0), m


def test_pictures_that_are_not_of_whole_levels() -> None:
    x = torch.rand(40, 3, 16, 24, generator=generator(1))
    assert torch.allclose(one(x, "auto_contrast", 0), kornia.enhance.normalize_min_max(x), atol=1e-5)
    for name, found, expected in (
        ("equalize", one(x, "equalize", 0), kornia.enhance.equalize(x)),
        ("posterize", one(x, "posterize", 3), kornia.enhance.posterize(x, 3)),
        ("sharpness", one(x, "sharpness", 1.7), kornia.enhance.sharpness(x, 1.7)),
        ("brightness", one(x, "brightness", 1.7), kornia.enhance.adjust_contrast(x, 1.7)),
    ):
        same = (found - expected).abs() < 1e-5
        assert same.float().mean() > 0.98, name  # the others lie within rounding of a level's edge


def test_equalize_and_auto_contrast_leave_what_they_cannot_stretch() -> None:
    x = torch.full((2, 3, 8, 8), 0.5)
    x[1, 0, 0, 0] = 0.25
    assert torch.equal(one(x, "auto_contrast", 0)[0], x[0])
    assert one(x, "auto_contrast", 0)[1, 0].unique().tolist() == [0.0, 1.0]
    assert torch.equal(one(x, "equalize", 0), x)


@pytest.mark.parametrize("size", [(2, 7), (1, 1), (3, 3)])
def test_sharpness_leaves_the_rim(size: tuple[int, int]) -> None:
    x = levels(5, *size).float() / 255
    found = one(x, "sharpness", 0.0)
    inside = torch.zeros(size, dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    assert torch.equal(found[..., ~inside], x[..., ~inside])
    if size == (3, 3):
        blurred = (x.sum((2, 3)) + 4 * x[:, :, 1, 1]) / 13
        assert torch.allclose(found[:, :, 1, 1], blurred, atol=1e-6)


def bilinear_by_loop(x: Tensor, matrix: Tensor) -> Tensor:
    """Output (row, column) is the bilinear value at matrix @ (column, row, 1), zeros outside: one picture, float64."""
    _, height, width = x.shape
    padded = torch.zeros(3, height + 2, width + 2, dtype=x.dtype)
    padded[:, 1:-1, 1:-1] = x
    out = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            column, row = (matrix @ torch.tensor([j, i, 1.0], dtype=x.dtype) + 1).tolist()
            top, left = int(row // 1), int(column // 1)
            for r, c in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                if 0 <= r < height + 2 and 0 <= c < width + 2:
                    out[:, i, j] += (1 - abs(row - r)) * (1 - abs(column - c)) * padded[:, r, c]
    return out


@pytest.mark.parametrize("size", [(12, 12), (9, 14)])
def test_geometric_operations_by_the_definition(size: tuple[int, int]) -> None:
    height, width = size
    x = torch.rand(5, 3, *size, generator=generator(3), dtype=torch.float64)
    operation = torch.tensor([number(n) for n in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")])
    m = torch.tensor([25.0, -16.7, 54.0, 0.31, -0.22], dtype=torch.float64)
    found = apply_operations(x, operation, m)
    cos, sin = torch.deg2rad(m[0]).cos().item(), torch.deg2rad(m[0]).sin().item()
    slope_x, slope_y = torch.deg2rad(m[1]).tan().item(), torch.deg2rad(m[2]).tan().item()
    mid_x, mid_y = (width - 1) / 2, (height - 1) / 2
    matrices = [
        [[cos, -sin, mid_x - cos * mid_x + sin * mid_y], [sin, cos, mid_y - sin * mid_x - cos * mid_y]],
        [[1, slope_x, -slope_x * mid_y], [0, 1, 0]],
        [[1, 0, 0], [slope_y, 1, -slope_y * mid_x]],
        [[1, 0, -0.31 * width], [0, 1, 0]],
        [[1, 0, 0], [0, 1, 0.22 * height]],
    ]
    for row, matrix in enumerate(matrices):
        expected = bilinear_by_loop(x[row], torch.tensor(matrix, dtype=torch.float64))
        assert torch.allclose(found[row], expected, atol=1e-9), row


@pytest.mark.parametrize("size", SIZES)
def test_geometric_operations_are_kornias(size: tuple[int, int]) -> None:
    import kornia.augmentation as ka

    height, width = size
    x = torch.rand(4, 3, *size, generator=generator(2))
    m = torch.tensor([-30.0, -11.0, 0.0, 28.0])
    zero = torch.zeros(4)
    middle = torch.tensor([[(width - 1) / 2, (height - 1) / 2]]).expand(4, 2)
    gate = {"batch_prob": torch.ones(4)}

    def shear(a: Tensor, b: Tensor) -> Tensor:
        params = {"center": middle, "shear_x": a, "shear_y": b, **gate}
        return ka.RandomShear((0.0, 30.0), p=1.0, align_corners=True)(x, params=params)

    def translate(a: Tensor, b: Tensor) -> Tensor:
        params = {"translate_x": a, "translate_y": b, **gate}
        return ka.RandomTranslate((0.0, 0.5), (0.0, 0.5), p=1.0, align_corners=True)(x, params=params)

    for name, found, expected in (
        ("rotate", one(x, "rotate", m), ka.RandomRotation(30.0, p=1.0)(x, params={"degrees": m, **gate})),
        ("shear_x", one(x, "shear_x", m), shear(m, zero)),
        ("shear_y", one(x, "shear_y", m), shear(zero, m)),
        ("translate_x", one(x, "translate_x", m / 60), translate(m / 60 * width, zero)),
        ("translate_y", one(x, "translate_y", m / 60), translate(zero, m / 60 * height)),
    ):
        assert torch.allclose(found, expected, atol=2e-4), name


@pytest.mark.parametrize("size", SIZES)
def test_pillow_geometry_is_torchvisions(size: tuple[int, int]) -> None:
    height, width = size
    x = torch.rand(1, 3, *size, generator=generator(2))
    nearest: dict[str, Any] = {"interpolation": InterpolationMode.NEAREST}

    def affine(translate: list[int], shear: list[float]) -> Tensor:
        corner = {} if any(translate) else {"center": [0, 0]}
        return tvf.affine(x, angle=0.0, translate=translate, scale=1.0, shear=shear, **corner, **nearest)  # type: ignore[arg-type]

    for m in (-13.0, 9.3, 16.6):
        for name, magnitude, expected in (
            ("rotate", m, tvf.rotate(x, angle=m, **nearest)),
            ("shear_x", m, affine([0, 0], [m, 0.0])),
            ("shear_y", m, affine([0, 0], [0.0, m])),
            ("translate_x", m / 50, affine([int(m / 50 * width), 0], [0.0, 0.0])),
            ("translate_y", m / 50, affine([0, int(m / 50 * height)], [0.0, 0.0])),
        ):
            found = one(x, name, magnitude, geometry="pillow")
            differ = (found != expected).float().mean().item()
            assert differ < (0.03 if "translate" not in name else 1e-9), (name, m, differ)


def test_every_picture_has_its_own_operation() -> None:
    x = levels(64, 12, 20).float() / 255
    operation = torch.randint(len(OPERATIONS), (64,), generator=generator(5))
    m = torch.rand(64, generator=generator(6))
    before = x.clone()
    assert len(operation.unique()) == len(OPERATIONS)
    found = apply_operations(x, operation, m)
    apart = torch.cat([apply_operations(x[i : i + 1], operation[i : i + 1], m[i : i + 1]) for i in range(64)])
    assert torch.allclose(found, apart, atol=1e-6)
    assert torch.equal(x, before)
    assert found.min() >= 0
    assert found.max() <= 1
    last = apply_operations(x.contiguous(memory_format=torch.channels_last), operation, m)
    assert torch.allclose(last, found, atol=1e-6)


def test_gradients_flow_and_those_of_whole_levels_are_the_identitys() -> None:
    x = (0.1 + 0.8 * torch.rand(1, 3, 3, 4, generator=generator(1), dtype=torch.float64)).requires_grad_()
    m = {"solarize": 0.5, "offset": 0.01, "rotate": 20.0, "shear_x": 10.0, "shear_y": 10.0}
    for name in OPERATIONS:
        given = m.get(name, 0.2 if "translate" in name else 0.9)
        if name in ("posterize", "equalize"):
            slope = torch.autograd.grad((one(x, name, 3.0) * 2).sum(), x)[0]
            assert torch.equal(slope, torch.full_like(slope, 2.0)), name
            assert torch.equal(one(x, name, 3.0).detach(), one(x.detach(), name, 3.0))
        elif name != "auto_contrast":
            assert torch.autograd.gradcheck(lambda x, n=name, g=given: one(x, n, g), (x,), eps=1e-7), name
    assert torch.autograd.gradcheck(lambda x: one(x, "auto_contrast", 0.0), (x,), eps=1e-7)


def test_trivial_augment_draws_operations_and_magnitudes_evenly() -> None:
    method = TrivialAugment()
    draws = method.draw(60_000, generator=generator())
    names = [OPERATIONS[i] for i in draws["operation"].unique()]
    assert sorted(names) == sorted(method.ranges)
    assert len(names) == 12
    for name, (low, high) in method.ranges.items():
        m = draws["magnitude"][draws["operation"] == number(name)]
        assert len(m) / 60_000 == pytest.approx(1 / 12, abs=0.006)
        if low < high:
            assert (torch.histc(m, 4, low, high) / len(m) - 0.25).abs().max() < 0.03
        else:
            assert m.unique().tolist() == [low]
    assert method.ranges["shear_x"] == (-16.7, 16.7)
    assert TrivialAugment(max_shear=54).ranges["shear_y"] == (-54, 54)


def test_trivial_augment_has_kornias_list() -> None:
    renamed = {"Contrast": "brightness", "Brightness": "offset", "AutoContrast": "auto_contrast"}
    renamed |= {f"{kind}{axis}": f"{kind.lower()}_{axis.lower()}" for kind in ("Shear", "Translate") for axis in "XY"}
    own, found = TrivialAugment(max_shear=54).ranges, {}
    for sequence in KorniaTrivialAugment().children():
        operation = next(iter(sequence.children()))
        kind = type(operation).__name__
        found[renamed.get(kind, kind.lower())] = operation.magnitude_range
    assert sorted(found) == sorted(own)
    for name, bounds in found.items():
        if bounds is not None:
            high = float(torch.as_tensor(bounds).flatten()[-1])
            scale, shift = {"shear_x": (180, 0), "shear_y": (180, 0), "offset": (1, -1)}.get(name, (1, 0))
            assert own[name][1] == pytest.approx(scale * high + shift), name


def test_one_operation_for_all() -> None:
    method = TrivialAugment(per_picture=False)
    seen = set()
    for seed in range(60):
        draws = method.draw(16, generator=generator(seed))
        assert len(draws["operation"].unique()) == 1
        seen.add(int(draws["operation"][0]))
        if len(draws["magnitude"].unique()) == 1:
            assert OPERATIONS[int(draws["operation"][0])] in ("auto_contrast", "equalize")
    assert len(seen) == 12
    assert len(TrivialAugment().draw(16, generator=generator())["operation"].unique()) > 4
    assert method.draw(0, generator=generator())["operation"].shape == (0,)


@pytest.mark.parametrize("method", [TrivialAugment(), TrivialAugment(per_picture=False)])
def test_parts_are_the_whole_and_formats_are_kept(method: Augmentation) -> None:
    draws = method.draw(9, generator=generator(3))
    assert all(len(values) == 9 for values in draws.values())
    for size in ((8, 8), (24, 40)):
        x = torch.rand(9, 3, *size, generator=generator(1))
        before = x.clone()
        whole = augment(x, method, generator=generator(3))
        parts = [method.apply(x[part], take(draws, part)) for part in (slice(0, 1), slice(1, 1), slice(1, 9))]
        assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
        assert torch.equal(x, before)
        assert whole.is_contiguous()
        last = method.apply(x.contiguous(memory_format=torch.channels_last), draws)
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(last, whole, atol=1e-6)
        assert whole.min() >= 0
        assert whole.max() <= 1
        assert not torch.equal(whole, augment(x, method, generator=generator(4)))


@pytest.mark.parametrize("name", ["equalize", "posterize", "identity"])
def test_one_picture_keeps_its_graph(name: str) -> None:
    x = torch.rand(1, 3, 8, 8, generator=generator(1)).requires_grad_()
    assert one(x, name, 3.0).requires_grad


def test_whole_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match="float pictures"):
        augment(levels(2, 4, 4), TrivialAugment(), generator=generator())


@pytest.mark.parametrize("wrong", [90, -1])
def test_bad_settings(wrong: float) -> None:
    with pytest.raises(ValueError, match="max_shear"):
        TrivialAugment(max_shear=wrong)
