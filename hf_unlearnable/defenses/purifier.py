"""Any purifier as a data defense."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hf_unlearnable.defenses.data import DataDefense
from hf_unlearnable.draws import RandomNumbers
from hf_unlearnable.images import Images, Labels

_SLACK = 1e-4


@dataclass(frozen=True, kw_only=True)
class Purifier(DataDefense):
    """Pictures go through a function of the trainer's, such as a diffusion model that adds noise and takes it away.

        x' = purify(x)

    The function is given float32 pictures in [0, 1], (b, 3, h, w), on the device of the pictures, and returns such
    ones. Many networks work in [-1, 1]: `purify` is where 2 x - 1 and (x + 1) / 2 belong. A picture's result must not
    depend on its batch, or the ways of mapping differ: a random purifier takes its noise from the picture.

    Args:
        purify: a function of a module, or a value of a module's class that can be called; it is pickled for worker
            processes by its name or with its value.
        label: what it is, with all its settings ("ddpm-cifar10-32 t=100"): it stands for the function in results and
            in caches, so another function needs another label.

    Raises:
        ValueError: no label, or a function without a name of its own (a lambda, an inner function); when pictures come,
            a result of another shape, with NaN or outside [0, 1].
        TypeError: `purify` cannot be called; when pictures come, it does not return a float tensor.

    Source: METHODS 26 and METHODS_NEW N28 (AVATAR and others), as an adapter. Deviations: no purifier is included.
    """

    name: ClassVar[str] = "purifier"

    purify: Callable[[Tensor], Tensor] = field(repr=False, compare=False)
    label: str
    function: str = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.purify):
            raise TypeError(f"purify: expected a function of pictures, got {type(self.purify).__name__}")
        own = self.purify if hasattr(self.purify, "__qualname__") else type(self.purify)
        function = f"{own.__module__}.{own.__qualname__}"
        if "<" in function:
            raise ValueError(f"purify: expected a function or class of a module, got {function}: give it a name there")
        if not self.label.strip():
            raise ValueError("label: expected what the purifier is and its settings, got none")
        object.__setattr__(self, "function", function)

    def alter(self, x: Images, y: Labels | None, draws: RandomNumbers) -> Images:
        with torch.no_grad():
            pure = self.purify(x.clone())
        if not isinstance(pure, Tensor) or not pure.is_floating_point():
            kind = pure.dtype if isinstance(pure, Tensor) else type(pure).__name__
            raise TypeError(f"purifier {self.label!r}: expected float pictures, got {kind}")
        if pure.shape != x.shape:
            raise ValueError(
                f"purifier {self.label!r}: expected pictures of shape {tuple(x.shape)}, got {tuple(pure.shape)}"
            )
        if not len(x):
            return pure.to(x)
        low, high = torch.stack(pure.aminmax()).tolist()
        if not (low >= -_SLACK and high <= 1 + _SLACK):
            raise ValueError(
                f"purifier {self.label!r}: expected values in [0, 1], got {low:g} to {high:g}: "
                "bring them from [-1, 1] or clamp them in the function"
            )
        return pure.to(x).clamp(0, 1)
