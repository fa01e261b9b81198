"""Batched augmentations in two steps: draw the randomness, then apply it.

The steps are apart so that every process can draw for the whole batch with the same generator and apply its own rows:
the pictures then do not depend on the number of processes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor

Draws: TypeAlias = Mapping[str, Tensor]
"""The randomness of a batch by name; the first axis of every tensor counts the pictures."""


_TRIES = 10


@runtime_checkable
class Augmentation(Protocol):
    """A random change of pictures of any size and dtype, drawn on its own and applied afterwards."""

    def draw(self, count: int, *, generator: torch.Generator) -> Draws:
        """The randomness for `count` pictures, on the generator's device."""
        ...

    def apply(self, x: Shaped[Tensor, "b c h w"], draws: Draws) -> Shaped[Tensor, "b c h w"]:
        """The pictures of `x` under their draws, on x's device. `x` is left as it is."""
        ...


@dataclass(frozen=True, kw_only=True)
class CropFlip:
    """Pad with black, cut a window of the old size at a random place, mirror it left to right: one place per picture.

    Args:
        padding: pixels of zeros added on every side, so 2 * padding + 1 places along each axis (4 is usual at 32 px).
        flip: probability of the mirror image, in [0, 1].

    Raises:
        ValueError: negative padding, or a probability outside [0, 1].

    Source: RandomCrop(32, padding=4) and RandomHorizontalFlip(0.5) of torchvision, the standard CIFAR augmentation.
    Deviations: none.
    """

    padding: int = 4
    flip: float = 0.5

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding is at least 0 pixels, got {self.padding}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is a probability in [0, 1], got {self.flip}")

    def draw(self, count: int, *, generator: torch.Generator) -> Draws:
        """Rows and columns of the windows' corners in the padded pictures, and which windows are mirrored."""
        device = generator.device
        corners = torch.randint(0, 2 * self.padding + 1, (count, 2), generator=generator, device=device)
        mirrored = torch.rand(count, generator=generator, device=device) < self.flip
        return {"top": corners[:, 0], "left": corners[:, 1], "mirrored": mirrored}

    def apply(self, x: Shaped[Tensor, "b c h w"], draws: Draws) -> Shaped[Tensor, "b c h w"]:
        """One gather: output pixel (i, j) of picture n is padded pixel (top_n + i, left_n + j), or mirrored in j."""
        batch, channels, height, width = x.shape
        top, left, mirrored = (draws[name].to(x.device, non_blocking=True) for name in ("top", "left", "mirrored"))
        padded = F.pad(x, (self.padding,) * 4)
        across = torch.arange(width, device=x.device)
        rows = top[:, None] + torch.arange(height, device=x.device)
        columns = left[:, None] + torch.where(mirrored[:, None], across.flip(0), across)
        places = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).view(batch, 1, height * width)
        windows = padded.flatten(2).gather(2, places.expand(batch, channels, height * width))
        return windows.view(batch, channels, height, width)


@dataclass(frozen=True, kw_only=True)
class ShiftFlip:
    """Shift by any fraction of a pixel, black outside, and mirror left to right: CropFlip with smooth places.

    Output pixel (i, j) is the bilinear value of the picture at (i + dy, j + dx), with dy and dx uniform in
    -+ shift * side for every picture, or mirrored in j.

    Args:
        shift: the largest shift along an axis, a share of that side in [0, 1] (1/8: 4 pixels at 32, 28 at 224).
        flip: probability of the mirror image, in [0, 1].

    Raises:
        ValueError: a value outside [0, 1].

    Source: the differentiable transform of TAP's repository (METHODS 8): a sampling grid moved by up to
    linspace(0, 1, side)[side / 4], bilinear, zeros outside, align_corners.
    Deviations: sides that four does not divide have the same share; pictures of whole numbers are rounded to nearest.
    """

    shift: float = 0.125
    flip: float = 0.5

    def __post_init__(self) -> None:
        for name, value in (("shift", self.shift), ("flip", self.flip)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} lies in [0, 1], got {value}")

    def draw(self, count: int, *, generator: torch.Generator) -> Draws:
        """How far every picture is shifted along its two axes, in (-1, 1) of the largest, and which are mirrored."""
        device = generator.device
        shifts = 2 * torch.rand(count, 2, generator=generator, device=device) - 1
        mirrored = torch.rand(count, generator=generator, device=device) < self.flip
        return {"down": shifts[:, 0], "across": shifts[:, 1], "mirrored": mirrored}

    def apply(self, x: Shaped[Tensor, "b c h w"], draws: Draws) -> Shaped[Tensor, "b c h w"]:
        """Differentiable in `x` where it is of a float type."""
        kind = x.dtype if x.dtype == torch.float64 else torch.float32
        down, across, mirrored = (
            draws[name].to(x.device, non_blocking=True) for name in ("down", "across", "mirrored")
        )
        rows, columns = self._places(down, x.shape[2]).to(kind), self._places(across, x.shape[3]).to(kind)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), 3)
        moved = F.grid_sample(x.to(kind), grid, mode="bilinear", padding_mode="zeros", align_corners=True)
        return (moved if x.is_floating_point() else moved.round()).to(x.dtype)

    def _places(self, moved: Shaped[Tensor, " b"], side: int) -> Shaped[Tensor, "b side"]:
        """Where every output row or column looks, with -1 and 1 for the middles of the first and the last."""
        even = torch.linspace(-1, 1, side, dtype=torch.float64, device="cpu").to(moved)
        return even + moved[:, None] * (2 * self.shift * side / max(side - 1, 1))


@dataclass(frozen=True, kw_only=True)
class ResizedCropFlip:
    """Cut a window of random area and shape, enlarge it to the old size, mirror it left to right: one per picture.

    The window has the share `area` of the picture and the width `ratio` times its height, both in whole pixels: the
    first of ten draws that fits, or else the largest window at the centre whose ratio is allowed. Bilinear, from the
    window's own pixels alone.

    Args:
        area: least and largest share of the area, in (0, 1].
        ratio: least and largest width over height; the draw is uniform in its logarithm.
        flip: probability of the mirror image, in [0, 1].

    Raises:
        ValueError: a value outside its range.

    Source: RandomResizedCrop and RandomHorizontalFlip(0.5) of torchvision, the standard augmentation at 224 px
    (METHODS, part I). Deviations: the size stays; pictures of whole numbers are rounded to nearest.
    """

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area is (least, largest) in (0, 1], got {self.area}")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio is (least, largest), above 0, got {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is a probability in [0, 1], got {self.flip}")

    def draw(self, count: int, *, generator: torch.Generator) -> Draws:
        """Ten areas and ratios for every picture, the window's place as shares of the room, which are mirrored."""
        device = generator.device
        areas = torch.rand(count, _TRIES, generator=generator, device=device)
        shapes = torch.rand(count, _TRIES, generator=generator, device=device)
        places = torch.rand(count, 2, generator=generator, device=device)
        mirrored = torch.rand(count, generator=generator, device=device) < self.flip
        low, high = map(math.log, self.ratio)
        return {
            "areas": self.area[0] + areas * (self.area[1] - self.area[0]),
            "ratios": torch.exp(low + shapes * (high - low)),
            "places": places,
            "mirrored": mirrored,
        }

    def apply(self, x: Shaped[Tensor, "b c h w"], draws: Draws) -> Shaped[Tensor, "b c h w"]:
        """Differentiable in `x` where it is of a float type."""
        kind = x.dtype if x.dtype == torch.float64 else torch.float32
        top, left, height, width = self.windows(x.shape[2], x.shape[3], draws)
        mirrored = draws["mirrored"].to(x.device, non_blocking=True)
        rows = _inside(top, height, x.shape[2]).to(x.device, kind)
        columns = _inside(left, width, x.shape[3]).to(x.device, kind)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), 3)
        cut = F.grid_sample(x.to(kind), grid, mode="bilinear", padding_mode="border", align_corners=False)
        return (cut if x.is_floating_point() else cut.round()).to(x.dtype)

    def windows(self, height: int, width: int, draws: Draws) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Top, left, height and width of every window, in whole pixels, for pictures of this size."""
        areas, ratios = draws["areas"].double() * (height * width), draws["ratios"].double()
        wide, high = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
        fits = (wide >= 1) & (wide <= width) & (high >= 1) & (high <= height)
        first = fits.to(torch.uint8).argmax(1, keepdim=True)
        found = fits.any(1)
        least, largest = self.ratio
        wide = torch.where(found, wide.gather(1, first)[:, 0], min(width, round(height * largest)))
        high = torch.where(found, high.gather(1, first)[:, 0], min(height, round(width / least)))
        down, across = draws["places"].double().unbind(1)
        top = torch.where(found, (down * (height - high + 1)).floor(), ((height - high) / 2).floor())
        left = torch.where(found, (across * (width - wide + 1)).floor(), ((width - wide) / 2).floor())
        return top, left, high, wide


def _inside(start: Shaped[Tensor, " b"], length: Shaped[Tensor, " b"], side: int) -> Shaped[Tensor, "b side"]:
    """Where the rows or columns of an enlarged window look, with -1 and 1 for the picture's edges."""
    even = torch.arange(side, device=start.device) + 0.5
    places = (even * (length / side)[:, None] - 0.5).clamp_min(0).minimum(length[:, None] - 1)
    return (2 * (places + start[:, None]) + 1) / side - 1


def take(draws: Draws, rows: slice) -> Draws:
    """The draws of some of the pictures: those of one process out of the whole batch."""
    return {name: drawn[rows] for name, drawn in draws.items()}


def augment(
    x: Shaped[Tensor, "b c h w"], augmentation: Augmentation | None, *, generator: torch.Generator
) -> Shaped[Tensor, "b c h w"]:
    """Draw and apply in one go; None leaves the pictures as they are."""
    if augmentation is None:
        return x
    return augmentation.apply(x, augmentation.draw(len(x), generator=generator))
