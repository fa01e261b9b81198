"""What does a determined trainer still learn from protected datasets? Every attacker of a suite, worst first.

    python scripts/evaluate.py --protected out/cuda --clean cifar10 --suite quick --output eval/cuda
    python scripts/evaluate.py --protected cuda=out/cuda-0 cuda=out/cuda-1 lsp=out/lsp --clean cifar10 --output eval/all

Victims are trained on the published bytes, tested on clean pictures, and compared with victims on the clean rows; the
attacker and the epoch are chosen on clean validation rows, and reported on others. Datasets of one label are one method
under several keys.

The output holds one file for each training (jobs/), and summary.md, table.csv, matrix.md, heat-map.png, curves and
confusion matrices, made anew at the end of every call from what there is. Stopped at any moment, the same command goes
on; several of them, also on several machines that share the folder, divide the trainings between them (`--workers 2`
starts two here). Further --protected, --seeds and --attackers may be added to an output later. The records and cards of
the protected datasets are told the outcome (--no-note leaves them alone).

Exit status: 0 finished, 1 error or failed trainings, 2 wrong command line, 75 out of time (--max-minutes), 130
interrupted.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from accelerate import Accelerator

from hf_unlearnable import sources
from hf_unlearnable.evaluation.arms import Rows
from hf_unlearnable.evaluation.attackers import Suite, SuiteName, adaptive, pretrained, suite
from hf_unlearnable.evaluation.jobs import Job, Outcome, Queue, Worker
from hf_unlearnable.evaluation.pages import percent
from hf_unlearnable.evaluation.protocol import plan, protected_arms, report, tables
from hf_unlearnable.networks import SHORT_NAMES, create_network
from hf_unlearnable.recipes import RECIPES
from hf_unlearnable.record import Record
from hf_unlearnable.training import Unfinished


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        return run(arguments)
    except (ValueError, TypeError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"interrupted: {error}; the same command goes on")
        return 130


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = "Hub id, folder of pictures, parquet, save_to_disk, or demo"
    parser.add_argument("--protected", nargs="+", help="folders that protect.py made, or label=folder")
    parser.add_argument("--clean", help=f"what was protected, and clean test pictures: {source}")
    parser.add_argument("--config", help="configuration of a Hub dataset")
    parser.add_argument("--train-split", help="default: the only one, or train")
    parser.add_argument("--test-split", default="test", help="default: test")
    parser.add_argument("--suite", choices=get_args(SuiteName), default="quick", help="default: quick")
    parser.add_argument("--attackers", nargs="+", help="only these of the suite (and erm); default: all")
    weights = "also attackers that start from pretrained weights: timm's from the Hub, or those of a safetensors file"
    parser.add_argument("--pretrained", nargs="+", default=[], metavar="BACKBONE[=FILE]", help=weights)
    parser.add_argument("--pretrained-size", type=int, help="side that those see pictures at; default: as they are")
    knows = "also attackers who know CUDA, and to whom 1 and 10 clean pictures of every class leaked"
    parser.add_argument("--adaptive", action="store_true", help=knows)
    parser.add_argument("--seeds", type=int, nargs="+", help="of the trainings; default: the suite's")
    parser.add_argument("--rows", type=int, help="training rows, class by class; default: the suite's")
    parser.add_argument("--validation-rows", type=int, help="of the test split; default: a fifth of it")
    parser.add_argument("--image-size", type=int, help="resize and crop for all victims; default: as they are")
    parser.add_argument("--fractions", type=float, nargs="*", help="shares of protected rows; default: the suite's")
    parser.add_argument("--backbone", help=f"{', '.join(SHORT_NAMES)}, or any name of timm; default: the suite's")
    parser.add_argument("--recipe", choices=RECIPES, help="default: the suite's")
    parser.add_argument("--anchor", type=float, help="accuracy that clean training must reach; default: twice chance")
    parser.add_argument("--no-anchors", action="store_true", help="leave out clean rows and controls: claims nothing")
    parser.add_argument("--output", required=True, type=Path, help="folder of the evaluation")
    parser.add_argument("--max-minutes", type=float, help="stop after this time; the same command goes on")
    parser.add_argument("--workers", type=int, default=1, help="processes that divide the trainings (default: 1)")
    parser.add_argument("--report-only", action="store_true", help="no training: tables and plots from what there is")
    only = "only draw table, matrix and heat map anew, from all trainings in --output; needs nothing else"
    parser.add_argument("--tables", action="store_true", help=only)
    parser.add_argument("--retry-failed", action="store_true", help="do failed trainings again")
    parser.add_argument("--note", action=argparse.BooleanOptionalAction, default=True, help="update the records")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    known = [attacker.name for attacker in whole_suite(arguments).attackers]
    for name in arguments.attackers or []:
        if name not in known:
            near = sources.near(name, known)
            parser.error(f"suite {arguments.suite} has no attacker {name!r}{near}; it has {', '.join(known)}")
    if not arguments.tables and not (arguments.protected and arguments.clean):
        parser.error("the following arguments are required: --protected, --clean")
    for name in ("image_size", "pretrained_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected a number of pixels, 1 or more, got {value}")
    if arguments.pretrained_size is not None and not arguments.pretrained:
        parser.error("--pretrained-size: goes with --pretrained")
    if arguments.workers < 1:
        parser.error(f"--workers: expected 1 or more, got {arguments.workers}")
    return arguments


def whole_suite(arguments: argparse.Namespace) -> Suite:
    """The suite, and the trainers who know the method or start from weights."""
    made, more = suite(arguments.suite), [*(adaptive() if arguments.adaptive else ())]
    for text in arguments.pretrained:
        backbone, _, file = text.partition("=")
        more += pretrained(backbone, file=file or None, image_size=arguments.pretrained_size)
    return dataclasses.replace(made, attackers=(*made.attackers, *more))


def chosen_suite(arguments: argparse.Namespace) -> Suite:
    made = whole_suite(arguments)
    names = {"erm", *(arguments.attackers or [one.name for one in made.attackers])}
    changes = {name: getattr(arguments, name) for name in ("rows", "backbone", "recipe", "image_size")}
    changes |= {"seeds": arguments.seeds and tuple(dict.fromkeys(arguments.seeds))}
    changes = {name: value for name, value in changes.items() if value is not None}
    if arguments.fractions is not None:
        if wrong := [share for share in arguments.fractions if not 0 < share < 1]:
            raise ValueError(f"--fractions: expected shares between 0 and 1, got {wrong}")
        changes["fractions"] = tuple(dict.fromkeys(arguments.fractions))
    return dataclasses.replace(made, attackers=tuple(one for one in made.attackers if one.name in names), **changes)


def run(arguments: argparse.Namespace) -> int:
    if arguments.tables:
        trainings = sum(cell.last.trainings for cell in tables(arguments.output) if cell.last)
        print(f"{trainings} trainings: see {arguments.output / 'matrix.md'} and {arguments.output / 'heat-map.png'}")
        return 0
    made, protected = chosen_suite(arguments), protected_arms(arguments.protected)
    jobs = plan(made, protected, anchors=not arguments.no_anchors)
    for backbone in {made.backbone, *(one.backbone for one in made.attackers if one.backbone)}:
        create_network(
            backbone, num_classes=2, image_size=32, seed=0
        )  # an unknown name is told before anything is made
    open_output(arguments, made)
    queue = Queue(arguments.output / "jobs", jobs)
    if arguments.retry_failed and not arguments.worker and not arguments.report_only:
        for job in jobs:
            found = queue.outcome(job)
            if found is not None and found.failed is not None:
                queue.path(job).unlink(missing_ok=True)
    status = 0
    if queue.open() and not arguments.report_only:
        status = train(arguments, queue)
    if arguments.worker:
        return status
    outcomes = [outcome for job in jobs if (outcome := queue.outcome(job)) is not None]
    left, failed = len(jobs) - len(outcomes), [outcome for outcome in outcomes if outcome.failed is not None]
    if any(outcome.result for outcome in outcomes):
        told = report(made, protected, outcomes, arguments.output, anchor=arguments.anchor, note=arguments.note)
        for one in sorted(told, key=lambda v: -(v.learnability.mean if v.learnability else 2.0)):
            worth = f"refused: {'; '.join(one.refused)}" if one.refused else f"{percent(one.learnability)} %"
            print(f"{one.arm}: {worth} by {one.attacker} (chance {100 * one.chance:.1f})")
        print(f"see {arguments.output / 'summary.md'} and {arguments.output / 'heat-map.png'}")
    if left:
        print(f"{left} of {len(jobs)} trainings are not done")
    for outcome in failed:
        print(f"failed: {outcome.job['arm']['label']}, {outcome.job['attacker']['name']}: {outcome.failed}")
    return status or (1 if failed else 75 if left and not arguments.report_only else 0)


def open_output(arguments: argparse.Namespace, made: Suite) -> None:
    """Make the output, or make sure that it is of the same data, victims and rows."""
    wanted = {
        "clean": Path(arguments.clean).name if Path(arguments.clean).exists() else arguments.clean,
        "splits": [arguments.config, arguments.train_split, arguments.test_split],
        "rows": made.rows,
        "image_size": made.image_size,
        "validation_rows": arguments.validation_rows,
        "backbone": made.backbone,
        "recipe": made.recipe,
    }
    output: Path = arguments.output
    noted = output / "setting.json"
    if noted.exists():
        before = json.loads(noted.read_text())
        names = [*before, *(name for name in wanted if name not in before)]
        if other := {name: before.get(name) for name in names if before.get(name) != wanted.get(name)}:
            raise ValueError(f"{output} holds an evaluation with {other}: choose another --output")
    elif output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} exists and holds no evaluation: choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    partial = noted.with_suffix(f".{time.time_ns()}.partial")
    partial.write_text(json.dumps(wanted, indent=1) + "\n")
    partial.replace(noted)


def train(arguments: argparse.Namespace, queue: Queue) -> int:
    """Do what is open, here and in further processes; 75 when the time is up."""
    helpers = []
    if arguments.workers > 1:
        threads = max(1, torch.get_num_threads() // arguments.workers)
        torch.set_num_threads(threads)
        command = [sys.executable, *sys.argv, "--workers", "1", "--no-progress", "--worker"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        helpers = [subprocess.Popen(command, env=environment) for _ in range(arguments.workers - 1)]
    try:
        status = work(arguments, queue)
    except BaseException:
        for helper in helpers:
            helper.terminate()
        raise
    finally:
        codes = [helper.wait() for helper in helpers]
    if bad := [code for code in codes if code not in (0, 75)]:
        print(f"a worker ended with status {bad[0]}", file=sys.stderr)
        return status or 1
    return status


def work(arguments: argparse.Namespace, queue: Queue) -> int:
    accelerator = Accelerator(cpu=arguments.cpu, mixed_precision="bf16" if torch.cuda.is_available() else "no")
    training = sources.load_split(arguments.clean, arguments.train_split, config=arguments.config)
    test = sources.load_split(arguments.clean, arguments.test_split, config=arguments.config)
    known = Record.load(Path(queue.jobs[0].arm.path) / "record.json").source
    rows = Rows(
        training,
        test,
        rows=chosen_suite(arguments).rows,
        validation_rows=arguments.validation_rows,
        image_size=arguments.image_size,
        image_column=known["image_column"],
        label_column=known["label_column"],
        device=accelerator.device,
        progress=arguments.progress,
    )
    for one in chosen_suite(arguments).attackers:
        if (
            one.start is not None
        ):  # weights that are not there, or another network's, are told before anything is trained
            one.start.network(len(rows.clean.classes), rows.clean.image_size, seed=0)
    if rows.left_out and not arguments.worker:
        print(f"{rows.left_out} test rows are among the training rows and were left out")
    checkpoints = arguments.output / "checkpoints"
    worker = Worker(
        rows, accelerator, checkpoints=checkpoints, max_minutes=arguments.max_minutes, progress=arguments.progress
    )
    began, done = time.monotonic(), 0

    def told(job: Job, outcome: Outcome, left: int) -> None:
        nonlocal done
        done += 1
        minutes = (time.monotonic() - began) / done * left / 60 / arguments.workers
        result = outcome.result
        said = f"failed: {outcome.failed}" if result is None else f"{100 * result.test_accuracy:.1f} %"
        print(
            f"{job.arm.name}, {job.attacker.name}, seed {job.seed}: {said}; {left} left, {minutes:.0f} min", flush=True
        )

    try:
        others = queue.work(worker, told=told)
    except Unfinished:
        print("out of time; the same command goes on")
        return 75
    if others:
        print(f"{others} trainings are under way in other processes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
