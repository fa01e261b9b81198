"""Batched augmentations in two steps: draw the randomness, then apply it.

The steps are apart so that every process can draw for the whole batch with the same generator and apply its own rows:
the pictures then do not depend on the number of processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor

Draws: TypeAlias = Mapping[str, Tensor]
"""The randomness of a batch by name; the first axis of every tensor counts the pictures."""


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
