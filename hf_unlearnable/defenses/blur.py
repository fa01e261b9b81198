"""A Gaussian blur that is one, with a width of its own for every picture."""

import math
import warnings
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
class GaussianBlur(DataDefense):
    """Every picture is blurred by a Gaussian of a random width, the same for its three channels.

        x' = g * x * g^T,   g(t) = exp(-t^2 / 2 sigma^2) / sum,   sigma ~ U(low, high)

    Borders are mirrored without repeating the outermost pixel.

    Args:
        sigma: lowest and highest width in pixels, or one width for all.
        kernel_size: pixels of the Gaussian, odd; None for three of the largest widths to each side.

    Raises:
        ValueError: a width that is not positive, a range that is not one, an even kernel; when pictures come, one that
            is too small for the kernel.

    Warns:
        UserWarning: no width in the range would change a stored pixel by half a grey level: the identity.

    Source: ISS (METHODS 23), where it is sigma=(0.1,), kernel_size=3.
    Deviations: those numbers change nothing, so that ISS's and APBench's "gaussian" columns are undefended training;
    the default range is METHODS 23's.
    """

    name: ClassVar[str] = "gaussian-blur"
    each_step: ClassVar = "before crop"

    sigma: tuple[float, ...] = (0.1, 2.0)
    kernel_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.sigma) not in (1, 2) or not 0 < self.sigma[0] <= self.sigma[-1] < math.inf:
            raise ValueError(f"sigma is one positive width or (lowest, highest), got {self.sigma}")
        if self.kernel_size is not None and (self.kernel_size < 1 or self.kernel_size % 2 == 0):
            raise ValueError(f"kernel_size is odd and positive, got {self.kernel_size}")
        middle = float(self._weights(torch.tensor([[self.sigma[-1]]], dtype=torch.float64))[0, self._radius])
        if 255 * (1 - middle**2) < 0.5:
            warnings.warn(
                f"a Gaussian blur of sigma={self.sigma} and {2 * self._radius + 1} pixels is the identity: it changes "
                "no value by half a grey level (ISS's 'gaussian' is undefended training)",
                UserWarning,
                stacklevel=3,
            )

    @property
    def _radius(self) -> int:
        return math.ceil(3 * self.sigma[-1]) if self.kernel_size is None else self.kernel_size // 2

    def _weights(self, sigma: Float[Tensor, "b 1"]) -> Float[Tensor, "b k"]:
        squares = torch.arange(-self._radius, self._radius + 1).to(sigma).square()
        bell = torch.exp(-squares / (2 * sigma.square()))
        return bell / bell.sum(1, keepdim=True)

    def alter(self, x: Images, y: Labels | None, draws: RandomNumbers) -> Images:
        low, high, radius = self.sigma[0], self.sigma[-1], self._radius
        if radius >= min(x.shape[2:]):
            raise ValueError(
                f"expected pictures of more than {radius} pixels a side for a kernel of {2 * radius + 1}, got "
                f"{x.shape[2]} x {x.shape[3]}: set a smaller kernel_size"
            )
        weights = self._weights(low + (high - low) * draws.uniform(1, purpose="sigma")).to(x)
        taps = weights.t()[:, :, None, None, None]
        padded = F.pad(x, (radius,) * 4, mode="reflect")
        down = sum(tap * padded[:, :, i : i + x.shape[2]] for i, tap in enumerate(taps))
        return sum(tap * down[..., i : i + x.shape[3]] for i, tap in enumerate(taps))  # type: ignore[index]
