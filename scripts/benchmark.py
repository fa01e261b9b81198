"""Measure speed, as ratios within one run.

    python scripts/benchmark.py map                      # pictures that the project draws; --quick for a short look
    python scripts/benchmark.py map --dataset ../shared/data/cifar10 --dataset ../shared/data/imagenette-224-subset
    python scripts/benchmark.py surrogate --dataset ../shared/data/cifar10

`map` compares, at each picture size: a lossless identity map (decode, re-encode, no poison), the CUDA map, the usual
identity map (PIL, default PNG), CUDA as it is usually written (the same, row by row, one convolution a picture), and
the arithmetic alone against that loop.

`surrogate` compares one step of a surrogate's training at the paper's settings, and the map of its poison over the
pictures, with one step of plain training (forward, backward, SGD) of the same network on a batch. Beside it stands the
ideal: the forward-backward passes that the method consists of, in batches. A pass of an attack needs no gradients of
weights, so a ratio may lie below its ideal. "tiny" is the network on a CPU, ResNet-18 (bf16) on a GPU.

`augment` compares UEraser's augmentation of a batch with kornia's modules of the same settings, whole and in parts, and
a training step of UEraser and of adversarial training with the steps of plain training that they consist of.

Rounds alternate between the variants; a ratio is the median over rounds of the ratio within a round.
"""

import argparse
import io
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, Features, Image

from hf_unlearnable import columns, sources
from hf_unlearnable.benchmarks.augmenting import benchmark_augment
from hf_unlearnable.benchmarks.mapping import benchmark_map
from hf_unlearnable.benchmarks.surrogates import benchmark_surrogate
from hf_unlearnable.benchmarks.timing import SEED
from hf_unlearnable.environment import versions
from hf_unlearnable.keys import numpy_generator


def drawn(rows: int, size: int) -> Dataset:
    """JPEG pictures with smooth and fine detail, made on the spot."""
    generator = numpy_generator(SEED, "benchmark", size)
    coarse = generator.integers(0, 256, (rows, 4, 4, 3), dtype=np.uint8)
    values = []
    for picture in coarse:
        smooth = PIL.Image.fromarray(picture).resize((size, size), PIL.Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth, dtype=np.int16) + generator.integers(-12, 13, (size, size, 3))
        values.append(_jpeg(np.clip(noisy, 0, 255).astype(np.uint8)))
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    return Dataset.from_dict({"image": values, "label": [i % 10 for i in range(rows)]}, features=features)


def _jpeg(array: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, "JPEG", quality=90)
    return {"bytes": buffer.getvalue(), "path": None}


def show(value: Any, indent: int = 0) -> None:
    for name, inner in value.items():
        if isinstance(inner, dict) and any(isinstance(v, dict) for v in inner.values()):
            print(f"{' ' * indent}{name}")
            show(inner, indent + 2)
        elif isinstance(inner, dict):
            print(f"{' ' * indent}{name:28}" + "".join(f"  {k} {v:.4g}" for k, v in inner.items()))
        else:
            print(f"{' ' * indent}{name:28}  {inner}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["map", "surrogate", "augment"])
    parser.add_argument("--dataset", action="append", help="pictures to use instead of drawn ones; may be repeated")
    parser.add_argument("--rows", type=int, help="default: 4000 (others than map: 1000) below 96 pixels, 160 above")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows, one round: to see that it runs")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args(argv)
    datasets.disable_progress_bars()
    share = 10 if arguments.quick else 1
    rounds = 1 if arguments.quick else arguments.rounds
    usual = 4000 if arguments.what == "map" else 1000
    inputs: list[tuple[str, Dataset]] = []
    try:
        for name in arguments.dataset or []:
            source = sources.load_split(name)
            small = min(source[0][columns.image_column(source.features)].size) < 96
            rows = arguments.rows or (usual if small else 160) // share
            inputs.append((Path(name).name, source.select(range(min(rows, len(source))))))
        if not inputs:
            for size, rows in ((32, usual), (224, 160))[: 2 if arguments.what == "map" else 1]:
                inputs.append((f"drawn, {size} px", drawn((arguments.rows or rows) // share, size)))
    except (ValueError, OSError) as error:
        sys.exit(f"benchmark.py: {error}")
    report = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch threads": torch.get_num_threads()}
    report["rounds"] = rounds
    if arguments.what == "map":
        results = [benchmark_map(source, name, rounds) for name, source in inputs]
    else:
        function = benchmark_surrogate if arguments.what == "surrogate" else benchmark_augment
        results = [function(source, name, rounds, arguments.quick) for name, source in inputs]
    show(report)
    for result in results:
        print()
        show(result)
    if arguments.output:
        text = json.dumps({**report, "versions": versions(), "results": results}, indent=2)
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
