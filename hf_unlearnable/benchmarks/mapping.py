"""The CUDA map against maps that do nothing, and against the loop that is usually written."""

import os
import resource
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from datasets import Dataset, Image

from hf_unlearnable import columns
from hf_unlearnable.benchmarks.timing import SEED, compare
from hf_unlearnable.draws import Draws
from hf_unlearnable.images import decode_many
from hf_unlearnable.poisons.cuda import CudaPoison
from hf_unlearnable.transform import Transform


@dataclass(frozen=True, kw_only=True)
class Identity(Transform):
    """Decode and re-encode losslessly: what any map that stores pictures must at least do."""

    name: ClassVar[str] = "identity"

    def change(self, pixels: torch.Tensor, labels: torch.Tensor | None, where: Sequence[str]) -> torch.Tensor:
        return pixels


def pil_copy(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Decode with PIL and let `datasets` store PNG at its default: the usual lossless map, without a poison."""
    name = next(name for name in ("image", "img") if name in batch)
    return {name: [PIL.Image.fromarray(np.asarray(picture.convert("RGB"))) for picture in batch[name]]}


class Loop:
    """CUDA as a plain map: PIL, one convolution module a picture, default PNG."""

    def __init__(self, image: str, label: str, classes: int, size: int) -> None:
        self.image, self.label = image, label
        k, blur = (3, 0.3) if size < 96 else (9, 0.06)
        self.padding = k // 2
        self.filters = CudaPoison(seed=SEED).filters(classes, kernel_size=k, blur=blur).float()

    def tensor(self, x: torch.Tensor, label: int) -> torch.Tensor:
        weight = self.filters[label].expand(3, 1, -1, -1)
        blurred = F.conv2d(x[None], weight, padding=self.padding, groups=3)[0]
        return blurred / blurred.max()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        picture = np.asarray(row[self.image].convert("RGB"), dtype=np.float32) / 255
        x = self.tensor(torch.from_numpy(picture).permute(2, 0, 1), row[self.label])
        return {self.image: PIL.Image.fromarray((x.permute(1, 2, 0) * 255).numpy().astype(np.uint8))}


def mapped(source: Dataset, function: Any, **options: Any) -> None:
    """One map over the rows, written to a file that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        source.map(function, cache_file_name=f"{folder}/out.arrow", new_fingerprint=os.urandom(8).hex(), **options)


def benchmark_map(source: Dataset, name: str, rounds: int) -> dict[str, Any]:
    """All that `scripts/benchmark.py map` tells about one dataset."""
    image, label = columns.image_column(source.features), columns.label_column(source.features)
    plain = source.cast_column(image, Image(decode=False))
    pictures = decode_many(plain[image])
    shapes = [picture.pixels.shape for picture in pictures]
    common = max(set(shapes), key=shapes.count)
    kept = [i for i, shape in enumerate(shapes) if shape == common]
    plain, source = plain.select(kept), source.select(kept)
    size, count = min(common[1:]), len(kept)
    poison = CudaPoison(seed=SEED, image_column=image, label_column=label)
    identity = Identity(image_column=image, label_column=label)
    classes = int(max(source[label])) + 1
    loop = Loop(image, label, classes, size)
    few = max(8, count // 8)
    result: dict[str, Any] = {"data": name, "height_width": list(common[1:]), "rows": count}
    batched = {"batched": True, "batch_size": 500}
    result["map, one process"] = compare(
        {
            "identity map": lambda: mapped(plain, identity, **batched),
            "CUDA map": lambda: mapped(plain, poison, **batched),
            "PIL map, default PNG": lambda: mapped(source.select(range(few)), pil_copy, **batched),
            "plain loop map": lambda: mapped(source.select(range(few)), loop),
        },
        {"identity map": count, "CUDA map": count, "PIL map, default PNG": few, "plain loop map": few},
        rounds,
    )
    result["map, two processes"] = compare(
        {
            "identity map": lambda: mapped(plain, identity, num_proc=2, **batched),
            "CUDA map": lambda: mapped(plain, poison, num_proc=2, **batched),
        },
        {"identity map": count, "CUDA map": count},
        rounds,
    )
    sizes = (1, 32, 500, 2000)
    result["CUDA map by batch size"] = compare(
        {f"{b}": (lambda b=b: mapped(plain.select(range(few)), poison, batched=True, batch_size=b)) for b in sizes},
        {f"{b}": few for b in sizes},
        rounds,
    )
    levels = (0, 1, 3, 6)
    chosen = plain.select(range(few))
    result["CUDA map by container"] = compare(
        {
            **{
                f"png {n}": (lambda n=n: mapped(chosen, CudaPoison(seed=SEED, compress_level=n), **batched))
                for n in levels
            },
            "webp 1": lambda: mapped(chosen, CudaPoison(seed=SEED, image_format="webp"), **batched),
        },
        {**{f"png {n}": few for n in levels}, "webp 1": few},
        rounds,
    )
    for container in result["CUDA map by container"]:
        kind, level = container.split()
        image_format = "webp" if kind == "webp" else "png"
        made = CudaPoison(seed=SEED, image_format=image_format, compress_level=int(level))(chosen[:few])
        stored = [len(value["bytes"]) for value in made[image]]
        result["CUDA map by container"][container]["bytes_over_raw"] = statistics.mean(stored) / (
            3 * common[1] * common[2]
        )
    kept = kept[:2000]
    by_class = sorted(range(len(kept)), key=source[:2000][label].__getitem__)  # as the map does
    pixels = torch.stack([pictures[kept[i]].pixels for i in by_class])
    labels = torch.tensor(source[:2000][label])[by_class]
    some = list(zip(pixels, labels.tolist(), strict=True))[:: max(1, len(kept) // few)]
    result["arithmetic alone"] = compare(
        {
            "CUDA batch": lambda: poison.perturb_pixels(pixels, labels, Draws(SEED, "cuda", pixels), [""] * len(kept)),
            "one convolution a picture": lambda: [
                loop.tensor(a.float() / 255, b).mul(255).to(torch.uint8) for a, b in some
            ],
        },
        {"CUDA batch": len(kept), "one convolution a picture": len(some)},
        rounds,
    )
    result["peak memory, MiB, by rows"] = {str(n): peak_memory(plain, poison, n) for n in (1000, 4000)}
    return result


def peak_memory(plain: Dataset, poison: CudaPoison, rows: int) -> float:
    """Of a process of its own that maps `rows` rows (the source repeated)."""
    source = datasets.concatenate_datasets([plain] * -(-rows // len(plain))).select(range(rows))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            mapped(source, poison, batched=True, batch_size=500)
            os.write(writer, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    return float(found) / 1024 if found else float("nan")
