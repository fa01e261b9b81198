"""Networks that draw noise: the U-Net of DeepConfuse and the residual generator of unlearnable clusters."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def seeded(make: Callable[[], M], seed: int) -> M:
    """What `make` builds on the CPU, with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return make()


class UNet(nn.Module):
    """A U-Net with values in (-1, 1) for pictures of any size: 7,785,862 parameters at width 64.

    Four scales of width, 2, 4 and 8 times it, each two of (3x3 convolution, BN, ReLU); on the way down average pooling,
    on the way up bilinear interpolation to the size of the scale's own map, which is appended; then a 1x1 convolution,
    BN and tanh.

    Args:
        width: channels of the finest scale.

    Raises:
        ValueError: the width is not positive.

    Source: DeepConfuse's repository (METHODS 13). Deviations: odd sides are halved upwards: no pixel is left out.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        _check_width(width)
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList(_twice(before, after) for before, after in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(_twice(coarse + own, own) for coarse, own in zip(widths[1:], widths, strict=False))
        self.last = nn.Sequential(nn.Conv2d(width, 3, 1, bias=False), nn.BatchNorm2d(3), nn.Tanh())

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        scales: list[Tensor] = []
        for number, block in enumerate(self.down):
            scales.append(block(F.avg_pool2d(scales[-1], 2, ceil_mode=True) if number else x))
        found = scales.pop()
        for block in reversed(self.up):
            own = scales.pop()
            found = F.interpolate(found, size=own.shape[2:], mode="bilinear", align_corners=True)
            found = block(torch.cat([own, found], 1))
        return self.last(found)


class ResidualGenerator(nn.Module):
    """A residual generator with values in (-1, 1) for pictures of 5 pixels a side or more: 7,841,411 parameters at 64.

    A 7x7 convolution, two of stride 2 that double the channels, residual blocks of two 3x3 convolutions, two transposed
    convolutions back, cut to the input's size, a 7x7 convolution and tanh; BN and ReLU after all but the last, edges
    mirrored but for the strided ones.

    Args:
        width: channels after the first convolution; four times as many in the blocks.
        blocks: number of residual blocks.

    Raises:
        ValueError: a number that is not positive, or a smaller picture.

    Source: Unlearnable Clusters' repository (METHODS 12). Deviations: no dropout in the blocks.
    """

    def __init__(self, width: int = 64, blocks: int = 6) -> None:
        super().__init__()
        _check_width(width)
        if blocks < 1:
            raise ValueError(f"expected at least 1 residual block, got {blocks}")
        layers: list[nn.Module] = _mirrored(3, width, 7) + _normed(width)
        for before in (width, 2 * width):
            layers += [nn.Conv2d(before, 2 * before, 3, stride=2, padding=1, bias=False), *_normed(2 * before)]
        layers += [_Residual(4 * width) for _ in range(blocks)]
        for before in (4 * width, 2 * width):
            up = nn.ConvTranspose2d(before, before // 2, 3, stride=2, padding=1, output_padding=1, bias=False)
            layers += [up, *_normed(before // 2)]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Sequential(*_mirrored(width, 3, 7, bias=True), nn.Tanh())

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        height, width = x.shape[2:]
        if min(height, width) < 5:
            raise ValueError(f"expected pictures of at least 5 x 5 pixels, got {height} x {width}")
        return self.last(self.layers(x)[:, :, :height, :width])


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_mirrored(width, width, 3), *_normed(width), *_mirrored(width, width, 3), nn.BatchNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _twice(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        *_normed(after),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        *_normed(after),
    )


def _normed(width: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]


def _mirrored(before: int, after: int, kernel: int, *, bias: bool = False) -> list[nn.Module]:
    return [nn.ReflectionPad2d(kernel // 2), nn.Conv2d(before, after, kernel, bias=bias)]


def _check_width(width: int) -> None:
    if width < 1:
        raise ValueError(f"expected a width of at least 1 channel, got {width}")
