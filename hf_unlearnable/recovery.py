"""The recovery attack: what a few clean rows bring back while the weights stay near a victim's."""

import copy
import math

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from hf_unlearnable.batches import Batches
from hf_unlearnable.images import Images, Labels
from hf_unlearnable.networks import Network
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.victim import train_to_end

RECOVERY = Recipe(name="recovery", epochs=60, learning_rate=0.01, schedule="cosine", weight_decay=0.0)


class NearWeights:
    """Plain training of weights that stay in a ball around those of a network.

        theta <- theta_0 + (theta - theta_0) min(1, radius / ||theta - theta_0||)

    The projection comes before the loss of a step, which is after the step before.

    Args:
        network: theta_0 are its trainable parameters.
        radius: L2, over all of them together.
        device: where the training runs.
    """

    name = "near weights"

    def __init__(self, network: nn.Module, radius: float, device: torch.device) -> None:
        self.centre = [weight.detach().clone().to(device) for weight in network.parameters() if weight.requires_grad]
        self.radius = radius

    def __call__(
        self, model: nn.Module, x: Images, y: Labels, *, progress: float, generator: torch.Generator
    ) -> Tensor:
        self.project(model)
        return F.cross_entropy(model(x), y)

    @torch.no_grad()
    def project(self, model: nn.Module) -> None:
        """Put the weights of a model back into the ball, if they are outside."""
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        away = [weight - centre for weight, centre in zip(weights, self.centre, strict=True)]
        distance = torch.stack([part.norm() for part in away]).norm()
        share = (self.radius / distance).clamp_max(1)
        for weight, centre, part in zip(weights, self.centre, away, strict=True):
            weight.copy_(centre + share * part)


def recover(
    network: Network,
    clean: Batches,
    *,
    radius: float,
    recipe: Recipe = RECOVERY,
    accelerator: Accelerator,
    seed: int,
    progress: bool = True,
) -> Network:
    """A copy of a victim, trained on clean rows with its weights within an L2 distance of where they were.

        min_{||theta - theta_0|| <= radius} mean CE(f_theta(x), y)

    What it reaches is a lower bound for the best weights in the ball, of which the (q, eta) certificate
    (`certificate.certify`) bounds the noisy ones. As there, BatchNorm's running statistics stay: they are no weights.

    Args:
        network: a victim of the published rows; left as it is.
        clean: labelled rows that were not poisoned, a fifth of the training rows in the source; their classes are
            numbered as the network's are. Never the rows on which the outcome is measured.
        radius: over all trainable weights together (BatchNorm's scale and shift too); infinity for plain fine-tuning.
        recipe: of the training; its last epoch counts.
        seed: of the order and of crop and flip.

    Raises:
        ValueError: a radius that is not positive, no rows.

    Source: METHODS_NEW N44 (recovery attack). Deviations: there the difference is rescaled to the radius even inside
        the ball, and the rows are those of the test; momentum (0.9) and weight decay (none) are not told there.
    """
    if not radius > 0:
        raise ValueError(f"radius: expected a positive number, got {radius}")
    if not len(clean):
        raise ValueError("expected at least one clean row, got none")
    recovered = copy.deepcopy(network)
    recovered.frozen_batch_norm = True
    near = NearWeights(recovered, radius, accelerator.device)
    train_to_end(
        recovered,
        clean,
        clean.select(range(1)),
        recipe=recipe,
        defense=near,
        accelerator=accelerator,
        seed=seed,
        progress=progress,
    )
    near.project(recovered)
    recovered.frozen_batch_norm = network.frozen_batch_norm
    return recovered


def distance(network: nn.Module, other: nn.Module) -> float:
    """The L2 distance between the trainable weights of two networks."""
    pairs = zip(network.parameters(), other.parameters(), strict=True)
    squares = [float((a - b).detach().double().square().sum()) for a, b in pairs if a.requires_grad]
    return math.sqrt(sum(squares))
