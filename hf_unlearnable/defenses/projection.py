"""Orthogonal projection: what a linear classifier reads in the pictures is taken out of them."""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hf_unlearnable.batches import Batches
from hf_unlearnable.defenses.learned import LearnedDefense
from hf_unlearnable.draws import RandomNumbers
from hf_unlearnable.images import Images, Labels, to_float
from hf_unlearnable.keys import torch_generator


@dataclass(frozen=True, kw_only=True)
class OrthogonalProjection(LearnedDefense):
    """Pictures lose the directions of a logistic regression on the published pixels.

        W (k x d) minimises mean CE(W x, y),    W^T = Q R,    x' = x - (x Q) Q^T

    A training is given x' as it is: float, and outside [0, 1] in places. Stored by `ds.map` it is rounded and clipped
    like any picture, which puts a little of what was taken out back in. Test pictures are not projected.

    Args:
        fit_epochs: passes of the regression over the rows, in one order and without augmentation.
        fit_batch_size: rows of a step.
        fit_learning_rate: of plain SGD; a tenth after half and again after three quarters of the epochs.

    Raises:
        ValueError: not fitted, or pictures of another size than the fitted ones; in `fit`: no rows, or as many classes
            as a picture has values.

    Source: OP (NeurIPS 2023; METHODS_NEW N22).
    Deviations: rows are taken in one random order, official: as they are stored. The paper trains on x' with strong
    augmentation and CutMix.
    """

    name: ClassVar[str] = "op"
    version: ClassVar[int] = 2
    each_step: ClassVar = "before crop"
    stored_precision: ClassVar = torch.float64

    fit_epochs: int = 20
    fit_batch_size: int = 1024
    fit_learning_rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.fit_epochs, self.fit_batch_size) < 1 or not self.fit_learning_rate > 0:
            raise ValueError(
                f"expected a positive fit_epochs, fit_batch_size and fit_learning_rate, got {self.fit_epochs}, "
                f"{self.fit_batch_size} and {self.fit_learning_rate}"
            )

    def fit(self, train: Batches, *, seed: int, progress: bool = False) -> Self:
        """With the directions of the published rows; `seed` is of the regression's initial weights and its order."""
        values, classes = math.prod(train.pixels.shape[1:]), len(train.classes)
        if not len(train) or classes >= values:
            raise ValueError(
                f"expected rows, and fewer classes than the {values} values of a picture, got {len(train)} rows and "
                f"{classes} classes"
            )
        weight = self._regression(train, seed, progress).double()
        weight = weight / weight.norm(dim=1, keepdim=True)
        directions = torch.linalg.qr(weight.t().cpu()).Q
        return self.having_learnt({"directions": directions.float()}, train)

    def _regression(self, train: Batches, seed: int, progress: bool) -> Float[Tensor, "k d"]:
        classes, values = len(train.classes), math.prod(train.pixels.shape[1:])
        uniform = torch.rand(classes, values, generator=torch_generator(seed, self.name, "weights"))
        weight = ((2 * uniform - 1) / math.sqrt(values)).to(train.device)
        order = torch.randperm(len(train), generator=torch_generator(seed, self.name, "order")).to(train.device)
        for epoch in tqdm(range(self.fit_epochs), desc=f"{self.name}: regression", disable=not progress):
            passed = epoch / self.fit_epochs
            rate = self.fit_learning_rate * (0.01 if passed >= 0.75 else 0.1 if passed >= 0.5 else 1.0)
            for part in order.split(self.fit_batch_size):
                x, labels = to_float(train.pixels[part]).flatten(1), train.labels[part]
                error = (x @ weight.t()).softmax(1)
                error[torch.arange(len(x), device=x.device), labels] -= 1
                weight.addmm_(error.t(), x, alpha=-rate / len(x))
        return weight

    def alter(self, x: Images, y: Labels | None, draws: RandomNumbers) -> Images:
        directions = self.known(x, y)["directions"]
        return x - (x.flatten(1) @ directions @ directions.t()).view(x.shape)
