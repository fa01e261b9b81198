"""Random noise: the control that must do nothing."""

from dataclasses import dataclass
from typing import ClassVar

from hf_unlearnable.budget import Budget
from hf_unlearnable.draws import Draws
from hf_unlearnable.images import Images, Labels
from hf_unlearnable.poisons.base import Poison


@dataclass(frozen=True, kw_only=True)
class RandomNoisePoison(Poison):
    """Every picture gets its own uniform noise of whole grey levels: x' = x + delta, |delta| <= epsilon.

    The control of every comparison: a victim trained on it learns as from clean pictures, or the evaluation is broken.

    Args:
        epsilon: L-inf budget, a fraction of the value range.

    Raises:
        ValueError: an epsilon outside [0, 1].

    Source: the random-noise control of the evaluation protocol (METHODS_NEW part IV, P7).
    Deviations: none.
    """

    name: ClassVar[str] = "random-noise"
    pure: ClassVar[bool] = True

    epsilon: float = 8 / 255

    def budget_for(self, height: int, width: int) -> Budget:
        return Budget("linf", self.epsilon)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.budget_for(1, 1)

    @property
    def uses_labels(self) -> bool:
        return False

    def perturb(self, x: Images, y: Labels | None, draws: Draws) -> Images:
        levels = int(self.epsilon * 255 + 1e-6)
        delta = draws.integers(-levels, levels + 1, *x.shape[1:])
        return x + delta.to(x) / 255
