"""EntF: features of the classes entangled, pushed off their own class's centre or pulled to another's."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hf_unlearnable.augment import ShiftFlip
from hf_unlearnable.budget import Budget
from hf_unlearnable.draws import Draws
from hf_unlearnable.fitting import Fit, Setup
from hf_unlearnable.images import Images, Labels
from hf_unlearnable.networks import Network, frozen
from hf_unlearnable.pgd import Loss, Pgd
from hf_unlearnable.poisons.classifier_fit import ClassifierFit
from hf_unlearnable.poisons.with_surrogate import SurrogatePoison, settled
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.surrogate import Surrogate
from hf_unlearnable.training import as_input

CHUNK = 640
"""Pictures in one pass through the network."""


@dataclass(frozen=True, kw_only=True)
class EntfPoison(SurrogatePoison):
    """EntF: noise that makes the features of the classes, as a robust network has them, overlap.

        push: delta = argmax_{|delta| <= epsilon} E_{t ~ T} MSE(phi(t(x + delta)), mu_y)
        pull: delta = argmin_{|delta| <= epsilon} E_{t ~ T} min_{j != y} MSE(phi(t(x + delta)), mu_j)

    phi are the pooled features of an adversarially trained network, mu_c their mean over the pictures of class c, and
    t a small shift and a flip, drawn for every picture and step. For "pull", j is chosen again at every step.

    Args:
        epsilon: L-inf budget of the noise, a fraction of the value range.
        mode: "push" or "pull".
        pgd_steps: signed steps on the noise.
        pgd_step_size: their length; None for 0.05 * epsilon.
        adversarial_epsilon: L-inf radius that the network is trained against; 0 for plain training.
        adversarial_steps, adversarial_step_size: the signed ascent of its adversary, from a uniform start.

    Raises:
        ValueError: a budget outside [0, 1], a step size that is not positive, numbers below 1, another mode, "pull"
            with one class.

    Source: "Is Adversarial Training Really a Silver Bullet for Mitigating Data Poisoning?" and its repository
    (METHODS 11); the class's recipe is that of CIFAR-10 there.
    Deviations: another class is never the own one (the official code gives the own class a distance of 1, which loses
    where all others are farther); any number of classes and features (there 10 and 512).
    """

    name: ClassVar[str] = "entf"
    recipe: ClassVar[Recipe] = Recipe(name="entf", epochs=100, schedule="step", milestones=(0.75, 0.9))

    epsilon: float = 8 / 255
    mode: Literal["push", "pull"] = "push"
    pgd_steps: int = 300
    pgd_step_size: float | None = None
    adversarial_epsilon: float = settled(4 / 255)
    adversarial_steps: int = settled(10)
    adversarial_step_size: float = settled(2 / 255)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("push", "pull"):
            raise ValueError(f'mode is "push" or "pull", got {self.mode!r}')
        _ = self.adversary, self.noise_pgd()
        if self.num_classes is not None:
            self._check_classes(self.num_classes)

    @property
    def adversary(self) -> Pgd | None:
        """What the network is trained against."""
        if self.adversarial_epsilon == 0:
            return None
        return Pgd(
            budget=Budget("linf", self.adversarial_epsilon),
            steps=self.adversarial_steps,
            step_size=self.adversarial_step_size,
            direction="max",
            init="uniform",
        )

    def noise_pgd(self) -> Pgd:
        """The loop that makes the noise."""
        return Pgd(
            budget=Budget("linf", self.epsilon).whole(),
            steps=self.pgd_steps,
            step_size=0.05 * self.epsilon if self.pgd_step_size is None else self.pgd_step_size,
            direction="max" if self.mode == "push" else "min",
            init="normal",
            augmentation=ShiftFlip(),
            chunk=CHUNK,
        )

    def budget_for(self, height: int, width: int) -> Budget:
        return Budget("linf", self.epsilon)

    def craft(self, x: Images, y: Labels | None, draws: Draws, surrogate: Surrogate) -> Images:
        assert y is not None
        network, centroids = surrogate.network(device=x.device), surrogate.tensors["centroids"].to(x.device)
        loss = push_loss(network, centroids, y) if self.mode == "push" else pull_loss(network, centroids, y)
        return x + self.noise_pgd().run(loss, x, model=network, draws=draws)

    def fitting(self, setup: Setup) -> Fit:
        self._check_classes(len(setup.train.classes))
        return EntfFit(setup, self.adversary)

    def _check_classes(self, classes: int) -> None:
        if self.mode == "pull" and classes < 2:
            raise ValueError(f'expected two classes or more for "pull", got {classes}')


class EntfFit(ClassifierFit):
    """A robust classifier, and the centroids of its features in the end."""

    def kept(self) -> dict[str, Tensor]:
        return {"centroids": self.centroids()}

    def centroids(self) -> Float[Tensor, "k d"]:
        """The mean features of every class over its rows as they are, in evaluation mode, over all processes."""
        train, accelerator, network = self.setup.train, self.setup.accelerator, self.modules["network"]
        assert isinstance(network, Network)
        classes = len(train.classes)
        sums = torch.zeros(classes, network.num_features, device=self.setup.device)
        rank, world = accelerator.process_index, accelerator.num_processes
        with frozen(network), torch.no_grad():
            for pixels, labels in train.chunks(250, rank=rank, world=world):
                with accelerator.autocast():
                    features = network.features(as_input(pixels)).float()
                sums += nn.functional.one_hot(labels, classes).T.float() @ features
        total = accelerator.reduce(sums, "sum")
        assert isinstance(total, Tensor)
        means = total / torch.bincount(train.labels, minlength=classes)[:, None]
        if not bool(means.isfinite().all()):
            raise FloatingPointError("expected finite features, got NaN or infinity: the network's weights are broken")
        return means


def push_loss(network: Network, centroids: Float[Tensor, "k d"], y: Labels) -> Loss:
    """How far a picture's features are from its own class's centroid."""
    return lambda z, rows: (network.features(z).float() - centroids[y[rows]]).square().mean(1)


def pull_loss(network: Network, centroids: Float[Tensor, "k d"], y: Labels) -> Loss:
    """How far a picture's features are from the nearest centroid of another class."""

    def loss(z: Tensor, rows: Tensor) -> Tensor:
        features = network.features(z).float()
        distances = torch.cdist(features.detach(), centroids, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.scatter(1, y[rows][:, None], torch.inf).argmin(1)
        return (features - centroids[nearest]).square().mean(1)

    return loss
