"""Every pixel is looked up a little off its place."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_unlearnable.defenses.data import DataDefense
from hf_unlearnable.draws import RandomNumbers
from hf_unlearnable.images import Images, Labels


@dataclass(frozen=True, kw_only=True)
class RandomDisplacement(DataDefense):
    """Every pixel is looked up at a random place around its own.

        x'[i, j] = x[i + dy_ij, j + dx_ij],    dx_ij, dy_ij ~ U(-alpha, alpha)

    The value between pixels is bilinear, and the picture is repeated beyond its borders. The three channels share the
    places.

    Args:
        alpha: the largest displacement along an axis, in pixels; 0 leaves pictures as they are.

    Raises:
        ValueError: a negative alpha.

    Source: COIN (AAAI 2025; METHODS_NEW N21), at severity 4 of 0.8, 1.2, ... 3.2.
    Deviations: there the result is truncated to whole grey levels before training; here a training sees the values
    themselves, and stored pictures are rounded. The period is the side (scipy's "grid-wrap"); there it is one pixel
    less ("wrap"), which differs within alpha of the border.
    """

    name: ClassVar[str] = "coin"
    each_step: ClassVar = "after crop"

    alpha: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha is a number of pixels, 0 or more, got {self.alpha}")

    def alter(self, x: Images, y: Labels | None, draws: RandomNumbers) -> Images:
        _, _, height, width = x.shape
        moved = (draws.uniform(2, height, width, purpose="places").to(x) * 2 - 1) * self.alpha
        down = torch.arange(height, device=x.device)[:, None] + moved[:, 0]
        across = torch.arange(width, device=x.device) + moved[:, 1]
        top, left = down.floor(), across.floor()
        weight_down, weight_across = (down - top)[:, None], (across - left)[:, None]
        rows, columns, planes = top.long(), left.long(), x.flatten(2)

        def at(row: int, column: int) -> Images:
            places = (rows + row).remainder(height) * width + (columns + column).remainder(width)
            return planes.gather(2, places.flatten(1)[:, None].expand(-1, 3, -1)).view(x.shape)

        upper = at(0, 0) * (1 - weight_across) + at(0, 1) * weight_across
        lower = at(1, 0) * (1 - weight_across) + at(1, 1) * weight_across
        return upper * (1 - weight_down) + lower * weight_down
