"""UEraser's augmentation against kornia's, and the steps of defenses in steps of plain training."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset

from hf_unlearnable.augment import Augmentation, augment
from hf_unlearnable.batches import Batches
from hf_unlearnable.benchmarks.plain_loops import kornia_chain
from hf_unlearnable.benchmarks.timing import SEED, beside, compare, wait
from hf_unlearnable.defenses.adversarial import Adversarial
from hf_unlearnable.defenses.base import Defense
from hf_unlearnable.defenses.ueraser import Ueraser
from hf_unlearnable.environment import hardware, keep_freed_memory
from hf_unlearnable.erasing import UeraserAugmentation
from hf_unlearnable.fitting import Setup
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.training import as_input, own_randomness


def benchmark_augment(source: Dataset, name: str, rounds: int, quick: bool) -> dict[str, Any]:
    """UEraser's chain and its parts against kornia's modules of the same settings on one batch; then one training step
    of UEraser and of adversarial training in steps of plain training, beside the passes that they consist of."""
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    device = str(accelerator.device)
    if accelerator.device.type == "cpu":
        keep_freed_memory()  # as `train` does
    backbone = "resnet18" if device.startswith("cuda") else "tiny"
    train = Batches.load(source, progress=False, device=device)
    batch = min(16 if quick else 128, len(train))
    x, y = as_input(train.pixels[:batch]), train.labels[:batch]
    generator = torch.Generator(device=device).manual_seed(SEED)
    whole = UeraserAugmentation(max_shear=54.0)
    parts: dict[str, Augmentation] = {
        "whole": whole,
        "plasma": whole.parts["plasma"],
        "TrivialAugment": whole.parts["trivial"],
    }
    modules = kornia_chain(whole)
    setup = Setup(
        train=train,
        recipe=Recipe(name="benchmark", steps=1000, batch_size=batch, schedule="constant", augmentation="none"),
        backbone=backbone,
        seed=SEED,
        accelerator=accelerator,
    )
    network = setup.network()
    optimizer = setup.sgd(network)

    def timed(function: Callable[[], object]) -> Callable[[], None]:
        def one() -> None:
            function()
            wait(device)

        return one

    def step(loss: Callable[[], torch.Tensor]) -> None:
        optimizer.zero_grad()
        with accelerator.autocast():
            value = loss()
        value.backward()
        optimizer.step()

    def plain(times: int) -> torch.Tensor:
        return F.cross_entropy(network(x.repeat(times, 1, 1, 1)).float(), y.repeat(times))

    def defended(defense: Defense) -> torch.Tensor:
        return defense(network, x, y, progress=0.0, generator=generator)

    copies, ascent = Ueraser().copies, Adversarial().pgd_steps
    steps: dict[str, Callable[[], object]] = {
        "plain training": timed(partial(step, partial(plain, 1))),
        f"plain, {copies} batches in one": timed(partial(step, partial(plain, copies))),
        "ueraser, lite": timed(partial(step, partial(defended, Ueraser(mode="lite")))),
        f"ueraser, {copies} copies": timed(partial(step, partial(defended, Ueraser(mode="max")))),
        f"adversarial, {ascent} steps": timed(partial(step, partial(defended, Adversarial()))),
    }
    ideal = dict(zip(steps, (1.0, float(copies), 1.0, float(copies), 1.0 + ascent), strict=True))
    result: dict[str, Any] = {
        "data": name,
        "network": f"{backbone} on {hardware(accelerator)['device']}",
        "batch": batch,
    }
    with own_randomness(accelerator.device):
        over = {}
        for title, own in parts.items():
            pair: dict[str, Callable[[], object]] = {
                "ours": timed(partial(augment, x, own, generator=generator)),
                "kornia": timed(partial(modules[title], x)),
            }
            for function in pair.values():
                function()
            over[title] = compare(pair, dict.fromkeys(pair, batch), rounds * (1 if quick else 5))
        result["augmentation"] = {
            title: {
                "pictures_per_second": found["ours"]["pictures_per_second"],
                "kornia_over_ours": found["kornia"]["time_over_first"],
            }
            for title, found in over.items()
        }
        for function in steps.values():
            function()
        found = compare(steps, dict.fromkeys(steps, 1), rounds)
    result["one step"] = {title: beside(found[title]["time_over_first"], ideal[title]) for title in steps}
    return result
