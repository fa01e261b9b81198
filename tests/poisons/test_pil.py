import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from hf_unlearnable.batches import Batches
from hf_unlearnable.draws import Draws
from hf_unlearnable.fitting import Setup
from hf_unlearnable.poisons.pil import CHUNK, PilFit, PilPoison, TwoLinear, noise_gradient
from hf_unlearnable.surrogate import Surrogate
from hf_unlearnable.training import Unfinished
from tests.conftest import make_dataset, noise_pictures, pixels

LABELS = [i % 4 for i in range(60)]
SHORT = dataclasses.replace(PilPoison.recipe, epochs=15, batch_size=16, learning_rate=0.05)


@pytest.fixture(scope="module")
def source() -> Dataset:
    """Every class has a brighter quarter of its own."""
    pictures = noise_pictures(60, 12, 10) // 2
    for picture, label in zip(pictures, LABELS, strict=True):
        picture[3 * label : 3 * label + 3] += 100
    return make_dataset(pictures, LABELS)


@pytest.fixture(scope="module")
def rows(source: Dataset) -> Batches:
    return Batches.load(source, progress=False)


@pytest.fixture(scope="module")
def surrogate(rows: Batches) -> Surrogate:
    return PilPoison().fit(rows, recipe=SHORT, progress=False)


@pytest.fixture
def poison(surrogate: Surrogate) -> PilPoison:
    return PilPoison.from_surrogate(surrogate)


def objective(delta: Tensor, x: Tensor, y: Tensor, matrix: Tensor, weight: float) -> Tensor:
    """Every row's loss as the paper has it: cross-entropy of the noise, divergence of the picture from 1/K."""
    own, shown = delta.flatten(1) @ matrix.T, (x - delta).flatten(1) @ matrix.T
    even = torch.full_like(own, 1 / len(matrix))
    divergence = (even * (even.log() - shown.log_softmax(1))).sum(1)
    return weight * F.cross_entropy(own, y, reduction="none") + (1 - weight) * divergence


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9, 1.0])
def test_the_gradient_is_that_of_the_objective(weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    delta, x, matrix = (torch.randn(n, 36, generator=generator, dtype=torch.float64) for n in (5, 5, 7))
    y = torch.tensor([0, 6, 3, 3, 1])
    found = noise_gradient(delta, x @ matrix.T, y, matrix, weight)
    leaf = delta.clone().requires_grad_()
    expected = torch.autograd.grad(objective(leaf, x, y, matrix, weight).sum(), leaf)[0]
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-13)
    for row, value in ((0, 0), (2, 17), (4, 35)):
        step = torch.zeros_like(delta)
        step[row, value] = 1e-6
        up, down = (objective(delta + sign * step, x, y, matrix, weight)[row] for sign in (1, -1))
        assert float(found[row, value]) == pytest.approx(float(up - down) / 2e-6, abs=1e-7)


def by_autograd(poison: PilPoison, x: Tensor, y: Tensor, start: Tensor, matrix: Tensor) -> Tensor:
    """The algorithm of the sheet, one picture after the other, in float64."""
    epsilon, found = poison.epsilon, []
    for picture, label, delta in zip(x, y, start, strict=True):
        for _ in range(poison.pgd_steps):
            leaf = delta[None].clone().requires_grad_()
            objective(leaf, picture[None], label[None], matrix, poison.label_weight).sum().backward()
            assert leaf.grad is not None
            delta = (delta - poison.pgd_step_size * leaf.grad[0].sign()).clamp(-epsilon, epsilon)
        found.append((picture - delta).clamp(0, 1))
    return torch.stack(found)


@pytest.mark.parametrize("changes", [{}, {"label_weight": 0.2, "pgd_steps": 7, "epsilon": 6 / 255}])
def test_pixels_are_those_of_the_algorithm(changes: dict, surrogate: Surrogate, rows: Batches) -> None:
    poison = PilPoison.from_surrogate(surrogate, **changes)
    x, y = rows.pixels[:10].double() / 255, rows.labels[:10]
    uniform = Draws(poison.seed, "pil", rows.pixels[:10]).uniform(3, 12, 10, purpose="start")
    start = (2 * uniform - 1) * poison.epsilon
    expected = (255 * by_autograd(poison, x, y, start, surrogate.tensors["map"].double())).round()
    found = poison.change(rows.pixels[:10], y, [""] * 10)
    assert (found != expected).sum() <= 3  # a gradient of nearly 0 may fall to the other side in float32


def test_the_noise_carries_the_class_and_the_picture_loses_it(poison: PilPoison, rows: Batches) -> None:
    known = poison.surrogate
    assert known is not None
    x, y = rows.pixels.float() / 255, rows.labels
    shown = poison.change(rows.pixels, y, [""] * len(rows)).float() / 255
    matrix = known.tensors["map"]
    clean, after, noise = (z.flatten(1) @ matrix.T for z in (x, shown, x - shown))
    assert (noise.argmax(1) == y).float().mean() > 0.95
    assert (after.gather(1, y[:, None]) < clean.gather(1, y[:, None])).float().mean() > 0.95
    even = PilPoison.from_surrogate(known, label_weight=0.0).change(rows.pixels, y, [""] * len(rows)).float() / 255
    spread = (even.flatten(1) @ matrix.T).std(1) / clean.std(1)
    assert spread.mean() < 0.9


def test_the_map_is_that_of_plain_training(rows: Batches, surrogate: Surrogate) -> None:
    setup = Setup(train=rows, recipe=SHORT, backbone="linear", seed=0, accelerator=Accelerator())
    fit = PilFit(setup)
    network = fit.modules["network"]
    assert isinstance(network, TwoLinear)
    first, second = (weight.detach().clone().requires_grad_() for weight in (network.first, network.second))
    assert first.shape == (4, 360)
    assert second.shape == (4, 4)
    for weight in (first, second):
        bound = weight.shape[1] ** -0.5
        assert 0.8 * bound < float(weight.detach().abs().max()) <= bound
    optimizer = torch.optim.SGD([first, second], 0.05, 0.9)
    total = 60
    assert fit.total == total
    for step in range(total):
        batch = fit.batch(step)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + np.cos(np.pi * step / total)) / 2
        optimizer.zero_grad()
        F.cross_entropy((batch.pixels.float() / 255).flatten(1) @ first.T @ second.T, batch.labels).backward()
        optimizer.step()
    assert torch.allclose(surrogate.tensors["map"], (second @ first).detach(), atol=1e-6)
    curve = surrogate.provenance["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert surrogate.networks == {}


def test_training_goes_on_where_it_stopped(rows: Batches, surrogate: Surrogate, tmp_path: Path) -> None:
    checkpoint, stops = tmp_path / "half.safetensors", 0
    while True:
        try:
            found = PilPoison().fit(rows, recipe=SHORT, checkpoint=checkpoint, max_minutes=0.0, progress=False)
            break
        except Unfinished:
            stops += 1
    assert stops == 59
    assert torch.equal(found.tensors["map"], surrogate.tensors["map"])
    other = PilPoison().fit(rows, recipe=SHORT, seed=1, progress=False)
    assert not torch.equal(other.tensors["map"], surrogate.tensors["map"])


def test_accuracy_is_measured(rows: Batches) -> None:
    found = PilPoison().fit(rows, recipe=SHORT, test=rows, measure_every=1, progress=False)
    assert 0.25 <= found.provenance["curve"][-1]["clean accuracy"] <= 1


def test_every_way_of_mapping_gives_the_same_pixels(source: Dataset, poison: PilPoison, tmp_path: Path) -> None:
    expected = pixels(poison.apply(source)).astype(int)
    order = np.random.default_rng(0).permutation(60)
    for found, wanted in (
        (source.map(poison), expected),
        (source.map(poison, batched=True, batch_size=7, keep_in_memory=True), expected),
        (source.select(order).map(poison, batched=True), expected[order]),
        (poison.apply(source, num_proc=2), expected),
    ):
        assert (pixels(found) != wanted).sum() <= 4  # last bits of matrix products of another shape


def test_more_rows_than_a_chunk(poison: PilPoison) -> None:
    many = torch.from_numpy(noise_pictures(2 * CHUNK + 3, 12, 10)).permute(0, 3, 1, 2).contiguous()
    labels = torch.arange(len(many)) // 3 % 4
    whole = poison.change(many, labels, [""] * len(many))
    parts = [poison.change(many[i : i + 50], labels[i : i + 50], [""] * 50) for i in range(0, len(many), 50)]
    assert (whole != torch.cat(parts)).sum() <= 8


def test_the_start_belongs_to_the_picture_and_the_key(surrogate: Surrogate, rows: Batches) -> None:
    def start(seed: int | bytes | None) -> Tensor:
        poison = PilPoison.from_surrogate(surrogate, pgd_steps=0, seed=seed)
        return poison.change(rows.pixels, rows.labels, [""] * len(rows))

    assert torch.equal(start(None), start(None))
    assert not torch.equal(start(None), start(1))
    assert not torch.equal(start(1), start(bytes(32)))
    change = start(1).int() - rows.pixels.int()
    assert not torch.equal(change[0], change[4])
    assert -0.2 < float(change.float().mean()) < 0.2
    assert float(change.float().abs().mean()) == pytest.approx(4, abs=0.2)


@pytest.mark.parametrize("epsilon", [8 / 255, 0.0314, 2.5 / 255, 0.0])
def test_the_budget_is_kept_after_rounding(epsilon: float, surrogate: Surrogate) -> None:
    poison = PilPoison.from_surrogate(surrogate, epsilon=epsilon)
    levels = torch.arange(256).repeat(4)[:720].to(torch.uint8).view(2, 3, 12, 10)
    change = poison.change(levels, torch.tensor([0, 3]), ["a", "b"]).int() - levels.int()
    assert int(change.abs().max()) == int(epsilon * 255 + 1e-6)


def test_a_file_gives_the_same_poison(poison: PilPoison, rows: Batches, tmp_path: Path) -> None:
    assert poison.surrogate is not None
    read = PilPoison.from_surrogate(poison.surrogate.save(tmp_path / "pil.safetensors"))
    assert read == poison
    where = [""] * len(rows)
    assert torch.equal(read.change(rows.pixels, rows.labels, where), poison.change(rows.pixels, rows.labels, where))


def test_bad_input(rows: Batches, surrogate: Surrogate, poison: PilPoison) -> None:
    for wrong in (
        {"epsilon": -0.1},
        {"epsilon": 2.0},
        {"pgd_steps": -1},
        {"pgd_step_size": 0.0},
        {"pgd_step_size": float("nan")},
        {"label_weight": 1.1},
        {"label_weight": float("nan")},
    ):
        with pytest.raises(ValueError):
            PilPoison(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="linear map: expected backbone 'linear', got 'tiny'"):
        PilPoison().fit(rows, backbone="tiny", progress=False)
    with pytest.raises(ValueError, match="none of class 3"):
        PilPoison().fit(rows.select([i for i in range(60) if i % 4 < 3]), recipe=SHORT, progress=False)
    with pytest.raises(ValueError, match="12 x 10 pixels .* got 10 x 12"):
        poison.change(torch.zeros(1, 3, 10, 12, dtype=torch.uint8), torch.tensor([0]), ["row 0"])
    with pytest.raises(ValueError, match="4 classes"):
        poison.apply(make_dataset(noise_pictures(5, 12, 10), list(range(5)), 5))
    with pytest.raises(ValueError, match="for 'pil', got one for 'other'"):
        PilPoison.from_surrogate(dataclasses.replace(surrogate, method="other"))
    broken = dataclasses.replace(surrogate, tensors={"map": surrogate.tensors["map"] / 0})
    with pytest.raises(FloatingPointError, match="finite"):
        PilPoison.from_surrogate(broken).change(rows.pixels, rows.labels, [""] * len(rows))


def test_a_training_that_diverges_is_stopped(rows: Batches) -> None:
    wild = dataclasses.replace(SHORT, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match="expected a finite loss"):
        PilPoison().fit(rows, recipe=wild, progress=False)
