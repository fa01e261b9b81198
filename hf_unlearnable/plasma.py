"""Plasma fractals a batch at a time, and the augmentations of UEraser that need no policy: plasma brightness, plasma
contrast, and channels in any order.

A picture's field follows from the seed that was drawn for it, whatever the batch or the device, so that draws are small
and of one size for pictures of all sizes.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from hf_unlearnable.augment import Draws

# SplitMix64: the increment of its state and the multipliers of its output, as signed 64-bit numbers.
_INCREMENT, _FIRST, _SECOND = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def uniform_by_seed(seeds: Int[Tensor, " n"], count: int) -> Float[Tensor, "n count"]:
    """Numbers in (0, 1) that follow from each row's int64 seed alone: the middles of 65,536 equal steps.

    Number j of seed s is sixteen bits of word j // 4 of SplitMix64 with the state s.

    Source: Steele, Lea and Flood 2014. Deviations: none. It keeps no secrets.
    """
    words = torch.arange(1, -(-count // 4) + 1, device=seeds.device) * _INCREMENT + seeds[:, None]
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        words.bitwise_xor_((words >> shift).bitwise_and_(2 ** (64 - shift) - 1))
        if factor != 1:
            words.mul_(factor)
    return words.view(torch.int16)[:, :count].to(torch.float32).add_(32768.5).mul_(2.0**-16)


def plasma(
    seeds: Int[Tensor, " n"], roughness: Float[Tensor, " n"], size: tuple[int, int], *, maps: int = 3
) -> Float[Tensor, "n maps h w"]:
    """Diamond-square fields in [0, 1], float32: `maps` independent ones for every seed.

    A grid begins as uniform corners. Its first doubling adds means of neighbours; doubling k = 1, 2, ... after it adds

        (1 - r^k) * mean of the nearest neighbours + r^k * u,      u uniform in (0, 1),

    in the middle of every cell (four neighbours), then of every edge (four neighbours, three at the border), until the
    grid covers the picture, which is its upper left corner. All values are convex mixtures of uniform ones: their mean
    is 1/2 everywhere, and no field is stretched to its own extremes.

    Args:
        roughness: r in [0, 1]; the closer to 1, the closer to white noise.
        size: height and width in pixels.

    Source: kornia's `diamond_square` (after TorMentor, Nicolaou et al. 2022), what UEraser runs (METHODS 22).
    Deviations: other random numbers, of 16 bits.
    """
    bits = [(max(side, 3) - 2).bit_length() for side in size]
    grids = [[2 ** (bit - min(bits) + k) + 1 for bit in bits] for k in range(min(bits) + 1)]
    points = [math.prod(grid) for grid in grids]
    counts = [points[0], *(new - old for old, new in itertools.pairwise(points[1:]))]
    drawn = uniform_by_seed(seeds, maps * sum(counts)).view(len(seeds) * maps, sum(counts)).split(counts, 1)
    ratio = roughness.to(torch.float32).repeat_interleave(maps)[:, None, None]
    weight = torch.ones_like(ratio)
    field = _doubled(drawn[0].unflatten(1, grids[0]), None, weight)
    for numbers in drawn[1:]:
        weight = weight * ratio
        field = _doubled(field, numbers, weight)
    return field.unflatten(0, (len(seeds), maps))[..., : size[0], : size[1]]


def _doubled(
    x: Float[Tensor, "n r c"], numbers: Float[Tensor, "n count"] | None, weight: Float[Tensor, "n 1 1"]
) -> Float[Tensor, "n r2 c2"]:
    """The grid with its middles: of cells, of the edges across, of the edges down; plain means without numbers."""
    _, rows, columns = x.shape
    across, down = x[:, :, :-1] + x[:, :, 1:], x[:, :-1] + x[:, 1:]
    cells = (across[:, :-1] + across[:, 1:]).mul_(0.25)
    fresh: list[Tensor | None] = [None, None, None]
    if numbers is not None:
        shapes = [part.shape[1:] for part in (cells, across, down)]
        split = numbers.split([shape.numel() for shape in shapes], 1)
        fresh = [part.unflatten(1, shape) for part, shape in zip(split, shapes, strict=True)]
    _mix(cells, fresh[0], weight)
    across[:, 1:] += cells
    across[:, :-1] += cells
    across.mul_(0.25)[:, :: rows - 1].mul_(4 / 3)
    down[:, :, 1:] += cells
    down[:, :, :-1] += cells
    down.mul_(0.25)[:, :, :: columns - 1].mul_(4 / 3)
    _mix(across, fresh[1], weight)
    _mix(down, fresh[2], weight)
    doubled = x.new_empty(len(x), 2 * rows - 1, 2 * columns - 1)
    doubled[:, ::2, ::2], doubled[:, 1::2, 1::2] = x, cells
    doubled[:, ::2, 1::2], doubled[:, 1::2, ::2] = across, down
    return doubled


def _mix(means: Tensor, fresh: Tensor | None, weight: Tensor) -> None:
    if fresh is not None:
        means.lerp_(fresh, weight)


@dataclass(frozen=True, kw_only=True)
class Plasma:
    """Clouds of brightness, then clouds of contrast, with plasma fields P and Q for every channel of a picture:

        x <- clamp(x + s * (2P - 1), 0, 1)
        x <- clamp((x - 1/2) * 4Q + 1/2, 0, 1)

    Args:
        brightness, contrast: probabilities that a picture is changed so, each on its own; 0 leaves that out.
        brightness_roughness, contrast_roughness: ranges that the fields' roughness is drawn from, in [0, 1].
        intensity: range that s is drawn from, in [0, 1].

    Raises:
        ValueError: a probability or a range that is none.

    Source: METHODS 22; kornia's RandomPlasmaBrightness and RandomPlasmaContrast. Deviations: none in distribution.
    """

    brightness: float = 0.5
    contrast: float = 0.5
    brightness_roughness: tuple[float, float] = (0.1, 0.7)
    contrast_roughness: tuple[float, float] = (0.1, 0.7)
    intensity: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast"):
            _check_probability(name, getattr(self, name))
        for name in ("brightness_roughness", "contrast_roughness", "intensity"):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= 1:
                raise ValueError(f"{name} is a range (lowest, highest) within [0, 1], got {(low, high)}")

    def draw(self, count: int, *, generator: torch.Generator) -> Draws:
        """Two of each for every picture, for brightness and contrast: whether it is changed, the field's roughness and
        the field's seed; and s."""
        device = generator.device
        uniform = torch.rand(count, 5, generator=generator, device=device)
        roughness = (self.brightness_roughness, self.contrast_roughness)
        low, high = torch.tensor([*roughness, self.intensity], device=device).unbind(1)
        between = low + (high - low) * uniform[:, 2:]
        return {
            "chosen": uniform[:, :2] < torch.tensor([self.brightness, self.contrast], device=device),
            "roughness": between[:, :2],
            "intensity": between[:, 2],
            "seed": torch.randint(2**63 - 1, (count, 2), generator=generator, device=device),
        }

    def apply(self, x: Shaped[Tensor, "b c h w"], draws: Draws) -> Shaped[Tensor, "b c h w"]:
        """Differentiable in `x`."""
        chosen, seed, roughness = (draws[name].to(x.device) for name in ("chosen", "seed", "roughness"))
        lit, contrasted = (which.nonzero().flatten() for which in chosen.unbind(1))
        fields = plasma(
            torch.cat([seed[lit, 0], seed[contrasted, 1]]),
            torch.cat([roughness[lit, 0], roughness[contrasted, 1]]),
            (x.shape[2], x.shape[3]),
            maps=x.shape[1],
        ).to(x.dtype)
        light, contrast = fields.split([len(lit), len(contrasted)])
        intensity = draws["intensity"].to(x)[lit, None, None, None]
        light = light.mul(2 * intensity).sub_(intensity)
        x = x.index_copy(0, lit, (x.index_select(0, lit) + light).clamp(0, 1))
        middle = (x.index_select(0, contrasted) - 0.5) * contrast.mul(4)
        return x.index_copy(0, contrasted, (middle + 0.5).clamp(0, 1))


@dataclass(frozen=True, kw_only=True)
class ChannelShuffle:
    """The channels of a picture in one of their six orders.

    Args:
        probability: of a picture's order being drawn (the old one among them).

    Raises:
        ValueError: not a probability.

    Source: METHODS 22; kornia's RandomChannelShuffle. Deviations: none in distribution.
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        _check_probability("probability", self.probability)

    def draw(self, count: int, *, generator: torch.Generator) -> Draws:
        """Where every channel comes from, (count, 3)."""
        device = generator.device
        orders = torch.rand(count, 3, generator=generator, device=device).argsort(1)
        chosen = torch.rand(count, 1, generator=generator, device=device) < self.probability
        return {"channels": torch.where(chosen, orders, torch.arange(3, device=device))}

    def apply(self, x: Shaped[Tensor, "b c h w"], draws: Draws) -> Shaped[Tensor, "b c h w"]:
        """Differentiable in `x`."""
        channels = draws["channels"].to(x.device)
        rows = torch.arange(len(x), device=x.device)[:, None] * x.shape[1] + channels
        return x.flatten(0, 1).index_select(0, rows.flatten()).view_as(x)


def _check_probability(name: str, probability: float) -> None:
    if not 0 <= probability <= 1:
        raise ValueError(f"{name} is a probability in [0, 1], got {probability}")
