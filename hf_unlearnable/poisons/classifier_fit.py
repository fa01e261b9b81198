"""A surrogate that is an ordinary classifier of the clean pictures, trained plainly or adversarially."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_unlearnable.fitting import Fit, Setup
from hf_unlearnable.images import Labels
from hf_unlearnable.pgd import Loss, Pgd
from hf_unlearnable.training import as_input


class ClassifierFit(Fit):
    """Empirical risk minimisation by the recipe, or adversarial training where there is an adversary.

        min_f E CE(f(t(x) + delta_a), y),   delta_a = argmax CE(f(t(x) + delta_a), y) by the adversary, 0 without one

    The adversary meets f in evaluation mode; the step of f is on its pictures alone.
    """

    def __init__(self, setup: Setup, adversary: Pgd | None = None) -> None:
        super().__init__(setup)
        self.adversary = adversary
        network, recipe = setup.network(), setup.recipe
        self.modules, self.optimizers = {"network": network}, {"network": setup.sgd(network)}
        self.total = recipe.total_steps(setup.train.steps(recipe.batch_size, drop_last=recipe.drop_last))
        self.passes = 1 + (0 if adversary is None else adversary.steps)

    def step(self, step: int) -> dict[str, Tensor]:
        batch, network = self.batch(step), self.modules["network"]
        shown = self.view(as_input(batch.pixels), batch, "view", step)
        if self.adversary is not None:
            loss = cross_entropy(network, batch.labels)
            with self.setup.accelerator.autocast():
                draws = self.generator("adversary", step)
                shown = shown + self.adversary.run(loss, shown, model=network, draws=draws)
        return {"loss": self.descend(step, batch, lambda: F.cross_entropy(network(shown).float(), batch.labels))}


def cross_entropy(network: torch.nn.Module, y: Labels) -> Loss:
    """CE(f(z), y), one for every picture, as `Pgd` asks for it."""
    return lambda z, rows: F.cross_entropy(network(z).float(), y[rows], reduction="none")
