"""Recipes: schedules beside torch's, the papers' settings, and settings out of range."""

import dataclasses
import math
from collections.abc import Callable

import jaxtyping
import pytest
import torch
from torch import nn

from hf_unlearnable.recipes import RECIPES, Recipe, recipe

QUICK = Recipe(name="quick", epochs=3, batch_size=16, learning_rate=0.05, schedule="cosine")


def rates_of_torch(make: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler], total: int) -> list:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler, rates = make(optimizer), []
    for step in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < total - 1:
            scheduler.step()
    return rates


@pytest.mark.parametrize("total", [5, 40, 395])
def test_rates_equal_those_of_torch(total: int) -> None:
    schedulers = torch.optim.lr_scheduler
    marks = [round(0.4 * total), round(0.8 * total)]
    expected = {
        "constant": lambda o: schedulers.ConstantLR(o, factor=1.0),
        "step": lambda o: schedulers.MultiStepLR(o, marks, gamma=0.1),
        "cosine": lambda o: schedulers.CosineAnnealingLR(o, total),
        "onecycle": lambda o: schedulers.OneCycleLR(o, 0.3, total_steps=total, pct_start=0.25, cycle_momentum=False),
    }
    for schedule, make in expected.items():
        ours = Recipe(name="r", steps=total, learning_rate=0.3, schedule=schedule, milestones=(0.4, 0.8))
        assert [ours.rate(step, total) for step in range(total)] == pytest.approx(rates_of_torch(make, total), rel=1e-9)


def test_named_recipes_are_those_of_the_papers() -> None:
    rem, cuda = recipe("rem40k"), recipe("cuda100")
    assert (rem.total_steps(390), rem.batch_size, rem.drop_last) == (40_000, 128, True)
    steps = (0, 15_999, 16_000, 31_999, 32_000, 39_999)
    assert [rem.rate(step, 40_000) for step in steps] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert (cuda.total_steps(98), cuda.batch_size, cuda.gradient_clip) == (9800, 512, 5.0)
    epochs = (0, 39, 40, 79, 80, 99)
    assert [cuda.rate(98 * epoch, 9800) for epoch in epochs] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert (recipe("ueraser").epochs, recipe("ueraser").rate(9, 10)) == (200, 0.01)
    assert (recipe("iss60").epochs, recipe("iss60").schedule) == (60, "cosine")
    for made in RECIPES.values():
        if made.optimizer == "sgd":
            assert (made.momentum, made.weight_decay, made.augmentation) == (0.9, 5e-4, "crop_flip")
        assert min(made.rate(step, 1) for step in range(1)) > 0


def test_unknown_recipe_names_near_ones() -> None:
    with pytest.raises(ValueError, match="no recipe is named 'cuda10': did you mean cuda100"):
        recipe("cuda10")
    with pytest.raises(ValueError, match="they are rem40k, cuda100"):
        recipe("zzz")
    with pytest.raises(TypeError, match="epoch"):
        recipe("fast", epoch=3)


def test_a_new_length_replaces_the_old_one() -> None:
    assert (recipe("rem40k", epochs=5).epochs, recipe("rem40k", epochs=5).steps) == (5, None)
    assert (recipe("fast", steps=50).epochs, recipe("fast", steps=50).steps) == (None, 50)
    assert recipe("fast", batch_size=64) == dataclasses.replace(RECIPES["fast"], batch_size=64)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 1, "steps": 1},
        {"epochs": None},
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": -0.1},
        {"learning_rate": math.nan},
        {"schedule": "linear"},
        {"augmentation": "mixup"},
        {"milestones": (0.8, 0.4)},
        {"milestones": (40,)},
        {"gradient_clip": 0.0},
        {"momentum": 1.5},
    ],
)
def test_settings_out_of_range(changes: dict) -> None:
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match=next(iter(changes))):
        dataclasses.replace(QUICK, **changes)
