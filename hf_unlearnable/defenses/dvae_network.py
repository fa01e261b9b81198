"""The network of D-VAE: a picture in, a blurry copy and a perturbation of its class out."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from hf_unlearnable.images import Images, Labels

LATENT = 256
_WIDTH = 128


class Parts(NamedTuple):
    """What a picture is taken apart into.

    Args:
        picture: the reconstruction, in (0, 1).
        perturbation: of any sign.
        divergence: KL of the latent from N(0, 1), in nats: summed over channels, the mean over pictures and places.
    """

    picture: Images
    perturbation: Images
    divergence: Float[Tensor, ""]


class DisentanglingVae(nn.Module):
    """Encoder (the beginning of a CIFAR ResNet-18, to half the resolution), a Gaussian latent, and two decoders.

    Args:
        num_classes: of the embedding that the perturbation is decoded from.
        image_size: height and width in pixels, both even.
    """

    def __init__(self, num_classes: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.latent_size = (image_size[0] // 2, image_size[1] // 2)
        shortcut = nn.Sequential(nn.Conv2d(64, _WIDTH, 1, stride=2, bias=False), nn.BatchNorm2d(_WIDTH))
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            BasicBlock(64, 64),
            BasicBlock(64, 64),
            BasicBlock(64, _WIDTH, stride=2, downsample=shortcut),
        )
        self.mean, self.log_variance = nn.Conv2d(_WIDTH, LATENT, 1), nn.Conv2d(_WIDTH, LATENT, 1)
        self.widen = nn.Conv2d(LATENT, _WIDTH, 1)
        self.classes = nn.Embedding(num_classes, _WIDTH * math.prod(self.latent_size))
        self.picture, self.perturbation = _decoder(), _decoder()

    def forward(self, x: Images, y: Labels, noise: Float[Tensor, "b 256 h2 w2"]) -> Parts:
        """The parts of x; the latent is mean + noise * deviation."""
        features = self.encoder(x)
        mean, log_variance = self.mean(features), self.log_variance(features)
        z = self.widen(mean + noise * (log_variance / 2).exp())
        of_class = self.classes(y).view(z.shape)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        return Parts(self.picture(z).sigmoid(), self.perturbation(of_class + z), divergence)


def _decoder() -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(_WIDTH, 64, 4, stride=2, padding=1),
        nn.ConvTranspose2d(64, 64, 3, padding=1),
        nn.InstanceNorm2d(64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 3, padding=1),
        nn.InstanceNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 3, 3, padding=1),
    )


def loss(parts: Parts, x: Images, *, kl_weight: float, kl_floor: float, power_floor: float | None) -> Tensor:
    """MSE(picture, x) + MSE(clip(picture + perturbation), x) + kl_weight * max(KL, kl_floor), and then
    max(mean perturbation^2, power_floor) where that is wanted."""
    whole = (parts.picture + parts.perturbation).clamp(0, 1)
    total = F.mse_loss(parts.picture, x) + F.mse_loss(whole, x) + kl_weight * parts.divergence.clamp_min(kl_floor)
    if power_floor is None:
        return total
    return total + parts.perturbation.square().mean().clamp_min(power_floor)


def create(num_classes: int, image_size: tuple[int, int], seed: int) -> DisentanglingVae:
    """A network on the CPU whose weights depend on the seed alone; the global generators are left as they were."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return DisentanglingVae(num_classes, image_size)
