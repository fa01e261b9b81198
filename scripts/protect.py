"""Protect a dataset: poison one split and write a folder that `load_dataset` reads.

    python scripts/protect.py --dataset demo --poison cuda --seed 7 --output out/demo
    python scripts/protect.py --dataset path/or/hub-id --poison cuda --key-file key --output out/cuda
    python scripts/protect.py --dataset path/or/hub-id --poison min-max-min --surrogate mmm.safetensors --output out/mmm

More than one machine holds: a stream is protected shard by shard, and a stopped run goes on with what is missing. The
output may be any URL that fsspec knows. Alone, the last line does all; under torchrun or accelerate each process makes
its share, and array jobs make one shard each (the first is 1/64, the last 64/64); then one --merge.

    python scripts/protect.py --dataset SRC --streaming --poison cuda --key-file key --shard 3/64 --output out
    torchrun --nproc_per_node 2 scripts/protect.py --dataset SRC --streaming --poison cuda --key-file key --output out
    python scripts/protect.py --merge --output out
    python scripts/protect.py --dataset SRC --streaming --poison cuda --key-file key --output s3://bucket/protected

`python scripts/protect.py --poison cuda --help` lists the settings of a poison.
"""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.exceptions import DatasetBuildError

import hf_unlearnable as hu
from hf_unlearnable import columns, options, sources
from hf_unlearnable.batches import stratified_rows
from hf_unlearnable.keys import read_key
from hf_unlearnable.poisons.names import POISONS
from hf_unlearnable.protect import protect
from hf_unlearnable.record import Record
from hf_unlearnable.sharding.files import SUFFIXES
from hf_unlearnable.sharding.merge import merge
from hf_unlearnable.sharding.run import place, protect_shards

SETTLED = ("seed", "classes", "num_classes", "pixels", "size", "surrogate")


def settled(poison_class: type[hu.Poison]) -> tuple[str, ...]:
    """The fields that the command line cannot change."""
    return SETTLED + tuple(f.name for f in dataclasses.fields(poison_class) if f.metadata.get("settled"))


def main(argv: Sequence[str] | None = None) -> None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--poison")
    first.add_argument("--merge", action="store_true")
    known = first.parse_known_args(argv)[0]
    name = known.poison
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--dataset",
        required=not known.merge,
        help="Hub id, folder of pictures, parquet, save_to_disk, an address of parquet or pictures (s3://...), or demo",
    )
    parser.add_argument("--config", help="configuration of a Hub dataset")
    parser.add_argument("--split", help="default: the only one, or train")
    parser.add_argument("--poison", required=not known.merge, help=", ".join(POISONS))
    learns = issubclass(POISONS.get(name or "", hu.Poison), hu.SurrogatePoison)
    if learns:
        parser.add_argument("--surrogate", required=True, help="file or Hub id; scripts/train_surrogate.py makes one")
    key = parser.add_mutually_exclusive_group(required=not learns and not known.merge)
    key.add_argument("--key-file", type=Path, help="a secret key; python scripts/keygen.py makes one")
    key.add_argument("--seed", type=int, help="an int seed: reproducible, and guessable by a trainer")
    parser.add_argument("--output", required=True, help="folder to make; with --streaming also a URL")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--record-seed", action="store_true", help="write the int seed into record.json")
    parser.add_argument("--rows", type=int, help="only so many rows, drawn class by class")
    parser.add_argument("--num-proc", type=int, help="worker processes")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=500,
        help="pictures held at most at a time, fewer of large ones (default: 500)",
    )
    parser.add_argument("--protect-classes", nargs="+", help="names or numbers of the classes to protect; default: all")
    streams = parser.add_argument_group("shard by shard")
    streams.add_argument("--streaming", action="store_true", help="read row by row, write and go on shard by shard")
    streams.add_argument("--shard", help="make this one only, such as 3/64 (the first is 1/64)")
    streams.add_argument("--num-shards", type=int, help="how many there are in all; default: one for 10,000 rows or so")
    streams.add_argument(
        "--container", choices=tuple(SUFFIXES), help="parquet (default), or tar archives, which cannot be published"
    )
    streams.add_argument(
        "--on-error", choices=("stop", "skip"), help="unreadable pictures: stop (default), or leave out"
    )
    streams.add_argument(
        "--read-back-every",
        type=int,
        help="decode every n-th stored picture again, and compare (default: all of up to 10,000, else about so many, "
        "spread over the split)",
    )
    streams.add_argument("--merge", action="store_true", help="check finished shards and make them one dataset")
    if name in POISONS:
        options.add_fields(parser.add_argument_group(f"settings of {name}"), POISONS[name], skip=settled(POISONS[name]))
    elif name is not None:
        parser.error(f"there is no poison {name!r}{sources.near(name, POISONS)}: {', '.join(POISONS)}")
    arguments = parser.parse_args(argv)
    try:
        if arguments.merge and arguments.dataset is None:
            tell(merge(arguments.output), arguments.output)
        elif arguments.merge:
            raise ValueError("--merge needs --output only: what was done is in the output's plan")
        elif arguments.streaming:
            run_stream(arguments, POISONS[arguments.poison])
        else:
            run(arguments, POISONS[arguments.poison])
    except (ValueError, ArithmeticError, OSError, TypeError, RuntimeError, MemoryError, DatasetBuildError) as error:
        sys.exit(f"protect.py: {error}")


def few(dataset: Dataset, rows: int, label_column: str | None) -> Dataset:
    """The rows that every script's --rows means, drawn class by class; of unlabelled pictures the first."""
    try:
        label = columns.label_column(dataset.features, label_column)
    except ValueError:
        return dataset.select(range(rows))
    columns.check_labels(dataset.with_format("arrow")[label], columns.class_names(dataset.features, label), label)
    return dataset.select(stratified_rows(torch.tensor(dataset[label][:]), rows, key=0).tolist())


def run_stream(arguments: argparse.Namespace, poison_class: type[hu.Poison]) -> None:
    for flag in ("rows", "num_proc", "overwrite"):
        if getattr(arguments, flag):
            raise ValueError(
                f"--{flag.replace('_', '-')} is not for --streaming, which reads all rows, in as many "
                "processes as torchrun starts, and goes on with the output that is there"
            )
    if poison_class is hu.OpsPoison:
        raise ValueError("ops is fitted to a whole split: without --streaming, or in Python with `protect_shards`")
    rank, processes = place()
    only, shards = None, arguments.num_shards
    if arguments.shard is not None:
        number, shards = shard_of(arguments.shard)
        only = [number]
        if processes > 1:
            raise ValueError(f"--shard is for one process, got {processes}: leave it out, and each takes its share")
        if arguments.num_shards not in (None, shards):
            raise ValueError(f"--shard {arguments.shard} and --num-shards {arguments.num_shards} differ")
    stream = sources.stream_split(arguments.dataset, arguments.split, config=arguments.config)
    poison = make_poison(arguments, poison_class, stream.features)
    made = protect_shards(
        stream,
        poison,
        arguments.output,
        shards=shards,
        only=only,
        rank=rank,
        processes=processes,
        container=arguments.container or "parquet",
        batch_size=arguments.batch_size,
        on_error=arguments.on_error or "stop",
        read_back_every=arguments.read_back_every,
        record_seed=arguments.record_seed,
    )
    if only is None and processes == 1:
        tell(merge(arguments.output), arguments.output)
        return
    print(f"{arguments.output}: made shards {made}" if made else f"{arguments.output}: nothing was missing")
    print(f"  when all are made: python scripts/protect.py --merge --output {arguments.output}")


def shard_of(told: str) -> tuple[int, int]:
    """The number of a shard and how many there are, from 3/64."""
    found = re.fullmatch(r"(\d+)/(\d+)", told)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"--shard is such as 3/64, from 1/64 to 64/64, got {told!r}")
    return int(found[1]), int(found[2])


def make_poison(
    arguments: argparse.Namespace, poison_class: type[hu.Poison], features: Any, dataset: Dataset | None = None
) -> hu.Poison:
    settings = options.given(arguments, poison_class, skip=settled(poison_class))
    if settings.get("device") == "cuda" and "LOCAL_RANK" in os.environ:
        settings["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    seed = arguments.seed
    if arguments.key_file is not None:
        seed = read_key(arguments.key_file)
    if arguments.protect_classes:
        label = columns.label_column(features, settings.get("label_column"))
        settings["classes"] = columns.labels_of(features, label, arguments.protect_classes)
    make: Callable[..., hu.Poison] = poison_class
    if issubclass(poison_class, hu.SurrogatePoison):
        make = partial(poison_class.from_surrogate, arguments.surrogate)
    elif poison_class is hu.OpsPoison and dataset is not None:
        make = partial(hu.OpsPoison.fit, dataset)
    return make(seed=seed, **settings)


def run(arguments: argparse.Namespace, poison_class: type[hu.Poison]) -> None:
    given = [
        flag
        for flag in ("shard", "num_shards", "container", "on_error", "read_back_every")
        if getattr(arguments, flag) is not None
    ]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} is for --streaming")
    dataset = sources.load_split(arguments.dataset, arguments.split, config=arguments.config)
    if arguments.rows is not None:
        if arguments.rows < 1:
            raise ValueError(f"--rows is 1 or more, got {arguments.rows}")
        label = getattr(arguments, "label_column", None)
        dataset = few(dataset, min(arguments.rows, len(dataset)), label)
    poison = make_poison(arguments, poison_class, dataset.features, dataset)
    record = protect(
        dataset,
        poison,
        arguments.output,
        source=arguments.dataset,
        split=arguments.split or str(dataset.split or "train").split("[")[0].split("+")[0],
        num_proc=arguments.num_proc,
        batch_size=arguments.batch_size,
        overwrite=arguments.overwrite,
        record_seed=arguments.record_seed,
    )
    tell(record, arguments.output)


def tell(record: Record, output: str) -> None:
    pixels = record.pixels
    print(f"{output}: {pixels['rows_changed']} of {pixels['rows']} pictures changed by {record.method}")
    for name in ("linf_levels", "psnr_db", "ssim"):
        if pixels.get(name):
            print(f"  {name:12} mean {pixels[name]['mean']:.4g}, least {pixels[name]['least']:.4g}")
    if record.source.get("left_out"):
        print(f"  {len(record.source['left_out'])} rows were left out: see left_out in record.json")
    print(f"  see {output}/preview.png; what a trainer still learns is not measured yet:")
    if "://" in output:
        print("  copy the folder to this machine, and then")
        output = Path(output).name
    print(f"  python scripts/evaluate.py --protected {output} --clean THE_SOURCE --output eval/{Path(output).name}")


if __name__ == "__main__":
    main()
