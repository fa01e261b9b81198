"""How easily is a protected dataset read, found out and leant on? Each diagnostic beside the clean rows.

    python scripts/diagnose.py --protected out/cuda --clean cifar10 --output diagnose/cuda
    python scripts/diagnose.py --protected out/cuda --clean cifar10 --output diagnose/cuda --what supervised \\
        --other out/cuda-1

separability  readers of the perturbation, of the published and of the clean pictures
detector      does a simple network do suspiciously well on the published rows, and on the clean ones?
samples       are published rows learnt sooner than clean ones?
supervised    does a network taught under another key (--other) know them apart?
shortcuts     what a victim follows when perturbations are swapped; its reliance R_p on clean test rows
dfr           what a few clean rows bring back, beside two controls
recovery      what clean rows bring back while the weights stay near the victim's
certificate   a bound for noisy weights near the victim's (long: two victims, --draws evaluations of each)

The first three and shortcuts are the default. The output holds diagnosis.json, summary.md in plain sentences, and the
two victims. Stopped at any moment, the same command goes on: what is finished is not done again, and others may be
added to it with --what. No figure is a promise.

Exit status: 0 finished, 1 error, 2 wrong command line, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from accelerate import Accelerator

from hf_unlearnable import options, sources
from hf_unlearnable.evaluation.arms import Rows
from hf_unlearnable.evaluation.diagnosis import QUICK, Diagnosis, Setting
from hf_unlearnable.evaluation.diagnosis_pages import What, headlines


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        run(arguments)
    except (ValueError, TypeError, OSError, ArithmeticError) as error:
        print(f"diagnose.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on")
        return 130
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = "Hub id, folder of pictures, parquet, save_to_disk, or demo"
    parser.add_argument("--protected", required=True, help="a folder that protect.py made")
    parser.add_argument("--clean", required=True, help=f"what was protected, and clean test pictures: {source}")
    parser.add_argument("--other", help="a second folder of the same rows and method, under another key")
    parser.add_argument("--output", required=True, type=Path, help="folder of the diagnosis")
    parser.add_argument("--what", nargs="+", choices=get_args(What), default=QUICK, help=f"default: {' '.join(QUICK)}")
    parser.add_argument("--train-split", help="default: the only one, or train")
    parser.add_argument("--test-split", default="test", help="default: test")
    parser.add_argument("--rows", type=int, default=10_000, help="training rows, class by class (default: 10000)")
    parser.add_argument("--validation-rows", type=int, help="of the test split; default: a fifth of it")
    parser.add_argument("--image-size", type=int, help="resize and crop all pictures; default: they are of one size")
    options.add_fields(parser.add_argument_group("settings"), Setting)
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args(argv)
    if arguments.image_size is not None and arguments.image_size < 1:
        parser.error(f"--image-size: expected a number of pixels, 1 or more, got {arguments.image_size}")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    setting = Setting(**options.given(arguments, Setting))
    accelerator = Accelerator(cpu=arguments.cpu, mixed_precision="bf16" if torch.cuda.is_available() else "no")
    test = sources.load_split(arguments.clean, arguments.test_split)
    rows = Rows(
        sources.load_split(arguments.clean, arguments.train_split),
        test,
        rows=arguments.rows,
        validation_rows=len(test) // 5 if arguments.validation_rows is None else arguments.validation_rows,
        image_size=arguments.image_size,
        device=accelerator.device,
        progress=arguments.progress,
    )
    diagnosis = Diagnosis(
        rows,
        arguments.protected,
        other=arguments.other,
        setting=setting,
        output=arguments.output,
        accelerator=accelerator,
        progress=arguments.progress,
    )
    for line in headlines(diagnosis.run(arguments.what)):
        print(line)
    print(f"see {arguments.output / 'summary.md'}")


if __name__ == "__main__":
    sys.exit(main())
