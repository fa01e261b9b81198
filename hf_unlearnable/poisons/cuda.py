"""CUDA: class-wise random convolutions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hf_unlearnable.draws import Draws
from hf_unlearnable.images import Images, Labels, Pixels, as_uint8
from hf_unlearnable.keys import Key, numpy_generator
from hf_unlearnable.poisons.base import Poison

_SMALL = 96
_BLOCK, _ROWS = 8, 2
_VALUES_AT_ONCE = 160_000
"""Values that a CPU blurs together: as many as stay in a core's own cache."""


@dataclass(frozen=True, kw_only=True)
class CudaPoison(Poison):
    """Every class is blurred with a private random filter: x' = (s_y * x) / max(s_y * x).

    The filter of a class has k x k weights drawn from U(0, blur), of which one at a random place is 1; it is the same
    for the three channels, with zero padding of k // 2. There is no norm bound.

    Args:
        kernel_size: k, odd; None for 3 where a picture's shorter side is below 96 pixels, and 9 otherwise.
        blur: upper end p_b of the weights; None for 0.3 (small) or 0.06. Larger is stronger and blurrier.
        mode: "classwise", or the paper's sanity checks: "universal" (every class gets the filter of class 0) and
            "permuted" (class y gets the filter of class (y + 1) mod num_classes).

    An int seed gives the filters of the official code for that seed. With a secret key each class has its own stream.

    Raises:
        ValueError: an even or too large filter, a seed of 2**32 or more, "permuted" without num_classes.

    Source: CUDA, sections 4.1, 5.1 and 5.2 (METHODS 1).
    Deviations: rounds to the nearest level where the official code truncates. The weights are rounded to a multiple of
        2**-b (b = 14 for k=3, blur 0.3; b = 13 for k=9, blur 0.06) and pictures are taken at their 256 levels, so that
        float32 sums are exact: the pixels are the same on every device and in every batch, and within one grey level
        of the official bytes. `poison_rate` chooses an exact count of keyed rows.
    """

    name: ClassVar[str] = "cuda"
    pure: ClassVar[bool] = True

    kernel_size: int | None = None
    blur: float | None = None
    mode: Literal["classwise", "universal", "permuted"] = "classwise"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel_size is not None and (self.kernel_size < 1 or self.kernel_size % 2 == 0):
            raise ValueError(f"kernel_size is odd and positive, got {self.kernel_size}")
        if self.blur is not None and not 0 <= self.blur <= 1:
            raise ValueError(f"blur is a number from 0 to 1, got {self.blur}")
        if self.mode not in ("classwise", "universal", "permuted"):
            raise ValueError(f'mode is "classwise", "universal" or "permuted", got {self.mode!r}')
        if self.mode == "permuted" and self.num_classes is None:
            raise ValueError('mode="permuted" needs num_classes')
        if isinstance(self.seed, int) and self.seed >= 2**32:
            raise ValueError("an int seed of CUDA is below 2**32 (the official random stream's range)")

    @property
    def uses_labels(self) -> bool:
        return self.mode != "universal"

    def filters(self, num_classes: int, *, kernel_size: int, blur: float) -> Float[Tensor, "n k k"]:
        """The filters of classes 0 to num_classes - 1, float64, before rounding."""
        return torch.from_numpy(_filters(self.seed, num_classes, kernel_size, float(blur)).copy())

    def perturb(self, x: Images, y: Labels | None, draws: Draws) -> Images:
        poisoned = torch.empty_like(x)
        for rows, some in self._blurred(x, y):
            _put(poisoned, rows, some)
        return poisoned

    def perturb_pixels(self, pixels: Pixels, y: Labels | None, draws: Draws, where: Sequence[str]) -> Pixels:
        poisoned = torch.empty_like(pixels)
        for rows, some in self._blurred(pixels, y):
            _put(poisoned, rows, as_uint8(some.mul_(255).round_()))
        return poisoned

    def _blurred(self, x: Images | Pixels, y: Labels | None) -> Iterator[tuple[slice | Tensor, Images]]:
        """Some rows at a time, and what becomes of them."""
        small = min(x.shape[2:]) < _SMALL
        k = self.kernel_size or (3 if small else 9)
        blur = self.blur if self.blur is not None else (0.3 if small else 0.06)
        if k > min(x.shape[2:]):
            raise ValueError(
                f"expected a filter no larger than the picture ({tuple(x.shape[2:])}), got kernel_size={k}"
            )
        if self.mode == "universal" or y is None:
            which = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        elif self.mode == "permuted" and self.num_classes is not None:
            which = (y + 1) % self.num_classes
        else:
            which = y
        top = 1 << int(which.max()).bit_length()
        kernels = _whole(self.filters(top, kernel_size=k, blur=blur), blur)
        blurred = _by_blocks(x, which, kernels) if x.device.type == "cpu" and k > 3 else _by_shifts(x, which, kernels)
        for rows, some in blurred:
            yield rows, some / some.amax(dim=(1, 2, 3), keepdim=True).clamp_min_(1)


def _put(target: Tensor, rows: slice | Tensor, values: Tensor) -> None:
    if isinstance(rows, slice):
        target[rows] = values
    else:
        target.index_copy_(0, rows, values.to(target.dtype))


@lru_cache(maxsize=32)
def _filters(key: Key, num_classes: int, k: int, blur: float) -> np.ndarray:
    filters = np.empty((num_classes, k, k))
    official = np.random.RandomState(key) if isinstance(key, int) else None
    for label in range(num_classes):
        if official is not None:
            filters[label] = official.uniform(0, blur, (3, 1, k, k))[0, 0]
            row, column = official.randint(k), official.randint(k)
        else:
            generator = numpy_generator(key, CudaPoison.name, "filter", label)
            filters[label] = generator.uniform(0, blur, (k, k))
            row, column = generator.integers(k, size=2)
        filters[label, row, column] = 1
    return filters


def _whole(filters: Float[Tensor, "n k k"], blur: float) -> Float[Tensor, "n k k"]:
    """The weights as whole numbers, of as many bits as keep every sum of weight * level below 2**24."""
    largest_sum = 1 + (filters[0].numel() - 1) * blur
    bits = int(np.floor(np.log2(2**24 / (256 * largest_sum))))
    return filters.mul(2.0**bits).round_().to(torch.float32)


def _put_levels(x: Images | Pixels, target: Tensor) -> None:
    """The levels of pictures, round(255 x), as float32."""
    if x.dtype == torch.uint8:
        target.copy_(x)
    else:
        torch.mul(x, 255, out=target).round_()


def _by_shifts(x: Images | Pixels, which: Labels, kernels: Float[Tensor, "n k k"]) -> Iterator[tuple[slice, Images]]:
    """Zero-padded cross-correlation of the levels with each row's filter of whole numbers, exact in float32.

    One multiply-add of long vectors for each weight: all rows of all planes stand in one vector, `pad` zeros after each
    row and `pad` rows of zeros before each plane, so that a shift of the pictures is a shift of the vector. A CPU takes
    as few pictures at a time as stay in a core's own cache.
    """
    k = kernels.shape[-1]
    pad = k // 2
    height, width = x.shape[2:]
    stride = width + pad
    margin, length = pad * stride + pad, 3 * (height + pad) * stride
    few = len(x) if x.device.type != "cpu" else min(len(x), max(1, _VALUES_AT_ONCE // x[0].numel()))
    vector = x.new_zeros(few * length + 2 * margin, dtype=torch.float32)
    grid = vector[margin : margin + few * length].view(few, 3, height + pad, stride)[:, :, pad:, :width]
    starts = [row * stride + column for row in range(k) for column in range(k)]
    shifts = [vector[start : start + few * length].view(few, length) for start in starts]
    weights = kernels.to(x.device)[which].flatten(1).t().unsqueeze(2)
    for first in range(0, len(x), few):
        rows = slice(first, first + few)
        count = len(x[rows])
        _put_levels(x[rows], grid[:count])
        total = shifts[0][:count] * weights[0, rows]
        for shift, weight in zip(shifts[1:], weights[1:, rows], strict=True):
            total.addcmul_(shift[:count], weight)
        yield rows, total.view(count, 3, height + pad, stride)[:, :, pad:, :width]


def _by_blocks(
    x: Images | Pixels, which: Labels, kernels: Float[Tensor, "n k k"]
) -> Iterator[tuple[slice | Tensor, Images]]:
    """The same class by class, of which `_correlate_by_blocks` takes less time for large filters."""
    for label in which.unique().tolist():
        rows = (which == label).nonzero().flatten()
        first, last = int(rows[0]), int(rows[-1])
        place = slice(first, last + 1) if last - first < len(rows) else rows
        yield place, _correlate_by_blocks(x[place], kernels[label])


def _correlate_by_blocks(x: Images | Pixels, kernel: Float[Tensor, "k k"]) -> Images:
    """Blocks of neighbouring pixels are channels: one dense convolution, faster than a depthwise one.

    It makes blocks of _ROWS x `size` outputs out of columns in blocks of `size`, of which a block of outputs needs its
    own and the next (the picture is shifted by the padding). Rows cut into blocks are channels-last as they lie in
    memory, so that inputs are not copied around.
    """
    k = len(kernel)
    count, _, height, width = x.shape
    size = max(_BLOCK, -(-(k - 1) // _BLOCK) * _BLOCK)
    across, down, tall = -(-width // size), -(-height // _ROWS), _ROWS + k - 1
    dense = kernel.new_zeros(_ROWS, size, tall, 2 * size)
    row, one = dense.stride(2), dense.stride(1)
    shifted = dense.as_strided((_ROWS, size, k, k), (size * one + row, one + 1, row, 1))  # [r, c] is [r, c, r:, c:]
    shifted.copy_(kernel)
    dense = dense.view(_ROWS * size, tall, 2, size).permute(0, 3, 1, 2)
    padded = kernel.new_zeros(count, 3, down * _ROWS + k - 1, (across + 1) * size)
    _put_levels(x, padded[:, :, k // 2 : k // 2 + height, k // 2 : k // 2 + width])
    blocks = padded.view(count * 3, -1, across + 1, size).permute(0, 3, 1, 2)
    total = F.conv2d(blocks, dense, stride=(_ROWS, 1)).permute(0, 2, 3, 1)
    pixels = total.reshape(count, 3, down, across, _ROWS, size).transpose(3, 4)
    return pixels.reshape(count, 3, down * _ROWS, across * size)[:, :, :height, :width]
