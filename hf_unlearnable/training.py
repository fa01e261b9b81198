"""What every training loop here needs: its batches in order, its randomness from the seed and the step, and one
exchange between processes."""

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from hf_unlearnable.augment import Augmentation, CropFlip, ResizedCropFlip, ShiftFlip, take
from hf_unlearnable.batches import Batch, Batches
from hf_unlearnable.images import Images, Pixels, to_float
from hf_unlearnable.keys import Key, torch_generator
from hf_unlearnable.networks import memory_format
from hf_unlearnable.recipes import Recipe


class Unfinished(RuntimeError):
    """The time was up before the training was: the same call with the same arguments goes on."""


def stream(training: Batches, recipe: Recipe, seed: Key, rank: int, world: int, step: int) -> Iterator[Batch]:
    """This process's batches from optimiser step `step` on, without end."""
    epoch, done = divmod(step, training.steps(recipe.batch_size, drop_last=recipe.drop_last))
    while True:
        yield from training.epoch(
            epoch,
            key=seed,
            batch_size=recipe.batch_size,
            drop_last=recipe.drop_last,
            rank=rank,
            world=world,
            start_step=done,
        )
        epoch, done = epoch + 1, 0


def standard_augmentation(recipe: Recipe, image_size: tuple[int, int]) -> Augmentation | None:
    """The recipe's crop and flip for pictures of this size."""
    if recipe.augmentation == "shift_flip":
        return ShiftFlip(shift=recipe.crop_padding)
    if recipe.augmentation == "resized_crop_flip":
        return ResizedCropFlip()
    padding = round(recipe.crop_padding * min(image_size)) if "crop" in recipe.augmentation else 0
    flip = 0.5 if "flip" in recipe.augmentation else 0.0
    return CropFlip(padding=padding, flip=flip) if padding or flip else None


def augmented(
    batch: Batch, augmentation: Augmentation | None, seed: Key, step: int, pictures: Images | None = None
) -> Pixels | Images:
    """The batch (or what became of its pictures) under views that do not depend on the number of processes."""
    x = batch.pixels if pictures is None else pictures
    if augmentation is None:
        return x
    draws = augmentation.draw(batch.size, generator=torch_generator(seed, "augment", step))
    return augmentation.apply(x, take(draws, batch.part))


def as_input(pixels: Pixels | Images) -> Images:
    """uint8 pixels, or float ones in [0, 1], as a network's input in [0, 1]."""
    x = pixels if pixels.is_floating_point() else to_float(pixels)
    return x.contiguous(memory_format=memory_format(x.device))


def average_over_processes(
    sums: Float[Tensor, " s"], weights: list[nn.Parameter], model: nn.Module, accelerator: Accelerator
) -> Float[Tensor, " s"]:
    """The sums over all processes; gradients and running statistics become their means. One exchange for all."""
    if accelerator.num_processes == 1:
        return sums
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    parts = [weight.grad for weight in weights if weight.grad is not None]
    for module in model.modules():
        if not module.training or not isinstance(module, nn.modules.batchnorm._NormBase):
            continue
        if module.running_mean is not None:
            parts += [part for part in (module.running_mean, module.running_var) if part is not None]
    flat = accelerator.reduce(torch.cat([part.detach().float().flatten() for part in parts] + [sums]), "mean")
    assert isinstance(flat, Tensor)
    *means, mean_sums = flat.split([part.numel() for part in parts] + [len(sums)])
    for part, mean in zip(parts, means, strict=True):
        part.detach().copy_(mean.view(part.shape))
    return mean_sums * accelerator.num_processes


def seed_layers(seed: Key, step: int, rank: int, device: torch.device) -> None:
    """Dropout and the like draw from torch's global generators, which are the training's own here."""
    number = torch_generator(seed, "layers", step, rank).initial_seed()
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def own_randomness(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The global generators are put back afterwards."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextlib.contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Every module's mode is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
