"""What a training is asked to do (`Recipe`: how long, how fast, with which augmentation) and gave (`Result`)."""

import dataclasses
import difflib
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

SCHEMA = 1

Schedule = Literal["constant", "step", "cosine", "onecycle"]
AugmentationName = Literal["crop_flip", "crop", "flip", "none"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The hyper-parameters of one training. Change some with `dataclasses.replace` or `recipe(name, ...)`.

    Args:
        epochs: length in passes over the training rows; either this or `steps`.
        steps: length in optimiser steps; either this or `epochs`.
        batch_size: rows of a step, over all processes together.
        learning_rate: the highest.
        schedule: how the rate falls, once for every step; see `rate`.
        milestones: for "step": the shares of the training after which the rate is multiplied by `decay`.
        warmup: for "onecycle": the share of the training in which the rate rises.
        gradient_clip: largest L2 norm of the whole gradient; None does not clip.
        drop_last: leave out an epoch's last batch where it is not whole.
        augmentation: "crop_flip", "crop", "flip" or "none".
        crop_padding: zeros added before the crop, as a share of the shorter side (1/8: 4 pixels at 32, 28 at 224).

    Raises:
        ValueError: a value outside its range; both or neither of `epochs` and `steps`.
    """

    name: str
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 128
    learning_rate: float = 0.1
    schedule: Schedule = "cosine"
    milestones: tuple[float, ...] = ()
    decay: float = 0.1
    warmup: float = 0.25
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    gradient_clip: float | None = None
    drop_last: bool = False
    augmentation: AugmentationName = "crop_flip"
    crop_padding: float = 0.125

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"expected either epochs or steps, got epochs={self.epochs}, steps={self.steps}")
        for field, least in (("epochs", 1), ("steps", 1), ("batch_size", 1), ("learning_rate", 0), ("weight_decay", 0)):
            value = getattr(self, field)
            if value is not None and not value >= least:
                raise ValueError(f"{field}: expected at least {least}, got {value}")
        for field, values in (("schedule", get_args(Schedule)), ("augmentation", get_args(AugmentationName))):
            if getattr(self, field) not in values:
                raise ValueError(f"{field}: expected one of {values}, got {getattr(self, field)!r}")
        shares = (*self.milestones, self.warmup, self.momentum, self.crop_padding)
        if any(not 0 <= share <= 1 for share in shares) or list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones (ascending), warmup, momentum and crop_padding lie in [0, 1], got {shares}")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(f"gradient_clip: expected a positive norm or None, got {self.gradient_clip}")

    def total_steps(self, steps_per_epoch: int) -> int:
        """The length of the training in optimiser steps."""
        return self.steps if self.steps is not None else (self.epochs or 0) * steps_per_epoch

    def rate(self, step: int, total: int) -> float:
        """The learning rate of step `step` (from 0) out of `total`: a function of the step, so nothing to resume.

        - constant: learning_rate.
        - step: times `decay` for every milestone m with step >= round(m * total).
        - cosine: learning_rate * (1 + cos(pi * step / total)) / 2.
        - onecycle: by cosines from learning_rate / 25 up to learning_rate, then down to learning_rate / 250,000.

        Source: torch.optim.lr_scheduler (MultiStepLR, CosineAnnealingLR, OneCycleLR).
        Deviations: cosine falls at every step where ISS and EM change it once an epoch; onecycle leaves the momentum.
        """
        top = self.learning_rate
        if self.schedule == "step":
            return top * self.decay ** sum(step >= round(milestone * total) for milestone in self.milestones)
        if self.schedule == "cosine":
            return top * (1 + math.cos(math.pi * step / total)) / 2
        if self.schedule == "onecycle":
            peak, end = max(0.0, self.warmup * total - 1), total - 1
            if step <= peak:
                return _cosine(top / 25, top, step / peak if peak > 0 else 1.0)
            return _cosine(top, top / 250_000, (step - peak) / (end - peak))
        return top


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


RECIPES: dict[str, Recipe] = {
    made.name: made
    for made in (
        # REM's repository, which the CUDA and MMM tables name; MMM's own script keeps the rate constant.
        Recipe(name="rem40k", steps=40_000, schedule="step", milestones=(0.4, 0.8), drop_last=True),
        # CUDA's repository: StepLR(40, 0.1) over 100 epochs.
        Recipe(name="cuda100", epochs=100, batch_size=512, schedule="step", milestones=(0.4, 0.8), gradient_clip=5.0),
        # UEraser, Tables 11 and 12: CIFAR-10 (300 epochs on CIFAR-100 and ImageNet-100, 150 on SVHN).
        Recipe(name="ueraser", epochs=200, learning_rate=0.01, schedule="constant"),
        # ISS's repository (100 epochs with adversarial training, 200 for a ViT).
        Recipe(name="iss60", epochs=60, schedule="cosine"),
        # Ours: a strong victim in little time.
        Recipe(name="fast", epochs=30, batch_size=512, learning_rate=0.2, schedule="onecycle", nesterov=True),
        # Ours: the "tiny" network on CPU.
        Recipe(name="tiny", epochs=5, batch_size=64, learning_rate=0.1, schedule="onecycle", nesterov=True),
    )
}


def recipe(name: str, **changes: Any) -> Recipe:
    """A named recipe, with some of its fields changed; a new length in epochs replaces one in steps, and vice versa.

    Raises:
        ValueError: no recipe of this name (names near ones), or a value outside its range.
        TypeError: no field of this name.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"they are {', '.join(RECIPES)}"
        raise ValueError(f"no recipe is named {name!r}: {hint}")
    for given, other in (("epochs", "steps"), ("steps", "epochs")):
        if changes.get(given) is not None and other not in changes:
            changes[other] = None
    return dataclasses.replace(RECIPES[name], **changes)


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


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one training gave. Accuracies are fractions, measured in evaluation mode on pictures as they are.

    Args:
        test_accuracy: after the last step: the figure to report.
        best_test_accuracy: at the epoch with the best validation accuracy (the first of equals). The validation rows
            come from the training data: where that is poisoned, so are they.
        confusion: confusion[i][j] test rows of class i were taken for class j, after the last step.
        seconds: training and evaluation, over all resumptions.
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
            values = json.loads(Path(path).read_text())
            if values["schema"] != SCHEMA:
                raise ValueError(f"its schema is {values['schema']!r}")
            values["curve"] = tuple(Epoch(**point) for point in values["curve"])
            values["confusion"] = tuple(tuple(row) for row in values["confusion"])
            values["recipe"] = Recipe(**values["recipe"])
            for name in ("class_accuracy", "classes", "image_size"):
                values[name] = tuple(values[name])
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a result of schema {SCHEMA}, but {error}") from error


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
