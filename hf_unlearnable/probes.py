"""Probes: full-batch logistic regression on pictures, on their perturbations, and on a frozen network's features."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hf_unlearnable.batches import Batches, stratified_rows
from hf_unlearnable.images import Images, Labels, to_float
from hf_unlearnable.keys import Key
from hf_unlearnable.networks import Network, frozen
from hf_unlearnable.training import as_input, own_randomness, seed_layers

HIDDEN_WIDTH = 30
HELD_OUT = 0.2


class Standardise(nn.Module):
    """Each feature less its mean, divided by its standard deviation (population); constant ones become 0."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Float[Tensor, " d"], scale: Float[Tensor, " d"]) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    @classmethod
    def of(cls, features: Float[Tensor, "n d"]) -> Self:
        """With the mean and deviation of these rows."""
        deviation, mean = torch.std_mean(features, dim=0, correction=0)
        return cls(mean, torch.where(deviation > 1e-6 * mean.abs(), deviation, torch.inf))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return (x - self.mean) / self.scale


def perceptron(sizes: Sequence[int], *, activation: type[nn.Module], seed: Key, bias: bool = True) -> nn.Sequential:
    """Linear layers from each size to the next, with the activation between them; torch's initial weights, by seed."""
    cpu = torch.device("cpu")
    with own_randomness(cpu):
        seed_layers(seed, 0, 0, cpu)
        linear = [nn.Linear(a, b, bias=bias, device=cpu) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(linear[0], *(part for layer in linear[1:] for part in (activation(), layer)))


def fit_probe(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    *,
    classes: int,
    strength: float | None = None,
    bias: bool = True,
    standardise: bool = True,
    hidden: int = 0,
    iterations: int = 1000,
    seed: Key = 0,
) -> nn.Sequential:
    """Multinomial logistic regression on all rows at once; returns the network from features to logits.

        min_{W, b}  mean CE(W x + b, y) + ||W||^2 / (2 C n)

    L-BFGS with a strong-Wolfe line search, from W = b = 0, in the features' dtype and on their device.

    Args:
        strength: C, how much the data count against the penalty, as in scikit-learn; None for no penalty.
        bias: whether there is a b; it is never penalised.
        standardise: bring every feature to mean 0 and deviation 1 first (kept inside the returned network).
        hidden: tanh layers of 30 units before the last one; with any the problem is not convex.
        iterations: at most; the search ends sooner where the gradient (1e-7) or the step (1e-9) vanishes.
        seed: of the initial weights of hidden layers.

    Raises:
        ValueError: no rows, a strength that is not positive, fewer than no hidden layers.

    Source: METHODS_NEW N24 and N30. Deviations: none.
    """
    if not len(features):
        raise ValueError("expected at least one row, got none")
    if (strength is not None and not strength > 0) or hidden < 0:
        raise ValueError(f"expected a positive strength (or None) and hidden >= 0, got {strength} and {hidden}")
    scaling = Standardise.of(features) if standardise else nn.Identity()
    sizes = (features.shape[1], *(HIDDEN_WIDTH,) * hidden, classes)
    head = perceptron(sizes, activation=nn.Tanh, seed=seed, bias=bias).to(features)
    if not hidden:
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
    x = scaling(features)
    penalised = [] if strength is None else [weight for weight in head.parameters() if weight.dim() > 1]
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=iterations, max_eval=4 * iterations, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), labels)
        for weight in penalised:
            loss = loss + weight.square().sum() / (2 * (strength or 1.0) * len(x))
        loss.backward()
        return loss

    optimizer.step(objective)  # type: ignore[arg-type]  (the closure returns a tensor)
    optimizer.zero_grad()
    return nn.Sequential(scaling, *head).requires_grad_(False)


def collect(
    model: nn.Module,
    batches: Batches,
    function: Callable[[Images, Labels], Tensor],
    *,
    image_size: tuple[int, int] | None = None,
) -> Tensor:
    """What `function` gives for all rows, in order, with the model in evaluation mode and no gradients.

    Args:
        image_size: of what the model is shown, where `function` resizes: larger pictures come in smaller chunks.
    """
    most = 250 if batches.device.type == "cpu" else 1000
    size = max(1, min(most, 2**22 // math.prod(image_size or batches.image_size)))
    with frozen(model), torch.no_grad():
        return torch.cat([function(as_input(pixels), labels) for pixels, labels in batches.chunks(size)])


def accuracy(probe: nn.Module, features: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> float:
    """The share of rows whose highest score is their label's."""
    with torch.no_grad():
        return float((probe(features).argmax(1) == labels).double().mean())


@dataclass(frozen=True, kw_only=True)
class Separability:
    """What a probe reads off the perturbation and off the pictures. Accuracies are fractions.

    Args:
        delta_train_accuracy, delta_held_out_accuracy: of the probe of the perturbation, on its own rows and on others.
        published_held_out_accuracy, clean_held_out_accuracy: of the probes of the pictures, on rows held out.
        shortcut_gap: published less clean held-out accuracy: what the perturbation adds to a linear reader.
        class_energy_ratio: rho in [0, 1]: 1 where a class has one perturbation, about classes / rows where all
            perturbations are independent.
    """

    delta_train_accuracy: float
    delta_held_out_accuracy: float
    published_held_out_accuracy: float
    clean_held_out_accuracy: float
    shortcut_gap: float
    class_energy_ratio: float
    train_rows: int
    held_out_rows: int


def linear_separability(
    clean: Batches, published: Batches, *, seed: Key, hidden: int | None = None, iterations: int = 1000
) -> Separability:
    """Probe a perturbation, delta = published - clean, and the pictures with and without it.

        delta' = (delta - min) / (max - min);   rho = sum_c n_c ||mean_c delta||^2 / sum ||delta||^2

    Three probes with bias and without penalty, of delta', of the published and of the clean pictures in [0, 1], are
    fitted to the same four fifths of the rows and read on the rest.

    Args:
        clean, published: the same rows in the same order.
        seed: of the rows held out (class by class), and of hidden layers' weights.
        hidden: tanh layers of 30 units in the probes; None or 0 for linear ones.
        iterations: of L-BFGS, at most.

    Raises:
        ValueError: other rows, sizes, classes or labels; no difference at all; fewer than three rows.

    Source: METHODS_NEW N24 and N41 (published value: accuracy on the training rows).
    Deviations: a strong-Wolfe line search and 1000 iterations (there 500 times 20 of rate 0.5, without a search); the
    training accuracy is of the four fifths. Held-out accuracies, gap and rho are this library's.
    """
    _check_pairs(clean, published)
    published = published.to(clean.device)
    delta = (published.pixels.to(torch.float32) - clean.pixels.to(torch.float32)).div_(255).flatten(1)
    least, most = delta.aminmax()
    if least == most:
        raise ValueError(f"expected published pictures that differ from the clean ones, got {float(most)} everywhere")
    members = F.one_hot(clean.labels, len(clean.classes)).to(delta)
    sums, rows = members.T @ delta, members.sum(0).clamp_min(1)
    ratio = float((sums.square().sum(1) / rows).double().sum() / delta.square().sum(1).double().sum())
    delta.sub_(least).div_(most - least)

    held = torch.zeros(len(clean), dtype=torch.bool)
    held[stratified_rows(clean.labels.cpu(), round(HELD_OUT * len(clean)), key=seed)] = True
    held = held.to(clean.device)
    labels, classes = clean.labels, len(clean.classes)

    def probe(features: Float[Tensor, "n d"]) -> tuple[float, float]:
        head = fit_probe(
            features[~held],
            labels[~held],
            classes=classes,
            standardise=False,
            hidden=hidden or 0,
            iterations=iterations,
            seed=seed,
        )
        return accuracy(head, features[~held], labels[~held]), accuracy(head, features[held], labels[held])

    on_delta = probe(delta)
    with_noise, without = (probe(to_float(split.pixels).flatten(1))[1] for split in (published, clean))
    return Separability(
        delta_train_accuracy=on_delta[0],
        delta_held_out_accuracy=on_delta[1],
        published_held_out_accuracy=with_noise,
        clean_held_out_accuracy=without,
        shortcut_gap=with_noise - without,
        class_energy_ratio=ratio,
        train_rows=int((~held).sum()),
        held_out_rows=int(held.sum()),
    )


def _check_pairs(clean: Batches, published: Batches) -> None:
    if clean.classes != published.classes or clean.pixels.shape != published.pixels.shape:
        raise ValueError(
            f"expected the same rows and classes, got {tuple(clean.pixels.shape)} of {len(clean.classes)} classes and "
            f"{tuple(published.pixels.shape)} of {len(published.classes)}"
        )
    wrong = (clean.labels != published.labels.to(clean.device)).nonzero()
    if len(wrong):
        raise ValueError(f"row {int(wrong[0])}: expected one label, got another in the published rows")
    if round(HELD_OUT * len(clean)) < 1:
        raise ValueError(f"expected at least 3 rows to hold some out, got {len(clean)}")


@dataclass(frozen=True, kw_only=True)
class ProbePoint:
    """One probe: its strength C, and its accuracies on the rows it was fitted to and on three sets of others."""

    strength: float
    train_accuracy: float
    held_out_accuracy: float
    validation_accuracy: float
    test_accuracy: float


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """The probes of one network's features, one for each strength, in the order given."""

    points: tuple[ProbePoint, ...]

    @property
    def with_clean_data(self) -> ProbePoint:
        """What a trainer chooses who has the validation rows (the first of equals)."""
        return max(self.points, key=lambda point: point.validation_accuracy)

    @property
    def without_clean_data(self) -> ProbePoint:
        """What a trainer chooses who has the training rows alone, by those held out of them (the first of equals)."""
        return max(self.points, key=lambda point: point.held_out_accuracy)


def frozen_features(network: Network, batches: Batches, *, mirrored: bool = False) -> Float[Tensor, "n d"]:
    """float32 features of all rows in evaluation mode, of their mirror images if `mirrored`.

    Pictures of another size than the network was created for are stretched to it (bicubic, antialiased, clamped).
    """

    size = network.image_size or batches.image_size

    def features(x: Images, y: Labels) -> Tensor:
        if size != batches.image_size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
        return network.features(x.flip(3) if mirrored else x).float().flatten(1)

    return collect(network, batches.to(network.mean.device), features, image_size=size)


def frozen_probe(
    network: Network,
    train: Batches,
    validation: Batches,
    test: Batches,
    *,
    seed: Key,
    strengths: Sequence[float] = (0.01, 0.1, 1.0, 10.0),
    iterations: int = 1000,
) -> ProbeResult:
    """Train a last layer alone, on the features of a (pretrained) network that is left as it is.

    Features of the training pictures and of their mirror images, in evaluation mode, standardised; one multinomial
    logistic regression for every C, read on pictures as they are.

    Args:
        train: the published rows; a tenth of them is held out class by class, for a trainer without clean data.
        validation: clean rows, for a trainer who has some.
        test: clean rows that choose nothing; classes of both are matched with the training classes by name.
        seed: of the rows held out.
        strengths: the values of C, as in scikit-learn.
        iterations: of L-BFGS, at most.

    Raises:
        ValueError: no strengths, one that is not positive, or an empty split.

    Source: METHODS_NEW N30. What counts is its difference from the same call on clean training rows. Classes of
    CIFAR-10 are among those of ImageNet: weights pretrained there have seen them.
    Deviations: none known; the sheet leaves open that mirror images are training rows, and that both choices are among
    probes fitted to the nine tenths.
    """
    if not strengths:
        raise ValueError("expected at least one strength, got none")
    device = network.mean.device
    fitted, held_out = train.to(device).split(0.1, key=seed)
    others = [held_out, *(split.to(device).relabel(train.classes) for split in (validation, test))]
    for name, split in zip(("held out", "validation", "test"), others, strict=True):
        if not len(split):
            raise ValueError(f"expected at least one {name} row, got none ({len(train)} training rows)")
    once = frozen_features(network, fitted)
    features = torch.cat([once, frozen_features(network, fitted, mirrored=True)])
    judged = [(frozen_features(network, split), split.labels) for split in others]
    points = []
    for strength in strengths:
        probe = fit_probe(
            features, fitted.labels.repeat(2), classes=len(train.classes), strength=strength, iterations=iterations
        )
        own = accuracy(probe, once, fitted.labels)
        held, clean, tested = (accuracy(probe, *rows) for rows in judged)
        points.append(
            ProbePoint(
                strength=strength,
                train_accuracy=own,
                held_out_accuracy=held,
                validation_accuracy=clean,
                test_accuracy=tested,
            )
        )
    return ProbeResult(points=tuple(points))
