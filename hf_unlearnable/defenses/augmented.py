"""Plain training on pictures under a stronger augmentation than crop and flip."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from hf_unlearnable.augment import Augmentation, Draws, augment
from hf_unlearnable.images import Images, Labels
from hf_unlearnable.policies import OPERATIONS, TrivialAugment, apply_operations, as_laid_out, check_pictures

PolicyName: TypeAlias = Literal["cutout", "trivial_augment", "rand_augment", "auto_augment"]
Step: TypeAlias = tuple[str, float, int]

# What AutoAugment's search found on CIFAR-10: an operation, its probability and its level out of 9, twice.
CIFAR10: tuple[tuple[Step, Step], ...] = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("auto_contrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("auto_contrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("auto_contrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("auto_contrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("auto_contrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("auto_contrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("auto_contrast", 0.9, 0)),
)


def strength(operation: str, level: float) -> tuple[float, float]:
    """A level in [0, 1] as a magnitude: a value, and how far from it, up or down.

    Source: the ranges of torchvision's AutoAugment and RandAugment. Deviations: translations are shares of a side.
    """
    match operation:
        case "shear_x" | "shear_y":
            return 0.0, math.degrees(math.atan(0.3 * level))
        case "translate_x" | "translate_y":
            return 0.0, 150 / 331 * level
        case "rotate":
            return 0.0, 30 * level
        case "brightness" | "contrast" | "color" | "sharpness":
            return 1.0, 0.9 * level
        case "posterize":
            return 8.0 - round(4 * level), 0.0
        case "solarize":
            return 1 - level, 0.0
        case _:
            return 0.0, 0.0


def _signs(like: Float[Tensor, "b n"], generator: torch.Generator) -> Float[Tensor, "b n"]:
    return 2.0 * torch.randint(2, like.shape, generator=generator, device=like.device) - 1


class _Operations:
    """Draws of operations and magnitudes, (b, n): n operations of a picture one after the other."""

    def apply(self, x: Shaped[Tensor, "b c h w"], draws: Draws) -> Shaped[Tensor, "b c h w"]:
        """Differentiable in `x`; pictures are moved to the nearest pixel, with black outside."""
        check_pictures(x)
        operations, magnitudes = (draws[name].to(x.device) for name in ("operation", "magnitude"))
        z = x
        for operation, magnitude in zip(operations.unbind(1), magnitudes.unbind(1), strict=True):
            z = apply_operations(z, operation, magnitude, geometry="pillow")
        return as_laid_out(z, x)


@dataclass(frozen=True, kw_only=True)
class RandAugment(_Operations):
    """Some operations out of fourteen, drawn with replacement, all at one level.

    Args:
        number: N, operations a picture.
        level: M, out of 30.

    Raises:
        ValueError: a number below 0, or a level outside [0, 30].

    Source: Cubuk et al. 2020, as torchvision's RandAugment(2, 9) (METHODS 24).
    Deviations: values are not rounded to 255ths between operations.
    """

    OPERATIONS: ClassVar[tuple[str, ...]] = tuple(name for name in OPERATIONS if name not in ("invert", "offset"))

    number: int = 2
    level: int = 9

    def __post_init__(self) -> None:
        if self.number < 0 or not 0 <= self.level <= 30:
            raise ValueError(f"expected a number >= 0 and a level in [0, 30], got {self.number} and {self.level}")

    def draw(self, count: int, *, generator: torch.Generator) -> Draws:
        """Every picture's operations (numbers into `policies.OPERATIONS`) and magnitudes, (count, number)."""
        device = generator.device
        numbers = torch.tensor([OPERATIONS.index(name) for name in self.OPERATIONS], device=device)
        values = torch.tensor([strength(name, self.level / 30) for name in self.OPERATIONS], device=device)
        drawn = torch.randint(len(numbers), (count, self.number), generator=generator, device=device)
        middle, spread = values[drawn].unbind(2)
        return {"operation": numbers[drawn], "magnitude": middle + spread * _signs(middle, generator)}


@dataclass(frozen=True, kw_only=True)
class AutoAugment(_Operations):
    """One of the 25 pairs of operations that were found on CIFAR-10, each of the two with its probability and level.

    Source: Cubuk et al. 2019, as torchvision's AutoAugment(CIFAR10) (METHODS 24).
    Deviations: values are not rounded to 255ths between operations.
    """

    def draw(self, count: int, *, generator: torch.Generator) -> Draws:
        """Every picture's two operations (numbers into `policies.OPERATIONS`; 0: none) and magnitudes, (count, 2)."""
        device = generator.device
        numbers = torch.tensor([[OPERATIONS.index(name) for name, _, _ in pair] for pair in CIFAR10], device=device)
        values = [[(*strength(name, level / 9), probability) for name, probability, level in pair] for pair in CIFAR10]
        pairs = torch.randint(len(CIFAR10), (count,), generator=generator, device=device)
        middle, spread, probability = torch.tensor(values, device=device)[pairs].unbind(2)
        happens = torch.rand(count, 2, generator=generator, device=device) < probability
        return {
            "operation": torch.where(happens, numbers[pairs], 0),
            "magnitude": middle + spread * _signs(middle, generator),
        }


@dataclass(frozen=True, kw_only=True)
class Cutout:
    """A black square whose middle is any pixel; what would stand out of the picture is cut off.

    Args:
        side: of the square, a share of the picture's shorter side in [0, 1] (1/2: 16 pixels at 32, 112 at 224).

    Raises:
        ValueError: a side outside [0, 1].

    Source: DeVries and Taylor 2017 (METHODS 24). Deviations: none.
    """

    side: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.side <= 1:
            raise ValueError(f"side is a share in [0, 1], got {self.side}")

    def draw(self, count: int, *, generator: torch.Generator) -> Draws:
        """The middles' places down and across, shares of the height and the width."""
        return {"middle": torch.rand(count, 2, generator=generator, device=generator.device)}

    def apply(self, x: Shaped[Tensor, "b c h w"], draws: Draws) -> Shaped[Tensor, "b c h w"]:
        """Differentiable in `x`."""
        half = round(self.side * min(x.shape[2:])) // 2
        middle = draws["middle"].to(x.device)
        covered = []
        for length, place in zip(x.shape[2:], middle.unbind(1), strict=True):
            first = (place * length).long().clamp(max=length - 1) - half
            offset = torch.arange(length, device=x.device) - first[:, None]
            covered.append((offset >= 0) & (offset < 2 * half))
        down, across = covered
        return as_laid_out(x.masked_fill((down[:, :, None] & across[:, None, :])[:, None], 0), x)


POLICIES: Mapping[PolicyName, Augmentation] = {
    "cutout": Cutout(),
    "trivial_augment": TrivialAugment(),
    "rand_augment": RandAugment(),
    "auto_augment": AutoAugment(),
}
"""The augmentations at their usual settings."""


@dataclass(frozen=True)
class Augmented:
    """Plain training under an augmentation that is drawn for every picture: mean over the batch of CE(f(A(x)), y).

    Args:
        policy: "cutout" (a square of half the shorter side), "trivial_augment" (UEraser's last part), "rand_augment"
            (two operations at level 9 of 30) or "auto_augment" (the policy found on CIFAR-10).

    Raises:
        ValueError: an unknown policy.

    Source: METHODS 24, and 22 for TrivialAugment. Deviations: those of the policies.
    """

    name: ClassVar[str] = "augmented"

    policy: PolicyName = "cutout"

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy is one of {', '.join(POLICIES)}, got {self.policy!r}")

    def __call__(
        self, model: nn.Module, x: Images, y: Labels, *, progress: float, generator: torch.Generator
    ) -> Tensor:
        return F.cross_entropy(model(augment(x, POLICIES[self.policy], generator=generator)).float(), y)
