"""Unlearnable clusters: one noise for every cluster of a feature space, without labels."""

import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hf_unlearnable.batches import Batches, share
from hf_unlearnable.budget import Budget
from hf_unlearnable.draws import Draws
from hf_unlearnable.fitting import Fit, Setup
from hf_unlearnable.images import Images, Labels
from hf_unlearnable.keys import torch_generator
from hf_unlearnable.networks import Network, create_network, frozen, placed
from hf_unlearnable.poisons.generators import ResidualGenerator, seeded
from hf_unlearnable.poisons.with_surrogate import SurrogatePoison, settled
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.surrogate import Surrogate
from hf_unlearnable.training import as_input, stream

PIXELS = 2**22
"""Pixels, over all pictures as the feature network sees them, in one pass without gradients."""


@dataclass(frozen=True, kw_only=True)
class ClustersPoison(SurrogatePoison):
    """UC: noise that carries every cluster of pictures over to the next cluster's centre.

        delta_i = argmin_{|delta| <= epsilon} E_{x in cluster i} KL(softmax(m_{i+1 mod p}) || softmax(phi(x + delta)))

    phi are the pooled features of a network that stays as it is (`backbone`), m the centres of a K-means of all
    pictures' features, and delta_i a generator's answer to a fixed random picture. A picture gets the delta of the
    centre that its features are nearest to, whatever its label.

    Args:
        epsilon: L-inf budget of the noise, a fraction of the value range.
        clusters: p.
        pretrained: timm's weights for phi, from the Hub; otherwise they are random.
        weights: a safetensors file with the backbone's own weights, used in place of either.
        feature_size: the shorter side of the pictures that phi sees, in pixels; 0: as they are.
        restrict_to_cluster: learn delta_i on the pictures of cluster i, as the paper has it; otherwise on all of them,
            as its code does.
        generator_width: channels of the generator's first layer; 8 or 16 are for CPUs.

    Raises:
        ValueError: a budget outside [0, 1], numbers out of range; in training, fewer different pictures than clusters,
            or pictures of less than 5 pixels a side.
        ImportError: in training, scikit-learn is missing.

    The recipe is that of every generator: epochs over the pictures of its cluster (or steps), batches, Adam's rate and
    weight decay, augmentation. Momentum and drop_last are ignored.

    Source: Zhang et al., "Unlearnable Clusters", and its repository (METHODS 12).
    Deviations: timm's weights (official: torchvision's or CLIP's). Rows are shuffled, the rate falls to 0 (official:
    1e-6), and the generator has no dropout. phi sees whole pictures, with their aspect (official: the central 224 of
    256 pixels), and delta has the pictures' own size.
    """

    name: ClassVar[str] = "clusters"
    backbone: ClassVar[str] = "resnet50"
    recipe: ClassVar[Recipe] = Recipe(name="clusters", epochs=50, batch_size=256, learning_rate=1e-4, schedule="cosine")

    epsilon: float = settled(16 / 255)
    clusters: int = settled(10)
    pretrained: bool = settled(True)
    weights: str | None = field(default=None, repr=False, metadata={"settled": True})
    feature_size: int = settled(224)
    restrict_to_cluster: bool = settled(True)
    generator_width: int = settled(64)

    def __post_init__(self) -> None:
        super().__post_init__()
        Budget("linf", self.epsilon)
        for name, least in (("clusters", 2), ("feature_size", 0), ("generator_width", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {least} or more, got {getattr(self, name)}")

    @property
    def uses_labels(self) -> bool:
        return False

    def budget_for(self, height: int, width: int) -> Budget:
        return Budget("linf", self.epsilon)

    def craft(self, x: Images, y: Labels | None, draws: Draws, surrogate: Surrogate) -> Images:
        network = surrogate.network("features", device=x.device)
        centres, deltas = (surrogate.tensors[name].to(x.device) for name in ("centres", "deltas"))
        rows = _rows_at_once(x, self.feature_size)
        with torch.no_grad():
            found = torch.cat([nearest(features(network, part, self.feature_size), centres) for part in x.split(rows)])
        return x + deltas[found]

    def fitting(self, setup: Setup) -> Fit:
        train = setup.train
        if len(train) < self.clusters:
            raise ValueError(f"expected at least {self.clusters} rows, one for every cluster, got {len(train)}")
        if min(train.image_size) < 5:
            height, width = train.image_size
            raise ValueError(f"expected pictures of at least 5 x 5 pixels, got {height} x {width}")
        network = create_network(
            setup.backbone,
            num_classes=1,
            image_size=seen_size(train.image_size, self.feature_size),
            seed=torch_generator(setup.seed, "weights", "features").initial_seed(),
            pretrained=self.pretrained if self.weights is None else self.weights,
        )
        return ClustersFit(setup, self, placed(network, setup.device))


class ClustersFit(Fit):
    """One generator after the other. K-means comes before the first step, which is how long each of them takes."""

    def __init__(self, setup: Setup, poison: ClustersPoison, network: Network) -> None:
        super().__init__(setup)
        recipe, rows = replace(setup.recipe, drop_last=False), len(setup.train)
        self.kmeans, self.poison, self.recipe = _kmeans(), poison, recipe
        self.epsilon = Budget("linf", poison.epsilon).whole().epsilon
        generator = placed(self.generator_of(0), setup.device)
        self.modules = {"features": network, "generator": generator}
        weights = generator.parameters()
        self.optimizers = {"generator": torch.optim.Adam(weights, weight_decay=recipe.weight_decay)}
        self.tensors = {
            "centres": torch.zeros(poison.clusters, network.num_features, device=setup.device),
            "assignment": torch.full((rows,), -1, device=setup.device),
            "deltas": torch.zeros(poison.clusters, 3, *setup.train.image_size, device=setup.device),
        }
        self.total = poison.clusters * recipe.total_steps(setup.train.steps(recipe.batch_size))
        if poison.restrict_to_cluster and recipe.epochs is not None:
            # the most batches that p clusters of any sizes make
            batch = recipe.batch_size
            self.total = recipe.epochs * ((rows + poison.clusters * (batch - 1)) // batch)

    @cached_property
    def lengths(self) -> list[int]:
        """The steps of every cluster's generator, once there are clusters."""
        recipe, clusters = self.recipe, self.poison.clusters
        counts = [len(self.setup.train)] * clusters
        if self.poison.restrict_to_cluster:
            counts = torch.bincount(self.tensors["assignment"], minlength=clusters).tolist()
        return [recipe.total_steps(-(-count // recipe.batch_size)) for count in counts]

    def finished(self, step: int) -> bool:
        return step > 0 and step >= sum(self.lengths)

    def step(self, step: int) -> dict[str, Tensor]:
        if step == 0:
            self.find_clusters()
        cluster, local, lengths = 0, step, self.lengths
        while local >= lengths[cluster]:
            cluster, local = cluster + 1, local - lengths[cluster]
        generator, network, setup = self.modules["generator"], self.modules["features"], self.setup
        if local == 0:
            generator.load_state_dict(self.generator_of(cluster).state_dict())
            self.optimizers["generator"].state.clear()
        if local == 0 or self._batches is None:
            accelerator, seed = setup.accelerator, setup.seed
            rank, world = accelerator.process_index, accelerator.num_processes
            self._batches = stream(self.rows_of(cluster), self.recipe, seed, rank, world, local)
        batch = self.batch(step)
        x = self.view(as_input(batch.pixels), batch, "view", step)
        target = self.tensors["centres"][(cluster + 1) % self.poison.clusters].softmax(0)

        def distance() -> Tensor:
            with frozen(network):
                found = features(network, (x + self.delta(cluster)).clamp(0, 1), self.poison.feature_size)
            return divergence(target, found)

        rate = self.recipe.rate(local, lengths[cluster])
        loss = self.descend(step, batch, distance, "generator", rate=rate)
        if local == lengths[cluster] - 1:
            with torch.no_grad():
                self.tensors["deltas"][cluster] = self.delta(cluster)[0]
        return {"loss": loss}

    def objective(self, x: Images, y: Labels) -> Tensor:
        network = self.modules["features"]
        with frozen(network):
            found = features(network, x, self.poison.feature_size)
            return divergence(found.detach()[0].softmax(0), found)

    def find_clusters(self) -> None:
        """Features of all rows, in float32 as in mapping, their K-means, and the rows nearest to every centre."""
        setup, train = self.setup, self.setup.train
        accelerator, network = setup.accelerator, self.modules["features"]
        found = torch.zeros(len(train), self.tensors["centres"].shape[1], device=setup.device)
        mine = share(len(train), accelerator.process_index, accelerator.num_processes)
        rows = _rows_at_once(train.pixels, self.poison.feature_size)
        with frozen(network), torch.no_grad():
            for start in range(mine.start, mine.stop, rows):
                part = slice(start, min(start + rows, mine.stop))
                found[part] = features(network, as_input(train.pixels[part]), self.poison.feature_size)
        found = _sum(found, setup)
        if not bool(found.isfinite().all()):
            row = int((~found.isfinite()).any(1).nonzero()[0])
            raise FloatingPointError(f"row {row}: expected finite features, got NaN or infinity")
        centres = torch.zeros_like(self.tensors["centres"])
        if accelerator.is_main_process:
            seed = torch_generator(setup.seed, "k-means").initial_seed() % 2**32
            made = self.kmeans(n_clusters=len(centres), random_state=seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of fewer different rows than clusters, which is an error below
                centres.copy_(torch.from_numpy(made.fit(found.cpu().numpy()).cluster_centers_))
        centres = _sum(centres, setup)
        assignment = nearest(found, centres)
        if empty := (torch.bincount(assignment, minlength=len(centres)) == 0).nonzero().flatten().tolist():
            raise ValueError(
                f"expected pictures in each of {len(centres)} clusters, got none in {len(empty)} of them (cluster "
                f"{empty[0]} first): their features are of fewer kinds; use fewer clusters"
            )
        self.tensors["centres"].copy_(centres)
        self.tensors["assignment"].copy_(assignment)

    def rows_of(self, cluster: int) -> Batches:
        """The rows that the generator of a cluster learns on."""
        if not self.poison.restrict_to_cluster:
            return self.setup.train
        return self.setup.train.select((self.tensors["assignment"] == cluster).nonzero().flatten())

    def delta(self, cluster: int) -> Float[Tensor, "1 3 h w"]:
        """What the generator under way makes of the cluster's fixed input."""
        randomness = torch_generator(self.setup.seed, "generator input", cluster)
        fixed = torch.rand(1, 3, *self.setup.train.image_size, generator=randomness).to(self.setup.device)
        return self.modules["generator"](fixed).float().clamp(-self.epsilon, self.epsilon)

    def generator_of(self, cluster: int) -> ResidualGenerator:
        """The generator of a cluster, as it begins."""
        seed = torch_generator(self.setup.seed, "weights", "generator", cluster).initial_seed()
        return seeded(lambda: ResidualGenerator(self.poison.generator_width), seed)

    def networks(self) -> dict[str, Network]:
        network = self.modules["features"]
        assert isinstance(network, Network)
        return {"features": network}

    def kept(self) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in ("centres", "deltas")}

    def measure(self, test: Batches) -> dict[str, float]:
        return {}


def seen_size(image_size: tuple[int, int], feature_size: int) -> tuple[int, int]:
    """Height and width of what the feature network sees: the shorter side is feature_size, or as it was for 0."""
    shorter = min(image_size)
    height, width = (round(side * (feature_size or shorter) / shorter) for side in image_size)
    return height, width


def features(network: Any, x: Float[Tensor, "b 3 h w"], feature_size: int) -> Float[Tensor, "b d"]:
    """phi of pictures of any size, in the network's own mode; differentiable."""
    height, width = x.shape[2:]
    size = seen_size((height, width), feature_size)
    if size != (height, width):
        x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
    return network.features(x).float()


def nearest(found: Float[Tensor, "b d"], centres: Float[Tensor, "p d"]) -> Int[Tensor, "b"]:
    """The centre of the smallest Euclidean distance; the first of equal ones."""
    return torch.cdist(found, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


def divergence(target: Float[Tensor, "d"], found: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """KL(target || softmax(found)), the mean over the rows; target is a distribution."""
    return F.kl_div(found.log_softmax(1), target.expand_as(found), reduction="batchmean")


def _rows_at_once(x: Tensor, feature_size: int) -> int:
    height, width = seen_size((x.shape[2], x.shape[3]), feature_size)
    return max(1, min(250, PIXELS // (height * width)))


def _sum(part: Tensor, setup: Setup) -> Tensor:
    """What all processes have, each its part of it and zeros elsewhere."""
    total = setup.accelerator.reduce(part, "sum") if setup.accelerator.num_processes > 1 else part
    assert isinstance(total, Tensor)
    return total


def _kmeans() -> Any:
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("unlearnable clusters need scikit-learn: pip install 'hf_unlearnable[clusters]'") from error
    return KMeans
