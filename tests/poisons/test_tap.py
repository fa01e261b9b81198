from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from hf_unlearnable.augment import CropFlip, ShiftFlip
from hf_unlearnable.batches import Batches
from hf_unlearnable.budget import Budget
from hf_unlearnable.draws import Draws
from hf_unlearnable.images import to_float, to_uint8
from hf_unlearnable.pgd import Pgd
from hf_unlearnable.poisons.hypo import HypoPoison
from hf_unlearnable.poisons.tap import TapPoison
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.surrogate import Surrogate
from tests.conftest import make_dataset, noise_pictures, pixels

LABELS = [i % 4 for i in range(40)]
SHORT = Recipe(name="short", steps=20, batch_size=20, learning_rate=0.02)
FEW: dict[str, Any] = {"pgd_steps": 4, "pgd_step_size": 2 / 255}
MAY_DIFFER = 40
"""Values out of 122,880 that the network's arithmetic may move to the other side of a boundary."""


@pytest.fixture(scope="module")
def source() -> Dataset:
    return make_dataset(noise_pictures(40), LABELS)


@pytest.fixture(scope="module")
def rows(source: Dataset) -> Batches:
    return Batches.load(source, progress=False)


@pytest.fixture(scope="module")
def surrogate(rows: Batches) -> Surrogate:
    return TapPoison(**FEW).fit(rows, seed=1, recipe=SHORT, backbone="tiny", progress=False)


def losses(surrogate: Surrogate, u: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(surrogate.network()(to_float(u)), y, reduction="none")


def mapped(poison: TapPoison, rows: Batches) -> Tensor:
    return poison.change(rows.pixels, rows.labels, [f"row {i}" for i in range(len(rows))])


def test_the_loop_is_that_of_the_paper() -> None:
    pgd = TapPoison().noise_pgd((32, 32))
    assert pgd == Pgd(
        budget=Budget("linf", 8 / 255),
        steps=250,
        step_size=pgd.step_size,
        direction="min",
        init="normal",
        augmentation=ShiftFlip(shift=1 / 8, flip=0.5),
        chunk=640,
    )
    assert pgd.step_size == pytest.approx(0.4 / 255)
    assert TapPoison(epsilon=16 / 255).noise_pgd((32, 32)).step_size == pytest.approx(0.8 / 255)
    assert TapPoison(objective="untargeted", restarts=8).noise_pgd((32, 32)) == replace(
        pgd, direction="max", restarts=8
    )
    rem = TapPoison(start="uniform", pgd_step_size=0.064 / 255, views="crop_flip").noise_pgd((224, 300))
    assert (rem.init, rem.step_size, rem.augmentation) == ("uniform", 0.064 / 255, CropFlip(padding=28))


def test_the_recipe_is_that_of_the_paper() -> None:
    recipe, epoch = TapPoison.recipe, 391
    total = recipe.total_steps(epoch)
    rates = [recipe.rate(epoch * at + shift, total) for at in (14, 24, 35) for shift in (-1, 0)]
    assert total == 40 * epoch
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001, 0.001, 0.0001])
    assert (recipe.batch_size, recipe.momentum, recipe.nesterov, recipe.weight_decay) == (128, 0.9, True, 5e-4)
    assert (TapPoison.backbone, recipe.augmentation) == ("resnet18", "shift_flip")


@pytest.mark.parametrize(
    ("settings", "target", "sign"),
    [({}, 1, -1), ({"target_shift": -1}, 3, -1), ({"target_shift": 6}, 2, -1), ({"objective": "untargeted"}, 0, 1)],
)
def test_one_step_from_zero_is_the_sign_of_the_gradient(
    surrogate: Surrogate, rows: Batches, settings: dict, target: int, sign: int
) -> None:
    plain = {"start": "zero", "views": "none", "pgd_steps": 1, "pgd_step_size": 3 / 255}
    found = mapped(TapPoison.from_surrogate(surrogate, **plain, **settings), rows)
    x = to_float(rows.pixels).requires_grad_()
    log_p = surrogate.network()(x).log_softmax(1)
    wanted = torch.tensor([(label + target) % 4 for label in LABELS])
    slope = torch.autograd.grad(-log_p[torch.arange(40), wanted].sum(), x)[0]
    expected = to_uint8((x.detach() + sign * 3 / 255 * slope.sign()).clamp(0, 1))
    assert (found != expected).sum() <= MAY_DIFFER
    assert (found != rows.pixels).float().mean() > 0.8


@pytest.mark.parametrize("settings", [{}, {"target_shift": 2}, {"objective": "untargeted"}])
def test_the_loss_goes_where_it_should(surrogate: Surrogate, rows: Batches, settings: dict) -> None:
    found = mapped(TapPoison.from_surrogate(surrogate, pgd_steps=10, **settings), rows)
    targeted = "objective" not in settings
    y = (rows.labels + settings.get("target_shift", 1)) % 4 if targeted else rows.labels
    before, after = losses(surrogate, rows.pixels, y), losses(surrogate, found, y)
    assert ((after < before) == targeted).float().mean() > 0.9


def test_the_next_class_of_the_last_is_the_first(surrogate: Surrogate, rows: Batches) -> None:
    last = rows.select((rows.labels == 3).nonzero()[:, 0])
    found = mapped(TapPoison.from_surrogate(surrogate, pgd_steps=10), last)
    change = torch.stack(
        [losses(surrogate, found, y) - losses(surrogate, last.pixels, y) for y in torch.arange(4).expand(10, 4).T]
    )
    assert (change.argmin(0) == 0).float().mean() >= 0.8
    assert change.mean(1).argmin() == 0


@pytest.mark.parametrize("settings", [{}, {"objective": "untargeted", "restarts": 2, "pgd_steps": 2}])
def test_every_way_of_mapping_gives_the_same_pixels(source: Dataset, surrogate: Surrogate, settings: dict) -> None:
    poison = TapPoison.from_surrogate(surrogate, **{**FEW, **settings})
    expected = pixels(poison.apply(source))
    order = np.random.default_rng(0).permutation(40)
    for found, wanted in (
        (source.map(poison, batched=True, batch_size=7, keep_in_memory=True), expected),
        (source.select(range(6)).map(poison, keep_in_memory=True), expected[:6]),
        (source.select(order).map(poison, batched=True, keep_in_memory=True), expected[order]),
    ):
        assert (pixels(found) != wanted).sum() <= MAY_DIFFER


def test_processes_give_the_same_pixels(source: Dataset, surrogate: Surrogate, tmp_path: Path) -> None:
    poison = TapPoison.from_surrogate(surrogate.save(tmp_path / "tap.safetensors"))
    assert poison.pgd_steps == 4
    one, two = pixels(poison.apply(source)), pixels(poison.apply(source, num_proc=2))
    assert (one != two).sum() <= MAY_DIFFER


def test_a_file_gives_the_same_poison(surrogate: Surrogate, rows: Batches, tmp_path: Path) -> None:
    kept = Surrogate.load(surrogate.save(tmp_path / "tap.safetensors"))
    assert kept.digest == surrogate.digest
    assert kept.settings == {
        "epsilon": 8 / 255,
        "objective": "targeted",
        "target_shift": 1,
        "start": "normal",
        "restarts": 1,
        "views": "shift_flip",
        **FEW,
    }
    first, second = TapPoison.from_surrogate(kept), TapPoison.from_surrogate(surrogate)
    assert first == second
    assert torch.equal(mapped(first, rows), mapped(second, rows))
    other = TapPoison.from_surrogate(surrogate, seed=8)
    assert not torch.equal(mapped(other, rows), mapped(first, rows))


@pytest.mark.parametrize(("epsilon", "levels"), [(8 / 255, 8), (2.7 / 255, 2), (0.0, 0)])
def test_the_budget_is_kept_and_used(surrogate: Surrogate, rows: Batches, epsilon: float, levels: int) -> None:
    found = mapped(TapPoison.from_surrogate(surrogate, epsilon=epsilon, pgd_steps=8), rows)
    assert int((found.int() - rows.pixels.int()).abs().max()) == levels


def test_more_restarts_are_no_worse(surrogate: Surrogate, rows: Batches) -> None:
    plain = {"views": "none", "pgd_steps": 2, "pgd_step_size": 1 / 255}
    y = (rows.labels + 1) % 4
    found = {}
    for restarts in (1, 4):
        poison = TapPoison.from_surrogate(surrogate, restarts=restarts, **plain)
        x = to_float(rows.pixels)
        z = poison.perturb(x, rows.labels, Draws(7, "tap", rows.pixels))
        with torch.no_grad():
            found[restarts] = F.cross_entropy(surrogate.network()(z), y, reduction="none")
    assert (found[4] <= found[1] + 1e-5).all()
    assert (found[4] < found[1] - 1e-4).float().mean() > 0.4


def test_the_noise_holds_under_the_views(surrogate: Surrogate, rows: Batches) -> None:
    """Made under views, it lowers the loss of other views more than noise made without does, on average."""
    y, gains = (rows.labels + 1) % 4, {}
    views = ShiftFlip()
    for name in ("shift_flip", "none"):
        found = mapped(TapPoison.from_surrogate(surrogate, views=name, pgd_steps=12), rows)
        x = to_float(found)
        draws = [views.draw(40, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
        with torch.no_grad():
            gains[name] = torch.stack([F.cross_entropy(surrogate.network()(views.apply(x, d)), y) for d in draws])
    assert gains["shift_flip"].mean() < gains["none"].mean()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"epsilon": 1.5}, "255"),
        ({"epsilon": -0.1}, "epsilon"),
        ({"pgd_steps": -1}, "steps is at least 0"),
        ({"pgd_step_size": 0.0}, "step_size is a positive"),
        ({"restarts": 0}, "restarts"),
        ({"restarts": 2, "start": "zero"}, "restarts need"),
        ({"target_shift": 0, "num_classes": 4}, "another class"),
        ({"target_shift": -8, "num_classes": 4}, "got -8 for 4 classes"),
    ],
)
def test_wrong_settings(wrong: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TapPoison(**wrong)


def test_a_target_is_checked_against_the_classes(surrogate: Surrogate, rows: Batches) -> None:
    with pytest.raises(ValueError, match="got 4 for 4 classes"):
        TapPoison(target_shift=4).fit(rows, recipe=SHORT, backbone="tiny", progress=False)
    with pytest.raises(ValueError, match="got 8 for 4 classes"):
        TapPoison.from_surrogate(surrogate, target_shift=8)
    assert TapPoison.from_surrogate(surrogate, target_shift=8, objective="untargeted").num_classes == 4


def test_what_does_not_fit_is_refused(surrogate: Surrogate, rows: Batches) -> None:
    poison = TapPoison.from_surrogate(surrogate)
    with pytest.raises(ValueError, match="expected pictures of 32 x 32 pixels"):
        poison.change(rows.pixels[:, :, :, :31], rows.labels, [f"row {i}" for i in range(40)])
    with pytest.raises(ValueError, match="expected at most 4 classes .*, got 5"):
        poison.apply(make_dataset(noise_pictures(5), [0, 1, 2, 3, 4], 5))
    with pytest.raises(ValueError, match=r"row 0.*got label 4"):
        poison.change(rows.pixels[:1], torch.tensor([4]), ["row 0"])
    with pytest.raises(ValueError, match="expected a surrogate for 'hypo', got one for 'tap'"):
        HypoPoison.from_surrogate(surrogate)
    with pytest.raises(ValueError, match="no surrogate"):
        TapPoison().change(rows.pixels, rows.labels, [""] * 40)


@pytest.mark.parametrize("name", ["objective", "start", "views"])
def test_unknown_words(name: str) -> None:
    poison = TapPoison()
    object.__setattr__(poison, name, "nonsense")
    with pytest.raises(ValueError, match=f"{name} is one of .* got 'nonsense'"):
        poison.__post_init__()
