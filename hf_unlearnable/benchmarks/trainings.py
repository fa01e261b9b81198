"""Our trainings against plain loops of the same networks, batches and steps."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from hf_unlearnable.batches import Batches
from hf_unlearnable.benchmarks import plain_loops
from hf_unlearnable.benchmarks.timing import SEED, compare, seconds, wait
from hf_unlearnable.defenses.adversarial import Adversarial
from hf_unlearnable.defenses.base import Defense
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.defenses.ueraser import Ueraser
from hf_unlearnable.environment import hardware
from hf_unlearnable.fitting import Setup
from hf_unlearnable.networks import create_network
from hf_unlearnable.poisons.robust_em import MinMaxMinPoison, RobustEmPoison
from hf_unlearnable.recipes import Recipe, recipe
from hf_unlearnable.training import own_randomness
from hf_unlearnable.victim import train_to_end

LOSSES: dict[str, tuple[Defense, plain_loops.LossOf, int]] = {
    "erm": (Erm(), plain_loops.plain_loss, 16),
    "adversarial": (Adversarial(), plain_loops.adversarial_loss, 4),
    "ueraser, five copies": (Ueraser(mode="max"), plain_loops.UeraserLoss(), 4),
}
"""Each victim's loss in both forms, and how many steps are timed."""
FEW: dict[str, Any] = {"pgd_steps": 2, "eot": 5, "adversarial_steps": 3}
"""Settings of the surrogates on a CPU: a whole step would take minutes."""


def benchmark_train(rows: Batches, name: str, rounds: int, quick: bool) -> dict[str, Any]:
    """Steps of victims and surrogates, both ways, in pictures per second and as ratios.

    Args:
        rows: training pictures, on the CPU.
    """
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    device = str(accelerator.device)
    backbone = "resnet18" if device.startswith("cuda") else "tiny"
    batch = min(16 if quick else 128, len(rows) // 2)
    few = rows.select(torch.arange(min(64, len(rows))))
    result: dict[str, Any] = {
        "data": name,
        "network": f"{backbone} on {hardware(accelerator)['device']}",
        "precision": f"ours {accelerator.mixed_precision.replace('no', 'float32')}, plain loop float32",
        "batch": batch,
    }
    found: dict[str, Any] = {}
    for title, (defense, loss, usual) in LOSSES.items():
        steps = 2 if quick else usual
        short = Recipe(name="benchmark", steps=steps, batch_size=batch, learning_rate=0.01, schedule="onecycle")
        how = {"recipe": short, "backbone": backbone, "seed": SEED}
        variants: dict[str, Callable[[], object]] = {
            "ours": partial(train_ours, rows, few, defense=defense, accelerator=accelerator, **how),
            "plain loop": partial(plain_loops.train_plainly, rows, few, loss=loss, device=device, **how),
        }
        found[title] = _both(variants, batch * steps, rounds)
    for title, poison in {"robust-em": RobustEmPoison(), "min-max-min": MinMaxMinPoison()}.items():
        settled = poison if device.startswith("cuda") else dataclasses.replace(poison, **FEW)
        chosen = Recipe(name="benchmark", steps=1000, batch_size=batch, schedule="constant", drop_last=True)
        setup = Setup(train=rows.to(device), recipe=chosen, backbone=backbone, seed=SEED, accelerator=accelerator)
        fit, numbers = settled.fitting(setup), itertools.count()
        plain = plain_loops.RobustStep(rows, settled, backbone=backbone, batch_size=batch, device=device)

        def ours(fit: Any = fit, numbers: Any = numbers) -> None:
            fit.step(next(numbers))
            wait(device)

        def loop(plain: Any = plain) -> None:
            plain()
            wait(device)

        with own_randomness(accelerator.device):
            passes = f"{title}, a step of {fit.passes} passes"
            found[passes] = _both({"ours": ours, "plain loop": loop}, batch, rounds)
    if not quick:
        erm = found["erm"]["ours"]["pictures_per_second"]
        found["erm"]["ours"]["share_of_matmul_speed"] = erm * flops(backbone, rows) / matmul_speed(device)
    return {**result, "trainings": found}


def _both(variants: dict[str, Callable[[], object]], pictures: int, rounds: int) -> dict[str, dict[str, float]]:
    for function in variants.values():
        function()
    return compare(variants, dict.fromkeys(variants, pictures), rounds)


def train_ours(
    rows: Batches,
    test: Batches,
    *,
    recipe: Recipe,
    backbone: str,
    seed: int,
    defense: Defense,
    accelerator: Accelerator,
) -> float:
    """Train a victim as `scripts/train_victim.py` does; its accuracy on the test rows."""
    network = create_network(backbone, num_classes=len(rows.classes), image_size=rows.image_size, seed=seed)
    how: dict[str, Any] = {"recipe": recipe, "defense": defense, "accelerator": accelerator, "seed": seed}
    found = train_to_end(network, rows, test, progress=False, **how)
    wait(str(accelerator.device))
    return found.test_accuracy


def benchmark_accuracy(rows: Batches, test: Batches, name: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Whole plain trainings both ways, by the recipe "tiny" ("fast" on a GPU): test accuracies in percent, seed by
    seed, and their means."""
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    device = str(accelerator.device)
    backbone, chosen = ("resnet18", recipe("fast")) if device.startswith("cuda") else ("tiny", recipe("tiny"))
    chosen = dataclasses.replace(chosen, drop_last=True)
    found: dict[str, list[float]] = {"ours": [], "plain loop": []}
    for seed in seeds:
        how: dict[str, Any] = {"recipe": chosen, "backbone": backbone, "seed": seed}
        mine = train_ours(rows, test, defense=Erm(), accelerator=accelerator, **how)
        found["ours"].append(100 * mine)
        plain = plain_loops.train_plainly(rows, test, loss=plain_loops.plain_loss, device=device, **how)
        found["plain loop"].append(100 * plain)
    titles = [f"seed {seed}" for seed in seeds]
    table = {
        who: dict(zip(titles, some, strict=True)) | {"mean": statistics.fmean(some)} for who, some in found.items()
    }
    return {"data": f"{name}, {len(rows)} rows, {chosen.epochs} epochs, {backbone}", "test accuracy, %": table}


def flops(backbone: str, rows: Batches) -> float:
    """Floating-point operations of a forward and backward pass for one picture."""
    network = create_network(backbone, num_classes=len(rows.classes), image_size=rows.image_size, seed=SEED)
    x = torch.zeros(8, 3, *rows.image_size)
    with FlopCounterMode(display=False) as counter:
        network(x).sum().backward()
    return counter.get_total_flops() / len(x)


def matmul_speed(device: str) -> float:
    """Operations a second of large matrix products, in bf16 on a GPU, in float32 on a CPU."""
    gpu = device.startswith("cuda")
    size = 8192 if gpu else 2048
    a = torch.ones(size, size, device=device, dtype=torch.bfloat16 if gpu else torch.float32)

    def product() -> None:
        torch.mm(a, a)
        wait(device)

    product()
    return 2 * size**3 / min(seconds(product) for _ in range(5))
