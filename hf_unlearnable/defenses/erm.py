"""No defense: empirical risk minimisation."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_unlearnable.images import Images, Labels


@dataclass(frozen=True)
class Erm:
    """Plain training: mean over the batch of CE(f(x), y).

    Source: every paper's undefended victim. Deviations: none.
    """

    name: ClassVar[str] = "erm"

    def __call__(
        self, model: nn.Module, x: Images, y: Labels, *, progress: float, generator: torch.Generator
    ) -> Tensor:
        return F.cross_entropy(model(x), y)
