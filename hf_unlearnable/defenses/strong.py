"""Strong augmentation, as contrastive learning uses it, in plain training."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hf_unlearnable.images import Images, Labels

_RATIOS = (3 / 4, 4 / 3)
_TRIES = 10
_LUMA = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class StrongAugmentation:
    """Mean over the batch of CE(f(t_s(x)), y), with a random view t_s of every picture, one after the other:

        a window of U(1 - 0.9 s, 1) of the area and a ratio of exp U(log 3/4, log 4/3), resized to the picture
        mirrored left to right, p = 1/2
        brightness, contrast, saturation times U(1 - 0.4 s, 1 + 0.4 s), hue + U(-0.1 s, 0.1 s) turns, p = 0.8 s
        grey, p = 0.2 s

    The recipe's own crop and flip come before: for the paper's views take a recipe with augmentation="none". At s = 0
    pictures are left to the recipe.

    Args:
        strength: s, in [0, 1].

    Raises:
        ValueError: a strength outside its range.

    Source: SDA of "SDA + AN" (AAAI 2024; METHODS_NEW N26), with AUE's transform.
    Deviations: colours change in the order above for every picture (there: a random order); windows are not rounded to
    whole pixels.
    """

    name: ClassVar[str] = "strong-augmentation"

    strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength lies in [0, 1], got {self.strength}")

    def view(self, x: Images, *, generator: torch.Generator) -> Images:
        """A fresh view of every picture, in [0, 1]."""
        if self.strength == 0:
            return x
        x = self._windows(x, generator)
        u = torch.rand(6, len(x), 1, 1, 1, generator=generator, device=x.device)
        change = (2 * u[:4] - 1) * self.strength
        jittered = turned_hue(recoloured(x, *(1 + 0.4 * change[:3])), 0.1 * change[3])
        x = torch.where(u[4] < 0.8 * self.strength, jittered, x)
        return torch.where(u[5] < 0.2 * self.strength, grey(x).expand_as(x), x)

    def _windows(self, x: Images, generator: torch.Generator) -> Images:
        u = torch.rand(2, len(x), _TRIES, generator=generator, device=x.device)
        place = torch.rand(2, len(x), generator=generator, device=x.device)
        mirrored = torch.rand(len(x), generator=generator, device=x.device) < 0.5
        high, wide = windows(u[0], u[1], self.strength, x.shape[2], x.shape[3])
        grid = torch.zeros(len(x), 2, 3, device=x.device)
        grid[:, 0, 0], grid[:, 1, 1] = torch.where(mirrored, -wide, wide), high
        grid[:, 0, 2], grid[:, 1, 2] = (2 * place[0] - 1) * (1 - wide), (2 * place[1] - 1) * (1 - high)
        places = F.affine_grid(grid, list(x.shape), align_corners=False)
        return F.grid_sample(x, places, mode="bilinear", padding_mode="border", align_corners=False)

    def __call__(
        self, model: nn.Module, x: Images, y: Labels, *, progress: float, generator: torch.Generator
    ) -> Tensor:
        return F.cross_entropy(model(self.view(x, generator=generator)).float(), y)


def windows(
    area: Float[Tensor, "b tries"], ratio: Float[Tensor, "b tries"], strength: float, height: int, width: int
) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
    """Heights and widths of windows as shares of the picture's, from uniform numbers: of each row the first try that
    fits into the picture, and where none does the largest central window of an allowed ratio."""
    share = 1 - 0.9 * strength * (1 - area)
    low, high = (math.log(value) for value in _RATIOS)
    pixels = torch.exp(low + (high - low) * ratio) * (height / width)
    tall, wide = (share / pixels).sqrt(), (share * pixels).sqrt()
    fits = (tall <= 1) & (wide <= 1)
    first = fits.int().argmax(1, keepdim=True)
    whole = (min(1.0, width / height / _RATIOS[0]), min(1.0, height / width * _RATIOS[1]))
    some = fits.any(1)
    return tuple(  # type: ignore[return-value]
        torch.where(some, side.gather(1, first)[:, 0], other) for side, other in zip((tall, wide), whole, strict=True)
    )


def grey(x: Images) -> Float[Tensor, "b 1 h w"]:
    """0.2989 R + 0.587 G + 0.114 B."""
    return _LUMA[0] * x[:, :1] + _LUMA[1] * x[:, 1:2] + _LUMA[2] * x[:, 2:]


def recoloured(x: Images, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Images:
    """Each factor in turn, clipped to [0, 1]: towards black, the picture's mean grey, and every pixel's own grey."""
    x = (x * brightness).clamp(0, 1)
    mean = grey(x).mean((2, 3), keepdim=True)
    x = (mean + (x - mean) * contrast).clamp(0, 1)
    own = grey(x)
    return (own + (x - own) * saturation).clamp(0, 1)


def turned_hue(x: Images, turns: Tensor) -> Images:
    """The hue of HSV, turned by a share of the full circle; value and saturation stay."""
    red, green, blue = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    safe = chroma.clamp_min(1e-12)
    sixths = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    sixths = torch.where(value == red, (green - blue) / safe, sixths) + 6 * turns[:, 0]
    offsets = torch.tensor([5.0, 3.0, 1.0], device=x.device)[:, None, None]
    k = (offsets + sixths[:, None]).remainder(6)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)
