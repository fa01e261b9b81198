"""What a defense is: the loss that a victim is trained with."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hf_unlearnable.defenses.data import DataDefense
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


@runtime_checkable
class BeforeCrop(Protocol):
    """A defense that also changes the pictures before the recipe's crop and flip."""

    def before_crop(self, x: Images, y: Labels, *, generator: torch.Generator) -> Images:
        """float32 pictures in [0, 1] to pictures of the same size."""
        ...


@runtime_checkable
class Predicts(Protocol):
    """A defense with its own way of predicting."""

    def predict(self, model: nn.Module, x: Images, *, generator: torch.Generator) -> Float[Tensor, "b k"]:
        """Scores of the classes, for a model in evaluation mode and without gradients; the highest is the answer."""
        ...


def describe(defense: object) -> dict[str, Any]:
    """The defense as plain data: its `name` (or that of its class or function) and its dataclass fields."""
    name = getattr(defense, "name", None) or getattr(defense, "__qualname__", type(defense).__qualname__)
    if isinstance(defense, DataDefense):
        return {"name": name, **defense.settings()}
    fields = dataclasses.fields(defense) if dataclasses.is_dataclass(defense) else ()
    values = {field.name: getattr(defense, field.name) for field in fields}
    return {"name": name, **{key: describe(v) if hasattr(v, "name") else v for key, v in values.items()}}
