"""Detectors: areas by counting pairs, simple networks on data whose secret is known, and collapsed predictions."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_unlearnable import detection
from hf_unlearnable.batches import Batches
from hf_unlearnable.detection import (
    Detection,
    best_threshold,
    fpr_at_tpr,
    reliance,
    roc_auc,
    sample_auc,
    soft_reliance,
    supervised_auc,
)
from hf_unlearnable.probes import perceptron
from hf_unlearnable.recipes import Recipe


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(seed: int, rows: int = 40, levels: int = 7) -> tuple[Tensor, Tensor]:
    """Scores with many ties."""
    scores = torch.randint(0, levels, (rows,), generator=generator(seed)).float() / levels
    truth = torch.rand(rows, generator=generator(seed + 100)) < 0.4
    return scores, truth


@pytest.mark.parametrize("seed", range(5))
def test_areas_and_rates_against_pairs(seed: int) -> None:
    scores, truth = draw(seed, rows=39 + seed)
    right, wrong = scores[truth].tolist(), scores[~truth].tolist()
    pairs = [(a > b) + 0.5 * (a == b) for a in right for b in wrong]
    assert roc_auc(scores, truth) == sum(pairs) / len(pairs)
    for tpr in (0.1, 0.5, 0.95, 1.0):
        reached = max(t for t in scores.tolist() if sum(a >= t for a in right) / len(right) >= tpr - 1e-12)
        assert fpr_at_tpr(scores, truth, tpr) == pytest.approx(sum(b >= reached for b in wrong) / len(wrong))

    def error(t: float) -> float:
        return sum(a < t for a in right) / len(right) + sum(b >= t for b in wrong) / len(wrong)

    least = min(error(t) for t in scores.tolist())
    expected = max(t for t in scores.tolist() if error(t) <= least + 1e-12)
    assert best_threshold(scores, truth) == expected


def test_areas_that_are_known() -> None:
    truth = torch.tensor([True, True, False, False, False])
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    assert (roc_auc(scores, truth), fpr_at_tpr(scores, truth)) == (1.0, 0.0)
    assert (roc_auc(-scores, truth), fpr_at_tpr(-scores, truth)) == (0.0, 1.0)
    assert (roc_auc(torch.zeros(5), truth), fpr_at_tpr(torch.zeros(5), truth)) == (0.5, 1.0)
    assert roc_auc(torch.tensor([0.0, -math.inf, math.inf, 0.0, -math.inf]), truth) == (1.5 + 0.5) / 6


def test_ninety_five_percent_of_twenty_is_nineteen() -> None:
    truth = torch.tensor([True] * 20 + [False] * 2)
    scores = torch.cat([torch.arange(20.0), torch.tensor([0.5, 1.0])])
    assert fpr_at_tpr(scores, truth) == 0.5


def test_bad_scores() -> None:
    scores, truth = torch.tensor([1.0, math.nan, 0.0]), torch.tensor([True, False, False])
    for function in (roc_auc, fpr_at_tpr, best_threshold):
        with pytest.raises(ValueError, match="row 1"):
            function(scores, truth)
        with pytest.raises(ValueError, match="both kinds"):
            function(torch.zeros(3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="tpr"):
        fpr_at_tpr(torch.arange(3.0), truth, 0.0)
    with pytest.raises(ValueError, match="two rows of each kind"):
        Detection.of(torch.arange(3.0), truth, seed=0)


def test_detection_of_perfect_reversed_and_idle_scores() -> None:
    truth = torch.arange(400) % 2 == 0
    perfect = Detection.of(truth.float(), truth, seed=0)
    assert (perfect.auc, perfect.fpr_at_95_tpr, perfect.half_total_error) == (1.0, 0.0, 0.0)
    assert perfect.threshold == 1.0
    idle = Detection.of(torch.rand(400, generator=generator()), truth, seed=0)
    assert abs(idle.auc - 0.5) < 0.1
    assert abs(idle.half_total_error - 0.5) < 0.12
    assert Detection.of(-truth.float(), truth, seed=0).half_total_error == 0.5


def test_the_error_is_of_the_half_that_did_not_choose() -> None:
    scores, truth = torch.rand(101, generator=generator(3)), draw(4, rows=101)[1]
    first, again, other = (Detection.of(scores, truth, seed=seed) for seed in (0, 0, 1))
    assert first.half_total_error == again.half_total_error
    assert (first.auc, first.fpr_at_95_tpr) == (other.auc, other.fpr_at_95_tpr)
    assert first.half_total_error != other.half_total_error


def random_pictures(rows: int, classes: int = 4, size: tuple[int, int] = (6, 7), seed: int = 0) -> Batches:
    pixels = torch.randint(60, 196, (rows, 3, *size), generator=generator(seed), dtype=torch.uint8)
    labels = torch.randint(0, classes, (rows,), generator=generator(seed + 1))
    return Batches(pixels=pixels, labels=labels, classes=tuple(f"class{i}" for i in range(classes)))


def shortcut(clean: Batches, rows: Tensor | None = None) -> Batches:
    """Every class gets a colour of its own, in all rows or some."""
    colours = 50 * torch.tensor([[1, 1, -1], [1, -1, 1], [-1, 1, 1], [-1, -1, -1]])
    added = colours[clean.labels][:, :, None, None].expand(clean.pixels.shape)
    if rows is not None:
        added = added * rows[:, None, None, None]
    return dataclasses.replace(clean, pixels=(clean.pixels.int() + added).to(torch.uint8))


def plain_network(classes: int, size: int = 126) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *perceptron((size, classes), activation=nn.ReLU, seed=0))


def test_poisoned_rows_are_learnt_first(accelerator: Accelerator) -> None:
    clean = random_pictures(400)
    poisoned = torch.arange(400) % 2 == 1
    network = plain_network(4).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    options: Any = {"epochs": 8, "accelerator": accelerator, "seed": 0, "progress": False}
    recipe = dataclasses.replace(detection.EARLY, learning_rate=0.02, augmentation="none")
    found = sample_auc(network, shortcut(clean, poisoned), poisoned, recipe=recipe, **options)
    assert found.auc > 0.85
    assert found.scores.shape == (400,)
    assert found.scores.max() <= 0
    none = sample_auc(network, clean, poisoned, recipe=recipe, **options)
    assert abs(none.auc - 0.5) < 0.1
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert network.training
    with pytest.raises(ValueError, match="400 rows, got 3"):
        sample_auc(network, clean, poisoned[:3], recipe=recipe, **options)


def test_the_worst_case_knows_the_method(accelerator: Accelerator) -> None:
    network = plain_network(2)
    recipe = Recipe(name="quick", epochs=10, batch_size=32, learning_rate=0.02, augmentation="none")
    options: Any = {"recipe": recipe, "accelerator": accelerator, "seed": 0, "progress": False}

    def poisoned(split: Batches) -> Batches:
        checks = (torch.arange(7) % 2 * 20).expand(6, 7)
        return dataclasses.replace(split, pixels=(split.pixels.int() + checks).to(torch.uint8))

    known, unknown = random_pictures(200, seed=1), random_pictures(150, seed=2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = supervised_auc(network, (known, poisoned(known)), (unknown, poisoned(unknown)), **options)
    assert found.auc > 0.95
    assert len(found.scores) == 300
    assert found.scores[150:].mean() > found.scores[:150].mean()
    blind = supervised_auc(network, (known, random_pictures(200, seed=5)), (unknown, poisoned(unknown)), **options)
    assert found.auc - blind.auc > 0.2
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    with pytest.raises(ValueError, match="one size"):
        supervised_auc(network, (known, random_pictures(4, size=(8, 8))), (unknown, unknown), **options)


def test_collapse_that_is_known() -> None:
    k = 5
    assert reliance([[4] * k for _ in range(k)]) == pytest.approx(0.0, abs=1e-15)
    most = (k - 1) / k**2
    assert reliance([[10 if i == j else 0 for j in range(k)] for i in range(k)]) == pytest.approx(most)
    assert reliance([[10, 0, 0, 0, 0] for _ in range(k)]) == pytest.approx(most)
    assert reliance([[10, 0], [0, 0]]) == pytest.approx(0.25)
    assert reliance([[10, 0], [15, 15]]) == pytest.approx(0.25 * 10 / 40)


def test_collapse_against_the_equation() -> None:
    counts = torch.randint(0, 20, (4, 4), generator=generator(1))
    total = counts.sum().item()
    expected = 0.0
    for row in counts.tolist():
        shares = [value / sum(row) for value in row]
        expected += sum(row) / total * sum((share - 1 / 4) ** 2 for share in shares) / 4
    assert reliance(counts) == pytest.approx(expected)


@pytest.mark.parametrize("wrong", [[[1, 2, 3], [1, 2, 3]], [[0, 0], [0, 0]], [[1, -1], [1, 1]]])
def test_what_is_no_confusion_matrix(wrong: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="square"):
        reliance(wrong)


class Certain(nn.Module):
    """Logits `scale` for a class that the first pixel chooses."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.eye(4)[(x[:, 0, 0, 0] * 255).long() % 4]


def test_soft_collapse_is_of_single_rows() -> None:
    rows = random_pictures(200)
    assert soft_reliance(Certain(0.0), rows) == pytest.approx(0.0, abs=1e-12)
    assert soft_reliance(Certain(100.0), rows) == pytest.approx(3 / 16)  # every row is certain, though of any answer
    top = math.exp(1.0) / (math.exp(1.0) + 3)
    rest = (1 - top) / 3
    expected = ((top - 0.25) ** 2 + 3 * (rest - 0.25) ** 2) / 4
    assert soft_reliance(Certain(1.0), rows.select([3])) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="at least one row"):
        soft_reliance(Certain(1.0), rows.select([]))
