"""Trainings in the manner of the papers' released code, to time ours against: float32, channels first, pictures through
PIL and a `DataLoader` on the CPU; surrogates take one copy of the batch after the other, each under one crop."""

from collections.abc import Callable, Iterator
from typing import cast

import kornia.augmentation
import kornia.augmentation.auto
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from hf_unlearnable.batches import Batches
from hf_unlearnable.defenses.adversarial import Adversarial
from hf_unlearnable.erasing import UeraserAugmentation
from hf_unlearnable.images import Images, Labels
from hf_unlearnable.networks import create_network
from hf_unlearnable.poisons.robust_em import RobustEmPoison
from hf_unlearnable.recipes import Recipe

LossOf = Callable[[nn.Module, Images, Labels], Tensor]


class Pictures(Dataset):
    """Rows as torchvision's CIFAR-10 gives them: an array to a PIL picture, crop, flip, a tensor."""

    def __init__(self, rows: Batches, padding: int | None) -> None:
        self.arrays = np.ascontiguousarray(rows.pixels.permute(0, 2, 3, 1).cpu().numpy())
        self.labels = rows.labels.tolist()
        crop = [] if padding is None else [transforms.RandomCrop(rows.image_size, padding)]
        flip = [] if padding is None else [transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose([*crop, *flip, transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return cast(Tensor, self.transform(PIL.Image.fromarray(self.arrays[row]))), self.labels[row]


def loaded(rows: Batches, batch_size: int, device: str, *, padding: int | None = None) -> DataLoader:
    """Batches in random order, on the CPU; on a GPU's machine by four processes."""
    workers = 4 if device.startswith("cuda") else 0
    return DataLoader(Pictures(rows, padding), batch_size, shuffle=True, num_workers=workers, drop_last=True)


def on_device(loader: DataLoader, device: str) -> Iterator[tuple[Images, Labels]]:
    """Its batches without end."""
    while True:
        for x, y in loader:
            yield x.to(device), y.to(device)


def train_plainly(
    rows: Batches, test: Batches, *, recipe: Recipe, backbone: str, seed: int, loss: LossOf, device: str
) -> float:
    """Train a victim by a recipe of SGD; its accuracy on the test rows."""
    padding = round(recipe.crop_padding * min(rows.image_size))
    model = create_network(backbone, num_classes=len(rows.classes), image_size=rows.image_size, seed=seed).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )
    total = recipe.total_steps(len(rows) // recipe.batch_size)
    share = [recipe.rate(step, total) / recipe.learning_rate for step in range(total)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share[min(step, total - 1)])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.train()
        batches = on_device(loaded(rows, recipe.batch_size, device, padding=padding), device)
        for _, (x, y) in zip(range(total), batches, strict=False):
            optimizer.zero_grad()
            loss(model, x, y).backward()
            optimizer.step()
            schedule.step()
        model.eval()
        right = 0
        with torch.no_grad():
            for x, y in DataLoader(Pictures(test, None), 500):
                right += int((model(x.to(device)).argmax(1).cpu() == y).sum())
    return right / len(test)


def plain_loss(model: nn.Module, x: Images, y: Labels) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(model(x), y)


def adversarial_loss(model: nn.Module, x: Images, y: Labels) -> Tensor:
    """That of the worst pictures, found by PGD with the defaults of `Adversarial`."""
    own = Adversarial()
    return F.cross_entropy(model(ascended(model, x, y, own.radius, own.pgd_steps, own.radius / 5)), y)


def ascended(model: nn.Module, x: Images, y: Labels, radius: float, steps: int, step_size: float) -> Images:
    """Pictures after a signed ascent from a random start, in evaluation mode."""
    model.eval()
    shown = torch.clamp(x + torch.empty_like(x).uniform_(-radius, radius), 0, 1)
    for _ in range(steps):
        shown.requires_grad_(True)
        gradient = torch.autograd.grad(F.cross_entropy(model(shown), y), shown)[0]
        shown = shown.detach() + step_size * gradient.sign()
        shown = torch.clamp(torch.min(torch.max(shown, x - radius), x + radius), 0, 1)
    model.train()
    return shown.detach()


def kornia_chain(own: UeraserAugmentation) -> dict[str, nn.Module]:
    """UEraser's augmentation of these settings as kornia's modules: the whole and its costly parts."""
    plasma = [
        kornia.augmentation.RandomPlasmaBrightness(
            roughness=own.brightness_roughness, intensity=own.intensity, p=own.brightness
        ),
        kornia.augmentation.RandomPlasmaContrast(roughness=own.contrast_roughness, p=own.contrast),
    ]
    trivial = kornia.augmentation.auto.TrivialAugment()
    whole = nn.Sequential(*plasma, kornia.augmentation.RandomChannelShuffle(p=own.shuffle), trivial)
    return {"whole": whole, "plasma": nn.Sequential(*plasma), "TrivialAugment": trivial}


class UeraserLoss:
    """UEraser's with five copies: kornia's modules on the repeated batch, and the worst copy's loss."""

    def __init__(self, copies: int = 5) -> None:
        self.copies = copies
        self.augmentation = kornia_chain(UeraserAugmentation())["whole"]

    def __call__(self, model: nn.Module, x: Images, y: Labels) -> Tensor:
        shown = self.augmentation(x.repeat(self.copies, 1, 1, 1))
        losses = F.cross_entropy(model(shown), y.repeat(self.copies), reduction="none")
        return losses.view(self.copies, -1).max(0).values.mean()


class RobustStep:
    """Steps of REM's or MMM's surrogate: noise by a descent whose expectation is a loop over one crop of the whole
    batch at a time, then a step of the network.

    Args:
        poison: its settings; DAR is added where it has one.
    """

    def __init__(self, rows: Batches, poison: RobustEmPoison, *, backbone: str, batch_size: int, device: str) -> None:
        self.poison, self.inner = poison, poison.inner == "pgd"
        size = rows.image_size
        self.model = create_network(backbone, num_classes=len(rows.classes), image_size=size, seed=0).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.batches = on_device(loaded(rows, batch_size, device), device)
        self.view = transforms.Compose(
            [transforms.RandomCrop(size, round(min(size) / 8)), transforms.RandomHorizontalFlip()]
        )

    def adversary(self, x: Images, y: Labels) -> Images:
        own = self.poison
        return ascended(self.model, x, y, own.adversarial_epsilon, own.adversarial_steps, own.adversarial_step_size)

    def noise(self, x: Images, y: Labels) -> Images:
        own = self.poison
        delta = torch.empty_like(x).uniform_(-own.epsilon, own.epsilon)
        for _ in range(own.pgd_steps):
            delta.requires_grad_(True)
            total = torch.zeros_like(x)
            for _ in range(own.eot):
                shown = self.view(x + delta)
                if self.inner:
                    shown = shown + (self.adversary(shown.detach(), y) - shown.detach())
                self.model.eval()
                total += torch.autograd.grad(F.cross_entropy(self.model(shown), y), delta)[0]
            delta = torch.clamp(delta.detach() - own.pgd_step_size * total.sign(), -own.epsilon, own.epsilon)
            delta = torch.clamp(x + delta, 0, 1) - x
        return delta

    def __call__(self) -> None:
        x, y = next(self.batches)
        shown = self.adversary(self.view(x + self.noise(x, y)), y)
        self.model.train()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(shown), y)
        if getattr(self.poison, "dar", "none") != "none":
            p = self.model(self.view(x)).softmax(1)
            loss = loss + torch.linalg.vector_norm(p - 1 / p.shape[1], dim=1).mean()
        loss.backward()
        self.optimizer.step()
