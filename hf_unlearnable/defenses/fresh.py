"""Data defenses that a training applies afresh to every batch."""

from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn

from hf_unlearnable.batches import Batches
from hf_unlearnable.defenses.base import BeforeCrop, Defense, Predicts
from hf_unlearnable.defenses.data import DataDefense
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.draws import FreshDraws
from hf_unlearnable.images import Images, Labels


@dataclass(frozen=True)
class EachStep:
    """A data defense with new randomness at every step, and then a loss (which may be another `EachStep`).

    Args:
        data: what is done to the pictures.
        loss: what is minimised on them.
        when: "before crop" or "after crop" (the recipe's crop and flip); default: what `data` is made for.

    Raises:
        TypeError: a data defense that is applied to whole splits alone.
        ValueError: another `when`.
    """

    data: DataDefense
    loss: Defense = field(default_factory=Erm)
    when: Literal["before crop", "after crop"] | None = None

    def __post_init__(self) -> None:
        if type(self.data).alter is DataDefense.alter:
            raise TypeError(f"{self.data.name} is applied to a whole split, once: split = defense.on(split)")
        if self.when not in (None, "before crop", "after crop"):
            raise ValueError(f'when is "before crop" or "after crop", got {self.when!r}')

    @property
    def name(self) -> str:
        own = getattr(self.loss, "name", type(self.loss).__name__)
        return self.data.name if isinstance(self.loss, Erm) else f"{self.data.name}+{own}"

    def fit(self, train: Batches, *, seed: int, progress: bool = False) -> Self:
        """With its data defenses fitted to the published rows."""
        loss = self.loss.fit(train, seed=seed, progress=progress) if isinstance(self.loss, EachStep) else self.loss
        return replace(self, data=self.data.fit(train, seed=seed, progress=progress), loss=loss)

    @property
    def _early(self) -> bool:
        return (self.when or self.data.each_step) != "after crop"

    def before_crop(self, x: Images, y: Labels, *, generator: torch.Generator) -> Images:
        """What comes before the crop: this data defense, if it does, and then that of `loss`."""
        if self._early:
            x = self.data.alter(x, y, FreshDraws(len(x), generator))
        return self.loss.before_crop(x, y, generator=generator) if isinstance(self.loss, BeforeCrop) else x

    def predict(self, model: nn.Module, x: Images, *, generator: torch.Generator) -> Tensor:
        """As `loss` predicts."""
        return self.loss.predict(model, x, generator=generator) if isinstance(self.loss, Predicts) else model(x)

    def __call__(
        self, model: nn.Module, x: Images, y: Labels, *, progress: float, generator: torch.Generator
    ) -> Tensor:
        if not self._early:
            x = self.data.alter(x, y, FreshDraws(len(x), generator))
        return self.loss(model, x, y, progress=progress, generator=generator)
