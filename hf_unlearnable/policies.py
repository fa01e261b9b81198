"""The operations of automatic augmentation on a batch in which every picture has its own operation and magnitude, and
TrivialAugment, which is one of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hf_unlearnable.augment import Draws

OPERATIONS = (
    "identity",
    "auto_contrast",
    "equalize",
    "invert",
    "posterize",
    "solarize",
    "offset",
    "brightness",
    "contrast",
    "color",
    "sharpness",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
"""What `apply_operations` knows, in the order of its numbers."""

Geometry: TypeAlias = Literal["smooth", "pillow"]

_GEOMETRIC = OPERATIONS.index("rotate")
_GREY = (0.2989, 0.587, 0.114)


def apply_operations(
    x: Float[Tensor, "b 3 h w"],
    operation: Int[Tensor, " b"],
    magnitude: Float[Tensor, " b"],
    *,
    geometry: Geometry = "smooth",
) -> Float[Tensor, "b 3 h w"]:
    """Every picture under its own operation; the result lies in [0, 1] where `x` does. `x` is left as it is.

    | operation | result for a magnitude m |
    |---|---|
    | identity, invert | x, 1 - x |
    | auto_contrast | every channel stretched to [0, 1]; one of a single value stays |
    | equalize | every channel's histogram of 256 levels made flat, as Pillow does it |
    | posterize | the upper round(m) of 8 bits; 8 leaves x as it is |
    | solarize | 1 - x where x >= m |
    | offset, brightness | clamp(x + m), clamp(m x) |
    | contrast, color, sharpness | clamp(m x + (1 - m) g): g is the mean grey, the grey picture, the blurred inside |
    | rotate | by m degrees, counter-clockwise |
    | shear_x, shear_y | by an angle of m degrees |
    | translate_x, translate_y | right or down by m of the width or height |

    What comes from outside is black. Gradients flow through all; posterize and equalize hand them on unchanged.

    Args:
        x: in [0, 1].
        operation: numbers into `OPERATIONS`.
        magnitude: ignored where an operation has none.
        geometry: "smooth" is bilinear and shears about the middle (kornia); "pillow" takes the nearest pixel, shears
            about the upper left corner and translates by whole pixels (torchvision's policies).

    Source: torchvision and kornia, operation by operation (METHODS 22 and 24).
    Deviations: values are not rounded to 255ths, except by posterize and equalize, which take the level below (of a
    picture of whole 255ths: its level).
    """
    order = operation.argsort(stable=True)
    counts = torch.bincount(operation, minlength=len(OPERATIONS)).tolist()
    photometric = [*counts[:_GEOMETRIC], sum(counts[_GEOMETRIC:])]
    ordered, strength = x.index_select(0, order), magnitude.to(x)[order, None, None, None]
    done = []
    for number, (part, m) in enumerate(zip(ordered.split(photometric), strength.split(photometric), strict=True)):
        if len(part) and number < _GEOMETRIC:
            done.append(_photometric(part, OPERATIONS[number], m))
        elif len(part):
            done.append(_moved(part, operation[order[-len(part) :]], m.flatten(), geometry))
    return torch.cat(done).index_select(0, order.argsort()) if done else x.clone()


def _photometric(x: Tensor, name: str, m: Tensor) -> Tensor:
    match name:
        case "auto_contrast":
            low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
            flat = high == low
            return (x - low.masked_fill(flat, 0)) / (high - low).masked_fill(flat, 1)
        case "equalize":
            return _straight_through(x, _equalized(x.detach()))
        case "invert":
            return 1 - x
        case "posterize":
            bits = m.round()
            step = 2 ** (8 - bits)
            kept = (_levels(x.detach()) / step).floor() * step / 255
            return torch.where(bits >= 8, x, _straight_through(x, kept))
        case "solarize":
            return torch.where(x < m, x, 1 - x)
        case "offset":
            return (x + m).clamp(0, 1)
        case "brightness":
            return (x * m).clamp(0, 1)
        case "contrast":
            return _blended(_grey(x).mean((1, 2, 3), keepdim=True), x, m)
        case "color":
            return _blended(_grey(x), x, m)
        case "sharpness":
            return _sharpened(x, m)
        case _:
            return x


def _blended(other: Tensor, x: Tensor, m: Tensor) -> Tensor:
    return (other + m * (x - other)).clamp(0, 1)


def _grey(x: Tensor) -> Float[Tensor, "b 1 h w"]:
    red, green, blue = x.split(1, 1)
    return _GREY[0] * red + _GREY[1] * green + _GREY[2] * blue


def _straight_through(x: Tensor, value: Tensor) -> Tensor:
    """The value, with the gradient of x."""
    return value + (x - x.detach()) if x.requires_grad else value


def _levels(x: Tensor) -> Tensor:
    """The level of 256 at or just below; a 2^-10 makes up for the rounding of level / 255."""
    return (255 * x + 2**-10).floor()


def _equalized(x: Tensor) -> Tensor:
    levels = _levels(x).long().flatten(2)
    counts = levels.new_zeros(*x.shape[:2], 256).scatter_add_(2, levels, torch.ones_like(levels))
    highest = counts.gather(2, levels.amax(2, keepdim=True))
    step = (levels.shape[2] - highest) // 255
    table = ((counts.cumsum(2) - counts + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step[..., None] > 0, table.gather(2, levels).view_as(x).to(x) / 255, x)


def _sharpened(x: Tensor, m: Tensor) -> Tensor:
    """The blur weighs a pixel 5/13 and its eight neighbours 1/13 each; the rim is left alone."""
    down = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    inside = x[..., 1:-1, 1:-1]
    blurred = (down[..., :-2] + down[..., 1:-1] + down[..., 2:] + 4 * inside) / 13
    sharp = x.clone()
    sharp[..., 1:-1, 1:-1] = _blended(blurred, inside, m)
    return sharp


def _moved(x: Tensor, operation: Int[Tensor, " b"], m: Float[Tensor, " b"], geometry: Geometry) -> Tensor:
    """One lookup for all geometric operations: output (i, j) is the picture at M (i, j) + t, both from its middle."""
    height, width = x.shape[2:]
    is_rotation, is_shear_x, is_shear_y, is_right, is_down = (
        operation == number for number in range(_GEOMETRIC, len(OPERATIONS))
    )
    angle, zero = torch.deg2rad(m), torch.zeros_like(m)
    cosine = torch.where(is_rotation, angle.cos(), 1)
    sine, slope = torch.where(is_rotation, angle.sin(), zero), angle.tan()
    slope_x, slope_y = torch.where(is_shear_x, slope, zero), torch.where(is_shear_y, slope, zero)
    right, down = torch.where(is_right, m * width, zero), torch.where(is_down, m * height, zero)
    if geometry == "pillow":
        right = right.trunc() - slope_x * (height / 2)
        down = down.trunc() - slope_y * (width / 2)
    across = torch.arange(width, device=x.device, dtype=x.dtype) - (width - 1) / 2
    along = (torch.arange(height, device=x.device, dtype=x.dtype) - (height - 1) / 2)[:, None]
    cosine, sine, slope_x, slope_y, right, down = (
        value[:, None, None] for value in (cosine, sine, slope_x, slope_y, right, down)
    )
    columns = cosine * across + ((slope_x - sine) * along - right)
    rows = cosine * along + ((slope_y + sine) * across - down)
    grid = torch.stack([columns * (2 / width), rows * (2 / height)], 3)
    mode = "bilinear" if geometry == "smooth" else "nearest"
    return F.grid_sample(x, grid, mode=mode, padding_mode="zeros", align_corners=False)


def check_pictures(x: Tensor) -> None:
    """Raise TypeError unless the pictures are of a float type."""
    if not x.is_floating_point():
        raise TypeError(f"expected float pictures in [0, 1], got {x.dtype}")


def as_laid_out(z: Tensor, x: Tensor) -> Tensor:
    """`z` in the memory format of `x`, channels first or last."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return z.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@dataclass(frozen=True, kw_only=True)
class TrivialAugment:
    """One operation out of twelve, at a uniform magnitude.

    Args:
        max_shear: largest angle of a shear in degrees, in [0, 90): arctan(0.3), the 0.3 of the TrivialAugment paper.
            kornia reads its 0.3 as a share of 180 degrees, 54.
        per_picture: every picture has its own operation; False: one operation for all that are drawn at once (every
            picture its own magnitude), as in kornia.

    Raises:
        ValueError: `max_shear` outside its range.

    Source: Mueller and Hutter 2021, with kornia's list and ranges, which UEraser runs (METHODS 22): neither identity
    nor colour; kornia's "contrast" is a factor of all values ("brightness" here), its "brightness" is added to them.
    Deviations: shears are smaller and operations differ between pictures, unless told otherwise.
    """

    max_shear: float = 16.7
    per_picture: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.max_shear < 90:
            raise ValueError(f"max_shear is an angle in degrees in [0, 90), got {self.max_shear}")

    @property
    def ranges(self) -> Mapping[str, tuple[float, float]]:
        """The operations and the ranges of their magnitudes."""
        shear = (-self.max_shear, self.max_shear)
        return {
            "auto_contrast": (0.0, 0.0),
            "equalize": (0.0, 0.0),
            "rotate": (-30.0, 30.0),
            "posterize": (0.0, 4.0),
            "solarize": (0.0, 1.0),
            "brightness": (0.1, 1.9),
            "offset": (-0.9, 0.9),
            "sharpness": (0.1, 1.9),
            "shear_x": shear,
            "shear_y": shear,
            "translate_x": (-0.5, 0.5),
            "translate_y": (-0.5, 0.5),
        }

    def draw(self, count: int, *, generator: torch.Generator) -> Draws:
        """Every picture's operation (a number into `OPERATIONS`) and magnitude."""
        device, ranges = generator.device, self.ranges
        numbers = torch.tensor([OPERATIONS.index(name) for name in ranges], device=device)
        bounds = torch.tensor(list(ranges.values()), device=device)
        several = count if self.per_picture else min(count, 1)
        drawn = torch.randint(len(ranges), (several,), generator=generator, device=device).expand(count)
        low, high = bounds[drawn].unbind(1)
        share = torch.rand(count, generator=generator, device=device)
        return {"operation": numbers[drawn], "magnitude": low + (high - low) * share}

    def apply(self, x: Shaped[Tensor, "b c h w"], draws: Draws) -> Shaped[Tensor, "b c h w"]:
        """Differentiable in `x`."""
        check_pictures(x)
        operation, magnitude = (draws[name].to(x.device, non_blocking=True) for name in ("operation", "magnitude"))
        return as_laid_out(apply_operations(x, operation, magnitude), x)
