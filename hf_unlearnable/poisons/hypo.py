"""HYPO: pictures that a plain classifier gets right more easily than the clean ones."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from hf_unlearnable.budget import Budget
from hf_unlearnable.draws import Draws
from hf_unlearnable.fitting import Fit, Setup
from hf_unlearnable.images import Images, Labels
from hf_unlearnable.pgd import Pgd
from hf_unlearnable.poisons.classifier_fit import ClassifierFit, cross_entropy
from hf_unlearnable.poisons.with_surrogate import SurrogatePoison
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.surrogate import Surrogate

CHUNK = 640
"""Pictures in one pass through the network."""


@dataclass(frozen=True, kw_only=True)
class HypoPoison(SurrogatePoison):
    """HYPO, the hypocritical perturbation: noise that lowers the loss of a classifier of the clean pictures.

        delta = argmin_{||delta|| <= epsilon} CE(f(x + delta), y)

    f is trained plainly on clean pictures. There is no random start, so the pictures follow from the surrogate alone.

    Args:
        norm: of the budget, "linf" or "l2" (Euclidean, over all values of a picture in [0, 1]).
        epsilon: the budget; None for 8/255 in "linf" and 0.5 in "l2" (of 32 x 32 pixels).
        pgd_steps: descents on the noise, in the norm's steepest direction.
        pgd_step_size: their length in the norm; None for epsilon / 5.

    Raises:
        ValueError: another norm, a budget outside its range, a step size that is not positive, no steps.

    Source: "Better Safe Than Sorry: Preventing Delusive Adversaries with Adversarial Training", P2 of its repository
    (METHODS 9), there with VGG-16 (backbone="vgg16_bn") and norm="l2". UEraser and APBench: pgd_step_size=0.8 / 255.
    Deviations: the surrogate is by default ResNet-18 and the norm L-inf; it is trained on all rows and taken at the
    end, not with 2 % of them held out to choose the best epoch.
    """

    name: ClassVar[str] = "hypo"
    recipe: ClassVar[Recipe] = Recipe(name="hypo", epochs=150, schedule="step", milestones=(100 / 150, 125 / 150))

    norm: Literal["linf", "l2"] = "linf"
    epsilon: float | None = None
    pgd_steps: int = 100
    pgd_step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in ("linf", "l2"):
            raise ValueError(f'norm is "linf" or "l2", got {self.norm!r}')
        if self.pgd_steps < 1:
            raise ValueError(f"pgd_steps is at least 1 (the noise starts at zero), got {self.pgd_steps}")
        self.noise_pgd()

    @property
    def budget(self) -> Budget:
        """What the noise keeps."""
        usual = 8 / 255 if self.norm == "linf" else 0.5
        return Budget(self.norm, usual if self.epsilon is None else self.epsilon)

    def noise_pgd(self) -> Pgd:
        """The descent that makes the noise."""
        budget = self.budget
        return Pgd(
            budget=budget.whole(),
            steps=self.pgd_steps,
            step_size=budget.epsilon / 5 if self.pgd_step_size is None else self.pgd_step_size,
            direction="min",
            chunk=CHUNK,
        )

    def budget_for(self, height: int, width: int) -> Budget:
        return self.budget

    def craft(self, x: Images, y: Labels | None, draws: Draws, surrogate: Surrogate) -> Images:
        assert y is not None
        network = surrogate.network(device=x.device)
        return x + self.noise_pgd().run(cross_entropy(network, y), x, model=network)

    def fitting(self, setup: Setup) -> Fit:
        return ClassifierFit(setup)
