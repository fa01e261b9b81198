"""The randomness of a batch of pictures: a picture's own, wherever it stands, or fresh at every step of a training."""

from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hf_unlearnable.images import Pixels, digest
from hf_unlearnable.keys import Key, numpy_generator


class RandomNumbers(Protocol):
    """Numbers for every picture of a batch; the first axis counts the pictures. Other purposes, other numbers."""

    def uniform(self, *shape: int, purpose: str = "uniform") -> Float[Tensor, "b ..."]:
        """Uniform numbers in [0, 1), `shape` for every picture."""
        ...

    def normal(self, *shape: int, purpose: str = "normal") -> Float[Tensor, "b ..."]:
        """Standard normal numbers, `shape` for every picture."""
        ...


class Draws:
    """Noise drawn from (key, method, picture).

    What a row is given does not depend on the batch it stands in, on its place or on the device.
    """

    def __init__(self, key: Key, method: str, pixels: Pixels) -> None:
        self._key, self._method, self._pixels = key, method, pixels

    @cached_property
    def digests(self) -> list[bytes]:
        """What identifies each picture: a hash of its decoded pixels."""
        return [digest(row) for row in self._pixels.cpu()]

    def normal(self, *shape: int, purpose: str = "normal") -> Float[Tensor, "b ..."]:
        """Standard normal float64 numbers, `shape` for every picture, on the CPU."""
        rows = [self._row(d, purpose).standard_normal(shape) for d in self.digests]
        return torch.from_numpy(np.stack(rows))

    def uniform(self, *shape: int, purpose: str = "uniform") -> Float[Tensor, "b ..."]:
        """Uniform float64 numbers in [0, 1), `shape` for every picture, on the CPU."""
        return torch.from_numpy(np.stack([self._row(d, purpose).random(shape) for d in self.digests]))

    def integers(self, low: int, high: int, *shape: int, purpose: str = "integers") -> Tensor:
        """Integers from `low` to `high - 1`, `shape` for every picture, int64 on the CPU."""
        return torch.from_numpy(np.stack([self._row(d, purpose).integers(low, high, shape) for d in self.digests]))

    def _row(self, picture: bytes, purpose: str) -> np.random.Generator:
        return numpy_generator(self._key, self._method, "picture", purpose, picture)


class FreshDraws:
    """float32 numbers for `count` pictures from a generator, on its device: other ones at every call."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self._count, self._generator = count, generator

    def normal(self, *shape: int, purpose: str = "normal") -> Float[Tensor, "b ..."]:
        """Standard normal numbers, `shape` for every picture."""
        return torch.randn((self._count, *shape), generator=self._generator, device=self._generator.device)

    def uniform(self, *shape: int, purpose: str = "uniform") -> Float[Tensor, "b ..."]:
        """Uniform numbers in [0, 1), `shape` for every picture."""
        return torch.rand((self._count, *shape), generator=self._generator, device=self._generator.device)
