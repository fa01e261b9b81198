"""Data defenses: what a trainer does to the pictures themselves."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch

from hf_unlearnable.batches import Batches
from hf_unlearnable.draws import Draws, RandomNumbers
from hf_unlearnable.images import Images, Labels, Pixels, to_float, to_uint8
from hf_unlearnable.transform import Transform

TRANSFORM_FIELDS = ("image_column", "label_column", "image_format", "compress_level", "device")


@dataclass(frozen=True, kw_only=True)
class DataDefense(Transform):
    """A countermeasure on the training pictures: a map function like a poison, and a step of a training.

    `ds.map(defense)` stores what it makes, losslessly. A training applies it once to the whole split (`on`) or, where
    `each_step` says so, afresh to every batch (`fresh.EachStep`). Test pictures are left as they are.

    Args:
        seed: of what is drawn, if anything is, when the pictures are stored; a picture's numbers are its own.
    """

    seed: int = 0

    each_step: ClassVar[Literal["never", "before crop", "after crop"]] = "never"
    stored_precision: ClassVar[torch.dtype] = torch.float32
    """Of the arithmetic whose result is rounded and stored: float64 where its last bits depend on the batch."""

    def alter(self, x: Images, y: Labels | None, draws: RandomNumbers) -> Images:
        """The changed pictures, of the same size, on x's device. Nothing is rounded; values may leave [0, 1]."""
        raise TypeError(f"{type(self).__name__} does not say how it alters pictures")

    def fit(self, train: Batches, *, seed: int, progress: bool = False) -> Self:
        """The defense with what it learns from the published rows, for those that learn; `seed` is the trainer's."""
        return self

    def change(self, pixels: Pixels, labels: Labels | None, where: Sequence[str]) -> Pixels:
        x = to_float(pixels).to(self.stored_precision)
        return to_uint8(self.alter(x, labels, Draws(self.seed, self.name, pixels)))

    def on(self, split: Batches, *, chunk: int = 500) -> Batches:
        """The split with its pictures changed, as `ds.map` would store them."""
        parts = []
        with torch.no_grad():
            for start in range(0, len(split), chunk):
                part = slice(start, start + chunk)
                where = [f"row {row}" for row in range(len(split))[part]]
                parts.append(self.change(split.pixels[part], split.labels[part], where))
        return replace(split, pixels=torch.cat(parts))

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters and the version: everything but how pictures are stored."""
        state = super().cache_state()
        return {k: v for k, v in state.items() if k not in (*TRANSFORM_FIELDS, "transform")}
