"""Robust error-minimising noise and its relatives, REM, SEM and MMM: one loop with another inner adversary."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hf_unlearnable.augment import CropFlip, ResizedCropFlip
from hf_unlearnable.budget import Budget
from hf_unlearnable.draws import Draws
from hf_unlearnable.fitting import Fit, Setup
from hf_unlearnable.images import Images, Labels, to_uint8
from hf_unlearnable.pgd import Pgd
from hf_unlearnable.poisons.classifier_fit import cross_entropy
from hf_unlearnable.poisons.with_surrogate import SurrogatePoison, settled
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.surrogate import Surrogate
from hf_unlearnable.training import as_input

Penalty: TypeAlias = Literal["code", "paper"]
CHUNK = 640
"""Pictures, copies counted, in one pass through the network."""


@dataclass(frozen=True, kw_only=True)
class RobustEmPoison(SurrogatePoison):
    """REM: noise that an adversarially trained network has nothing left to learn from.

        delta = argmin_{|delta| <= epsilon} E_{t ~ T} max_{|delta_a| <= rho} CE(f(t(x + delta) + delta_a), y)

    rho is adversarial_epsilon and t crop and flip. f is trained on t(x + delta) + delta_a, with delta as it is for the
    f of the step; the published delta is that of the last f, from a random start of the picture's own.

    Args:
        epsilon: L-inf budget of the noise, a fraction of the value range.
        pgd_steps, pgd_step_size: signed descent on the noise.
        adversarial_epsilon: L-inf radius of the adversary, in the frame of t(x + delta); 0 for none.
        adversarial_steps, adversarial_step_size: its signed ascent.
        eot: copies of a picture in the expectation over t.
        views: t: "crop_flip" with a padding of 1/8 of the shorter side, or "resized_crop_flip" (at 224 px).

    Raises:
        ValueError: a budget outside [0, 1], a step size that is not positive, numbers below 1.

    Source: "Robust Unlearnable Examples", `generate_robust_em.py` of its repository (METHODS 6); the class's recipe is
    that of CIFAR-10 there (ImageNet-100: 7 steps of 2/255, adversary 7 of 1/255, eot 4, 3,000 steps).
    Deviations: x + delta is kept in the box after every step. All rows get the noise of the last network: the official
    code drops the last batch of its final pass. For large pictures t is RandomResizedCrop there, which is
    views="resized_crop_flip" here; noise and pictures have one size (official: 256 px, of which t cuts 224).
    """

    name: ClassVar[str] = "robust-em"
    recipe: ClassVar[Recipe] = Recipe(name="rem", steps=5000, schedule="step", milestones=(0.4, 0.8), drop_last=True)
    inner: ClassVar[Literal["pgd", "uniform", "none"]] = "pgd"
    """What the noise is robust against while it is made."""

    epsilon: float = 8 / 255
    pgd_steps: int = 10
    pgd_step_size: float = 1.6 / 255
    adversarial_epsilon: float = settled(4 / 255)
    adversarial_steps: int = settled(10)
    adversarial_step_size: float = settled(0.8 / 255)
    eot: int = 5
    views: Literal["crop_flip", "resized_crop_flip"] = settled("crop_flip")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views not in ("crop_flip", "resized_crop_flip"):
            raise ValueError(f'views is "crop_flip" or "resized_crop_flip", got {self.views!r}')
        self.noise_pgd((32, 32))

    @property
    def adversary(self) -> Pgd | None:
        """What the surrogate is trained against."""
        if self.adversarial_epsilon == 0:
            return None
        return Pgd(
            budget=Budget("linf", self.adversarial_epsilon),
            steps=self.adversarial_steps,
            step_size=self.adversarial_step_size,
            direction="max",
            init="uniform",
        )

    def noise_pgd(self, image_size: tuple[int, int]) -> Pgd:
        """The descent that makes the noise."""
        adversary = self.adversary
        inner = {"pgd": adversary, "uniform": adversary and replace(adversary, steps=0), "none": None}[self.inner]
        small = CropFlip(padding=round(min(image_size) / 8))
        transform = ResizedCropFlip() if self.views == "resized_crop_flip" else small
        return Pgd(
            budget=Budget("linf", self.epsilon).whole(),
            steps=self.pgd_steps,
            step_size=self.pgd_step_size,
            direction="min",
            init="uniform",
            augmentation=transform,
            eot=self.eot,
            inner=inner,
            chunk=CHUNK,
        )

    def budget_for(self, height: int, width: int) -> Budget:
        return Budget("linf", self.epsilon)

    def craft(self, x: Images, y: Labels | None, draws: Draws, surrogate: Surrogate) -> Images:
        assert y is not None
        network = surrogate.network(device=x.device)
        return x + self.noise_pgd(surrogate.image_size).run(cross_entropy(network, y), x, model=network, draws=draws)

    def fitting(self, setup: Setup) -> Fit:
        return RobustFit(setup, self.noise_pgd(setup.train.image_size), self.adversary)


@dataclass(frozen=True, kw_only=True)
class SemPoison(RobustEmPoison):
    """SEM: REM, with one uniform draw in place of the adversary while the noise is made.

        delta = argmin_{|delta| <= epsilon} E_{t ~ T, u ~ U(-rho, rho)} CE(f(t(x + delta) + u), y)

    f is trained as REM's, against the adversary: 61 passes a step in place of 561.

    Args:
        as `RobustEmPoison`.

    Source: "Stable Unlearnable Example", its repository (METHODS_NEW N2).
    Deviations: as `RobustEmPoison`.
    """

    name: ClassVar[str] = "sem"
    inner: ClassVar[Literal["pgd", "uniform", "none"]] = "uniform"


@dataclass(frozen=True, kw_only=True)
class MinMaxMinPoison(RobustEmPoison):
    """MMM: noise for an adversarially trained network that is kept from learning the clean pictures.

        delta = argmin_{|delta| <= epsilon} E_{t ~ T} CE(f(t(x + delta)), y)
        f     : min E [ max_{|delta_a| <= rho} CE(f(t(x + delta) + delta_a), y) + dar_weight * DAR(t'(x)) ]

    rho is adversarial_epsilon. DAR, the differentiable average randomness, is a distance of the clean pictures' class
    probabilities p from 1/K.

    Args:
        dar: "code": ||p - 1/K|| with 10 classes, ||p - 1/K||^2 with any other number, as the official code has it;
            "paper": ||p - 1/K||^2 / K, ten to a hundred times weaker; "none" for min-max-min without it.
        dar_weight: its weight in the loss.
        others as `RobustEmPoison`.

    Source: "Re-thinking Data Availability Attacks Against Deep Neural Networks", Algorithm I, and its repository
    (METHODS 7). The bound of Theorem 1 there, 4/K, is not tight: the penalty of the paper is at most (K - 1) / K^2.
    Deviations: as `RobustEmPoison`.
    """

    name: ClassVar[str] = "min-max-min"
    inner: ClassVar[Literal["pgd", "uniform", "none"]] = "none"

    dar: Literal["code", "paper", "none"] = settled("code")
    dar_weight: float = settled(1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dar not in ("code", "paper", "none"):
            raise ValueError(f'dar is "code", "paper" or "none", got {self.dar!r}')
        if not self.dar_weight >= 0:
            raise ValueError(f"dar_weight is a number of 0 or more, got {self.dar_weight}")

    def fitting(self, setup: Setup) -> Fit:
        noise, adversary = self.noise_pgd(setup.train.image_size), self.adversary
        if self.dar == "none" or self.dar_weight == 0:
            return RobustFit(setup, noise, adversary)
        return RobustFit(setup, noise, adversary, self.dar, self.dar_weight)


class RobustFit(Fit):
    """The loop of REM, SEM and MMM: noise for the network as it is, then a step of the network on it.

    Without adversary and penalty it is the EM of REM's repository.
    """

    def __init__(
        self,
        setup: Setup,
        noise: Pgd,
        adversary: Pgd | None,
        penalty: Penalty | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__(setup)
        self.noise, self.adversary, self.weight = noise, adversary, weight
        self.penalty: Penalty | None = penalty
        network = setup.network()
        self.modules, self.optimizers = {"network": network}, {"network": setup.sgd(network)}
        self.total = setup.recipe.total_steps(
            setup.train.steps(setup.recipe.batch_size, drop_last=setup.recipe.drop_last)
        )
        inner = 0 if noise.inner is None else noise.inner.steps
        ascent = 0 if adversary is None else adversary.steps
        self.passes = noise.steps * noise.eot * (1 + inner) + ascent + 1 + (penalty is not None)

    def step(self, step: int) -> dict[str, Tensor]:
        batch, network, accelerator = self.batch(step), self.modules["network"], self.setup.accelerator
        x, y = as_input(batch.pixels), batch.labels
        loss = cross_entropy(network, y)
        with accelerator.autocast():
            delta = self.noise.run(loss, x, model=network, draws=self.generator("noise", step))
            shown = self.view(as_input(to_uint8(x + delta)), batch, "view", step)
            if self.adversary is not None:
                shown = shown + self.adversary.run(loss, shown, model=network, draws=self.generator("adversary", step))
        penalties: list[Tensor] = []

        def objective() -> Tensor:
            value = F.cross_entropy(network(shown).float(), y)
            if self.penalty is not None:
                clean = network(self.view(x, batch, "clean view", step))
                penalties.append(average_randomness(clean.float().softmax(1), self.penalty))
                value = value + self.weight * penalties[0]
            return value

        return {"loss": self.descend(step, batch, objective)}


def average_randomness(p: Float[Tensor, "b k"], form: Penalty) -> Float[Tensor, ""]:
    """DAR: how far class probabilities are from 1/K, the mean over the rows; 0 for uniform ones.

    "paper": (K - 1) / K^2 for one-hot rows. "code": sqrt(1 - 1/K) for them with 10 classes, 1 - 1/K with others.
    """
    classes = p.shape[1]
    difference = p - 1 / classes
    if form == "code" and classes == 10:
        return torch.linalg.vector_norm(difference, dim=1).mean()
    squares = difference.square().sum(1).mean()
    return squares / classes if form == "paper" else squares
