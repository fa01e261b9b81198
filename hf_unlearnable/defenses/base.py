"""What a defense is: the loss that a victim is trained with."""

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_unlearnable.images import Images, Labels


class Defense(Protocol):
    """A training loss: any callable of this signature, such as a function or a frozen dataclass with `__call__`.

    It returns the mean loss over the rows of `x`, to be minimised over the parameters of `model`, and leaves the
    gradients and modes of `model` as it found them. The batch is cropped and mirrored already.

    Args:
        model: the victim in training mode; takes float32 RGB in [0, 1], returns logits.
        x: this process's pictures of the batch, never none.
        y: their labels.
        progress: share of the training that is done, in [0, 1).
        generator: on x's device, fresh for every step and process: the only source of randomness.
    """

    def __call__(
        self, model: nn.Module, x: Images, y: Labels, *, progress: float, generator: torch.Generator
    ) -> Tensor: ...


def describe(defense: Defense) -> dict[str, Any]:
    """The defense as plain data: its `name` (or that of its class or function) and its dataclass fields."""
    name = getattr(defense, "name", None) or getattr(defense, "__qualname__", type(defense).__qualname__)
    fields = dataclasses.asdict(defense) if dataclasses.is_dataclass(defense) else {}  # type: ignore[arg-type]
    return {"name": name, **fields}
