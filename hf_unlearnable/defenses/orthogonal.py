"""Orthogonal regularisation of the victim's weights."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hf_unlearnable.images import Images, Labels


@dataclass(frozen=True)
class OrthogonalRegularization:
    """Training that draws the filters of every layer towards an orthonormal system.

        min_f mean CE(f(x), y) + strength * sum over layers of ||W W^T - I||_F^2

    over all convolutions and linear layers, W of shape (out, in * k * k); a grouped convolution is one such matrix too.
    A layer with more outputs than inputs cannot reach 0.

    Args:
        strength: weight of the sum; 0 is plain training.

    Raises:
        ValueError: a negative strength.

    Source: Brock et al. 2017, as used in CUDA, section 5.2 (METHODS 25.4): neither norm nor weight is told there.
    Deviations: the squared Frobenius norm; Brock et al. have the sum of absolute values, as METHODS recalls. It is
    computed in float32 under autocast as well.
    """

    name: ClassVar[str] = "orthogonal"

    strength: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength: expected a number that is not negative, got {self.strength}")

    def __call__(
        self, model: nn.Module, x: Images, y: Labels, *, progress: float, generator: torch.Generator
    ) -> Tensor:
        loss = F.cross_entropy(model(x).float(), y)
        with torch.autocast(x.device.type, enabled=False):
            return loss + self.strength * non_orthogonality(model)


def non_orthogonality(model: nn.Module) -> Float[Tensor, ""]:
    """Sum over convolutions and linear layers of ||W W^T - I||_F^2, W of shape (out, in * k * k); 0 without any."""
    total = torch.zeros(())
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            rows = module.weight.flatten(1).float()
            total = total + (rows @ rows.T - torch.eye(len(rows), device=rows.device)).square().sum()
    return total
