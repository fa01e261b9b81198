"""What a training is asked to do: how long, how fast, with which augmentation."""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

OptimizerName = Literal["sgd", "adamw"]
Schedule = Literal["constant", "step", "cosine", "onecycle"]
AugmentationName = Literal["crop_flip", "shift_flip", "resized_crop_flip", "crop", "flip", "none"]


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
        momentum, nesterov: of "sgd" alone, without effect on "adamw".
        weight_decay: of all that is trained, biases and norms too: times the weight, added to the gradient ("sgd"), or
            times the weight and the learning rate, taken off the weight ("adamw").
        gradient_clip: largest L2 norm of the whole gradient; None does not clip.
        drop_last: leave out an epoch's last batch where it is not whole.
        augmentation: "crop_flip", "shift_flip" (bilinear, see `augment.ShiftFlip`), "resized_crop_flip" (at 224 px, see
            `augment.ResizedCropFlip`), "crop", "flip" or "none".
        crop_padding: zeros added before the crop, as a share of the shorter side (1/8: 4 pixels at 32, 28 at 224);
            the largest shift of "shift_flip", as a share of each side.
        optimizer: "sgd", or "adamw" with betas of 0.9 and 0.999 and an epsilon of 1e-8.

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
    optimizer: OptimizerName = "sgd"

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"expected either epochs or steps, got epochs={self.epochs}, steps={self.steps}")
        for field, least in (("epochs", 1), ("steps", 1), ("batch_size", 1), ("learning_rate", 0), ("weight_decay", 0)):
            value = getattr(self, field)
            if value is not None and not value >= least:
                raise ValueError(f"{field}: expected at least {least}, got {value}")
        for field, names in (
            ("schedule", Schedule),
            ("augmentation", AugmentationName),
            ("optimizer", OptimizerName),
        ):
            if getattr(self, field) not in get_args(names):
                raise ValueError(f"{field}: expected one of {get_args(names)}, got {getattr(self, field)!r}")
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
        # Pretrained weights (METHODS_NEW N30), which leaves the schedule open: the cosine is ours.
        Recipe(name="finetune", epochs=10, learning_rate=1e-4, weight_decay=0.05, optimizer="adamw"),
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
    return changed(RECIPES[name], **changes)


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    """A recipe with some of its fields changed; a new length in epochs replaces one in steps, and vice versa.

    Raises:
        ValueError: a value outside its range.
        TypeError: no field of this name.
    """
    for given, other in (("epochs", "steps"), ("steps", "epochs")):
        if changes.get(given) is not None and other not in changes:
            changes[other] = None
    return dataclasses.replace(recipe, **changes)
