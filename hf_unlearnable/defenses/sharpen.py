"""Random sharpening and a low-pass filter, against poisons that blur."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hf_unlearnable.defenses.data import DataDefense
from hf_unlearnable.draws import RandomNumbers
from hf_unlearnable.images import Images, Labels


@dataclass(frozen=True, kw_only=True)
class RandomSharpening(DataDefense):
    """Every picture is sharpened by a small random kernel, and loses its high frequencies.

                  |  0   -n1   0  |
        kernel =  | -n2   c   -n3 | ,    c ~ N(center, spread^2),    n1..n4 ~ N((c - 1) / 4, spread^2)
                  |  0   -n4   0  |
        x1 = clip(kernel * x)            (correlation without padding: h, w -> h - 2, w - 2)
        x' = clip(idct2(low(dct2(x1))))  (orthonormal DCT-II; the lowest floor(keep * side) of each axis)

    One kernel serves the three channels. The outermost pixel of each side, which has no neighbours, becomes black.

    Args:
        center: mean of the kernel's middle; its weights sum to 1 on average.
        spread: standard deviation of each weight.
        keep: share of the frequencies of each axis that is kept, in (0, 1].
        frequency_filter: whether frequencies are taken out at all.
        random: False for the fixed kernel c = center, n = (center - 1) / 4 ("SSK").

    Raises:
        ValueError: a negative spread, a share outside its range; when pictures come, one so small that nothing is left.

    Source: RSK + FF (arXiv 2411.01742; METHODS_NEW N20).
    Deviations: there a window of 32 is cut from the 30 pixels with 4 black ones on each side, 7 places an axis; here
    the picture gets its old size back first and the recipe crops it, 9 places an axis at 32 pixels.
    """

    name: ClassVar[str] = "rsk-ff"
    each_step: ClassVar = "before crop"
    stored_precision: ClassVar = torch.float64

    center: float = 2.5
    spread: float = 0.1
    keep: float = 0.3
    frequency_filter: bool = True
    random: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.spread >= 0:
            raise ValueError(f"spread is a standard deviation, 0 or more, got {self.spread}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is a share in (0, 1], got {self.keep}")

    def kernels(self, count: int, draws: RandomNumbers) -> Float[Tensor, "b 5"]:
        """The weights of `count` pictures: the middle, and those above, left, right and below (as they are added)."""
        noise = self.spread * draws.normal(5, purpose="kernel") if self.random else torch.zeros(count, 5)
        middle = self.center + noise[:, :1]
        return torch.cat([middle, -(middle - 1) / 4 - noise[:, 1:]], 1)

    def alter(self, x: Images, y: Labels | None, draws: RandomNumbers) -> Images:
        height, width = x.shape[2] - 2, x.shape[3] - 2
        if math.floor(self.keep * min(height, width)) < 1:
            raise ValueError(
                f"expected pictures of which keep={self.keep} leaves a frequency on each axis, got "
                f"{x.shape[2]} x {x.shape[3]}, {height} x {width} inside the border"
            )
        middle, above, left, right, below = self.kernels(len(x), draws).to(x).t()[:, :, None, None, None]
        rows, columns = slice(1, -1), slice(1, -1)
        sharp = middle * x[:, :, rows, columns]
        sharp = sharp + above * x[:, :, :-2, columns] + left * x[:, :, rows, :-2]
        sharp = (sharp + right * x[:, :, rows, 2:] + below * x[:, :, 2:, columns]).clamp(0, 1)
        if self.frequency_filter:
            sharp = (low_pass(height, self.keep, like=x) @ sharp @ low_pass(width, self.keep, like=x)).clamp(0, 1)
        return F.pad(sharp, (1, 1, 1, 1))


def dct_matrix(size: int) -> Float[Tensor, "size size"]:
    """The orthonormal DCT-II in float64: row k is s_k cos(pi k (2 i + 1) / 2 size), s_0 = sqrt(1 / size), others
    sqrt(2 / size)."""
    i = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi / (2 * size) * i[:, None] * (2 * i + 1)) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows


def low_pass(size: int, keep: float, *, like: Tensor) -> Float[Tensor, "size size"]:
    """The symmetric matrix that leaves the lowest floor(keep * size) frequencies of a side, as `like` in type."""
    rows = dct_matrix(size)[: math.floor(keep * size)]
    return (rows.t() @ rows).to(like)
