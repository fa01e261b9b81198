from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from hf_unlearnable.batches import Batches
from hf_unlearnable.budget import Budget
from hf_unlearnable.images import to_float, to_uint8
from hf_unlearnable.pgd import Pgd
from hf_unlearnable.poisons.hypo import HypoPoison
from hf_unlearnable.poisons.tap import TapPoison
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.surrogate import Surrogate
from tests.conftest import make_dataset, noise_pictures, pixels

LABELS = [i % 4 for i in range(40)]
SHORT = Recipe(name="short", steps=10, batch_size=20, learning_rate=0.02)
MAY_DIFFER = 40
"""Values out of 122,880 that the network's arithmetic may move to the other side of a boundary."""
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])


@pytest.fixture(scope="module")
def source() -> Dataset:
    return make_dataset(noise_pictures(40), LABELS)


@pytest.fixture(scope="module")
def rows(source: Dataset) -> Batches:
    return Batches.load(source, progress=False)


@pytest.fixture(scope="module")
def surrogate(rows: Batches) -> Surrogate:
    return HypoPoison(pgd_steps=5).fit(rows, seed=1, recipe=SHORT, backbone="tiny", progress=False)


def mapped(poison: HypoPoison, rows: Batches) -> Tensor:
    return poison.change(rows.pixels, rows.labels, [f"row {i}" for i in range(len(rows))])


def test_the_loop_is_that_of_the_paper() -> None:
    linf, l2 = HypoPoison().noise_pgd(), HypoPoison(norm="l2").noise_pgd()
    assert linf == Pgd(
        budget=Budget("linf", 8 / 255), steps=100, step_size=linf.step_size, direction="min", init="zero", chunk=640
    )
    assert linf.step_size == pytest.approx(1.6 / 255)
    assert l2 == replace(linf, budget=Budget("l2", 0.5), step_size=0.1)
    assert HypoPoison(norm="l2", epsilon=1.0).noise_pgd().step_size == 0.2
    assert HypoPoison(epsilon=4.5 / 255).noise_pgd().budget == Budget("linf", 4 / 255)
    assert HypoPoison(norm="l2").budget_for(32, 32) == Budget("l2", 0.5)


def test_the_recipe_is_that_of_the_paper() -> None:
    recipe, epoch = HypoPoison.recipe, 391
    total = recipe.total_steps(epoch)
    rates = [recipe.rate(epoch * at + shift, total) for at in (100, 125) for shift in (-1, 0)]
    assert total == 150 * epoch
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001])
    assert (recipe.batch_size, recipe.momentum, recipe.nesterov, recipe.weight_decay) == (128, 0.9, False, 5e-4)
    assert recipe.augmentation == "crop_flip"


@NORMS
def test_the_pixels_are_those_of_a_loop(surrogate: Surrogate, rows: Batches, norm: Any) -> None:
    """Picture by picture, in the paper's words."""
    found = mapped(HypoPoison.from_surrogate(surrogate, norm=norm, pgd_steps=3), rows)
    network, worst = surrogate.network(), 0
    epsilon = 8 / 255 if norm == "linf" else 0.5
    for i in range(0, 40, 4):
        clean = to_float(rows.pixels[i : i + 1])
        x = clean.clone()
        for _ in range(3):
            leaf = x.clone().requires_grad_()
            slope = torch.autograd.grad(F.cross_entropy(network(leaf), rows.labels[i : i + 1]), leaf)[0]
            step = slope.sign() if norm == "linf" else slope / slope.norm()
            delta = x - epsilon / 5 * step - clean
            delta = delta.clamp(-epsilon, epsilon) if norm == "linf" else delta * min(1, epsilon / float(delta.norm()))
            x = (clean + delta).clamp(0, 1)
        worst += int((to_uint8(x) != found[i : i + 1]).sum())
    assert worst <= MAY_DIFFER


@NORMS
def test_the_loss_falls_and_the_budget_holds(surrogate: Surrogate, rows: Batches, norm: Any) -> None:
    found = mapped(HypoPoison.from_surrogate(surrogate, norm=norm, pgd_steps=20), rows)
    with torch.no_grad():
        before, after = (
            F.cross_entropy(surrogate.network()(to_float(u)), rows.labels, reduction="none")
            for u in (rows.pixels, found)
        )
    assert (after < before).all()
    change = found.float() - rows.pixels.float()
    if norm == "linf":
        assert change.abs().max() == 8
    else:
        sizes = change.flatten(1).norm(dim=1) / 255
        assert (sizes - 0.5).abs().max() < 0.05
        assert change.abs().max() > 8


@NORMS
def test_the_box_is_kept(surrogate: Surrogate, rows: Batches, norm: Any) -> None:
    extremes = replace(rows, pixels=torch.where(rows.pixels > 127, 255, 0).to(torch.uint8))
    poison = HypoPoison.from_surrogate(surrogate, norm=norm)
    x = to_float(extremes.pixels)
    delta = poison.noise_pgd().run(lambda z, i: z.flatten(1).sum(1), x)
    assert (x + delta).min() == 0
    assert (x + poison.noise_pgd().run(lambda z, i: -z.flatten(1).sum(1), x)).max() == 1
    assert (mapped(poison, extremes) != extremes.pixels).any()


@NORMS
def test_every_way_of_mapping_gives_the_same_pixels(source: Dataset, surrogate: Surrogate, norm: Any) -> None:
    poison = HypoPoison.from_surrogate(surrogate, norm=norm)
    expected = pixels(poison.apply(source))
    order = np.random.default_rng(0).permutation(40)
    for found, wanted in (
        (source.map(poison, batched=True, batch_size=7, keep_in_memory=True), expected),
        (source.select(range(6)).map(poison, keep_in_memory=True), expected[:6]),
        (source.select(order).map(poison, batched=True, keep_in_memory=True), expected[order]),
        (poison.apply(source, num_proc=2), expected),
    ):
        assert (pixels(found) != wanted).sum() <= MAY_DIFFER


def test_there_is_no_randomness(surrogate: Surrogate, rows: Batches) -> None:
    assert torch.equal(*(mapped(HypoPoison.from_surrogate(surrogate, seed=seed), rows) for seed in (1, 2)))


def test_a_file_gives_the_same_poison(surrogate: Surrogate, rows: Batches, tmp_path: Path) -> None:
    kept = Surrogate.load(surrogate.save(tmp_path / "hypo.safetensors"))
    assert kept.settings == {"norm": "linf", "epsilon": None, "pgd_steps": 5, "pgd_step_size": None}
    first, second = HypoPoison.from_surrogate(kept), HypoPoison.from_surrogate(surrogate)
    assert first == second
    assert torch.equal(mapped(first, rows), mapped(second, rows))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"epsilon": 1.5}, "255"),
        ({"epsilon": -1.0, "norm": "l2"}, "epsilon"),
        ({"pgd_steps": 0}, "pgd_steps is at least 1"),
        ({"pgd_step_size": -0.1}, "step_size is a positive"),
    ],
)
def test_wrong_settings(wrong: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        HypoPoison(**wrong)


def test_what_does_not_fit_is_refused(surrogate: Surrogate, rows: Batches) -> None:
    poison = HypoPoison.from_surrogate(surrogate)
    with pytest.raises(ValueError, match="expected pictures of 32 x 32 pixels"):
        poison.change(rows.pixels[:, :, :31], rows.labels, [f"row {i}" for i in range(40)])
    with pytest.raises(ValueError, match="expected at most 4 classes .*, got 5"):
        poison.apply(make_dataset(noise_pictures(5), [0, 1, 2, 3, 4], 5))
    with pytest.raises(ValueError, match="expected a surrogate for 'tap', got one for 'hypo'"):
        TapPoison.from_surrogate(surrogate)
    with pytest.raises(ValueError, match="no surrogate"):
        HypoPoison().change(rows.pixels, rows.labels, [""] * 40)


@pytest.mark.parametrize("name", ["norm"])
def test_unknown_words(name: str) -> None:
    poison = HypoPoison()
    object.__setattr__(poison, name, "nonsense")
    with pytest.raises(ValueError, match=f"{name} is .* got 'nonsense'"):
        poison.__post_init__()
