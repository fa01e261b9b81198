"""Adversarial noise: the published pictures are pushed off what a small robust network reads in them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hf_unlearnable.augment import CropFlip, augment
from hf_unlearnable.batches import Batches
from hf_unlearnable.budget import Budget
from hf_unlearnable.defenses.learned import LearnedDefense
from hf_unlearnable.draws import RandomNumbers
from hf_unlearnable.images import Images, Labels, to_float
from hf_unlearnable.keys import torch_generator
from hf_unlearnable.pgd import Pgd

_MOST_WEIGHTS = 2**28


@dataclass(frozen=True, kw_only=True)
class AdversarialNoise(LearnedDefense):
    """Noise against which a network of two layers, trained to withstand such noise, cannot stand.

        f(x) = W2 relu(W1 x + b1) + b2,    trained on CE(f(x + PGD(x, y; fit_step_size)), y)
        x' = x + PGD(x, y; pgd_step_size),    PGD ascends CE(f(x + delta), y) over |delta|_inf <= radius from delta = 0

    Train on x' with `StrongAugmentation` for the whole of "SDA + AN". The label of a picture is needed.

    Args:
        radius: L-inf, a fraction of the value range, in training and for the noise.
        pgd_steps: of both ascents.
        pgd_step_size: of the noise.
        fit_step_size: of the training.
        fit_epochs, fit_batch_size, fit_learning_rate: of SGD with momentum 0.9 and weight decay 5e-4; a tenth of the
            rate after three quarters and again after nine tenths of the epochs.
        hidden: width of the inner layer; None for as many as a picture has values.

    Raises:
        ValueError: not fitted, no labels, a label or a picture's size that was not fitted, a setting outside its range;
            in `fit`: no rows, or a network of more than 2**28 weights (set `hidden`).
        FloatingPointError: a gradient is not finite.

    Source: "SDA + AN" of udp (AAAI 2024; METHODS_NEW N26).
    Deviations: the noise is made on the published pictures, as a trainer must; there two stored noises are added to the
    clean ones, and truncated. Stored pictures are rounded.
    """

    name: ClassVar[str] = "sda-an"

    radius: float = 8 / 255
    pgd_steps: int = 10
    pgd_step_size: float = 1 / 255
    fit_step_size: float = 2 / 255
    fit_epochs: int = 100
    fit_batch_size: int = 128
    fit_learning_rate: float = 0.01
    hidden: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.fit_epochs, self.fit_batch_size, 1 if self.hidden is None else self.hidden) < 1:
            raise ValueError(
                f"expected a positive fit_epochs, fit_batch_size and hidden, got {self.fit_epochs}, "
                f"{self.fit_batch_size} and {self.hidden}"
            )
        if not self.fit_learning_rate > 0:
            raise ValueError(f"expected a positive fit_learning_rate, got {self.fit_learning_rate}")
        _ = self._pgd(self.pgd_step_size), self._pgd(self.fit_step_size)

    @property
    def needs_labels(self) -> bool:
        return True

    def _pgd(self, step_size: float) -> Pgd:
        return Pgd(budget=Budget("linf", self.radius), steps=self.pgd_steps, step_size=step_size, direction="max")

    def fit(self, train: Batches, *, seed: int, progress: bool = False) -> Self:
        """With the network, trained on the published rows with crop and flip."""
        values, classes = math.prod(train.pixels.shape[1:]), len(train.classes)
        hidden = values if self.hidden is None else self.hidden
        if not len(train) or values * hidden > _MOST_WEIGHTS:
            raise ValueError(
                f"expected rows, and at most {_MOST_WEIGHTS:,} weights, got {len(train)} rows and {values * hidden:,} "
                "weights: set a smaller `hidden`"
            )
        draws = torch_generator(seed, self.name, "weights")
        weights = {
            "inner.weight": _drawn((hidden, values), values, draws),
            "inner.bias": _drawn((hidden,), values, draws),
            "outer.weight": _drawn((classes, hidden), hidden, draws),
            "outer.bias": _drawn((classes,), hidden, draws),
        }
        weights = {name: weight.to(train.device).requires_grad_() for name, weight in weights.items()}
        with torch.enable_grad():
            self._train(weights, train, seed, progress)
        return self.having_learnt(weights, train)

    def _train(self, weights: Mapping[str, Tensor], train: Batches, seed: int, progress: bool) -> None:
        optimizer = torch.optim.SGD(weights.values(), self.fit_learning_rate, momentum=0.9, weight_decay=5e-4)
        ascent, crop = self._pgd(self.fit_step_size), CropFlip(padding=round(min(train.image_size) / 8))
        for epoch in tqdm(range(self.fit_epochs), desc=f"{self.name}: network", disable=not progress):
            passed = epoch / self.fit_epochs
            for group in optimizer.param_groups:
                group["lr"] = self.fit_learning_rate * (0.01 if passed >= 0.9 else 0.1 if passed >= 0.75 else 1.0)
            generator = torch_generator(seed, self.name, "crops", epoch)
            for batch in train.epoch(epoch, key=seed, batch_size=self.fit_batch_size):
                x = to_float(augment(batch.pixels, crop, generator=generator))
                x = x + _noise(ascent, {name: weight.detach() for name, weight in weights.items()}, x, batch.labels)
                optimizer.zero_grad()
                F.cross_entropy(logits(weights, x), batch.labels).backward()
                optimizer.step()

    def alter(self, x: Images, y: Labels | None, draws: RandomNumbers) -> Images:
        known = self.known(x, y)
        assert y is not None
        return x + _noise(self._pgd(self.pgd_step_size), known, x, y)


def logits(weights: Mapping[str, Tensor], x: Images) -> Float[Tensor, "b k"]:
    """The network of two layers."""
    inner = F.relu(F.linear(x.flatten(1), weights["inner.weight"], weights["inner.bias"]))
    return F.linear(inner, weights["outer.weight"], weights["outer.bias"])


def _noise(ascent: Pgd, weights: Mapping[str, Tensor], x: Images, y: Labels) -> Images:
    def loss(z: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(logits(weights, z), y[rows], reduction="none")

    return ascent.run(loss, x)


def _drawn(shape: Sequence[int], inputs: int, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(tuple(shape), generator=generator) - 1) / math.sqrt(inputs)
