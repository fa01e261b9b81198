"""DeepConfuse: a generator whose noise leads a classifier astray while it is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from hf_unlearnable.budget import Budget
from hf_unlearnable.draws import Draws
from hf_unlearnable.fitting import Fit, Setup
from hf_unlearnable.images import Images, Labels
from hf_unlearnable.keys import torch_generator
from hf_unlearnable.networks import Network, frozen, placed
from hf_unlearnable.poisons.generators import UNet, seeded
from hf_unlearnable.poisons.with_surrogate import SurrogatePoison, settled
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.surrogate import Surrogate
from hf_unlearnable.training import as_input

PIXELS = 2**17
"""Pixels, over all pictures, in one pass through the generator when pictures are mapped."""


@dataclass(frozen=True, kw_only=True)
class DeepConfusePoison(SurrogatePoison):
    """DeepConfuse: noise of a generator G that was trained to spoil the training of classifiers.

        x' = x + epsilon * G(x),   G ascends CE(h+(x), y),   h+ = h - rate * grad_h CE(h(x'), y)

    An outer epoch trains a classifier h from scratch on the noise of the G before, and for every batch looks one step
    ahead: what h would be after a step on the noise of the G under way, which then ascends the loss of that h+ on the
    clean pictures, through the step. Labels are needed to train, not to map: equal pictures get equal noise.

    Args:
        epsilon: L-inf budget of the noise, a fraction of the value range; G is scaled to the whole 255ths in it (8 of
            the paper's 8.16).
        outer_epochs: classifiers, one after the other; each is trained as long as the recipe says.
        generator_learning_rate: of Adam for G.
        generator_width: channels of the U-Net's finest scale; 8 or 16 are for CPUs.

    Raises:
        ValueError: a budget outside [0, 1], numbers that are not positive.

    The recipe is the classifier's: its rate (also of the look-ahead), batches and augmentation, and the rate starts
    anew with every classifier. The look-ahead is a plain step, without momentum and weight decay.

    Source: Feng et al., "Learning to Confuse", and its repository (METHODS 13); the class's recipe is that of CIFAR-10
    there. APBench maps its generator at 8/255.
    Deviations: 50 outer epochs, and G of the last one is kept; official: up to 1,000, with the G that a test set finds
    best. The budget is cut to whole 255ths. Classifiers of other names than VGG-11-BN have the same head, two numbers
    and then a linear layer. Rows are shuffled. With several processes each looks ahead on its own rows.
    """

    name: ClassVar[str] = "deep-confuse"
    backbone: ClassVar[str] = "vgg11_bn"
    recipe: ClassVar[Recipe] = Recipe(
        name="deep-confuse",
        epochs=20,
        batch_size=256,
        learning_rate=0.01,
        schedule="constant",
        momentum=0.0,
        weight_decay=0.0,
        augmentation="none",
    )

    epsilon: float = 0.032
    outer_epochs: int = settled(50)
    generator_learning_rate: float = settled(1e-4)
    generator_width: int = settled(64)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.scale
        for name in ("outer_epochs", "generator_learning_rate", "generator_width"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is positive, got {getattr(self, name)}")

    @property
    def uses_labels(self) -> bool:
        return False

    @property
    def scale(self) -> float:
        """The largest change of a value: the budget in whole 255ths."""
        return Budget("linf", self.epsilon).whole().epsilon

    def budget_for(self, height: int, width: int) -> Budget:
        return Budget("linf", self.epsilon)

    def craft(self, x: Images, y: Labels | None, draws: Draws, surrogate: Surrogate) -> Images:
        generator = _generator(surrogate, x.device)
        rows = max(1, PIXELS // (x.shape[2] * x.shape[3]))
        with torch.no_grad():
            return torch.cat([part + self.scale * generator(part) for part in x.split(rows)])

    def fitting(self, setup: Setup) -> Fit:
        counts = torch.bincount(setup.train.labels.cpu(), minlength=len(setup.train.classes))
        if empty := (counts == 0).nonzero().flatten().tolist():
            name = setup.train.classes[empty[0]]
            raise ValueError(f"expected rows of every class, got none of class {empty[0]} ({name})")
        return DeepConfuseFit(setup, self)


class DeepConfuseFit(Fit):
    """A step is a batch: the generator under way looks ahead, the classifier learns the noise of the one before."""

    def __init__(self, setup: Setup, poison: DeepConfusePoison) -> None:
        super().__init__(setup)
        recipe, self.scale, self.rate = setup.recipe, poison.scale, poison.generator_learning_rate
        self.per_classifier = recipe.total_steps(setup.train.steps(recipe.batch_size, drop_last=recipe.drop_last))
        self.total = poison.outer_epochs * self.per_classifier
        self.passes = 11.0  # counted in multiplications, for VGG-11 and a width of 64
        seed = torch_generator(setup.seed, "weights", "generator").initial_seed()
        generators = [seeded(lambda: UNet(poison.generator_width), seed) for _ in range(2)]
        generator, before = (placed(one, setup.device) for one in generators)
        network = Bottleneck.of(setup, 0)
        self.modules = {"network": network, "generator": generator, "generator before": before}
        self.optimizers = {"network": setup.sgd(network), "generator": torch.optim.Adam(generator.parameters())}

    def step(self, step: int) -> dict[str, Tensor]:
        outer, inner = divmod(step, self.per_classifier)
        network, generator, before = (self.modules[name] for name in ("network", "generator", "generator before"))
        if inner == 0:
            before.load_state_dict(generator.state_dict())
            network.load_state_dict(Bottleneck.of(self.setup, outer).state_dict())
            self.optimizers["network"].state.clear()
        batch = self.batch(step)
        x, y = self.view(as_input(batch.pixels), batch, "view", step), batch.labels
        rate = self.setup.recipe.rate(inner, self.per_classifier)

        def fooled() -> Tensor:
            return -look_ahead(network, (x + self.scale * generator(x)).clamp(0, 1), x, y, rate)

        def learnt() -> Tensor:
            with frozen(before), torch.no_grad():
                shown = (x + self.scale * before(x)).clamp(0, 1)
            return F.cross_entropy(network(shown).float(), y)

        ahead = -self.descend(step, batch, fooled, "generator", rate=self.rate)
        return {"loss": self.descend(step, batch, learnt, rate=rate), "look-ahead": ahead}

    def networks(self) -> dict[str, Network]:
        return {}

    def kept(self) -> dict[str, Tensor]:
        return {f"generator.{name}": value for name, value in self.modules["generator"].state_dict().items()}


class Bottleneck(nn.Module):
    """A network that says all it knows in two numbers, and a linear layer that reads them."""

    def __init__(self, backbone: Network, head: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    @classmethod
    def of(cls, setup: Setup, number: int) -> "Bottleneck":
        """The classifier of an outer epoch, as it begins."""
        seed = torch_generator(setup.seed, "weights", "head", number).initial_seed()
        head = seeded(lambda: nn.Linear(2, len(setup.train.classes)), seed)
        return cls(setup.network(f"classifier {number}", num_classes=2), head.to(setup.device))

    def forward(self, x: Tensor) -> Float[Tensor, "b k"]:
        return self.head(self.backbone(x))


def look_ahead(
    network: nn.Module, shown: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"], y: Labels, rate: float
) -> Float[Tensor, ""]:
    """CE(h+(x), y) with h+ = h - rate * grad_h CE(h(shown), y), differentiable in `shown`; h is left as it is.

    Both passes are in h's own mode, from copies of its buffers.
    """
    weights = {name: weight.detach().requires_grad_() for name, weight in network.named_parameters()}

    def loss(at: Mapping[str, Tensor], z: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        return F.cross_entropy(functional_call(network, {**at, **buffers}, (z,)).float(), y)

    slopes = torch.autograd.grad(loss(weights, shown), list(weights.values()), create_graph=True)
    moved = {name: weight - rate * slope for (name, weight), slope in zip(weights.items(), slopes, strict=True)}
    return loss(moved, x)


def _generator(surrogate: Surrogate, device: torch.device) -> nn.Module:
    """The generator among a surrogate's tensors, on a device; made once and kept with it."""
    kept: dict[str, nn.Module] = surrogate.__dict__.setdefault("_generators", {})
    if str(device) not in kept:
        generator = seeded(lambda: UNet(surrogate.settings["generator_width"]), 0)
        before = "generator."
        own = {name[len(before) :]: tensor for name, tensor in surrogate.tensors.items() if name.startswith(before)}
        generator.load_state_dict(own)
        generator.eval().requires_grad_(False)
        kept[str(device)] = placed(generator, device)
    return kept[str(device)]
