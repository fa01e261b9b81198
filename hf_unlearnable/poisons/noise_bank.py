"""Noise that was optimised for known pictures, kept by what the pictures are."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from hf_unlearnable.images import Pixels, digest
from hf_unlearnable.surrogate import Surrogate


@dataclass(frozen=True, eq=False)
class NoiseBank:
    """A noise for every known picture, found by the digest of its decoded pixels: never another picture's.

    Of pictures that are equal the first one's noise counts for all.

    Args:
        digests: one row of bytes for every picture.
        noise: whole grey levels, from -127 to 127.
    """

    digests: UInt8[Tensor, "n d"]
    noise: Int8[Tensor, "n 3 h w"]

    @classmethod
    def of(cls, pixels: Pixels, delta: Float[Tensor, "n 3 h w"]) -> "NoiseBank":
        """The noise of pictures, delta in [0, 1] units rounded to whole levels (half to even, as the papers' int8)."""
        found = [digest(row) for row in pixels.cpu()]
        digests = torch.from_numpy(np.frombuffer(b"".join(found), dtype=np.uint8).reshape(len(found), -1).copy())
        return cls(digests, (delta.detach().cpu().float() * 255).round().clamp(-127, 127).to(torch.int8))

    @classmethod
    def in_surrogate(cls, surrogate: Surrogate) -> "NoiseBank":
        """The bank among a surrogate's tensors; made once and kept with it."""
        kept: NoiseBank | None = surrogate.__dict__.get("_bank")
        if kept is None:
            kept = cls(surrogate.tensors["bank.digests"], surrogate.tensors["bank.noise"])
            surrogate.__dict__["_bank"] = kept
        return kept

    def tensors(self) -> dict[str, Tensor]:
        """For a surrogate's tensors."""
        return {"bank.digests": self.digests, "bank.noise": self.noise}

    def find(self, digests: Sequence[bytes]) -> list[int | None]:
        """The place of every picture in `noise`, or None for unknown ones."""
        return [self._places.get(one) for one in digests]

    @cached_property
    def _places(self) -> dict[bytes, int]:
        rows = self.digests.numpy()
        return {rows[i].tobytes(): i for i in range(len(rows) - 1, -1, -1)}
