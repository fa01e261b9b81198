"""Train the surrogate of a poison, and keep it in one safetensors file.

    accelerate launch scripts/train_surrogate.py --dataset ../shared/data/cifar10 --split train \
        --method min-max-min --backbone resnet18 --output surrogates/mmm.safetensors
    python scripts/protect.py --dataset ../shared/data/cifar10 --poison min-max-min \
        --surrogate surrogates/mmm.safetensors --output out/mmm

The curves are drawn beside the file, as PNG. A training that was stopped (Ctrl-C, --max-minutes, a crash) goes on with
the same command. `python scripts/train_surrogate.py --method min-max-min --help` lists the settings of a method.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets.exceptions import DatasetBuildError
from safetensors import SafetensorError

import hf_unlearnable as hu
from hf_unlearnable import options, report, sources
from hf_unlearnable.batches import Batches
from hf_unlearnable.keys import read_key
from hf_unlearnable.networks import SHORT_NAMES
from hf_unlearnable.recipes import Recipe, changed
from hf_unlearnable.training import Unfinished

METHODS: dict[str, type[hu.SurrogatePoison]] = {
    "clusters": hu.ClustersPoison,
    "deep-confuse": hu.DeepConfusePoison,
    "em": hu.EmPoison,
    "entf": hu.EntfPoison,
    "hypo": hu.HypoPoison,
    "min-max-min": hu.MinMaxMinPoison,
    "ntga": hu.NtgaPoison,
    "pil": hu.PilPoison,
    "robust-em": hu.RobustEmPoison,
    "sem": hu.SemPoison,
    "tap": hu.TapPoison,
}
BASE = tuple(field.name for field in dataclasses.fields(hu.SurrogatePoison))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    precision = arguments.mixed_precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() and not arguments.cpu else "no"
    accelerator = Accelerator(cpu=arguments.cpu, mixed_precision=precision)
    try:
        return run(arguments, accelerator)
    except (
        ValueError,
        TypeError,
        OSError,
        SafetensorError,
        FloatingPointError,
        MemoryError,
        ImportError,
        DatasetBuildError,
    ) as error:
        say(accelerator, f"train_surrogate.py: {error}", file=sys.stderr)
        return 1
    except Unfinished as error:
        say(accelerator, f"out of time: {error}; the same command goes on")
        return 75
    except KeyboardInterrupt as error:
        say(accelerator, f"interrupted: {error}; the same command goes on")
        return 130
    finally:
        accelerator.end_training()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method")
    name = first.parse_known_args(argv)[0].method
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = "Hub id, folder of pictures, parquet, save_to_disk, or demo"
    parser.add_argument("--dataset", required=True, help=f"clean pictures: {source}")
    parser.add_argument("--config", help="configuration of a Hub dataset")
    parser.add_argument("--split", help="default: the only one, or train")
    parser.add_argument("--test-split", help="measure the surrogate's clean accuracy on this split, now and then")
    parser.add_argument("--measure-every", type=int, help="steps between these measurements; default: about ten in all")
    parser.add_argument("--image-column", help="default: the only one")
    parser.add_argument("--label-column", help="default: the only one")
    parser.add_argument("--rows", type=int, help="train on this many rows: the same whatever the seed, class by class")
    parser.add_argument("--method", required=True, help=", ".join(METHODS))
    parser.add_argument("--backbone", help=f"{', '.join(SHORT_NAMES)}, or any name of timm; default: the method's")
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--seed", type=int, default=0, help="an int seed, which the file tells (default: 0)")
    key.add_argument("--key-file", type=Path, help="a secret key; python scripts/keygen.py makes one")
    parser.add_argument("--output", required=True, type=Path, help="the .safetensors file to make")
    parser.add_argument("--overwrite", action="store_true", help="delete the file first, if it is there")
    parser.add_argument("--max-minutes", type=float, help="stop after this time; the same command goes on")
    parser.add_argument("--mixed-precision", choices=("auto", "no", "bf16"), default="auto", help="auto: bf16 on GPUs")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    if name in METHODS:
        options.add_fields(parser.add_argument_group(f"settings of {name}"), METHODS[name], skip=BASE)
        how = f"changes to the recipe of {name}"
        options.add_fields(
            parser.add_argument_group(how), Recipe, skip=("name", "optimizer"), defaults=METHODS[name].recipe
        )
    elif name is not None:
        parser.error(f"there is no method {name!r}{sources.near(name, METHODS)}; they are {', '.join(METHODS)}")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace, accelerator: Accelerator) -> int:
    poison_class, output = METHODS[arguments.method], arguments.output
    checkpoint = output.with_name(f"{output.stem}.checkpoint.safetensors")
    if output.suffix != ".safetensors":
        raise ValueError(f"--output: expected the name of a .safetensors file, got {output}")
    if output.exists() and not arguments.overwrite:
        raise FileExistsError(f"{output} exists: --overwrite, or choose another --output")
    poison = poison_class(**options.given(arguments, poison_class, skip=BASE))
    recipe = changed(poison.recipe, **options.given(arguments, Recipe, skip=("name", "optimizer")))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and output.exists():
        checkpoint.unlink(missing_ok=True)
        output.unlink()
    accelerator.wait_for_everyone()
    how: dict[str, Any] = {"image_column": arguments.image_column, "label_column": arguments.label_column}
    how |= {"device": accelerator.device, "labelled": poison.uses_labels}
    how["progress"] = arguments.progress and accelerator.is_main_process
    with accelerator.main_process_first():
        pictures = sources.load_split(arguments.dataset, arguments.split, config=arguments.config)
        test = None
        if arguments.test_split is not None:
            test = sources.load_split(arguments.dataset, arguments.test_split, config=arguments.config)
    surrogate = poison.fit(
        Batches.load(pictures, rows=arguments.rows, **how),
        test=None if test is None else Batches.load(test, **how),
        seed=arguments.seed if arguments.key_file is None else read_key(arguments.key_file),
        recipe=recipe,
        backbone=arguments.backbone,
        accelerator=accelerator,
        measure_every=arguments.measure_every,
        checkpoint=checkpoint,
        max_minutes=arguments.max_minutes,
        source=Path(arguments.dataset).name if Path(arguments.dataset).exists() else arguments.dataset,
        progress=arguments.progress,
    )
    if accelerator.is_main_process:
        surrogate.save(output)
        report.surrogate_curves({output.stem: surrogate}, output.with_suffix(".png"))
        checkpoint.unlink(missing_ok=True)
        print(told(surrogate, output))
    accelerator.wait_for_everyone()
    return 0


def told(surrogate: hu.Surrogate, output: Path) -> str:
    """The summary for people."""
    known = surrogate.provenance
    last = ", ".join(f"{name} {value:.4g}" for name, value in known["curve"][-1].items() if name != "step")
    return "\n".join(
        [
            f"{output}: {surrogate.method}, {known['backbone']}, {known['data']['rows']:,} rows, "
            f"{known['steps']:,} steps; {known['hardware']['processes']} process(es) on "
            f"{known['hardware']['device']}, {known['seconds']:.0f} s",
            f"  at the end: {last}; curves in {output.with_suffix('.png')}",
            f"  python scripts/protect.py --poison {surrogate.method} --surrogate {output} --dataset ... --output ...",
        ]
    )


def say(accelerator: Accelerator, text: str, **where: Any) -> None:
    if accelerator.is_main_process:
        print(text, **where)


if __name__ == "__main__":
    sys.exit(main())
