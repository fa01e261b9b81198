"""Randomised smoothing: training under Gaussian noise, and a vote over noisy copies."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hf_unlearnable.images import Images, Labels

_PIXELS_A_PASS = 2**18  # 256 pictures of 32 x 32


@dataclass(frozen=True)
class Smoothing:
    """Randomised smoothing: training on x + n, and prediction by the majority over noisy copies.

        min_f mean CE(f(x + n), y),   prediction argmax_c #{v <= votes: argmax f(x + n_v) = c},   n ~ N(0, sigma^2)

    Args:
        sigma: standard deviation of every value, in pictures of [0, 1], which are not clamped afterwards.
        votes: noisy copies of a test picture: an evaluation costs as many.

    Raises:
        ValueError: a negative sigma, fewer than one vote.

    Source: Cohen et al. 2019; CUDA, section 5.2 (METHODS 25.3), which tells sigma but not the number of votes.
    Deviations: the prediction never abstains (a tie goes to the lower label), and no radius is certified.
    """

    name: ClassVar[str] = "smoothing"

    sigma: float = 0.5
    votes: int = 100

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < float("inf"):
            raise ValueError(f"sigma: expected a number that is not negative, got {self.sigma}")
        if self.votes < 1:
            raise ValueError(f"votes: expected at least 1, got {self.votes}")

    def __call__(
        self, model: nn.Module, x: Images, y: Labels, *, progress: float, generator: torch.Generator
    ) -> Tensor:
        return F.cross_entropy(model(self._noisy(x, 1, generator)).float(), y)

    def predict(self, model: nn.Module, x: Images, *, generator: torch.Generator) -> Float[Tensor, "b k"]:
        """How many of the noisy copies of each picture were taken for each class.

        One pass takes copies up to `_PIXELS_A_PASS` pixels, or one copy of all that is given where that is more.
        """
        most = max(1, _PIXELS_A_PASS // max(1, len(x) * x.shape[2] * x.shape[3]))
        counts = []
        for done in range(0, self.votes, most):
            copies = min(most, self.votes - done)
            logits = model(self._noisy(x, copies, generator))
            chosen = logits.argmax(1).view(copies, len(x), 1) == torch.arange(logits.shape[1], device=x.device)
            counts.append(chosen.sum(0))
        return torch.stack(counts).sum(0).float()

    def _noisy(self, x: Images, copies: int, generator: torch.Generator) -> Float[Tensor, "n 3 h w"]:
        """All rows of the first copy, then of the next."""
        noise = torch.randn(copies, *x.shape, generator=generator, device=x.device)
        return (x + self.sigma * noise).flatten(0, 1)
