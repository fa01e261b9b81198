"""Protect a dataset: poison one split and write a folder that `load_dataset` reads.

    python scripts/protect.py --dataset demo --poison cuda --seed 7 --output out/demo
    python scripts/protect.py --dataset path/or/hub-id --poison cuda --key-file key --output out/cuda
    python scripts/protect.py --dataset path/or/hub-id --poison min-max-min --surrogate mmm.safetensors --output out/mmm

`python scripts/protect.py --poison cuda --help` lists the settings of a poison.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from datasets.exceptions import DatasetBuildError

import hf_unlearnable as hu
from hf_unlearnable import columns, options, sources
from hf_unlearnable.batches import stratified_rows
from hf_unlearnable.keys import read_key
from hf_unlearnable.protect import protect

POISONS: dict[str, type[hu.Poison]] = {
    "ar": hu.ArPoison,
    "clusters": hu.ClustersPoison,
    "cuda": hu.CudaPoison,
    "deep-confuse": hu.DeepConfusePoison,
    "em": hu.EmPoison,
    "entf": hu.EntfPoison,
    "hypo": hu.HypoPoison,
    "lsp": hu.LspPoison,
    "min-max-min": hu.MinMaxMinPoison,
    "ntga": hu.NtgaPoison,
    "ops": hu.OpsPoison,
    "pil": hu.PilPoison,
    "random-noise": hu.RandomNoisePoison,
    "robust-em": hu.RobustEmPoison,
    "sem": hu.SemPoison,
    "tap": hu.TapPoison,
}
SETTLED = ("seed", "classes", "num_classes", "pixels", "size", "surrogate")


def settled(poison_class: type[hu.Poison]) -> tuple[str, ...]:
    """The fields that the command line cannot change."""
    return SETTLED + tuple(f.name for f in dataclasses.fields(poison_class) if f.metadata.get("settled"))


def main(argv: Sequence[str] | None = None) -> None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--poison")
    name = first.parse_known_args(argv)[0].poison
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dataset", required=True, help="Hub id, folder of pictures, parquet, save_to_disk, or demo")
    parser.add_argument("--config", help="configuration of a Hub dataset")
    parser.add_argument("--split", help="default: the only one, or train")
    parser.add_argument("--poison", required=True, help=", ".join(POISONS))
    learns = issubclass(POISONS.get(name or "", hu.Poison), hu.SurrogatePoison)
    if learns:
        parser.add_argument("--surrogate", required=True, help="file or Hub id; scripts/train_surrogate.py makes one")
    key = parser.add_mutually_exclusive_group(required=not learns)
    key.add_argument("--key-file", type=Path, help="a secret key; python scripts/keygen.py makes one")
    key.add_argument("--seed", type=int, help="an int seed: reproducible, and guessable by a trainer")
    parser.add_argument("--output", required=True, type=Path, help="folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--record-seed", action="store_true", help="write the int seed into record.json")
    parser.add_argument("--rows", type=int, help="only so many rows, drawn class by class")
    parser.add_argument("--num-proc", type=int, help="worker processes")
    parser.add_argument("--batch-size", type=int, default=500, help="pictures held at a time (default: 500)")
    parser.add_argument("--protect-classes", nargs="+", help="names or numbers of the classes to protect; default: all")
    if name in POISONS:
        options.add_fields(parser.add_argument_group(f"settings of {name}"), POISONS[name], skip=settled(POISONS[name]))
    elif name is not None:
        parser.error(f"there is no poison {name!r}{sources.near(name, POISONS)}: {', '.join(POISONS)}")
    arguments = parser.parse_args(argv)
    try:
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


def run(arguments: argparse.Namespace, poison_class: type[hu.Poison]) -> None:
    dataset = sources.load_split(arguments.dataset, arguments.split, config=arguments.config)
    if arguments.rows is not None:
        if arguments.rows < 1:
            raise ValueError(f"--rows is 1 or more, got {arguments.rows}")
        label = getattr(arguments, "label_column", None)
        dataset = few(dataset, min(arguments.rows, len(dataset)), label)
    settings = options.given(arguments, poison_class, skip=settled(poison_class))
    seed = arguments.seed
    if arguments.key_file is not None:
        seed = read_key(arguments.key_file)
    if arguments.protect_classes:
        label = columns.label_column(dataset.features, settings.get("label_column"))
        settings["classes"] = columns.labels_of(dataset.features, label, arguments.protect_classes)
    make: Callable[..., hu.Poison] = poison_class
    if issubclass(poison_class, hu.SurrogatePoison):
        make = partial(poison_class.from_surrogate, arguments.surrogate)
    elif poison_class is hu.OpsPoison:
        make = partial(hu.OpsPoison.fit, dataset)
    poison = make(seed=seed, **settings)
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
    pixels = record.pixels
    print(f"{arguments.output}: {pixels['rows_changed']} of {pixels['rows']} pictures changed by {record.method}")
    for name in ("linf_levels", "psnr_db", "ssim"):
        if pixels.get(name):
            print(f"  {name:12} mean {pixels[name]['mean']:.4g}, least {pixels[name]['least']:.4g}")
    print(f"  see {arguments.output / 'preview.png'}; what a trainer still learns is not measured yet:")
    print(f"  accelerate launch scripts/train_victim.py --dataset {arguments.output} ...")


if __name__ == "__main__":
    main()
