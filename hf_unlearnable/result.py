"""What a training gave (`Result`), what of that it keeps meanwhile (`Tally`), and several seeds in one `summary`."""

import dataclasses
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from hf_unlearnable.recipes import Recipe

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One point of the curve. Accuracies are fractions; None where they were not measured.

    Args:
        epoch: passes begun so far, from 1.
        steps: optimiser steps done so far.
        train_loss: mean of the defense's loss over the rows of this pass.
        train_accuracy: share of this pass's rows that the last forward of a step got right, as the defense showed them.
    """

    epoch: int
    steps: int
    train_loss: float
    train_accuracy: float | None
    validation_accuracy: float | None
    test_accuracy: float | None


@dataclass
class Tally:
    """The result while the training is under way: with the weights and the momentum, all that it has to remember.

    Args:
        step: optimiser steps done so far.
        sums: of the pass under way: loss, rows, right ones, rows that could be judged, asked to stop by the clock, by a
            signal, steps since the loss ceased to be finite.
        confusion, held_out: the last confusion matrices on the test and on the validation rows.
    """

    step: int = 0
    seconds: float = 0.0
    sums: list[float] = field(default_factory=lambda: [0.0] * 7)
    curve: list[Epoch] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)
    held_out: list[list[int]] = field(default_factory=list)

    @classmethod
    def resumed(cls, values: dict[str, Any]) -> Self:
        """From what `dataclasses.asdict` made of another."""
        return cls(**{**values, "curve": [Epoch(**point) for point in values["curve"]]})

    def look(self, sums: list[float], total: int) -> tuple[bool, bool]:
        """Take the sums over all processes; return whether the clock, and whether a signal, asked to stop.

        Raises:
            FloatingPointError: the loss is no longer finite (names the step out of `total`).
        """
        self.sums = sums
        if sums[6]:
            raise FloatingPointError(
                f"expected a finite loss, got one that is not at step {self.step - int(sums[6]) + 1} of {total}: "
                "lower the learning rate, or clip the gradient (gradient_clip=5.0)"
            )
        return sums[4] > 0, sums[5] > 0

    def end_epoch(self, epoch: int, measured: bool) -> None:
        """Add a point to the curve; `measured`: the confusion matrices are of this moment."""
        loss, rows, right, judged = self.sums[:4]
        point = Epoch(
            epoch=epoch,
            steps=self.step,
            train_loss=loss / rows,
            train_accuracy=right / judged if judged == rows else None,
            validation_accuracy=_accuracy(self.held_out) if measured else None,
            test_accuracy=_accuracy(self.confusion) if measured else None,
        )
        self.curve.append(point)

    def shown(self) -> dict[str, str]:
        """For the progress bar."""
        loss, rows, right, judged = self.sums[:4]
        values = {"loss": loss / rows, "train": right / judged if judged == rows else None}
        if self.curve:
            values |= {"validation": self.curve[-1].validation_accuracy, "test": self.curve[-1].test_accuracy}
        return {name: f"{value:.3f}" for name, value in values.items() if value is not None}

    def measured(self) -> dict[str, Any]:
        """The fields of `Result` that this knows, after the last step."""
        judged = [point for point in self.curve if point.validation_accuracy is not None]
        best = max(judged, key=lambda point: point.validation_accuracy or 0.0, default=None)
        return {
            "test_accuracy": _accuracy(self.confusion) or 0.0,
            "best_test_accuracy": best and best.test_accuracy,
            "best_epoch": best and best.epoch,
            "validation_accuracy": _accuracy(self.held_out),
            "best_validation_accuracy": best and best.validation_accuracy,
            "class_accuracy": tuple(row[i] / sum(row) if sum(row) else None for i, row in enumerate(self.confusion)),
            "confusion": tuple(tuple(row) for row in self.confusion),
            "curve": tuple(self.curve),
            "seconds": self.seconds,
        }


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one training gave. Accuracies are fractions, measured in evaluation mode on pictures as they are.

    Args:
        test_accuracy: after the last step: the figure to report.
        best_test_accuracy: at the epoch with the best validation accuracy (the first of equals). The validation rows
            come from the training data: where that is poisoned, so are they.
        confusion: confusion[i][j] test rows of class i were taken for class j, after the last step.
        seconds: training and evaluation, over all resumptions.
        start: what the training began with and left as it was (`weights`: "timm", "random" or the digest of their file;
            `frozen_stages`, `frozen_batch_norm`); None for random weights, all of which were trained.
    """

    test_accuracy: float
    best_test_accuracy: float | None
    best_epoch: int | None
    validation_accuracy: float | None
    best_validation_accuracy: float | None
    class_accuracy: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    curve: tuple[Epoch, ...]
    classes: tuple[str, ...]
    train_rows: int
    validation_rows: int
    test_rows: int
    image_size: tuple[int, int]
    train_digest: str
    test_digest: str
    backbone: str
    defense: dict[str, Any]
    recipe: Recipe
    seed: int
    hardware: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    start: dict[str, Any] | None = None
    schema: int = SCHEMA

    @property
    def chance(self) -> float:
        """The test accuracy of always answering with the commonest class."""
        return max(sum(row) for row in self.confusion) / self.test_rows

    def save(self, path: str | Path) -> None:
        """Write the result as JSON, whole or not at all."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a result.

        Raises:
            FileNotFoundError: there is none.
            ValueError: not a result, or one of another schema.
        """
        try:
            return cls.from_values(json.loads(Path(path).read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a result of schema {SCHEMA}, but {error}") from error

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Self:
        """From what JSON made of `dataclasses.asdict` of another.

        Raises:
            ValueError, KeyError, TypeError: not a result, or one of another schema.
        """
        if values["schema"] != SCHEMA:
            raise ValueError(f"its schema is {values['schema']!r}")
        kept = values["recipe"]
        return cls(
            **{
                **values,
                "curve": tuple(Epoch(**point) for point in values["curve"]),
                "confusion": tuple(tuple(row) for row in values["confusion"]),
                "recipe": Recipe(**{**kept, "milestones": tuple(kept["milestones"])}),
                **{name: tuple(values[name]) for name in ("class_accuracy", "classes", "image_size")},
            }
        )


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one), least and most of the accuracies over the seeds."""

    def spread(name: str) -> dict[str, float | None] | None:
        values = [getattr(result, name) for result in results]
        if None in values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return {"mean": statistics.fmean(values), "std": deviation, "min": min(values), "max": max(values)}

    names = ("test_accuracy", "best_test_accuracy", "validation_accuracy", "best_validation_accuracy", "seconds")
    return {"seeds": [result.seed for result in results], **{name: spread(name) for name in names}}


def _accuracy(confusion: Sequence[Sequence[int]]) -> float | None:
    rows = sum(map(sum, confusion))
    return sum(row[i] for i, row in enumerate(confusion)) / rows if rows else None
