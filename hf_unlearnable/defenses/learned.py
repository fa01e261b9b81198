"""What the data defenses that learn from the published rows have in common: their tensors, and what these fit."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from hf_unlearnable.batches import Batches
from hf_unlearnable.checkpoint import tensors_digest
from hf_unlearnable.defenses.data import DataDefense
from hf_unlearnable.images import Images, Labels

_FITTED = "fitted"


@dataclass(frozen=True, kw_only=True)
class LearnedDefense(DataDefense):
    """A data defense that is fitted before it is used: `defense.fit(Batches.load(published), seed=0)`.

    Args:
        tensors: what was learnt, on the CPU; None for a defense that is to be fitted. `learned` is their digest, so
            that two fitted defenses are equal, and share a cache, if they learnt the same.
    """

    tensors: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    learned: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tensors is not None:
            object.__setattr__(self, "learned", f"sha256:{tensors_digest(self.tensors)}")

    def having_learnt(self, tensors: Mapping[str, Tensor], train: Batches) -> Self:
        """A copy with these tensors, for pictures and labels such as those of `train`."""
        known = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        return replace(self, tensors={**known, _FITTED: torch.tensor([*train.image_size, len(train.classes)])})

    def known(self, x: Images, y: Labels | None) -> dict[str, Tensor]:
        """The tensors, on the device and of the type of `x`.

        Raises:
            ValueError: the defense was not fitted, or for pictures of another size; where labels are needed, there are
                none, or one that was not among the fitted classes.
        """
        if self.tensors is None:
            own = type(self).__name__
            raise ValueError(f"this {own} has learnt nothing yet: call .fit(Batches.load(published), seed=...) first")
        height, width, classes = self.tensors[_FITTED].tolist()
        if tuple(x.shape[2:]) != (height, width):
            raise ValueError(
                f"expected pictures of {height} x {width} pixels (height x width), as fitted, got {x.shape[2]} x "
                f"{x.shape[3]}: resize the dataset before both"
            )
        if self.needs_labels and y is None:
            raise ValueError("expected labels, got none")
        if self.needs_labels and y is not None and len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
            raise ValueError(f"expected labels in 0 to {classes - 1}, as fitted, got {int(y.min())} to {int(y.max())}")
        return {name: tensor.to(x) for name, tensor in self.tensors.items() if name != _FITTED}
