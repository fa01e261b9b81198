"""D-VAE: a variational autoencoder takes the poison, which is easy to predict from the class, off the picture."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_unlearnable.batches import Batches
from hf_unlearnable.defenses.dvae_network import LATENT, DisentanglingVae, create, loss
from hf_unlearnable.defenses.learned import LearnedDefense
from hf_unlearnable.draws import FreshDraws, RandomNumbers
from hf_unlearnable.images import Images, Labels, to_float, to_uint8
from hf_unlearnable.keys import torch_generator

_CHUNK = 250


@dataclass(frozen=True, kw_only=True)
class Dvae(LearnedDefense):
    """Two autoencoders that split a picture into a reconstruction r and a perturbation p of its class.

        minimise MSE(r, x) + MSE(clip(r + p), x) + kl_weight max(KL, kl_floor) + [after 1/6] max(mean p^2, power_floor)

        x1 = clip(x - p_1(x, y))       rounded to grey levels; the second autoencoder is trained on these
        x2 = clip(x1 - p_2(x1, y))
        x' = r_2(x2, y)

    The latent is drawn, for training and for purifying alike. The label of a picture is needed.

    Args:
        vae_epochs, vae_batch_size, vae_learning_rate: of each autoencoder: Adam, with the rate falling as a cosine once
            an epoch, gradients clipped to norm 5, no augmentation, whole batches only. The bound on the perturbation's
            power holds after a sixth of the epochs.
        kl_weight: of the latent's divergence.
        kl_floors: divergence in nats below which it does not count, of the first and the second autoencoder.
        power_floor: mean square of the perturbation below which it does not count.

    Raises:
        ValueError: not fitted, no labels, a label or a picture's size that was not fitted, a setting outside its range;
            in `fit`: no rows, or pictures with an odd side.
        FloatingPointError: the loss of an epoch is not finite.

    Source: D-VAE (ICML 2024; METHODS_NEW N27), with the variant of its shipped scripts: the perturbation is decoded
    from class embedding + latent, and the second floor is 3.0.
    Deviations: pictures are rounded, not truncated; x2 is clipped; no classifier is consulted, whose loss was only
    logged there; a split smaller than a batch is one batch.
    """

    name: ClassVar[str] = "d-vae"

    vae_epochs: int = 60
    vae_batch_size: int = 128
    vae_learning_rate: float = 0.005
    kl_weight: float = 0.01
    kl_floors: tuple[float, float] = (1.0, 3.0)
    power_floor: float = 0.002

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.vae_epochs, self.vae_batch_size) < 1 or not self.vae_learning_rate > 0:
            raise ValueError(
                f"expected a positive vae_epochs, vae_batch_size and vae_learning_rate, got {self.vae_epochs}, "
                f"{self.vae_batch_size} and {self.vae_learning_rate}"
            )
        if len(self.kl_floors) != 2 or not min(self.kl_weight, *self.kl_floors, self.power_floor) >= 0:
            raise ValueError(
                f"expected a kl_weight, two kl_floors and a power_floor of 0 or more, got {self.kl_weight}, "
                f"{self.kl_floors} and {self.power_floor}"
            )

    @property
    def needs_labels(self) -> bool:
        return True

    def fit(self, train: Batches, *, seed: int, progress: bool = False) -> Self:
        """With both autoencoders, trained one after the other on the published rows, on their device."""
        height, width = train.image_size
        if not len(train) or height % 2 or width % 2:
            raise ValueError(f"expected rows of pictures with even sides, got {len(train)} of {height} x {width}")
        first = self._train(train, 0, seed, progress)
        generator = torch_generator(seed, self.name, "removal", device=train.device)
        parts = []
        for pixels, labels in train.chunks(_CHUNK):
            x1 = _without(first, to_float(pixels), labels, FreshDraws(len(labels), generator), "first")
            parts.append(to_uint8(x1))
        second = self._train(replace(train, pixels=torch.cat(parts)), 1, seed, progress)
        states = {"first": first.state_dict(), "second": second.state_dict()}
        return self.having_learnt(
            {f"{stage}.{name}": tensor for stage, state in states.items() for name, tensor in state.items()}, train
        )

    def _train(self, train: Batches, stage: int, seed: int, progress: bool) -> DisentanglingVae:
        key = f"stage {stage + 1}"
        initial = torch_generator(seed, self.name, key, "weights").initial_seed()
        model = create(len(train.classes), train.image_size, initial).to(train.device).train()
        adam, size = torch.optim.Adam(model.parameters()), min(self.vae_batch_size, len(train))
        with torch.enable_grad():
            for epoch in tqdm(range(self.vae_epochs), desc=f"{self.name}: {key} of 2", disable=not progress):
                for group in adam.param_groups:
                    group["lr"] = self.vae_learning_rate * (1 + math.cos(math.pi * epoch / self.vae_epochs)) / 2
                floor = self.power_floor if epoch > self.vae_epochs / 6 else None
                draws = torch_generator(seed, self.name, key, epoch, device=train.device)
                value = torch.zeros((), device=train.device)
                for batch in train.epoch(epoch, key=seed, batch_size=size, drop_last=True):
                    x = to_float(batch.pixels)
                    noise = FreshDraws(len(x), draws).normal(LATENT, *model.latent_size)
                    value = loss(
                        model(x, batch.labels, noise),
                        x,
                        kl_weight=self.kl_weight,
                        kl_floor=self.kl_floors[stage],
                        power_floor=floor,
                    )
                    adam.zero_grad()
                    value.backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                    adam.step()
                if not value.isfinite():
                    raise FloatingPointError(f"{self.name}, {key}: the loss is not finite after epoch {epoch + 1}")
        return model.eval()

    def alter(self, x: Images, y: Labels | None, draws: RandomNumbers) -> Images:
        known = self.known(x, y)
        assert y is not None
        classes = len(known["first.classes.weight"])
        first, second = (_loaded(known, f"{stage}.", classes, x) for stage in ("first", "second"))
        x1 = to_float(to_uint8(_without(first, x, y, draws, "first")))
        x2 = _without(second, x1, y, draws, "second")
        with torch.no_grad():
            return second(x2, y, _latent(second, x2, draws, "reconstruction")).picture


def _without(model: DisentanglingVae, x: Images, y: Labels, draws: RandomNumbers, purpose: str) -> Images:
    with torch.no_grad():
        return (x - model(x, y, _latent(model, x, draws, purpose)).perturbation).clamp(0, 1)


def _latent(model: DisentanglingVae, x: Images, draws: RandomNumbers, purpose: str) -> Tensor:
    return draws.normal(LATENT, *model.latent_size, purpose=purpose).to(x)


def _loaded(tensors: Mapping[str, Tensor], prefix: str, classes: int, x: Images) -> DisentanglingVae:
    with torch.device("meta"):
        model = DisentanglingVae(classes, (x.shape[2], x.shape[3]))
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    model.load_state_dict(own, assign=True)
    return model.eval()
