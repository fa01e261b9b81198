"""UEraser's chain of augmentations as one: what the defense trains on, and what an adaptive poison descends through."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

from hf_unlearnable.augment import Augmentation, Draws
from hf_unlearnable.plasma import ChannelShuffle, Plasma
from hf_unlearnable.policies import TrivialAugment, as_laid_out, check_pictures


@dataclass(frozen=True, kw_only=True)
class UeraserAugmentation:
    """UEraser's chain: plasma brightness, plasma contrast, channels in any order, TrivialAugment.

    Draws are small whatever the pictures' size: plasma fields follow from a seed for every picture. An adaptive
    attacker may descend through it (`Pgd(augmentation=UeraserAugmentation(), ...)`), with parts of it switched off.

    Args:
        brightness, contrast, shuffle: probabilities of a picture being changed by the plasmas and the channels' order.
        brightness_roughness, contrast_roughness: ranges of the plasmas' roughness, in [0, 1].
        intensity: range of the brightness plasma's weight, in [0, 1].
        trivial: whether TrivialAugment follows.
        max_shear, per_picture: see `TrivialAugment`.

    Raises:
        ValueError: a value outside its range.

    Source: UEraser (Qin et al. 2023), METHODS 22; the defaults are those of its repository.
    Deviations: those of `TrivialAugment`.
    """

    brightness: float = 0.5
    contrast: float = 0.5
    shuffle: float = 0.5
    brightness_roughness: tuple[float, float] = (0.3, 0.7)
    contrast_roughness: tuple[float, float] = (0.3, 0.7)
    intensity: tuple[float, float] = (0.5, 1.0)
    trivial: bool = True
    max_shear: float = 16.7
    per_picture: bool = True

    def __post_init__(self) -> None:
        _ = self.parts

    @property
    def parts(self) -> Mapping[str, Augmentation]:
        """What is applied, one after the other."""
        fields = ("brightness", "contrast", "brightness_roughness", "contrast_roughness", "intensity")
        plasma = Plasma(**{name: getattr(self, name) for name in fields})
        trivial = TrivialAugment(max_shear=self.max_shear, per_picture=self.per_picture)
        parts = {"plasma": plasma, "shuffle": ChannelShuffle(probability=self.shuffle)}
        return {**parts, "trivial": trivial} if self.trivial else parts

    def draw(self, count: int, *, generator: torch.Generator) -> Draws:
        """The draws of the parts, as "plasma seed" and so on."""
        drawn = {name: part.draw(count, generator=generator) for name, part in self.parts.items()}
        return {f"{name} {what}": values for name, draws in drawn.items() for what, values in draws.items()}

    def apply(self, x: Shaped[Tensor, "b c h w"], draws: Draws) -> Shaped[Tensor, "b c h w"]:
        """Differentiable in `x`; the memory format is kept."""
        check_pictures(x)
        z = x.contiguous()
        for name, part in self.parts.items():
            prefix = f"{name} "
            z = part.apply(z, {key.removeprefix(prefix): v for key, v in draws.items() if key.startswith(prefix)})
        return as_laid_out(z, x)
