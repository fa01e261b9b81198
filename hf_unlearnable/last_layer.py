"""DFR: fit the last layer of a victim anew, to a few clean pictures."""

import copy
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from hf_unlearnable.augment import CropFlip
from hf_unlearnable.batches import Batches
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.keys import Key
from hf_unlearnable.networks import Network, create_network
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.training import as_input, augmented, restored_modes
from hf_unlearnable.victim import evaluate, train_to_end


def refit_last_layer(
    network: Network,
    clean: Batches,
    *,
    bn: Literal["eval", "train"] = "eval",
    epochs: int = 15,
    batch_size: int = 1024,
    learning_rate: float = 0.5,
    seed: Key,
) -> tuple[Network, float]:
    """DFR: a copy of the network whose last linear layer is fitted to clean rows, from where it stands.

        min_{W, b} mean CE(W features(x) + b, y)

    L-BFGS over random batches under crop and flip, 20 inner iterations a batch, its memory kept from batch to batch.

    Args:
        clean: labelled rows that were not poisoned (5,000 in the source).
        bn: "eval" changes the last layer alone; "train", the source's way, normalises by the batch's statistics and
            moves the running ones, so that the trunk is adapted to clean pictures too. It takes some 50 batches in all
            (99.5 % of the way at momentum 0.1) until those agree with what the layer was fitted to.
        batch_size: rows of a batch.
        learning_rate: step length of L-BFGS, which makes no line search.
        seed: of the order and of crop and flip.

    Returns:
        The copy, and the step length with which its search did not diverge.

    Raises:
        TypeError: the network does not end with a linear layer.
        ValueError: no rows.
        FloatingPointError: the search diverged, and did so with steps of down to a 32nd of that length.

    Source: METHODS_NEW N23.
    Deviations: a search that diverges is begun anew with half the step length, and a warning; features once a batch, so
    "train" moves the running statistics once where the source does at each of the inner evaluations; dropout is off;
    for the best of all checkpoints call this on each.
    """
    for length in [learning_rate / 2**halvings for halvings in range(6)]:
        refit = _refit(network, clean, bn, epochs, batch_size, length, seed)
        if refit is not None:
            if length != learning_rate:
                warnings.warn(
                    f"the search for the last layer diverged with steps of {learning_rate}: their length is "
                    f"{length} now",
                    stacklevel=2,
                )
            return refit, length
    raise FloatingPointError(f"the search diverged: lower the learning rate, got {learning_rate}")


def _refit(
    network: Network, clean: Batches, bn: str, epochs: int, batch_size: int, learning_rate: float, seed: Key
) -> Network | None:
    """None where the search diverged."""
    refit = copy.deepcopy(network)
    layer = refit.backbone.get_classifier()
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"expected a network that ends with a linear layer, got {type(layer).__name__}")
    if not len(clean):
        raise ValueError("expected at least one clean row, got none")
    clean = clean.to(network.mean.device)
    augmentation = CropFlip(padding=round(min(clean.image_size) / 8))
    weight, bias = (None if part is None else part.detach().clone() for part in (layer.weight, layer.bias))
    assert weight is not None
    free = [part.requires_grad_() for part in (weight, bias) if part is not None]
    optimizer = torch.optim.LBFGS(free, lr=learning_rate)
    with restored_modes(refit):
        refit.eval()
        if bn == "train":
            for module in refit.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.train()
        for epoch in range(epochs):
            batches = clean.epoch(epoch, key=seed, batch_size=batch_size)
            for step, batch in enumerate(batches, epoch * clean.steps(batch_size)):
                with torch.no_grad():
                    features = refit.features(as_input(augmented(batch, augmentation, seed, step)))

                def objective(features: Tensor = features, labels: Tensor = batch.labels) -> Tensor:
                    optimizer.zero_grad()
                    loss = F.cross_entropy(F.linear(features, weight, bias), labels)
                    loss.backward()
                    return loss

                optimizer.step(objective)  # type: ignore[arg-type]  (the closure returns a tensor)
    if not all(bool(part.isfinite().all()) for part in free):
        return None
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return refit


@dataclass(frozen=True, kw_only=True)
class LastLayerResult:
    """Test accuracies around a re-fitted last layer. The first two mean little without the last two.

    Args:
        before: of the network as it was.
        refitted: with its last layer fitted to the clean rows.
        random_trunk: of a network that was never trained, with its last layer fitted in the same way.
        from_scratch: of the same architecture, trained on the same clean rows alone.
        refitted_step, random_trunk_step: step lengths of the two searches: shorter than asked for where one diverged.
    """

    before: float
    refitted: float
    random_trunk: float
    from_scratch: float
    clean_rows: int
    refitted_step: float
    random_trunk_step: float

    @property
    def learnt(self) -> float:
        """What the published rows taught the trunk: refitted less the better control. Not above 0: nothing shown."""
        return self.refitted - max(self.random_trunk, self.from_scratch)


def dfr_with_controls(
    network: Network,
    clean: Batches,
    test: Batches,
    *,
    recipe: Recipe,
    accelerator: Accelerator,
    seed: int,
    bn: Literal["eval", "train"] = "eval",
    epochs: int = 15,
    batch_size: int = 1024,
    learning_rate: float = 0.5,
    progress: bool = True,
) -> LastLayerResult:
    """`refit_last_layer`, and what the same clean rows give without the published ones.

    Args:
        network: a victim of the published rows; left as it is.
        clean: labelled rows that were not poisoned; their classes are numbered as the network's are.
        test: clean rows, matched with those classes by name.
        recipe: of the training from scratch, on all clean rows; its last epoch counts.
        seed: of the controls' initial weights, and of all that is drawn.
        bn, epochs, batch_size, learning_rate: of the re-fit; see `refit_last_layer`.

    Raises:
        as `refit_last_layer` and `victim.train`.

    Source: METHODS_NEW N23. Deviations: as `refit_last_layer`.
    """
    device = accelerator.device
    test = test.relabel(clean.classes).to(device)
    network = copy.deepcopy(network).to(device)

    def fresh() -> Network:
        return create_network(
            network.architecture,
            num_classes=network.num_classes,
            image_size=network.image_size or clean.image_size,
            seed=seed,
            mean=network.mean.flatten().tolist(),
            std=network.std.flatten().tolist(),
        ).to(device)

    def refitted(trunk: Network) -> tuple[float, float]:
        refit, step = refit_last_layer(
            trunk, clean, bn=bn, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed
        )
        return _accuracy(refit, test, accelerator), step

    scratch = train_to_end(
        fresh(),
        clean,
        test,
        recipe=recipe,
        defense=Erm(),
        accelerator=accelerator,
        seed=seed,
        progress=progress,
    )
    accuracy, step = refitted(network)
    random_accuracy, random_step = refitted(fresh())
    return LastLayerResult(
        before=_accuracy(network, test, accelerator),
        refitted=accuracy,
        random_trunk=random_accuracy,
        from_scratch=scratch.test_accuracy,
        clean_rows=len(clean),
        refitted_step=step,
        random_trunk_step=random_step,
    )


def _accuracy(network: Network, test: Batches, accelerator: Accelerator) -> float:
    confusion = evaluate(network, test, accelerator=accelerator)
    return int(confusion.trace()) / int(confusion.sum())
