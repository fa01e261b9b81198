"""Train victims on a dataset, one for every seed, and say what they learned about clean test pictures.

    accelerate launch scripts/train_victim.py --dataset out/cuda --test-dataset cifar10 --test-split test \\
        --backbone resnet18 --defense erm --recipe fast --seeds 0 1 2 --output runs/cuda-erm

The output holds options.json, summary.json (mean and spread over the seeds) and, for every seed, a folder seed-N with
result.json, curves.png and victim.safetensors (the weights). A run that was stopped (Ctrl-C, --max-minutes, a crash)
goes on where it stood when the same command is given again; more --seeds may be added to a run later.

Pretrained weights are fine-tuned: all layers, all but the first ones, or the last one alone (--freeze-stages all).
Compare with the same on clean pictures and on random noise; and note that the classes of CIFAR-10 are among those of
ImageNet.

    train_victim.py --backbone resnet18 --pretrained --image-size 224 --recipe finetune \\
        --freeze-stages 1 --batch-norm frozen ...

On a CPU, start it with plain `python`: `accelerate launch` gives a process one thread unless it is told
--num_cpu_threads_per_process. Several GPUs: `accelerate launch --num_processes 4 scripts/train_victim.py ...`.
Several processes on CPUs: `torchrun --nproc_per_node 2 scripts/train_victim.py --cpu ...`, because `accelerate launch
--cpu --num_processes 2` starts a single one unless it is given MPI. The batch size is that of all processes together;
with BatchNorm, every process normalises by its own rows.

Exit status: 0 finished, 1 error, 2 wrong command line, 75 out of time (--max-minutes), 130 interrupted.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file

from hf_unlearnable import options, report, sources
from hf_unlearnable.batches import Batches
from hf_unlearnable.defenses.adversarial import Adversarial
from hf_unlearnable.defenses.augmented import Augmented
from hf_unlearnable.defenses.base import Defense, describe
from hf_unlearnable.defenses.blur import GaussianBlur
from hf_unlearnable.defenses.data import TRANSFORM_FIELDS, DataDefense
from hf_unlearnable.defenses.displace import RandomDisplacement
from hf_unlearnable.defenses.dvae import Dvae
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.defenses.filters import DeconvolutionAdversarial, RandomFilter
from hf_unlearnable.defenses.fresh import EachStep
from hf_unlearnable.defenses.mixing import Cutmix, Mixup
from hf_unlearnable.defenses.orthogonal import OrthogonalRegularization
from hf_unlearnable.defenses.projection import OrthogonalProjection
from hf_unlearnable.defenses.resize import Resize
from hf_unlearnable.defenses.sda import AdversarialNoise
from hf_unlearnable.defenses.sharpen import RandomSharpening
from hf_unlearnable.defenses.smoothing import Smoothing
from hf_unlearnable.defenses.squeeze import BitDepth, Grayscale, Jpeg, Webp
from hf_unlearnable.defenses.strong import StrongAugmentation
from hf_unlearnable.defenses.ueraser import Ueraser
from hf_unlearnable.digests import file_digest
from hf_unlearnable.networks import SHORT_NAMES, Network, create_pretrained, freeze_early
from hf_unlearnable.recipes import RECIPES, Recipe, recipe
from hf_unlearnable.result import Result, summary
from hf_unlearnable.training import Unfinished
from hf_unlearnable.victim import train

DEFENSES: dict[str, type[Defense] | type[DataDefense]] = {
    "adversarial": Adversarial,
    "augmented": Augmented,
    "bit-depth": BitDepth,
    "coin": RandomDisplacement,
    "cutmix": Cutmix,
    "d-vae": Dvae,
    "deconvolution": DeconvolutionAdversarial,
    "erm": Erm,
    "gaussian-blur": GaussianBlur,
    "grayscale": Grayscale,
    "jpeg": Jpeg,
    "mixup": Mixup,
    "op": OrthogonalProjection,
    "orthogonal": OrthogonalRegularization,
    "random-filter": RandomFilter,
    "resize": Resize,
    "rsk-ff": RandomSharpening,
    "sda-an": AdversarialNoise,
    "smoothing": Smoothing,
    "strong-augmentation": StrongAugmentation,
    "ueraser": Ueraser,
    "webp": Webp,
}
NOT_IDENTITY = ("output", "overwrite", "seeds", "max_minutes", "cpu", "progress")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    precision = arguments.mixed_precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() and not arguments.cpu else "no"
    accelerator = Accelerator(cpu=arguments.cpu, mixed_precision=precision)
    try:
        return run(arguments, accelerator)
    except (ValueError, TypeError, OSError, SafetensorError, FloatingPointError) as error:
        say(accelerator, f"train_victim.py: {error}", file=sys.stderr)
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
    first.add_argument("--defense", default="erm")
    defense = first.parse_known_args(argv)[0].defense
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = "Hub id, folder of pictures, parquet, save_to_disk, or demo"
    parser.add_argument("--dataset", required=True, help=f"training pictures: {source}")
    parser.add_argument("--train-split", help="default: the only one, or train")
    parser.add_argument("--test-dataset", help=f"clean test pictures: {source}; default: --dataset")
    parser.add_argument("--test-split", default="test", help="default: test")
    parser.add_argument("--image-column", help="default: the only one")
    parser.add_argument("--label-column", help="default: the only one")
    parser.add_argument("--rows", type=int, help="train on this many rows: the same whatever the seed, class by class")
    parser.add_argument("--image-size", type=int, help="resize and crop all pictures; default: they are of one size")
    parser.add_argument("--backbone", default="resnet18", help=f"{', '.join(SHORT_NAMES)}, or any name of timm")
    start = "start from timm's weights, from the Hub, or from those in a safetensors file, named as timm names them"
    parser.add_argument("--pretrained", nargs="?", const=True, default=False, metavar="FILE", help=start)
    stages = "do not train the stem and the first N stages, or blocks (0: the stem alone; all: everything but the last"
    stages += " layer; default: train all)"
    parser.add_argument("--freeze-stages", type=frozen_stages, metavar="N|all", help=stages)
    norm = "frozen: BatchNorm keeps its running statistics and normalises by them (default: train)"
    parser.add_argument("--batch-norm", choices=("train", "frozen"), default="train", help=norm)
    parser.add_argument("--defense", default="erm", help=", ".join(DEFENSES))
    parser.add_argument("--recipe", default="fast", help=", ".join(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--validation-fraction", type=float, default=0.1, help="of the training rows (default: 0.1)")
    parser.add_argument("--evaluate-every", type=int, default=1, help="epochs between evaluations (default: 1)")
    parser.add_argument("--output", required=True, type=Path, help="folder of the run")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the output")
    parser.add_argument("--max-minutes", type=float, help="stop after this time; the same command goes on")
    parser.add_argument("--mixed-precision", choices=("auto", "no", "bf16"), default="auto", help="auto: bf16 on GPUs")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    options.add_fields(parser.add_argument_group("changes to the recipe"), Recipe, skip=("name",))
    if defense in DEFENSES and dataclasses.fields(DEFENSES[defense]):  # type: ignore[arg-type]
        group = parser.add_argument_group(f"settings of {defense}")
        options.add_fields(group, DEFENSES[defense], skip=(*TRANSFORM_FIELDS, "seed"))
    arguments, strange = parser.parse_known_args(argv)
    for what, known in (("defense", DEFENSES), ("recipe", RECIPES)):
        name = getattr(arguments, what)
        if name not in known:
            parser.error(f"there is no {what} {name!r}{sources.near(name, known)}; they are {', '.join(known)}")
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    return arguments


def run(arguments: argparse.Namespace, accelerator: Accelerator) -> int:
    began = time.monotonic()
    chosen = recipe(arguments.recipe, **options.given(arguments, Recipe, skip=("name",)))
    defense = DEFENSES[arguments.defense](
        **options.given(arguments, DEFENSES[arguments.defense], skip=(*TRANSFORM_FIELDS, "seed"))
    )
    output: Path = arguments.output
    open_run(arguments, accelerator)
    columns = {"image_column": arguments.image_column, "label_column": arguments.label_column}
    how = {**columns, "image_size": arguments.image_size, "device": accelerator.device}
    how["progress"] = arguments.progress and accelerator.is_main_process
    with accelerator.main_process_first():
        training = sources.load_split(arguments.dataset, arguments.train_split)
        test = sources.load_split(arguments.test_dataset or arguments.dataset, arguments.test_split)
    pictures, test_pictures = Batches.load(training, rows=arguments.rows, **how), Batches.load(test, **how)

    results, limit = [], arguments.max_minutes
    for seed in arguments.seeds:
        folder = output / f"seed-{seed}"
        if not (folder / "result.json").exists():
            network = beginning(arguments, pictures, seed)
            training, loss = defended(defense, pictures, seed, how["progress"])
            result = train(
                network,
                training,
                test_pictures,
                recipe=chosen,
                defense=loss,
                accelerator=accelerator,
                seed=seed,
                validation_fraction=arguments.validation_fraction,
                evaluate_every=arguments.evaluate_every,
                checkpoint=folder / "checkpoint.safetensors",
                max_minutes=None if limit is None else max(0.0, limit - (time.monotonic() - began) / 60),
                progress=arguments.progress,
            )
            if accelerator.is_main_process:
                keep(
                    folder, network, dataclasses.replace(result, defense=describe(defense), start=began_with(arguments))
                )
            accelerator.wait_for_everyone()
        results.append(Result.load(folder / "result.json"))
        say(accelerator, f"seed {seed}: test accuracy {results[-1].test_accuracy:.4f}")
    if accelerator.is_main_process:
        (output / "summary.json").write_text(json.dumps(summary(results), indent=1) + "\n")
    say(accelerator, told(arguments, results))
    return 0


def frozen_stages(text: str) -> int | str:
    """What --freeze-stages takes."""
    return text if text == "all" else int(text)


def beginning(arguments: argparse.Namespace, pictures: Batches, seed: int) -> Network:
    """The network before training, in which what shall not be trained is frozen."""
    network = create_pretrained(
        arguments.backbone,
        num_classes=len(pictures.classes),
        image_size=pictures.image_size,
        seed=seed,
        pretrained=arguments.pretrained,
    )
    network.frozen_batch_norm = arguments.batch_norm == "frozen"
    freeze_early(network, arguments.freeze_stages)
    return network


def began_with(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """For the result: which weights, and what of them was not trained."""
    file, frozen = arguments.pretrained, arguments.batch_norm == "frozen"
    if file is False and arguments.freeze_stages in (None, -1) and not frozen:
        return None
    weights = "random" if file is False else "timm" if file is True else f"sha256:{file_digest(Path(file))}"
    return {"weights": weights, "frozen_stages": arguments.freeze_stages, "frozen_batch_norm": frozen}


def defended(defense: Defense | DataDefense, pictures: Batches, seed: int, progress: bool) -> tuple[Batches, Defense]:
    """The training pictures and the loss: data defenses are fitted to all rows; they change them once or each step."""
    if not isinstance(defense, DataDefense):
        return pictures, defense
    fitted = defense.fit(pictures, seed=seed, progress=progress)
    return (fitted.on(pictures), Erm()) if defense.each_step == "never" else (pictures, EachStep(fitted))


def open_run(arguments: argparse.Namespace, accelerator: Accelerator) -> None:
    """Make the output folder, or make sure that it holds the beginning of this very run."""
    output: Path = arguments.output
    identity = {name: value for name, value in vars(arguments).items() if name not in NOT_IDENTITY}
    identity = json.loads(json.dumps(identity))
    noted = output / "options.json"
    if output.exists() and any(output.iterdir()) and not noted.exists():
        raise FileExistsError(f"{output} exists and is not a run of this script: choose another --output")
    if noted.exists() and not arguments.overwrite:
        before = {"batch_norm": "train", **json.loads(noted.read_text())}  # runs from before there was the option
        if other := [name for name in {**before, **identity} if before.get(name) != identity.get(name)]:
            there = ", ".join(f"{name}={before.get(name)!r}" for name in other)
            raise FileExistsError(f"{output} holds another run ({there}): --overwrite, or choose another --output")
        if all((output / f"seed-{seed}" / "result.json").exists() for seed in arguments.seeds):
            raise FileExistsError(f"{output} holds this run, finished: --overwrite, or choose another --output")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if arguments.overwrite and noted.exists():
            for folder in output.glob("seed-*"):
                shutil.rmtree(folder)
            (output / "summary.json").unlink(missing_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        noted.write_text(json.dumps(identity, indent=1) + "\n")
    accelerator.wait_for_everyone()


def keep(folder: Path, network: torch.nn.Module, result: Result) -> None:
    """The weights, the picture, and last of all the result, which says that the seed is finished."""
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
    save_file(weights, folder / "victim.safetensors")
    report.curves(result, folder / "curves.png")
    result.save(folder / "result.json")
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)


def told(arguments: argparse.Namespace, results: Sequence[Result]) -> str:
    """The summary for people: the last accuracy first, chance beside it."""
    first, spread = results[0], summary(results)
    hardware = first.hardware
    seeds = " ".join(str(result.seed) for result in results)
    lines = [
        f"{arguments.output}: {arguments.backbone}, defense {arguments.defense}, recipe {arguments.recipe}, "
        f"seeds {seeds}; {first.train_rows:,} rows for training, {first.validation_rows:,} for validation; "
        f"{hardware['processes']} process(es) on {hardware['device']}, {spread['seconds']['mean']:.0f} s a seed",
        f"  test accuracy after the last step   {_spread(spread['test_accuracy'])}   on {first.test_rows:,} rows",
        f"  at the best epoch by validation     {_spread(spread['best_test_accuracy'])}",
        f"  chance (commonest test class)       {first.chance:.4f}",
        f"  validation accuracy                 {_spread(spread['validation_accuracy'])}   (rows of the training data)",
    ]
    return "\n".join(lines)


def _spread(values: dict[str, Any] | None) -> str:
    if values is None:
        return "not measured"
    return f"{values['mean']:.4f}" + (f" ± {values['std']:.4f}" if values["std"] is not None else "")


def say(accelerator: Accelerator, text: str, **where: Any) -> None:
    if accelerator.is_main_process:
        print(text, **where)


if __name__ == "__main__":
    sys.exit(main())
