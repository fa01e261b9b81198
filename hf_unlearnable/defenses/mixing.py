"""Mixup and cutmix: training on mixtures of two pictures and of their labels."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hf_unlearnable.images import Images, Labels


@dataclass(frozen=True)
class Mixing(ABC):
    """What mixup and cutmix share: lambda ~ Beta(alpha, alpha), partners by a permutation of the batch, soft labels.

        mean over i of -sum_c t_ic log softmax(f(x'_i))_c

    The partners are rows of this process, as they were before any mixing. Every round mixes the pictures and the
    labels of the round before it, so that the shares of earlier labels shrink by each later lambda.

    Args:
        alpha: of the Beta distribution, positive: below 1 mostly light mixtures, 1 uniform, above 1 mostly halves.
        probability: that a round mixes at all, in [0, 1].
        rounds: how often, at least 1.
        per: "batch" draws one lambda (one box, one chance) for the whole batch, "image" one for every picture.

    Raises:
        ValueError: a value outside its range.
    """

    alpha: float = 1.0
    probability: float = 1.0
    rounds: int = 1
    per: Literal["batch", "image"] = "batch"

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha: expected a positive number, got {self.alpha}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability: expected a number in [0, 1], got {self.probability}")
        if self.rounds < 1:
            raise ValueError(f"rounds: expected at least 1, got {self.rounds}")
        if self.per not in ("batch", "image"):
            raise ValueError(f'per: expected "batch" or "image", got {self.per!r}')

    @abstractmethod
    def join(
        self, x: Images, other: Images, kept: Float[Tensor, " n"], *, generator: torch.Generator
    ) -> tuple[Images, Float[Tensor, " n"]]:
        """The share `kept` of each picture of `x` and the rest from `other`, and the share that was really kept.

        n is the number of rows, or 1 for all alike.
        """

    def mix(self, x: Images, *, generator: torch.Generator) -> tuple[Images, Float[Tensor, "b b"]]:
        """The mixed pictures, and in (i, j) the weight that the label of row j has for picture i; rows sum to 1."""
        count = 1 if self.per == "batch" else len(x)
        mixed, own = x, torch.eye(len(x), device=x.device)
        shares = own
        for _ in range(self.rounds):
            partner = torch.randperm(len(x), generator=generator, device=x.device)
            kept = _beta(self.alpha, count, generator)
            unmixed = torch.rand(count, generator=generator, device=x.device) >= self.probability
            mixed, kept = self.join(mixed, x[partner], kept.masked_fill(unmixed, 1), generator=generator)
            shares = kept[:, None] * shares + (1 - kept)[:, None] * own[partner]
        return mixed, shares

    def __call__(
        self, model: nn.Module, x: Images, y: Labels, *, progress: float, generator: torch.Generator
    ) -> Tensor:
        mixed, shares = self.mix(x, generator=generator)
        logits = model(mixed).float()
        targets = torch.zeros_like(logits).index_add_(1, y, shares)
        return F.cross_entropy(logits, targets)


@dataclass(frozen=True)
class Mixup(Mixing):
    """Mixup: x'_i = lambda x_i + (1 - lambda) x_p(i), and the labels likewise.

    Args: those of `Mixing`.

    Source: Zhang et al. 2018; one lambda and a permutation for each batch as in OPS's repository (METHODS 24).
    Deviations: none. `Mixup(rounds=2, probability=0.5, per="image")` is the dataset wrapper of EM, AR and ISS, but
    that the partner comes from the batch and has its crop and flip; there it is any row of the training set.
    """

    name: ClassVar[str] = "mixup"

    def join(
        self, x: Images, other: Images, kept: Float[Tensor, " n"], *, generator: torch.Generator
    ) -> tuple[Images, Float[Tensor, " n"]]:
        share = kept[:, None, None, None]
        return share * x + (1 - share) * other, kept


@dataclass(frozen=True)
class Cutmix(Mixing):
    """CutMix: a box of the partner is pasted at its own place, and the labels are mixed by area.

        x'_i = x_p(i) inside the box, x_i outside;   weight of y_i: 1 - area of the box / (h w)

    The box has sqrt(1 - lambda) of the picture's height and width, its centre is a uniformly random pixel, and the
    picture's borders cut it off: the weight follows from the area that remains.

    Args: those of `Mixing`.

    Source: Yun et al. 2019, whose box reaches floor(side / 2) pixels up and left of its centre, and as far down and
    right less one (METHODS 24).
    Deviations: none. `Cutmix(rounds=2, probability=0.5, per="image")` is the dataset wrapper of EM, AR and ISS but
    for the partner, as with `Mixup`. There and here a second box takes its share of both labels of the first round,
    whichever of them it covers.
    """

    name: ClassVar[str] = "cutmix"

    def join(
        self, x: Images, other: Images, kept: Float[Tensor, " n"], *, generator: torch.Generator
    ) -> tuple[Images, Float[Tensor, " n"]]:
        rows, columns = (self._inside(side, kept, generator) for side in x.shape[2:])
        box = rows[:, None, :, None] & columns[:, None, None, :]
        return torch.where(box, other, x), 1 - box.float().mean((1, 2, 3))

    def _inside(self, side: int, kept: Float[Tensor, " n"], generator: torch.Generator) -> Tensor:
        """Which places along one axis the boxes cover, (n, side)."""
        centre = torch.randint(side, kept.shape, generator=generator, device=kept.device)
        reach = ((1 - kept).sqrt() * side / 2).floor()
        offset = torch.arange(side, device=kept.device) - centre[:, None]
        return (offset >= -reach[:, None]) & (offset < reach[:, None])


def _beta(alpha: float, count: int, generator: torch.Generator) -> Float[Tensor, " {count}"]:
    """Beta(alpha, alpha) from two uniform numbers: (1 + t / sqrt(1 + t^2)) / 2, t sqrt(2 alpha) of Student's law.

    Bailey 1994: t^2 = (u^(-1 / alpha) - 1) cos^2(2 pi v), with the sign of the cosine, has 2 alpha degrees of freedom.
    """
    u, v = torch.rand(2, count, generator=generator, device=generator.device)
    cosine = torch.cos(2 * torch.pi * v)
    square = torch.expm1(-torch.log1p(-u) / alpha) * cosine.square()
    return (1 + cosine.sign() / (1 + 1 / square).sqrt()) / 2
