"""PIL, perturbation-induced linearisation: the shortcut of a linear map, made by its gradient in closed form."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hf_unlearnable.budget import Budget
from hf_unlearnable.draws import Draws
from hf_unlearnable.fitting import Fit, Setup
from hf_unlearnable.images import Images, Labels
from hf_unlearnable.keys import Key, torch_generator
from hf_unlearnable.networks import Network
from hf_unlearnable.poisons.with_surrogate import SurrogatePoison
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.surrogate import Surrogate
from hf_unlearnable.training import as_input

CHUNK = 128
"""Pictures at a time: their noise stays in a core's cache for all steps."""


@dataclass(frozen=True, kw_only=True)
class PilPoison(SurrogatePoison):
    """PIL: noise that a linear map reads the class from, taken away from a picture that it then reads nothing from.

        delta = argmin_{|delta| <= epsilon} w CE(A delta, y) + (1 - w) KL(u || softmax(A (x - delta)))
        x'    = clamp(x - delta)

    w is label_weight, u = 1/K for each of K classes. A, from pixels to K logits, is the product of two linear maps
    without biases, trained together on the clean pictures: for some 3,000 steps, which the recipe's epochs are on
    50,000 rows; on fewer rows take more epochs, or the noise is weak.

    The signed descent is a loop of its own, not `Pgd`: its gradient is two small matrix products, and through autograd
    it takes six times as long.

    Args:
        epsilon: L-inf budget of the noise, a fraction of the value range.
        pgd_steps, pgd_step_size: signed descent on the noise, from a uniform random start.
        label_weight: w, in [0, 1].

    Raises:
        ValueError: a budget or weight outside [0, 1], a step size that is not positive, fewer than no steps.

    Source: "Perturbation-Induced Linearization", its repository (METHODS_NEW N1); the class's recipe is the one there.
    Deviations: pictures are rounded to the nearest level, by which none changes by more than epsilon (official: floats
    that its loader truncates, up to 9/255). The linear map is trained on shuffled rows (official: in the order of the
    file), and its learning rate falls at every step (official: once an epoch).
    """

    name: ClassVar[str] = "pil"
    recipe: ClassVar[Recipe] = Recipe(
        name="pil", epochs=30, batch_size=512, learning_rate=0.003, weight_decay=0.0, augmentation="none"
    )
    backbone: ClassVar[str] = "linear"

    epsilon: float = 8 / 255
    pgd_steps: int = 30
    pgd_step_size: float = 0.8 / 255
    label_weight: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        Budget("linf", self.epsilon)
        if self.pgd_steps < 0:
            raise ValueError(f"pgd_steps is 0 or more, got {self.pgd_steps}")
        if not 0 < self.pgd_step_size < math.inf:
            raise ValueError(f"pgd_step_size is a positive number, got {self.pgd_step_size}")
        if not 0 <= self.label_weight <= 1:
            raise ValueError(f"label_weight is a fraction from 0 to 1, got {self.label_weight}")

    def budget_for(self, height: int, width: int) -> Budget:
        return Budget("linf", self.epsilon)

    def fitting(self, setup: Setup) -> Fit:
        if setup.backbone != self.backbone:
            raise ValueError(f"pil trains a linear map: expected backbone {self.backbone!r}, got {setup.backbone!r}")
        return PilFit(setup)

    def craft(self, x: Images, y: Labels | None, draws: Draws, surrogate: Surrogate) -> Images:
        assert y is not None
        matrix = surrogate.tensors["map"].to(x)
        if not bool(matrix.isfinite().all()):
            raise FloatingPointError("expected a linear map of finite numbers, got NaN or infinity: train it again")
        budget = Budget("linf", self.epsilon).whole()
        start = budget.inside(draws.uniform(*x.shape[1:], purpose="start"), torch.zeros(len(x))).to(x)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for first in range(0, len(x), CHUNK):
            rows = slice(first, first + CHUNK)
            clean, delta = x[rows].flatten(1) @ matrix.T, start[rows]
            for _ in range(self.pgd_steps):
                slope = noise_gradient(delta.flatten(1), clean, y[rows], matrix, self.label_weight)
                delta = budget.project(delta.add_(slope.sign_().view_as(delta), alpha=-self.pgd_step_size))
            torch.sub(x[rows], delta, out=out[rows])
        return out


def noise_gradient(
    delta: Float[Tensor, "b d"],
    clean: Float[Tensor, "b k"],
    y: Labels,
    matrix: Float[Tensor, "k d"],
    weight: float,
) -> Float[Tensor, "b d"]:
    """The gradient of every row's w CE(A delta, y) + (1 - w) KL(u || softmax(A x - A delta)) in delta, `clean` = A x.

    A^T [w (softmax(A delta) - onehot(y)) - (1 - w) (softmax(A x - A delta) - 1/K)].
    """
    own = delta @ matrix.T
    wanted = own.softmax(1) - F.one_hot(y, len(matrix))
    left = (clean - own).softmax(1) - 1 / len(matrix)
    return (weight * wanted - (1 - weight) * left) @ matrix


class TwoLinear(nn.Module):
    """W2 W1 x for pictures x: K logits of K x d and K x K weights, which follow from the seed."""

    def __init__(self, inputs: int, classes: int, seed: Key) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Parameter(
                (2 * torch.rand(classes, fan_in, generator=torch_generator(seed, "weights", name)) - 1) / fan_in**0.5
            )
            for name, fan_in in (("first", inputs), ("second", classes))
        )

    def forward(self, x: Images) -> Float[Tensor, "b k"]:
        return F.linear(F.linear(x.flatten(1), self.first), self.second)


class PilFit(Fit):
    """Cross-entropy of the linear map on clean pictures."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        train, recipe = setup.train, setup.recipe
        network = TwoLinear(train.pixels[0].numel(), len(train.classes), setup.seed).to(setup.device)
        self.modules, self.optimizers = {"network": network}, {"network": setup.sgd(network)}
        self.total = recipe.total_steps(train.steps(recipe.batch_size, drop_last=recipe.drop_last))

    def step(self, step: int) -> dict[str, Tensor]:
        batch, network = self.batch(step), self.modules["network"]
        x = self.view(as_input(batch.pixels), batch, "view", step)
        return {"loss": self.descend(step, batch, lambda: F.cross_entropy(network(x).float(), batch.labels))}

    def networks(self) -> dict[str, Network]:
        return {}

    def kept(self) -> dict[str, Tensor]:
        network = self.modules["network"]
        assert isinstance(network, TwoLinear)
        return {"map": network.second.detach() @ network.first.detach()}
