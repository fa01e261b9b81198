"""Image shortcut squeezing: a trainer throws away colour, fine detail or grey levels, once for the whole split."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_unlearnable.defenses.data import DataDefense
from hf_unlearnable.images import Labels, Picture, Pixels, _threaded, decode, to_pil

_LUMA = (19595, 38470, 7471)
"""0.299, 0.587 and 0.114 in 65536ths."""


@dataclass(frozen=True, kw_only=True)
class Grayscale(DataDefense):
    """Every channel becomes the picture's grey.

        "luma":  (19595 R + 38470 G + 7471 B + 32768) >> 16
        "mean":  (R + G + B) / 3, rounded to nearest

    Args:
        weights: "luma" (PIL's, in whole numbers) or "mean" (what CUDA was tested with).

    Source: ISS (METHODS 23); "mean": CUDA, Section 5.2 (METHODS 1).
    Deviations: none for "luma". "mean": CUDA takes the mean before it divides by a picture's largest value and rounds.
    """

    name: ClassVar[str] = "grayscale"

    weights: Literal["luma", "mean"] = "luma"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights not in ("luma", "mean"):
            raise ValueError(f'weights is "luma" or "mean", got {self.weights!r}')

    def change(self, pixels: Pixels, labels: Labels | None, where: Sequence[str]) -> Pixels:
        red, green, blue = pixels.to(torch.int32).unbind(1)
        if self.weights == "mean":
            grey = (red + green + blue + 1).div(3, rounding_mode="floor")
        else:
            grey = (red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + 0x8000) >> 16
        return grey.to(torch.uint8).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()


@dataclass(frozen=True, kw_only=True)
class Jpeg(DataDefense):
    """Every picture is compressed as JPEG (4:2:0) and decoded again, in memory and in threads.

    The pixels are those of the installed PIL's libjpeg: the same for every batch and process, not for every version.

    Args:
        quality: PIL's, from 1 to 95.

    Raises:
        ValueError: a quality outside its range.

    Source: ISS (METHODS 23), whose headline quality is 10. Deviations: none.
    """

    name: ClassVar[str] = "jpeg"

    quality: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quality not in range(1, 96):
            raise ValueError(f"quality is an int from 1 to 95, got {self.quality!r}")

    def change(self, pixels: Pixels, labels: Labels | None, where: Sequence[str]) -> Pixels:
        return _compressed(pixels, where, "JPEG", quality=self.quality, subsampling="4:2:0")


@dataclass(frozen=True, kw_only=True)
class Webp(DataDefense):
    """Every picture is compressed as lossy WebP and decoded again, in memory and in threads.

    The pixels are those of the installed PIL's libwebp: the same for every batch and process, not for every version.

    Args:
        quality: PIL's, from 1 to 100.

    Raises:
        ValueError: a quality outside its range.

    Source: METHODS_NEW P6, with 80. Deviations: none.
    """

    name: ClassVar[str] = "webp"

    quality: int = 80

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quality not in range(1, 101):
            raise ValueError(f"quality is an int from 1 to 100, got {self.quality!r}")

    def change(self, pixels: Pixels, labels: Labels | None, where: Sequence[str]) -> Pixels:
        return _compressed(pixels, where, "WebP", quality=self.quality)


def _compressed(pixels: Pixels, where: Sequence[str], kind: str, **how: Any) -> Pixels:
    def one(row: tuple[Tensor, str]) -> Tensor:
        buffer = io.BytesIO()
        try:
            to_pil(Picture(row[0])).save(buffer, kind, **how)
        except (OSError, ValueError) as error:
            raise ValueError(f"{row[1]}: expected a picture that {kind} can hold, got {error}") from error
        return decode(buffer.getvalue(), where=row[1]).pixels

    return torch.stack(_threaded(one, list(zip(pixels.cpu(), where, strict=True)))).to(pixels.device)


@dataclass(frozen=True, kw_only=True)
class BitDepth(DataDefense):
    """Only the highest bits of every value are kept, the others are 0: 2**bits levels from 0 to 256 - 2**(8 - bits).

    Args:
        bits: from 1 to 8; 8 leaves the pictures as they are.

    Raises:
        ValueError: a number of bits outside its range.

    Source: ISS's bit-depth reduction (METHODS 23), with 2 bits in APBench. Deviations: none.
    """

    name: ClassVar[str] = "bit-depth"

    bits: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in range(1, 9):
            raise ValueError(f"bits is an int from 1 to 8, got {self.bits!r}")

    def change(self, pixels: Pixels, labels: Labels | None, where: Sequence[str]) -> Pixels:
        return pixels & (256 - (1 << (8 - self.bits)))
