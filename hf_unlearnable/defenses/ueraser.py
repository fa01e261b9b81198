"""UEraser: adversarial augmentation."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_unlearnable.erasing import UeraserAugmentation
from hf_unlearnable.images import Images, Labels

Mode: TypeAlias = Literal["lite", "standard", "max"]
Preset: TypeAlias = Literal["repository", "paper", "apbench"]


SHARES: Mapping[Mode, float] = {"lite": 0.0, "standard": 50 / 200, "max": 1.0}
"""E_adv / epochs: the share of the training with several copies."""

PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    "repository": {},
    "paper": {"brightness_roughness": (0.1, 0.7), "contrast_roughness": (0.1, 0.7), "intensity": (0.0, 1.0)},
    "apbench": {"brightness": 1.0, "contrast": 1.0},
}
"""Where the settings differ from those of `UeraserAugmentation`."""


@dataclass(frozen=True)
class Ueraser:
    """UEraser: the worst of several random augmentations of every picture.

        min_f mean_i max_{k <= K} CE(f(A_k(x_i)), y_i)

    A is plasma brightness, plasma contrast, channels in any order and TrivialAugment, drawn for every copy and picture
    anew. K is `copies` in the first share of the training and 1 ("Lite") after it.

    The K copies go through the network in one forward pass in training mode: BatchNorm normalises with the statistics
    of all K * b pictures, and its running ones move once a step, by all copies and not by the worst alone. The gradient
    is that of the worst copy's loss. Nothing is augmented at test time.

    Args:
        mode: "lite" never takes several copies, "standard" for the first quarter of the training (50 of 200 epochs),
            "max" always.
        copies: K. A step costs K forward and backward passes. Large K may diverge early: clip the gradient at 5.
        adversarial_share: of the training with several copies, in [0, 1], in place of that of "standard" (0.1 for 30 of
            300 epochs: CIFAR-100, ImageNet-100; 0.2 for 30 of 150: SVHN).
        preset: settings of A: those of the UEraser repository, of the paper's Table 13 (kornia's defaults) or of
            APBench.
        max_shear: largest shear in degrees; kornia's TrivialAugment reads 0.3 as 54 (arctan 0.3 is 16.7).
        per_picture: TrivialAugment draws an operation for every picture and copy; False: one for every copy of the
            whole batch, as kornia does.

    Raises:
        ValueError: no copies; a share outside [0, 1] or beside another mode than "standard"; an unknown name.

    Source: Qin et al. 2023, Table 12 and 13 (METHODS 22).
    Deviations: shears are smaller than kornia's unless `max_shear=54`. The repository's own script shares one operation
    between all copies: here copies always differ. APBench's variants with JPEG are not among the presets.
    """

    name: ClassVar[str] = "ueraser"

    mode: Mode = "standard"
    copies: int = 5
    adversarial_share: float | None = None
    preset: Preset = "repository"
    max_shear: float = 16.7
    per_picture: bool = True

    def __post_init__(self) -> None:
        for field, known in (("mode", SHARES), ("preset", PRESETS)):
            if getattr(self, field) not in known:
                raise ValueError(f"{field} is one of {', '.join(known)}, got {getattr(self, field)!r}")
        if self.copies < 1:
            raise ValueError(f"copies is at least 1, got {self.copies}")
        if self.adversarial_share is not None and (self.mode != "standard" or not 0 <= self.adversarial_share <= 1):
            raise ValueError(
                f'adversarial_share lies in [0, 1] and goes with mode "standard", got {self.adversarial_share} '
                f"with {self.mode!r}"
            )
        _ = self.augmentation

    @property
    def augmentation(self) -> UeraserAugmentation:
        """A, also for an attacker who wants to descend through it."""
        own = UeraserAugmentation(max_shear=self.max_shear, per_picture=self.per_picture)
        return dataclasses.replace(own, **PRESETS[self.preset])

    @property
    def share(self) -> float:
        """The share of the training with several copies."""
        return SHARES[self.mode] if self.adversarial_share is None else self.adversarial_share

    def __call__(
        self, model: nn.Module, x: Images, y: Labels, *, progress: float, generator: torch.Generator
    ) -> Tensor:
        copies = self.copies if progress < self.share else 1
        draws = [self.augmentation.draw(len(x), generator=generator) for _ in range(copies)]
        merged = {name: torch.cat([drawn[name] for drawn in draws]) for name in draws[0]}
        shown = self.augmentation.apply(x.repeat(copies, 1, 1, 1), merged)
        losses = F.cross_entropy(model(shown).float(), y.repeat(copies), reduction="none")
        return losses.view(copies, -1).max(0).values.mean()
