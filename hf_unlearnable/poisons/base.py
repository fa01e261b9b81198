"""Poison: a value that makes pictures unlearnable, and a `Dataset.map` function."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from hf_unlearnable.budget import Budget
from hf_unlearnable.draws import Draws
from hf_unlearnable.images import Images, Labels, Picture, Pixels, decode_many, digest, to_float, to_uint8
from hf_unlearnable.keys import Key, cache_tag, check_key, uniforms
from hf_unlearnable.sizes import at_once
from hf_unlearnable.transform import Transform


@dataclass(frozen=True, kw_only=True)
class Poison(Transform):
    """What the data owner does to pictures so that a network trained on them learns little.

    Args:
        seed: an int (reproducible, and guessable) or a 32-byte secret from `new_key()`.
        poison_rate: share of the rows (of `classes`, where given) that are changed, in [0, 1]. The rows at one rate
            are among those at every higher rate, and the same for every method with the same seed. `apply` changes
            round(rate * rows) of them exactly; `ds.map` and streams give each row its own keyed draw. The other rows
            are stored in the same lossless container.
        classes: labels whose rows are changed; None for all.
        num_classes: how many classes there are, where the data do not say; a label at or above it is an error.
    """

    seed: Key = field(repr=False)
    poison_rate: float = 1.0
    classes: tuple[int, ...] | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "seed", check_key(self.seed))
        if not 0 <= self.poison_rate <= 1:
            raise ValueError(f"poison_rate is a fraction from 0 to 1, got {self.poison_rate}")
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"num_classes is 1 or more, got {self.num_classes}")
        if self.classes is not None:
            wanted = tuple(sorted({int(label) for label in self.classes}))
            top = self.num_classes or math.inf
            if not wanted or wanted[0] < 0 or wanted[-1] >= top:
                raise ValueError(f"classes are labels from 0 to {top - 1}, at least one, got {self.classes}")
            object.__setattr__(self, "classes", wanted)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "perturb" in vars(cls) and "perturb_pixels" not in vars(cls):
            cls.perturb_pixels = Poison.perturb_pixels  # not that of another `perturb`

    # What a method defines.

    def perturb(self, x: Images, y: Labels | None, draws: Draws) -> Images:
        """The batch generator: pictures in [0, 1] to poisoned ones in [0, 1], on x's device (clipped by the base)."""
        raise TypeError(f"{type(self).__name__} does not say how it perturbs")

    def perturb_pixels(self, pixels: Pixels, y: Labels | None, draws: Draws, where: Sequence[str]) -> Pixels:
        """`perturb`, and the one rounding: what is stored. A method may define it with the same result in less time.

        Args:
            where: what each row is called in errors.
        """
        return to_uint8(self.perturb(to_float(pixels), y, draws), where)

    def budget_for(self, height: int, width: int) -> Budget | None:
        """The bound that published pictures of this size keep, or None for methods without one."""
        return None

    @property
    def uses_labels(self) -> bool:
        """Whether the perturbation depends on the label."""
        return True

    # Final.

    @property
    def needs_labels(self) -> bool:
        return self.uses_labels or self.classes is not None

    def change(self, pixels: Pixels, labels: Labels | None, where: Sequence[str]) -> Pixels:
        if labels is not None and self.num_classes is not None and (labels >= self.num_classes).any():
            row = int((labels >= self.num_classes).nonzero()[0])
            raise ValueError(
                f"{where[row]}: expected one of {self.num_classes} classes (num_classes), got label {int(labels[row])}"
            )
        height, width = pixels.shape[2:]
        try:
            poisoned = self.perturb_pixels(pixels, labels, Draws(self.seed, self.name, pixels), where)
        except (ValueError, FloatingPointError) as error:
            kind = type(error) if type(error) is FloatingPointError else ValueError
            raise kind(f"{where[0]} and the others of {height} x {width} pixels with it: {error}") from error
        budget = self.budget_for(height, width)
        if budget is not None:
            budget.check(pixels, poisoned, where)
        return poisoned

    def chosen(self, pictures: Sequence[Picture], labels: Sequence[int] | None) -> np.ndarray:
        mask = np.ones(len(pictures), dtype=bool)
        if self.classes is not None:
            mask &= np.isin(np.asarray(labels), self.classes)
        if self.poison_rate < 1:
            mask &= self._ranks(pictures) < self.poison_rate
        return mask

    def chosen_exactly(self, dataset: Dataset, image_column: str, label_column: str | None) -> np.ndarray | None:
        if self.poison_rate == 1:
            return None
        ranks = np.empty(len(dataset))
        step = at_once(dataset, image_column, 500)
        for start in tqdm(range(0, len(dataset), step), desc=f"{self.name}: choosing rows", unit=f"x{step} rows"):
            values = dataset[start : start + step][image_column]
            rows = slice(start, start + len(values))
            ranks[rows] = self._ranks(decode_many(values, where=[f"row {start + i}" for i in range(len(values))]))
        eligible = np.arange(len(dataset))
        if self.classes is not None and label_column is not None:
            eligible = np.flatnonzero(np.isin(np.asarray(dataset[label_column]), self.classes))
        count = math.floor(self.poison_rate * len(eligible) + 0.5)
        mask = np.zeros(len(dataset), dtype=bool)
        mask[eligible[np.argsort(ranks[eligible], kind="stable")[:count]]] = True
        return mask

    @property
    def known_classes(self) -> Sequence[str] | None:
        return None if self.num_classes is None else [str(label) for label in range(self.num_classes)]

    def check_classes(self, names: Sequence[str] | None, where: str) -> None:
        if names is None:
            return
        if self.num_classes is not None and len(names) > self.num_classes:
            raise ValueError(f"{where}: expected at most {self.num_classes} classes (num_classes), got {len(names)}")
        if self.classes is not None and self.classes[-1] >= len(names):
            raise ValueError(f"{where} has {len(names)} classes (0 to {len(names) - 1}), got classes={self.classes}")

    def cache_state(self) -> dict[str, Any]:
        return {**super().cache_state(), "key": cache_tag(self.seed)}

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters for a record or card: everything but the key and how pictures are stored."""
        hidden = {"image_column", "label_column", "image_format", "compress_level", "device"}
        return {k: v for k, v in super().cache_state().items() if k not in hidden and k != "transform"}

    def _ranks(self, pictures: Sequence[Picture]) -> np.ndarray:
        return uniforms(self.seed, "poison_rate", [digest(picture.pixels) for picture in pictures])
