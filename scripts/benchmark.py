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

`train` compares training steps of victims (plain, adversarial, UEraser) and of REM's and MMM's surrogates (cut
down on a CPU) with loops in the manner of the papers' released code: float32, a DataLoader, channels first. With
`--seeds 0 1 2` whole victims are trained both ways too, and their test accuracies stand side by side.

    python scripts/benchmark.py train --dataset ../shared/data/cifar10 --seeds 0 1 2

`scale` measures protect.py --streaming in processes of its own: memory and time over the rows (up to 10^6 drawn
pictures), processor time at 32, 224 and 512 px, two processes against one, the sharded path against a plain map.
`containers` measures the lossless containers of protected pictures; `costs` writes a page of both, with what 10^6, 10^8
and 10^9 pictures would cost, on paper.

    python scripts/benchmark.py scale --dataset ../shared/data/imagenette-224-subset --output scale.json
    python scripts/benchmark.py containers --dataset ../shared/data/imagenette-224-subset --output containers.json
    python scripts/benchmark.py costs --scale scale.json --containers containers.json --output cards/results/costs.md

Rounds alternate between the variants; a ratio is the median over rounds of the ratio within a round.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image

from hf_unlearnable import columns, sources
from hf_unlearnable.batches import Batches, stratified_rows
from hf_unlearnable.benchmarks import containers, costs, scaling
from hf_unlearnable.benchmarks.augmenting import benchmark_augment
from hf_unlearnable.benchmarks.mapping import benchmark_map
from hf_unlearnable.benchmarks.pictures import Pictures
from hf_unlearnable.benchmarks.surrogates import benchmark_surrogate
from hf_unlearnable.benchmarks.timing import SEED
from hf_unlearnable.benchmarks.trainings import benchmark_accuracy, benchmark_train
from hf_unlearnable.environment import hardware, versions
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
    parsers = parser.add_subparsers(dest="what", required=True)
    for what in ("map", "surrogate", "augment", "train"):
        speed = parsers.add_parser(what)
        speed.add_argument("--dataset", action="append", help="pictures to use instead of drawn ones; may be repeated")
        speed.add_argument("--rows", type=int, help="default: 4000 (others than map: 1000) below 96 pixels, 160 above")
        speed.add_argument("--quick", action="store_true", help="a tenth of the rows, one round: to see that it runs")
    parsers.choices["train"].add_argument(
        "--seeds", type=int, nargs="+", default=[], help="train whole victims on 10,000 rows (--quick: 1,000) too"
    )
    scale, coding = parsers.add_parser("scale"), parsers.add_parser("containers")
    scale.add_argument("--rows", type=int, nargs="+", help="numbers of drawn rows; default: 10000 100000 1000000")
    scale.add_argument("--size", type=int, default=32, help="of those rows, in pixels (default: 32)")
    scale.add_argument(
        "--work", type=Path, help="folder that keeps the sources for the next time; default: a temporary one"
    )
    for one in (scale, coding):
        told = "pictures to use instead of drawn ones, resized from the set with the largest (scale: but for --rows)"
        one.add_argument("--dataset", nargs="+", action="extend", help=told)
        one.add_argument("--quick", action="store_true", help="a few rows, one round: to see that it runs")
    for one in parsers.choices.values():
        one.add_argument("--rounds", type=int, default=5)
        one.add_argument("--output", type=Path, help="write the figures as JSON (containers: and a table beside it)")
    paper = parsers.add_parser("costs")
    paper.add_argument("--scale", type=Path, required=True, help="what `scale --output` wrote")
    paper.add_argument("--containers", type=Path, required=True, help="what `containers --output` wrote")
    prices = costs.Prices()
    paper.add_argument("--core-hour-price", type=float, default=prices.core_hour, help="dollars; default: %(default)s")
    paper.add_argument("--gb-month-price", type=float, default=prices.gb_month, help="dollars; default: %(default)s")
    paper.add_argument("--output", type=Path, help="the page to write; default: only print it")
    arguments = parser.parse_args(argv)
    datasets.disable_progress_bars()
    try:
        if arguments.what == "costs":
            write_costs(arguments)
        elif arguments.what in ("scale", "containers"):
            at_scale(arguments, sys.argv[1:] if argv is None else argv)
        else:
            speeds(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"benchmark.py: {error}")


def machine(rounds: int) -> dict[str, Any]:
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch threads": torch.get_num_threads(),
        "rounds": rounds,
    }


def speeds(arguments: argparse.Namespace) -> None:
    share = 10 if arguments.quick else 1
    rounds = 1 if arguments.quick else arguments.rounds
    usual = 4000 if arguments.what == "map" else 1000
    inputs: list[tuple[str, Dataset]] = []
    for name in arguments.dataset or []:
        source = sources.load_split(name)
        small = min(source[0][columns.image_column(source.features)].size) < 96
        rows = arguments.rows or (usual if small else 160) // share
        inputs.append((Path(name).name, source.select(range(min(rows, len(source))))))
    if not inputs:
        for size, rows in ((32, usual), (224, 160))[: 2 if arguments.what == "map" else 1]:
            inputs.append((f"drawn, {size} px", drawn((arguments.rows or rows) // share, size)))
    report = machine(rounds)
    if arguments.what == "map":
        results = [benchmark_map(source, name, rounds) for name, source in inputs]
    elif arguments.what == "train":
        loaded = [(name, Batches.load(source, progress=False)) for name, source in inputs]
        results = [benchmark_train(rows, name, rounds, arguments.quick) for name, rows in loaded]
        for name in arguments.dataset or ["demo"] if arguments.seeds else []:
            splits = [sources.load_split(name, split) for split in ("train", "test")]
            rows, test = (Batches.load(split, progress=False) for split in splits)
            few = stratified_rows(rows.labels, min(1000 if arguments.quick else 10_000, len(rows)), key=0)
            results.append(benchmark_accuracy(rows.select(few), test, Path(name).name, arguments.seeds))
    else:
        function = benchmark_surrogate if arguments.what == "surrogate" else benchmark_augment
        results = [function(source, name, rounds, arguments.quick) for name, source in inputs]
    show(report)
    for result in results:
        print()
        show(result)
    if arguments.output:
        write(arguments.output, report, results)


def at_scale(arguments: argparse.Namespace, command: Sequence[str]) -> None:
    pictures = Pictures.largest({Path(name).name: sources.load_split(name) for name in arguments.dataset or []})
    quick = arguments.quick
    rounds = 1 if quick else arguments.rounds
    if min(rounds, *(arguments.rows or [1] if arguments.what == "scale" else [1])) < 1:
        raise ValueError("--rows and --rounds are 1 or more")
    report = machine(rounds) | {"processor": hardware(Accelerator(cpu=True))["device"]}
    report["command"] = " ".join(
        ["scripts/benchmark.py", *(Path(word).name if "/" in word else word for word in command)]
    )
    if arguments.what == "containers":
        result = containers.benchmark_containers(
            pictures,
            sizes=containers.QUICK_SIZES if quick else containers.SIZES,
            levels=containers.QUICK_LEVELS if quick else containers.LEVELS,
            rounds=rounds,
            quick=quick,
        )
        print(containers.table(result))
        if arguments.output:
            arguments.output.with_suffix(".md").write_text(containers.table(result))
    else:
        with contextlib.ExitStack() as stack:
            work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hf_unlearnable-")))
            result = scaling.benchmark_scale(
                scaling.Bench(
                    protect=Path(__file__).with_name("protect.py").resolve(), work=work.resolve(), quick=quick
                ),
                pictures,
                rows=arguments.rows or (scaling.QUICK_ROWS if quick else scaling.ROWS),
                size=arguments.size,
                sizes=scaling.QUICK_SIZES if quick else scaling.SIZES,
                rounds=rounds,
            )
        show(report)
        show(result)
    if arguments.output:
        write(arguments.output, report, result)


def write(path: Path, report: Mapping[str, Any], results: Any) -> None:
    path.write_text(json.dumps({**report, "versions": versions(), "results": results}, indent=2) + "\n")


def write_costs(arguments: argparse.Namespace) -> None:
    prices = costs.Prices(core_hour=arguments.core_hour_price, gb_month=arguments.gb_month_price)
    scale, coded = (json.loads(path.read_text()) for path in (arguments.scale, arguments.containers))
    page = costs.page(scale, coded, prices)
    print(page)
    if arguments.output:
        arguments.output.write_text(page)


if __name__ == "__main__":
    main()
