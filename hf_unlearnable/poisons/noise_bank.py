"""Noise that was optimised for known pictures, kept by what the pictures are."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

from hf_unlearnable.images import Pixels, digest
from hf_unlearnable.surrogate import Surrogate

_ROWS = 1024


@dataclass(frozen=True, eq=False)
class NoiseBank:
    """A noise for every known picture, found by the digest of its decoded pixels: never another picture's.

    Where the noise was made for a label, that is part of what it is found by: under another one a picture is unknown.
    Of pictures that are equal (and equally labelled) the first one's noise counts for all.

    Args:
        digests: one row of bytes for every picture.
        noise: whole grey levels, from -127 to 127.
        labels: what every picture's noise was made for; None for noise that does not depend on labels.
    """

    digests: UInt8[Tensor, "n d"]
    noise: Int8[Tensor, "n 3 h w"]
    labels: Int[Tensor, " n"] | None = None

    @classmethod
    def of(
        cls, pixels: Pixels, delta: Float[Tensor, "n 3 h w"], labels: Int[Tensor, " n"] | None = None
    ) -> "NoiseBank":
        """The noise of pictures, delta in [0, 1] units rounded to whole levels (half to even, as the papers' int8).

        Raises:
            ValueError: NaN, or a change of more than 127 levels; names the first row.
        """
        found = [digest(row) for row in pixels.cpu()]
        digests = torch.from_numpy(np.frombuffer(b"".join(found), dtype=np.uint8).reshape(len(found), -1).copy())
        noise = torch.empty(delta.shape, dtype=torch.int8)
        for start in range(0, len(delta), _ROWS):
            levels = (delta[start : start + _ROWS].detach().cpu().float() * 255).round()
            bad = (~(levels.abs() <= 127)).flatten(1).any(1).nonzero().flatten().tolist()
            if bad:
                raise ValueError(
                    f"row {start + bad[0]}: expected noise of at most 127/255, got {levels[bad[0]].abs().max():g}/255"
                )
            noise[start : start + _ROWS] = levels.to(torch.int8)
        return cls(digests, noise, None if labels is None else labels.detach().cpu().clone())

    @classmethod
    def in_surrogate(cls, surrogate: Surrogate) -> "NoiseBank":
        """The bank among a surrogate's tensors; made once and kept with it.

        Raises:
            ValueError: the surrogate holds none.
        """
        kept: NoiseBank | None = surrogate.__dict__.get("_bank")
        if kept is None:
            own = surrogate.tensors
            if "bank.noise" not in own:
                raise ValueError(f"{surrogate} holds no noise of known pictures")
            kept = cls(own["bank.digests"], own["bank.noise"], own.get("bank.labels"))
            surrogate.__dict__["_bank"] = kept
        return kept

    def tensors(self) -> dict[str, Tensor]:
        """For a surrogate's tensors."""
        found = {"bank.digests": self.digests, "bank.noise": self.noise}
        return found if self.labels is None else {**found, "bank.labels": self.labels}

    def find(self, digests: Sequence[bytes], labels: Sequence[int] | None = None) -> list[int | None]:
        """The place of every picture in `noise`, or None for unknown ones.

        Raises:
            ValueError: labels for a bank without them, or none for one with them.
        """
        if (labels is None) != (self.labels is None):
            raise ValueError(f"expected {'no ' if self.labels is None else ''}labels to find noise by")
        known = [-1] * len(digests) if labels is None else labels
        return [self._places.get(one) for one in zip(digests, known, strict=True)]

    @cached_property
    def _places(self) -> dict[tuple[bytes, int], int]:
        rows = self.digests.numpy()
        labels = [-1] * len(rows) if self.labels is None else self.labels.tolist()
        return {(rows[i].tobytes(), labels[i]): i for i in range(len(rows) - 1, -1, -1)}
