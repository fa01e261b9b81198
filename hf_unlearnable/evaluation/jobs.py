"""A queue of small trainings in a folder: each result is one file, and several processes or machines may share it."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout

from hf_unlearnable.checkpoint import OtherRun
from hf_unlearnable.defenses.fresh import EachStep
from hf_unlearnable.defenses.inversion import FilterInversion
from hf_unlearnable.evaluation.arms import Arm, Rows
from hf_unlearnable.evaluation.attackers import Attacker
from hf_unlearnable.networks import create_network
from hf_unlearnable.recipes import changed, recipe
from hf_unlearnable.reported import reported
from hf_unlearnable.result import Result
from hf_unlearnable.training import Unfinished
from hf_unlearnable.victim import train

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training of one attacker on one arm.

    Args:
        steps: length in optimiser steps, where it is another than the recipe's (step-matched comparisons).
    """

    arm: Arm
    attacker: Attacker
    seed: int
    backbone: str
    recipe: str
    steps: int | None = None

    @property
    def name(self) -> str:
        """For file names; one job, one name."""
        plain = "".join(c if c.isalnum() or c in "-+." else "-" for c in self.attacker.name)
        matched = "" if self.steps is None else "-steps"
        return f"{self.arm.name}/{plain}{matched}-{self.seed}"

    @property
    def victim(self) -> str:
        """The backbone of this training."""
        start = self.attacker.start
        return start.backbone if start is not None else self.attacker.backbone or self.backbone

    def described(self) -> dict[str, Any]:
        """What decides the result, as JSON values."""
        arm = {name: getattr(self.arm, name) for name in ("label", "kind", "digest", "fraction", "epsilon")}
        return json.loads(
            json.dumps(
                {
                    "arm": arm,
                    "attacker": {"name": self.attacker.name, **self.attacker.described()},
                    "seed": self.seed,
                    "backbone": self.victim,
                    "recipe": dataclasses.asdict(recipe(self.attacker.recipe or self.recipe)),
                    "steps": self.steps,
                }
            )
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a job: a result, or why there is none.

    Args:
        job: `Job.described()`.
        reported: a paper's figure for this pair, or None.
        result: of the training; its "best" epoch is the one that clean validation rows chose.
        failed: the error, where there is no result.
    """

    job: dict[str, Any]
    result: Result | None
    failed: str | None = None
    reported: dict[str, Any] | None = None
    schema: int = SCHEMA

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), allow_nan=False, separators=(",", ":")) + "\n")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> "Outcome":
        """Read one.

        Raises:
            ValueError: not an outcome, or one of a newer version.
        """
        try:
            values = json.loads(path.read_text())
            if values["schema"] > SCHEMA:
                raise ValueError(f"its schema is {values['schema']}, newer than {SCHEMA}: update hf_unlearnable")
            result = values["result"]
            return cls(**{**values, "result": None if result is None else Result.from_values(result)})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected the outcome of a job, but {error}; delete it to do it again") from error


class Queue:
    """Jobs and their outcomes in a folder.

    A job is claimed by a lock that its process loses when it ends, however it ends, and leaves a checkpoint now and
    then: what is killed is gone on with by the next process, there or elsewhere. The folder's file system must keep
    POSIX locks between the machines that share it.

    Args:
        folder: "FOLDER/ARM/ATTACKER-SEED.json" is the outcome of a job.
        jobs: in the order in which they are wanted.
    """

    def __init__(self, folder: Path, jobs: Sequence[Job]) -> None:
        self.folder, self.jobs = folder, list(jobs)
        names = [job.name for job in self.jobs]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two jobs are named {sorted(twice)}")

    def path(self, job: Job) -> Path:
        """Where the outcome of a job is, or will be."""
        return self.folder / f"{job.name}.json"

    def outcome(self, job: Job) -> Outcome | None:
        """What became of a job; None where it was not finished.

        Raises:
            ValueError: the file is of another job: names what differs.
        """
        path = self.path(job)
        if not path.exists():
            return None
        found, wanted = Outcome.load(path), job.described()
        if found.job != wanted:
            differs = [name for name in wanted if found.job.get(name) != wanted[name]]
            raise ValueError(
                f"{path} is of another job: {differs} was {[found.job.get(name) for name in differs]} and would be "
                f"{[wanted[name] for name in differs]}; choose another output, or delete it"
            )
        return found

    def open(self) -> list[Job]:
        """The jobs without an outcome."""
        return [job for job in self.jobs if self.outcome(job) is None]

    def work(self, do: Callable[[Job], Outcome], *, told: Callable[[Job, Outcome, int], None]) -> int:
        """Do what is open and not claimed by others, until nothing is; return how many are left with others.

        Args:
            do: what makes the outcome of a job; it is saved here.
            told: called after each, with how many are open still.
        """
        while True:
            claimed, waiting = False, self.open()
            for job in waiting:
                path = self.path(job)
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = FileLock(path.with_suffix(".lock"))
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    continue
                with lock:
                    if path.exists():
                        continue
                    claimed = True
                    outcome = do(job)
                    outcome.save(path)
                told(job, outcome, len(self.open()))
            if not claimed:
                return len(self.open())


class Worker:
    """Does jobs: loads their rows, trains, and turns errors into outcomes.

    Args:
        checkpoints: folder for the state of trainings under way.
        max_minutes: of all jobs together; None for no limit.
    """

    def __init__(
        self, rows: Rows, accelerator: Accelerator, *, checkpoints: Path, max_minutes: float | None, progress: bool
    ) -> None:
        self.rows, self.accelerator, self.checkpoints, self.progress = rows, accelerator, checkpoints, progress
        self._until = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    def __call__(self, job: Job) -> Outcome:
        """The outcome of a job.

        Raises:
            Unfinished: the time is up; a checkpoint holds the state.
        """
        paper = None
        if job.arm.kind in ("protected", "clean") and job.steps is None:
            paper = reported(self.rows.source(job.arm), job.arm.label, job.attacker.name)
        described = job.described()
        try:
            return Outcome(job=described, result=self._train(job), reported=paper)
        except Unfinished:
            raise
        except (ValueError, TypeError, ArithmeticError, RuntimeError, OSError) as error:
            return Outcome(job=described, result=None, failed=f"{type(error).__name__}: {error}", reported=paper)

    def _train(self, job: Job) -> Result:
        left = None if self._until is None else (self._until - time.monotonic()) / 60
        if left is not None and left <= 0:
            raise Unfinished("the time is up")
        training = self.rows.training(job.arm)
        changes = {**job.attacker.changes, **({"steps": job.steps} if job.steps else {})}
        chosen = changed(recipe(job.attacker.recipe or job.recipe), **changes)
        for defense in job.attacker.data:
            if isinstance(defense, FilterInversion):
                fitted = defense.fit_pairs(training, self.rows.behind(job.arm), seed=job.seed)
            else:
                fitted = defense.fit(training, seed=job.seed, progress=self.progress)
            training = fitted.on(training)
        loss = job.attacker.loss
        if isinstance(loss, EachStep):
            loss = loss.fit(training, seed=job.seed, progress=self.progress)
        shape: dict[str, Any] = {"num_classes": len(training.classes), "image_size": training.image_size}
        start = job.attacker.start
        if start is None:
            network = create_network(job.victim, seed=job.seed, **shape)
        else:
            network = start.network(seed=job.seed, **shape)
        checkpoint = self.checkpoints / f"{job.name}.safetensors"
        how: dict[str, Any] = {
            "recipe": chosen,
            "defense": loss,
            "accelerator": self.accelerator,
            "seed": job.seed,
            "validation": self.rows.validation,
            "checkpoint": checkpoint,
            "max_minutes": left,
            "progress": self.progress,
        }
        try:
            result = train(network, training, self.rows.test, **how)
        except OtherRun:  # begun with other threads, hardware or versions
            checkpoint.unlink()
            result = train(network, training, self.rows.test, **how)
        checkpoint.unlink(missing_ok=True)
        return result
