"""Detectors of a poisoned set: networks that should do badly on held-out rows of it, and do not."""

import copy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from hf_unlearnable.batches import Batches
from hf_unlearnable.defenses.base import Defense
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.images import Images, Labels
from hf_unlearnable.probes import perceptron
from hf_unlearnable.recipes import Recipe, changed
from hf_unlearnable.victim import train_to_end

SIMPLE = Recipe(name="simple", epochs=100, learning_rate=0.01, schedule="step", milestones=(0.75, 0.9))
HELD_OUT = 0.2


@dataclass(frozen=True, kw_only=True)
class SetScore:
    """How well a detector's network does on held-out rows of the suspect set itself. Set it beside that of clean data.

    Args:
        validation_accuracy: after the last epoch.
        threshold: the verdict is "poisoned" above it.
        chance: validation accuracy of always answering with the commonest class.
    """

    validation_accuracy: float
    train_accuracy: float | None
    threshold: float
    chance: float
    train_rows: int
    validation_rows: int

    @property
    def poisoned(self) -> bool:
        """The verdict."""
        return self.validation_accuracy > self.threshold


def simple_network_score(
    suspect: Batches,
    *,
    kind: Literal["linear", "two_layer"] = "two_layer",
    epochs: int = 100,
    threshold: float = 0.7,
    accelerator: Accelerator,
    seed: int,
    progress: bool = True,
) -> SetScore:
    """Detector A: a network too simple for pictures does well on a fifth of the suspect set only if it is poisoned.

    "linear" is d to K; "two_layer" is d to d, ReLU, d to K, and is shown its training rows under crop and flip.
    SGD 0.01, momentum 0.9, weight decay 5e-4, batches of 128, the rate times 0.1 after 75 % and 90 %.

    Args:
        suspect: the published training rows. "two_layer" has about d^2 weights (9.4 million at 32 px): load larger
            pictures with `image_size=32`.
        threshold: validation accuracy above which the verdict is "poisoned". It presumes about ten classes that a
            simple network cannot tell apart: measure the clean set too.
        seed: of the split, the initial weights and the training.

    Raises:
        ValueError: too few rows to hold some out.

    Source: METHODS_NEW N26 (detector A) and N42.
    Deviations: the fifth is drawn class by class, and is judged without crop and flip.
    """
    size, classes = suspect.pixels[0].numel(), len(suspect.classes)
    sizes = (size, classes) if kind == "linear" else (size, size, classes)
    model = nn.Sequential(nn.Flatten(), *perceptron(sizes, activation=nn.ReLU, seed=seed))
    recipe = changed(SIMPLE, epochs=epochs, augmentation="none" if kind == "linear" else "crop_flip")
    return _score(model, suspect, recipe, Erm(), threshold, accelerator, seed, progress)


@dataclass(frozen=True)
class Shifted:
    """Plain training on pictures that are all brighter or darker: mean over the batch of CE(f(x + shift), y)."""

    name: ClassVar[str] = "shifted"

    shift: float

    def __call__(
        self, model: nn.Module, x: Images, y: Labels, *, progress: float, generator: torch.Generator
    ) -> Tensor:
        return F.cross_entropy(model(x + self.shift), y)


def bias_shift_score(
    network: nn.Module,
    suspect: Batches,
    *,
    shift: float = -0.5,
    epochs: int = 100,
    threshold: float = 0.7,
    accelerator: Accelerator,
    seed: int,
    progress: bool = True,
) -> SetScore:
    """Detector B: a network that was shown the rows x + shift alone does well on x only if the set is poisoned.

    What tells the classes of clean pictures apart changes with the brightness; a perturbation does not. The recipe is
    detector A's, under crop and flip.

    Args:
        network: untrained (ResNet-18 in the source); a copy is trained.
        suspect: the published training rows; a fifth is held out, and judged as it is.
        shift: added to all values while training, -0.5 or 0.5 in the source; the sums leave [0, 1].
        threshold: validation accuracy above which the verdict is "poisoned"; measure the clean set too.
        seed: of the split and of the training.

    Raises:
        ValueError: too few rows to hold some out, or a shift of 0.

    Source: METHODS_NEW N26 (detector B).
    Deviations: judged on rows that were held out, drawn class by class; the source names the same set.
    """
    if shift == 0:
        raise ValueError("shift: expected another number than 0, for which this is plain training")
    model = copy.deepcopy(network)
    return _score(
        model, suspect, changed(SIMPLE, epochs=epochs), Shifted(shift), threshold, accelerator, seed, progress
    )


def _score(
    model: nn.Module,
    suspect: Batches,
    recipe: Recipe,
    defense: Defense,
    threshold: float,
    accelerator: Accelerator,
    seed: int,
    progress: bool,
) -> SetScore:
    training, held_out = suspect.split(HELD_OUT, key=seed)
    if not len(held_out):
        raise ValueError(f"expected enough rows to hold a fifth out, got {len(suspect)}")
    result = train_to_end(
        model,
        training,
        held_out,
        recipe=recipe,
        defense=defense,
        accelerator=accelerator,
        seed=seed,
        progress=progress,
    )
    return SetScore(
        validation_accuracy=result.test_accuracy,
        train_accuracy=result.curve[-1].train_accuracy,
        threshold=threshold,
        chance=result.chance,
        train_rows=len(training),
        validation_rows=len(held_out),
    )
