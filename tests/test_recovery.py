"""The recovery attack: weights that stay where they may be, and what clean rows bring back there."""

import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_unlearnable.batches import Batches
from hf_unlearnable.networks import Network, create_network
from hf_unlearnable.recipes import changed
from hf_unlearnable.recovery import RECOVERY, NearWeights, distance, recover
from hf_unlearnable.victim import evaluate

QUICK = changed(RECOVERY, epochs=8, batch_size=16, augmentation="none", learning_rate=0.05)


def colours(rows: int, seed: int) -> Batches:
    """Pictures whose class is the brightest channel."""
    pixels = torch.randint(0, 120, (rows, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    labels = torch.arange(rows) % 3
    pixels[torch.arange(rows), labels] += 100
    return Batches(pixels=pixels, labels=labels, classes=("red", "green", "blue"))


def network() -> Network:
    return create_network("tiny", num_classes=3, image_size=16, seed=1)


def run(radius: float, accelerator: Accelerator, victim: Network | None = None, **changes: Any) -> Network:
    how: dict[str, Any] = {"recipe": QUICK, "accelerator": accelerator, "seed": 0, "progress": False, **changes}
    return recover(network() if victim is None else victim, colours(48, 0), radius=radius, **how)


@pytest.mark.parametrize("radius", [0.01, 0.3, 5.0])
def test_projection_in_closed_form(radius: float) -> None:
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1, bias=False))
    model[1].weight.requires_grad_(False)
    near = NearWeights(model, radius, torch.device("cpu"))
    before = [weight.detach().clone() for weight in model.parameters()]
    steps = [torch.full_like(weight, 0.1) for weight in before]
    with torch.no_grad():
        for weight, step in zip(model.parameters(), steps, strict=True):
            weight.add_(step)
    near.project(model)
    length = math.sqrt(8 * 0.1**2)  # the six weights and two biases that are trainable
    share = min(1.0, radius / length)
    for weight, old, step in zip(list(model.parameters())[:2], before, steps, strict=False):
        assert torch.allclose(weight, old + share * step, atol=1e-7)
    assert torch.equal(model[1].weight, before[2] + steps[2]), "a frozen weight is nobody's"
    again = [weight.detach().clone() for weight in model.parameters()]
    near.project(model)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(model.parameters(), again, strict=True))


def test_the_weights_stay_in_the_ball_and_reach_its_edge(accelerator: Accelerator) -> None:
    victim = network()
    weights = {name: value.clone() for name, value in victim.state_dict().items()}
    for radius in (0.05, 0.5):
        assert distance(run(radius, accelerator, victim), victim) == pytest.approx(radius, rel=1e-3)
    far = run(math.inf, accelerator, victim)
    assert distance(far, victim) > 0.5
    assert all(torch.equal(value, weights[name]) for name, value in victim.state_dict().items()), "it is left alone"
    assert distance(victim, victim) == 0


def test_running_statistics_stay(accelerator: Accelerator) -> None:
    victim = network()
    found = run(math.inf, accelerator, victim)
    assert not found.frozen_batch_norm
    counted = 0
    for (name, old), new in zip(victim.named_buffers(), found.buffers(), strict=True):
        assert torch.equal(old, new), name
        counted += "running" in name
    assert counted


def test_a_larger_ball_gives_back_more(accelerator: Accelerator) -> None:
    test = colours(60, 9)

    def accuracy(model: Network) -> float:
        confusion = evaluate(model, test, accelerator=accelerator)
        return int(confusion.trace()) / int(confusion.sum())

    near, far = (accuracy(run(radius, accelerator)) for radius in (0.01, math.inf))
    assert far > 0.9
    assert near < far - 0.3


def test_the_seed_decides(accelerator: Accelerator) -> None:
    one, same, other = (run(0.5, accelerator, seed=seed) for seed in (0, 0, 1))
    assert distance(one, same) == 0
    assert distance(one, other) > 0


def test_what_cannot_be_recovered(accelerator: Accelerator) -> None:
    for radius in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="radius: expected a positive number"):
            run(radius, accelerator)
    with pytest.raises(ValueError, match="at least one clean row"):
        recover(network(), colours(0, 0), radius=1.0, accelerator=accelerator, seed=0, progress=False)


def test_the_recipe_is_that_of_the_sheet() -> None:
    assert (RECOVERY.epochs, RECOVERY.learning_rate, RECOVERY.schedule, RECOVERY.optimizer) == (
        60,
        0.01,
        "cosine",
        "sgd",
    )
