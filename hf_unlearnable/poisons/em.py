"""Error-minimising noise, EM: noise and network take turns, until the network has nothing left to learn."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_unlearnable.augment import Augmentation, CropFlip, ResizedCropFlip
from hf_unlearnable.budget import Budget
from hf_unlearnable.draws import Draws
from hf_unlearnable.erasing import UeraserAugmentation
from hf_unlearnable.fitting import Fit, Setup
from hf_unlearnable.images import Images, Labels
from hf_unlearnable.pgd import Pgd, RowDraws
from hf_unlearnable.poisons.classifier_fit import cross_entropy
from hf_unlearnable.poisons.em_fit import ClasswiseFit, Rounds, SamplewiseFit
from hf_unlearnable.poisons.noise_bank import NoiseBank
from hf_unlearnable.poisons.robust_em import RobustEmPoison, RobustFit
from hf_unlearnable.poisons.with_surrogate import SurrogatePoison, settled
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.surrogate import Surrogate

VIEWS = ("none", "crop_flip", "resized_crop_flip", "plasma", "shuffle", "plasma-shuffle", "ueraser")
CHUNK = 640
"""Pictures in one pass through the network."""
REM_RECIPE = dataclasses.replace(RobustEmPoison.recipe, name="em-rem-repo")

_SAMPLEWISE = {"pgd_steps": 20, "pgd_step_size": 0.8 / 255, "noise_views": "none", "stop_error": 0.01}
_CLASSWISE = {**_SAMPLEWISE, "pgd_steps": 1, "stop_error": 0.1}
_REM_REPO = {**_SAMPLEWISE, "pgd_steps": 10, "pgd_step_size": 1.6 / 255, "noise_views": "crop_flip"}


@dataclass(frozen=True, kw_only=True)
class EmPoison(SurrogatePoison):
    """EM: noise under which a network trained on it errs no more, so that there is nothing to learn.

        min_f sum_i min_{|delta_i| <= epsilon} CE(f(x_i + delta_i), y_i)        ("classwise": delta_i = delta_{y_i})

    In turns: `train_steps_per_round` batches train f on x + delta; then delta goes on from where it was, by signed
    descent for the frozen f, on one batch after the other. This ends when the error of f on x + delta is at most
    `stop_error`, or else after `max_rounds` (or the recipe's length, counted in training batches, if that is sooner):
    the noise is then used as it is. The surrogate's provenance tells error and rounds, under "state".

    Noise for each picture is made together with the network, and kept in the surrogate by the picture's pixels and
    label: it is for these pictures alone. The class-wise table fits any picture of its classes.

    Args:
        epsilon: L-inf budget of the noise, a fraction of the value range.
        mode: "samplewise", a noise for every picture, or "classwise", one for every class.
        variant: "original", or "rem-repo": every batch has noise made from a random start for f as it is, and is then
            trained on (`RobustFit` without adversary); the published noise is that of the last f, made while mapping.
            It has its own recipe, and of the fields below it uses `pgd_steps`, `pgd_step_size`, `noise_views` and
            `positive_only`.
        pgd_steps, pgd_step_size: signed descent on the noise. Default: 20 of 0.8/255; "classwise" 1 of 0.8/255;
            "rem-repo" 10 of 1.6/255.
        noise_views: random views of x + delta for the network and for the noise, new ones at every step: "none",
            "crop_flip", "resized_crop_flip" (at 224 px), or, against a trainer with UEraser, parts of its chain (plasma
            pictures, channels in any order) or all of it ("ueraser", with TrivialAugment). With "none" the network's
            views are the recipe's. Default: "none"; "rem-repo": "crop_flip".
        train_steps_per_round: batches that train f in a round.
        stop_error: share of errors of f, in evaluation mode and without views, in [0, 1]. Default: 0.01; "classwise"
            0.1.
        max_rounds: the most rounds.
        search_fraction: "classwise": share of the rows, in proportion to the classes, on which the noise is made and
            the error taken; the network is trained on all of them.
        noise: "bank", the noise that was made with the network; "regenerate", noise made while mapping, for the last
            network from zero: for any picture, and in a small file. Samplewise only.
        unknown: what is done about a picture (with its label) that is not in the bank: "error", or "regenerate" its
            noise.
        positive_only: leave out all negative noise.

    The fields that may be None are filled in when the value is made.

    Raises:
        ValueError: a number outside its range; "classwise" noise in the "rem-repo" variant, which has none; a
            surrogate without a bank for noise="bank"; while mapping, a picture that is not in the bank.

    Source: "Unlearnable Examples", Huang et al. 2021, its repository (METHODS 5.1, 5.2; CIFAR-100: 20 batches a round,
    weight decay 5e-5; ImageNet-100: epsilon 16/255, steps of 1.6/255, 100 batches of 32 a round, stop_error 0.1, weight
    decay 5e-5), `generate_em.py` of REM's repository (METHODS 5.3), and UEraser's adaptive attack (its Table 5).
    Deviations: the official dataset class drops all negative noise when it adds it: `positive_only=True`. The fixed
    batches are drawn once from the seed, official: cut in the order of the file, which may be sorted by class. Noise of
    pictures is kept in the box after every step; official noise may leave it by one step until it is published, so that
    training sees that overshoot. It is stored in float16 while it is made, at the end in whole grey levels. The error
    is taken over rows, official: over batches. "classwise": the last batch is left out only if the recipe says so.
    "rem-repo": noise is made for x and seen under views, not for a view and added to x; it is made for all rows.
    """

    name: ClassVar[str] = "em"
    recipe: ClassVar[Recipe] = Recipe(
        name="em",
        steps=10_000,
        batch_size=512,
        schedule="constant",
        gradient_clip=5.0,
        augmentation="none",
    )

    epsilon: float = settled(8 / 255)
    mode: Literal["samplewise", "classwise"] = settled("samplewise")
    variant: Literal["original", "rem-repo"] = settled("original")
    pgd_steps: int | None = settled(None)
    pgd_step_size: float | None = settled(None)
    noise_views: (
        Literal["none", "crop_flip", "resized_crop_flip", "plasma", "shuffle", "plasma-shuffle", "ueraser"] | None
    ) = settled(None)
    train_steps_per_round: int = settled(10)
    stop_error: float | None = settled(None)
    max_rounds: int = settled(100)
    search_fraction: float = settled(0.2)
    noise: Literal["bank", "regenerate"] = "bank"
    unknown: Literal["error", "regenerate"] = "error"
    positive_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (
            ("mode", ("samplewise", "classwise")),
            ("variant", ("original", "rem-repo")),
            ("noise_views", (*VIEWS, None)),
            ("noise", ("bank", "regenerate")),
            ("unknown", ("error", "regenerate")),
        ):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is one of {values}, got {getattr(self, name)!r}")
        if self.variant == "rem-repo":
            if self.mode == "classwise":
                raise ValueError('the "rem-repo" variant makes noise for pictures, got mode="classwise"')
            object.__setattr__(self, "recipe", REM_RECIPE)
        usual: dict[str, Any] = _REM_REPO if self.variant == "rem-repo" else _SAMPLEWISE
        for name, value in (_CLASSWISE if self.mode == "classwise" else usual).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("pgd_steps", "train_steps_per_round", "max_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        if self.stop_error is None or not 0 <= self.stop_error <= 1:
            raise ValueError(f"stop_error is a fraction in [0, 1], got {self.stop_error}")
        if not 0 < self.search_fraction <= 1:
            raise ValueError(f"search_fraction is a fraction in (0, 1], got {self.search_fraction}")
        self.noise_pgd((32, 32))
        if self.has_bank and not self.epsilon <= 127 / 255:
            raise ValueError(f"epsilon is at most 127/255 for noise in a bank, got {self.epsilon}")
        if self.surrogate is not None and self.has_bank and "bank.noise" not in self.surrogate.tensors:
            raise ValueError('this surrogate was trained with noise="regenerate" and holds no noise of known pictures')

    @property
    def has_bank(self) -> bool:
        """Whether pictures are given the noise that was made with the network."""
        return self.mode == "samplewise" and self.variant == "original" and self.noise == "bank"

    def noise_pgd(self, image_size: tuple[int, int]) -> Pgd:
        """The descent that makes the noise."""
        assert self.pgd_steps is not None
        assert self.pgd_step_size is not None
        return Pgd(
            budget=Budget("linf", self.epsilon).whole(),
            steps=self.pgd_steps,
            step_size=self.pgd_step_size,
            direction="min",
            init="uniform" if self.variant == "rem-repo" else "zero",
            augmentation=views(self.noise_views or "none", image_size),
            chunk=CHUNK,
        )

    def budget_for(self, height: int, width: int) -> Budget:
        return Budget("linf", self.epsilon)

    def craft(self, x: Images, y: Labels | None, draws: Draws, surrogate: Surrogate) -> Images:
        assert y is not None
        if self.mode == "classwise":
            delta = surrogate.tensors["delta"].to(x)[y]
        elif self.has_bank:
            delta = self._known(x, y, draws, surrogate)
        else:
            delta = self._made(x, y, draws, surrogate)
        return x + (delta.clamp_min(0) if self.positive_only else delta)

    def fitting(self, setup: Setup) -> Fit:
        noise = self.noise_pgd(setup.train.image_size)
        if self.variant == "rem-repo":
            fit = RobustFit(setup, noise, None)
            fit.augmentation = noise.augmentation or fit.augmentation
            return fit
        assert self.stop_error is not None
        rounds = Rounds(training=self.train_steps_per_round, stop_error=self.stop_error, most=self.max_rounds)
        if self.mode == "classwise":
            return ClasswiseFit(setup, noise, rounds, fraction=self.search_fraction)
        return SamplewiseFit(setup, noise, rounds, bank=self.has_bank)

    def _known(self, x: Images, y: Labels, draws: Draws, surrogate: Surrogate) -> Images:
        bank = NoiseBank.in_surrogate(surrogate)
        places = bank.find(draws.digests, y.tolist())
        strange = [row for row, place in enumerate(places) if place is None]
        if strange and self.unknown == "error":
            raise ValueError(
                f"picture {strange[0]} of {len(places)} here: expected one of the {len(bank.noise)} pictures, with its "
                f"label, that the noise was made for; got an unknown one, or label {int(y[strange[0]])} for it "
                f'({len(strange)} are unknown): unknown="regenerate" makes noise for such pictures'
            )
        delta = torch.zeros_like(x)
        familiar = [(row, place) for row, place in enumerate(places) if place is not None]
        if familiar:
            rows, kept = (list(part) for part in zip(*familiar, strict=True))
            delta[rows] = bank.noise[kept].to(x) / 255
        if strange:
            delta[strange] = self._made(x[strange], y[strange], _RowsOf(draws, strange), surrogate)
        return delta

    def _made(self, x: Images, y: Labels, draws: RowDraws, surrogate: Surrogate) -> Images:
        network = surrogate.network(device=x.device)
        return self.noise_pgd(surrogate.image_size).run(cross_entropy(network, y), x, model=network, draws=draws)


def views(name: str, image_size: tuple[int, int]) -> Augmentation | None:
    """The random transformation of that name for pictures of this size; gradients flow through it."""
    if name == "none":
        return None
    if name == "crop_flip":
        return CropFlip(padding=round(min(image_size) / 8))
    if name == "resized_crop_flip":
        return ResizedCropFlip()
    plasma = 0.5 if name in ("plasma", "plasma-shuffle", "ueraser") else 0.0
    shuffle = 0.5 if name != "plasma" else 0.0
    return UeraserAugmentation(brightness=plasma, contrast=plasma, shuffle=shuffle, trivial=name == "ueraser")


class _RowsOf:
    """The randomness of some of the pictures of a batch."""

    def __init__(self, draws: Draws, rows: list[int]) -> None:
        self._draws, self._rows = draws, rows

    def uniform(self, *shape: int, purpose: str) -> Tensor:
        return self._draws.uniform(*shape, purpose=purpose)[self._rows]
