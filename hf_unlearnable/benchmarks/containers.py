"""Lossless containers of protected pictures: time and bytes, in those of PNG at level 1."""

import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch

from hf_unlearnable.benchmarks.pictures import CLASSES, Pictures
from hf_unlearnable.benchmarks.timing import SEED, compare
from hf_unlearnable.images import ImageFormat, Picture, decode, encode
from hf_unlearnable.poisons.cuda import CudaPoison

FIRST = "png 1"
LEVELS: dict[ImageFormat, tuple[int, ...]] = {"png": (1, 0, *range(2, 10)), "webp": tuple(range(1, 8))}
"""Compress levels, the one that is compared with first; of WebP those that differ (its methods 0 to 6)."""
QUICK_LEVELS: dict[ImageFormat, tuple[int, ...]] = {"png": (1, 0, 6), "webp": (1, 4)}
SIZES = {32: 500, 224: 40, 512: 10}
"""Pictures that are coded at each size."""
QUICK_SIZES = {32: 8, 224: 2, 512: 1}


def benchmark_containers(
    pictures: Pictures,
    *,
    sizes: Mapping[int, int],
    levels: Mapping[ImageFormat, tuple[int, ...]],
    rounds: int,
    quick: bool = False,
) -> dict[str, Any]:
    """All that `scripts/benchmark.py containers` tells: pictures under CUDA, coded one by one on one thread.

    Args:
        sizes: sides of pictures in pixels, and how many of each.
        levels: compress levels of each format; PNG's include 1.
    """
    return {
        "pictures": pictures.title,
        "quick": quick,
        "sizes": {str(size): _of_size(pictures, size, count, levels, rounds) for size, count in sizes.items()},
    }


def _of_size(
    pictures: Pictures, size: int, count: int, levels: Mapping[ImageFormat, tuple[int, ...]], rounds: int
) -> dict[str, dict[str, float]]:
    made = protected(pictures, size, count)
    told: dict[str, tuple[ImageFormat, int]] = {
        f"{kind} {level}": (kind, level) for kind in get_args(ImageFormat) for level in levels.get(kind, ())
    }
    told = {FIRST: told[FIRST], **told}

    def coded(kind: ImageFormat, level: int) -> list[bytes]:
        return [encode(picture, image_format=kind, compress_level=level) for picture in made]

    def decoded(stored: list[bytes]) -> list[Picture]:
        return [decode(data) for data in stored]

    stored = {name: coded(*chosen) for name, chosen in told.items()}
    rows = dict.fromkeys(told, count)
    encoders: dict[str, Callable[[], object]] = {n: functools.partial(coded, *chosen) for n, chosen in told.items()}
    decoders: dict[str, Callable[[], object]] = {n: functools.partial(decoded, stored[n]) for n in told}
    encoding, decoding = compare(encoders, rows, rounds), compare(decoders, rows, rounds)
    sizes = {name: statistics.mean(map(len, data)) for name, data in stored.items()}
    return {
        name: {
            "encode_over_png_1": encoding[name]["time_over_first"],
            "decode_over_png_1": decoding[name]["time_over_first"],
            "bytes_over_png_1": sizes[name] / sizes[FIRST],
            "encode_seconds": 1 / encoding[name]["pictures_per_second"],
            "decode_seconds": 1 / decoding[name]["pictures_per_second"],
            "bytes": sizes[name],
            "bytes_over_raw": sizes[name] / (3 * size * size),
        }
        for name in told
    }


def protected(pictures: Pictures, size: int, count: int) -> list[Picture]:
    """Square pictures under CUDA, the classes in turn: what is stored is blurred, and compresses otherwise than clean
    pictures do."""
    clean = [Picture(torch.from_numpy(pictures.picture(row, size).transpose(2, 0, 1).copy())) for row in range(count)]
    labels = [row % CLASSES for row in range(count)]
    poison = CudaPoison(seed=SEED)
    return poison.change_pictures(clean, labels, poison.chosen(clean, labels), [f"picture {i}" for i in range(count)])


def table(result: Mapping[str, Any]) -> str:
    """A result as markdown."""
    lines = [
        f"Pictures: {result['pictures']}, under CUDA. One thread.",
        "",
        "| size | container | encode, times PNG 1 | decode, times PNG 1 | bytes, times PNG 1 | encode, ms | decode, ms "
        "| bytes | bytes over raw |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size, found in result["sizes"].items():
        for name, told in found.items():
            cells = [
                *(f"{told[f'{what}_over_png_1']:.2f}" for what in ("encode", "decode", "bytes")),
                *(f"{1000 * told[f'{what}_seconds']:.3g}" for what in ("encode", "decode")),
                f"{told['bytes']:,.0f}",
                f"{told['bytes_over_raw']:.2f}",
            ]
            lines.append(f"| {size} px | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
