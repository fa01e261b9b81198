"""TAP: adversarial examples of a plain classifier, as training data."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from hf_unlearnable.augment import Augmentation, CropFlip, ShiftFlip
from hf_unlearnable.budget import Budget
from hf_unlearnable.draws import Draws
from hf_unlearnable.fitting import Fit, Setup
from hf_unlearnable.images import Images, Labels
from hf_unlearnable.pgd import Pgd
from hf_unlearnable.poisons.classifier_fit import ClassifierFit, cross_entropy
from hf_unlearnable.poisons.with_surrogate import SurrogatePoison
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.surrogate import Surrogate

Objective = Literal["targeted", "untargeted"]
Start = Literal["normal", "uniform", "zero"]
Views = Literal["shift_flip", "crop_flip", "none"]
CHUNK = 640
"""Pictures in one pass through the network."""


@dataclass(frozen=True, kw_only=True)
class TapPoison(SurrogatePoison):
    """TAP: noise that shows a classifier of the clean pictures the next class, and thereby teaches its features.

        targeted:   delta = argmin_{|delta| <= epsilon} E_{t ~ T} CE(f(t(x + delta)), (y + target_shift) mod K)
        untargeted: delta = argmax_{|delta| <= epsilon} E_{t ~ T} CE(f(t(x + delta)), y)

    f is trained plainly on clean pictures. One view t(x + delta) is drawn for every picture and step.

    Args:
        epsilon: L-inf budget of the noise, a fraction of the value range.
        objective: "targeted" or "untargeted".
        target_shift: how many classes on the target is; no multiple of the number of classes.
        pgd_steps: signed steps on the noise.
        pgd_step_size: their length; None for 0.05 * epsilon.
        start: where the noise begins: "normal", N(0, 1) * epsilon clamped to the budget; "uniform" in it; "zero".
        restarts: random starts (the paper: 8), of which every picture keeps the one with the best loss at the end.
        views: T while the noise is made: "shift_flip" of up to 1/8 of a side, "crop_flip" with a padding of 1/8 of the
            shorter side, or "none".

    Raises:
        ValueError: a budget outside [0, 1], a step size that is not positive, numbers below 1, an unknown choice, a
            target that is the class itself.

    Source: "Adversarial Examples Make Strong Poisons" and its repository (METHODS 8); the class's recipe is that of
    CIFAR-10 there. The variant in the repository of REM: start="uniform", pgd_step_size=0.064 / 255,
    views="crop_flip", on a surrogate of `recipe("rem40k")` (ImageNet-100: 100 steps of 0.16/255). P1 of HYPO's authors
    in L-inf: start="zero", views="none".
    Deviations: one restart by default; the best one is chosen for every picture, not for the dataset. Pictures go into
    f in [0, 1], not standardised, so that what shifts in is black, not the mean colour. Dropout is off.
    """

    name: ClassVar[str] = "tap"
    recipe: ClassVar[Recipe] = Recipe(
        name="tap",
        epochs=40,
        schedule="step",
        milestones=(14 / 40, 24 / 40, 35 / 40),
        nesterov=True,
        augmentation="shift_flip",
    )

    epsilon: float = 8 / 255
    objective: Objective = "targeted"
    target_shift: int = 1
    pgd_steps: int = 250
    pgd_step_size: float | None = None
    start: Start = "normal"
    restarts: int = 1
    views: Views = "shift_flip"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("objective", Objective), ("start", Start), ("views", Views)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} is one of {get_args(known)}, got {getattr(self, name)!r}")
        self.noise_pgd((32, 32))
        if self.num_classes is not None:
            self._check_target(self.num_classes)

    def noise_pgd(self, image_size: tuple[int, int]) -> Pgd:
        """The loop that makes the noise."""
        augmentations: dict[Views, Augmentation | None] = {
            "shift_flip": ShiftFlip(),
            "crop_flip": CropFlip(padding=round(min(image_size) / 8)),
            "none": None,
        }
        return Pgd(
            budget=Budget("linf", self.epsilon).whole(),
            steps=self.pgd_steps,
            step_size=0.05 * self.epsilon if self.pgd_step_size is None else self.pgd_step_size,
            direction="min" if self.objective == "targeted" else "max",
            init=self.start,
            augmentation=augmentations[self.views],
            restarts=self.restarts,
            chunk=CHUNK,
        )

    def budget_for(self, height: int, width: int) -> Budget:
        return Budget("linf", self.epsilon)

    def craft(self, x: Images, y: Labels | None, draws: Draws, surrogate: Surrogate) -> Images:
        assert y is not None
        network = surrogate.network(device=x.device)
        wanted = (y + self.target_shift) % len(surrogate.classes) if self.objective == "targeted" else y
        loss = cross_entropy(network, wanted)
        return x + self.noise_pgd(surrogate.image_size).run(loss, x, model=network, draws=draws)

    def fitting(self, setup: Setup) -> Fit:
        self._check_target(len(setup.train.classes))
        return ClassifierFit(setup)

    def _check_target(self, classes: int) -> None:
        if self.objective == "targeted" and self.target_shift % classes == 0:
            raise ValueError(
                f"target_shift: expected another class than the picture's own, got {self.target_shift} for "
                f"{classes} classes"
            )
