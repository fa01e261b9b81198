import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from hf_unlearnable.batches import Batches
from hf_unlearnable.poisons import ntga
from hf_unlearnable.poisons.neural_tangent import learnt, tangent_kernel
from hf_unlearnable.poisons.ntga import NtgaPoison, held_out_loss, plan
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.surrogate import Surrogate
from hf_unlearnable.training import Unfinished
from tests.conftest import make_dataset, noise_pictures, pixels

LABELS = [i % 4 for i in range(50)]
SMALL = NtgaPoison(block=16, pgd_steps=4, pgd_step_size=3 / 255)


@pytest.fixture(scope="module")
def source() -> Dataset:
    return make_dataset(noise_pictures(50, 7, 9), LABELS)


@pytest.fixture(scope="module")
def rows(source: Dataset) -> Batches:
    return Batches.load(source, progress=False)


@pytest.fixture(scope="module")
def surrogate(rows: Batches) -> Surrogate:
    return SMALL.fit(rows, progress=False)


@pytest.fixture
def poison(surrogate: Surrogate) -> NtgaPoison:
    return NtgaPoison.from_surrogate(surrogate)


def noise_of(surrogate: Surrogate) -> Tensor:
    return surrogate.tensors["bank.noise"]


def total_loss(x: Tensor, y: Tensor, held: Batches, time: float, classes: int = 4) -> Tensor:
    """The definition, through autograd and all at once."""
    flat, targets = x.flatten(1), F.one_hot(y, classes).double()
    coefficients = learnt(tangent_kernel(flat, flat), targets, time / (len(x) * classes))
    outputs = tangent_kernel(held.pixels.flatten(1).double() / 255, flat) @ coefficients
    return F.cross_entropy(outputs, held.labels, reduction="sum")


@pytest.mark.parametrize("chunk", [3, 128])
def test_the_gradient_is_that_of_the_definition(chunk: int, rows: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ntga, "CHUNK", chunk)
    block, held = rows.select(range(12)), rows.select(range(30, 40))
    x = block.pixels.double() / 255
    value, slope = held_out_loss(x, block.labels, held, 4, 64.0)
    leaf = x.clone().requires_grad_()
    expected = total_loss(leaf, block.labels, held, 64.0)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert torch.allclose(slope, torch.autograd.grad(expected, leaf)[0], rtol=1e-8, atol=1e-12)
    for place in ((0, 0, 0, 0), (5, 2, 6, 8), (11, 1, 3, 4)):
        step = torch.zeros_like(x)
        step[place] = 1e-4
        up, down = (total_loss(x + sign * step, block.labels, held, 64.0) for sign in (1, -1))
        assert float(slope[place]) == pytest.approx(float(up - down) / 2e-4, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize(("count", "block", "share"), [(50, 16, 0.2), (50, 1, 0.2), (41, 7, 0.6), (2, 512, 0.5)])
def test_every_row_is_in_one_block_and_judged_by_others(count: int, block: int, share: float) -> None:
    labels = torch.arange(count) % 4
    blocks = plan(labels, block=block, held_out=share, key=3)
    assert torch.equal(torch.cat([part for part, _ in blocks]).sort().values, torch.arange(count))
    assert all(0 < len(part) <= block for part, _ in blocks)
    assert all(not set(part.tolist()) & set(judges.tolist()) for part, judges in blocks)
    held = blocks[0][1]
    assert len(held) == round(share * count)
    for part, judges in blocks:
        if set(part.tolist()) & set(held.tolist()):
            assert len(judges) == min(len(held), count - len(held))
        else:
            assert torch.equal(judges, held)
    sizes = [len(part) for part, judges in blocks if judges is held]
    assert max(sizes) - min(sizes) <= 1
    again = plan(labels, block=block, held_out=share, key=3)
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(blocks, again, strict=True))
    if count > 2:
        assert not torch.equal(plan(labels, block=block, held_out=share, key=4)[0][1], held)


def test_classes_are_held_out_in_proportion() -> None:
    labels = torch.tensor([0] * 20 + [1] * 40)
    for _, judges in plan(labels, block=10, held_out=0.2, key=0):
        assert torch.equal(labels[judges].bincount(), torch.tensor([4, 8]))


def by_hand(x: Tensor, y: Tensor, held: Batches, poison: NtgaPoison) -> Tensor:
    """Signed ascent from the clean block, as the sheet has it."""
    delta = torch.zeros_like(x)
    for _ in range(poison.pgd_steps):
        leaf = (x + delta).requires_grad_()
        slope = torch.autograd.grad(total_loss(leaf, y, held, poison.time), leaf)[0]
        delta = (delta + poison.pgd_step_size * slope.sign()).clamp(-poison.epsilon, poison.epsilon)
        delta = (x + delta).clamp(0, 1) - x
    return delta


def test_noise_is_that_of_the_ascent(rows: Batches, surrogate: Surrogate) -> None:
    blocks = plan(rows.labels, block=16, held_out=0.2, key=0)
    assert surrogate.provenance["steps"] == len(blocks) == 4
    for part, judges in blocks:
        block, held = rows.select(part), rows.select(judges)
        expected = (255 * by_hand(block.pixels.double() / 255, block.labels, held, SMALL)).round()
        assert (noise_of(surrogate)[part] != expected).sum() <= 2


def test_fgsm_is_one_step_of_the_budget(rows: Batches) -> None:
    one = NtgaPoison(block=16, fgsm=True).fit(rows, progress=False)
    part, judges = plan(rows.labels, block=16, held_out=0.2, key=0)[0]
    block = rows.select(part)
    x = block.pixels.double() / 255
    slope = held_out_loss(x, block.labels, rows.select(judges), 4, 64.0)[1]
    expected = (block.pixels.short() + 8 * slope.sign().short()).clamp(0, 255) - block.pixels.short()
    assert torch.equal(noise_of(one)[part].short(), expected)
    plain = NtgaPoison(block=16, pgd_steps=1, pgd_step_size=8 / 255).fit(rows, progress=False)
    assert torch.equal(noise_of(plain), noise_of(one))


def test_the_noise_makes_the_block_generalise_badly(rows: Batches, surrogate: Surrogate, poison: NtgaPoison) -> None:
    last = surrogate.provenance["curve"]
    assert all(point["held-out loss"] > point["held-out loss, clean block"] for point in last)
    shown = poison.change(rows.pixels, rows.labels, [""] * 50)
    for part, judges in plan(rows.labels, block=16, held_out=0.2, key=0):
        block, held = rows.select(part), rows.select(judges)
        clean, after = (
            float(held_out_loss(p[part].double() / 255, block.labels, held, 4, 64.0)[0]) for p in (rows.pixels, shown)
        )
        random = block.pixels.short() + 8 * (noise_of(surrogate)[part].flip(0, 1, 2, 3).sign())
        other = float(held_out_loss(random.clamp(0, 255).double() / 255, block.labels, held, 4, 64.0)[0])
        assert after > max(clean, other)


def test_training_goes_on_where_it_stopped(rows: Batches, surrogate: Surrogate, tmp_path: Path) -> None:
    checkpoint, stops = tmp_path / "half.safetensors", 0
    while True:
        try:
            found = SMALL.fit(rows, checkpoint=checkpoint, max_minutes=0.0, progress=False)
            break
        except Unfinished:
            stops += 1
    assert stops == 3
    assert torch.equal(noise_of(found), noise_of(surrogate))
    assert not torch.equal(noise_of(SMALL.fit(rows, seed=1, progress=False)), noise_of(surrogate))


def test_every_way_of_mapping_gives_the_same_pixels(source: Dataset, poison: NtgaPoison) -> None:
    expected = pixels(poison.apply(source))
    order = np.random.default_rng(0).permutation(50)
    for found, wanted in (
        (source.map(poison), expected),
        (source.map(poison, batched=True, batch_size=7, keep_in_memory=True), expected),
        (source.select(order).map(poison, batched=True), expected[order]),
        (poison.apply(source, num_proc=2), expected),
    ):
        assert np.array_equal(pixels(found), wanted)
    assert (expected != pixels(source)).any((1, 2, 3)).all()


@pytest.mark.parametrize("epsilon", [8 / 255, 2.5 / 255, 0.0])
@pytest.mark.parametrize("fgsm", [False, True])
def test_the_budget_is_kept_after_rounding(epsilon: float, fgsm: bool) -> None:
    levels = torch.arange(256).repeat(8).to(torch.uint8)[: 8 * 3 * 7 * 9].view(8, 3, 7, 9)
    rows = Batches(pixels=levels, labels=torch.arange(8) % 2, classes=("a", "b"))
    poison = NtgaPoison(epsilon=epsilon, fgsm=fgsm, pgd_steps=3, pgd_step_size=5 / 255, held_out=0.5)
    found = NtgaPoison.from_surrogate(poison.fit(rows, progress=False))
    change = found.change(rows.pixels, rows.labels, [""] * 8).int() - levels.int()
    assert int(change.abs().max()) == int(epsilon * 255 + 1e-6)


def test_a_file_gives_the_same_poison(poison: NtgaPoison, rows: Batches, tmp_path: Path) -> None:
    assert poison.surrogate is not None
    read = NtgaPoison.from_surrogate(poison.surrogate.save(tmp_path / "ntga.safetensors"))
    assert read == poison
    assert (read.block, read.pgd_steps) == (16, 4)
    where = [""] * 50
    assert torch.equal(read.change(rows.pixels, rows.labels, where), poison.change(rows.pixels, rows.labels, where))


def test_unknown_pictures_are_named(poison: NtgaPoison, rows: Batches) -> None:
    other = rows.pixels[:6].clone()
    other[2, 0, 0, 0] ^= 1
    other[5] = 0
    with pytest.raises(ValueError, match=r"of the 50 pictures .* others as row 2, 5 of the batch \(2 of 6 rows\)"):
        poison.change(other, rows.labels[:6], [f"row {i}" for i in range(6)])


def test_bad_input(rows: Batches, surrogate: Surrogate, poison: NtgaPoison) -> None:
    for wrong in (
        {"epsilon": -0.1},
        {"block": 0},
        {"held_out": 0.0},
        {"held_out": 1.0},
        {"time": 0.0},
        {"time": float("inf")},
        {"pgd_steps": -1},
        {"pgd_step_size": -1.0},
    ):
        with pytest.raises(ValueError):
            NtgaPoison(**wrong)  # type: ignore[arg-type]
    with pytest.raises((ValueError, TypeError), match="kernel"):  # the type's checker may find it first
        NtgaPoison(kernel="cnn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected the backbone 'none', got 'tiny'"):
        SMALL.fit(rows, backbone="tiny", progress=False)
    with pytest.raises(ValueError, match="expected the recipe"):
        SMALL.fit(rows, recipe=Recipe(name="other", epochs=2), progress=False)
    with pytest.raises(ValueError, match="none of class 3"):
        SMALL.fit(rows.select([i for i in range(50) if i % 4 < 3]), progress=False)
    few = Batches(pixels=rows.pixels[:1], labels=torch.tensor([0]), classes=("a",))
    with pytest.raises(ValueError, match="enough rows to hold out 0.2 of them"):
        SMALL.fit(few, progress=False)
    with pytest.raises(ValueError, match="7 x 9 pixels .* got 9 x 7"):
        poison.change(torch.zeros(1, 3, 9, 7, dtype=torch.uint8), torch.tensor([0]), ["row 0"])
    with pytest.raises(ValueError, match="4 classes"):
        poison.apply(make_dataset(noise_pictures(5, 7, 9), list(range(5)), 5))
    with pytest.raises(ValueError, match="for 'ntga', got one for 'other'"):
        NtgaPoison.from_surrogate(dataclasses.replace(surrogate, method="other"))
    for name in ("epsilon", "pgd_steps", "pgd_step_size", "fgsm", "block", "held_out", "time"):
        with pytest.raises(ValueError, match=f"{name} was settled"):
            NtgaPoison.from_surrogate(surrogate, **{name: 0.01})
