"""Training surrogates, and mapping their poisons, in steps of plain training."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset, Image

from hf_unlearnable import columns
from hf_unlearnable.batches import Batches
from hf_unlearnable.benchmarks.mapping import mapped
from hf_unlearnable.benchmarks.timing import SEED, beside, compare, in_steps, wait
from hf_unlearnable.environment import hardware
from hf_unlearnable.fitting import Setup
from hf_unlearnable.poisons.em import EmPoison
from hf_unlearnable.poisons.pil import PilPoison
from hf_unlearnable.poisons.robust_em import MinMaxMinPoison, RobustEmPoison, SemPoison
from hf_unlearnable.poisons.with_surrogate import SurrogatePoison
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.training import as_input, own_randomness

SURROGATES: dict[str, SurrogatePoison] = {
    "robust-em": RobustEmPoison(),
    "sem": SemPoison(),
    "min-max-min": MinMaxMinPoison(),
    "em": EmPoison(max_rounds=1),
    "pil": PilPoison(),
}


def benchmark_surrogate(source: Dataset, name: str, rounds: int, quick: bool) -> dict[str, Any]:
    """All that `scripts/benchmark.py surrogate` tells about one dataset."""
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    device = str(accelerator.device)
    backbone = "resnet18" if device.startswith("cuda") else "tiny"
    train = Batches.load(source, progress=False, device=device)
    batch = min(16 if quick else 128, len(train))
    poisons = {
        title: dataclasses.replace(poison, pgd_steps=2, eot=1, adversarial_steps=1)
        if quick and isinstance(poison, RobustEmPoison)
        else poison
        for title, poison in SURROGATES.items()
    }
    recipe = Recipe(name="benchmark", steps=1000, batch_size=batch, schedule="constant", augmentation="none")
    setup = Setup(train=train, recipe=recipe, backbone=backbone, seed=SEED, accelerator=accelerator)
    network = setup.network()
    optimizer = setup.sgd(network)
    x, y = as_input(train.pixels[:batch]), train.labels[:batch]

    def plain() -> None:
        optimizer.zero_grad()
        with accelerator.autocast():
            loss = F.cross_entropy(network(x).float(), y)
        loss.backward()
        optimizer.step()
        wait(device)

    def steps_of(poison: SurrogatePoison, numbers: Iterator[int]) -> Callable[[], None]:
        linear = isinstance(poison, PilPoison)
        fit = poison.fitting(dataclasses.replace(setup, backbone=poison.backbone if linear else backbone))

        def one() -> None:
            fit.step(next(numbers))
            wait(device)

        return one

    steps: dict[str, Callable[[], object]] = {"plain training": plain}
    ideal: dict[str, float | None] = {"plain training": 1.0}
    for title, poison in poisons.items():
        if isinstance(poison, EmPoison):
            first = poison.train_steps_per_round
            steps["em, network"] = steps_of(poison, itertools.cycle(range(first)))
            steps["em, noise"] = steps_of(poison, itertools.cycle(range(first, first + len(train) // batch)))
            ideal |= {"em, network": 1.0, "em, noise": float(poison.pgd_steps or 0)}
        else:
            steps[title] = steps_of(poison, itertools.count())
            linear = isinstance(poison, PilPoison)
            ideal[title] = None if linear else poison.fitting(setup).passes
    with own_randomness(accelerator.device):
        for function in steps.values():
            function()
        one_step = compare(steps, dict.fromkeys(steps, 1), rounds)

    plain_source = source.cast_column(columns.image_column(source.features), Image(decode=False))
    maps: dict[str, dict[str, float]] = {}
    for title, poison in poisons.items():
        linear = isinstance(poison, PilPoison)
        known = poison.fit(
            train,
            recipe=dataclasses.replace(recipe, steps=1),
            backbone=poison.backbone if linear else backbone,
            accelerator=accelerator,
            progress=False,
        )
        made = dataclasses.replace(type(poison).from_surrogate(known), device=device)
        passes: float | None = None
        if isinstance(poison, RobustEmPoison):
            noise = poison.noise_pgd(train.image_size)
            inner = 0 if noise.inner is None else noise.inner.steps
            passes = noise.steps * noise.eot * (1 + inner) * len(source) / batch
        whole = partial(mapped, plain_source, made, batched=True, batch_size=500)
        maps[title] = beside(in_steps(whole, plain, max(1, rounds // 3)), passes)
    return {
        "data": name,
        "network": f"{backbone} on {hardware(accelerator)['device']}",
        "batch": batch,
        "one step": {title: beside(found["time_over_first"], ideal[title]) for title, found in one_step.items()},
        f"map of {len(source)} pictures": maps,
    }
