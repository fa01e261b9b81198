"""Probes: scikit-learn's optimum, noise whose separability is known, and features of a network left as it was."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_unlearnable import create_network
from hf_unlearnable.batches import Batches
from hf_unlearnable.probes import (
    ProbePoint,
    ProbeResult,
    Standardise,
    accuracy,
    collect,
    fit_probe,
    frozen_features,
    frozen_probe,
    linear_separability,
    perceptron,
)
from hf_unlearnable.training import as_input


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clouds(rows: int = 90, dimensions: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three overlapping classes in float64, their features of different scales and far from 0."""
    labels = torch.arange(rows) % 3
    x = torch.randn(rows, dimensions, generator=generator(seed), dtype=torch.float64)
    x[:, 0] += 0.9 * labels
    return x * torch.logspace(-1, 2, dimensions, dtype=torch.float64) + 5, labels


def pictures(rows: int, classes: int = 3, size: tuple[int, int] = (6, 5), seed: int = 0) -> Batches:
    """Random pictures with random labels: nothing to learn."""
    made = torch.randint(40, 216, (rows, 3, *size), generator=generator(seed), dtype=torch.uint8)
    labels = torch.randint(0, classes, (rows,), generator=generator(seed + 1))
    return Batches(pixels=made, labels=labels, classes=tuple(f"class{i}" for i in range(classes)))


def shifted(clean: Batches, delta: Tensor) -> Batches:
    return dataclasses.replace(clean, pixels=(clean.pixels.int() + delta.int()).to(torch.uint8))


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("bias", [True, False])
def test_it_finds_scikit_learns_optimum(strength: float, bias: bool) -> None:
    models = pytest.importorskip("sklearn.linear_model")
    x, y = clouds()
    scaled = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    oracle = models.LogisticRegression(C=strength, fit_intercept=bias, tol=1e-10, max_iter=10_000).fit(scaled, y)
    probe = fit_probe(x, y, classes=3, strength=strength, bias=bias)
    layer: Any = probe[1]
    assert layer.weight.dtype == torch.float64
    assert torch.allclose(layer.weight, torch.from_numpy(oracle.coef_), atol=1e-4)
    expected = torch.from_numpy(oracle.predict_proba(scaled))
    assert torch.allclose(probe(x).softmax(1), expected, atol=1e-4)
    assert not any(weight.requires_grad or weight.grad is not None for weight in probe.parameters())


def test_without_a_bias_a_probe_cannot_cut_away_from_the_origin() -> None:
    x = torch.linspace(1, 9, 40, dtype=torch.float64)[:, None]
    y = (x[:, 0] > 6).long()
    with_bias, without = (fit_probe(x, y, classes=2, standardise=False, bias=bias) for bias in (True, False))
    assert accuracy(with_bias, x, y) == 1.0
    assert len(without(x).argmax(1).unique()) == 1


def test_hidden_layers_bend_it_and_the_seed_decides() -> None:
    x = torch.rand(200, 2, generator=generator(), dtype=torch.float64) - 0.5
    y = (x[:, 0] * x[:, 1] > 0).long()
    assert accuracy(fit_probe(x, y, classes=2), x, y) < 0.75
    bent, again, other = (fit_probe(x, y, classes=2, hidden=1, seed=seed, iterations=100) for seed in (0, 0, 1))
    assert accuracy(bent, x, y) > 0.97
    assert [tuple(w.shape) for w in bent.parameters()] == [(30, 2), (30,), (2, 30), (2,)]
    assert torch.equal(bent(x), again(x))
    assert not torch.equal(bent(x), other(x))


def test_constant_features_count_nothing() -> None:
    x, y = clouds()
    scaling = Standardise.of(torch.cat([x, torch.full((len(x), 2), 0.1, dtype=x.dtype)], 1).float())
    scaled = scaling(torch.tensor([[5.0, 5.0, 5.0, 5.0, 3.0, -2.0]]))
    assert scaled[0, 4:].tolist() == [0.0, 0.0]
    assert scaled.isfinite().all()
    padded = torch.cat([x, torch.zeros(len(x), 1, dtype=x.dtype)], 1)
    probe, plain = fit_probe(padded, y, classes=3, strength=1.0), fit_probe(x, y, classes=3, strength=1.0)
    assert torch.allclose(probe(padded), plain(x), atol=1e-4)


@pytest.mark.parametrize("wrong", [{"strength": 0.0}, {"strength": -1.0}, {"hidden": -1}])
def test_bad_probes(wrong: dict[str, Any]) -> None:
    x, y = clouds()
    with pytest.raises(ValueError, match="positive strength"):
        fit_probe(x, y, classes=3, **wrong)
    with pytest.raises(ValueError, match="at least one row"):
        fit_probe(x[:0], y[:0], classes=3)


def test_perceptron_has_torchs_scale_of_weights() -> None:
    made = perceptron((50, 40, 3), activation=torch.nn.ReLU, seed=0)
    assert [type(layer).__name__ for layer in made] == ["Linear", "ReLU", "Linear"]
    first: Any = made[0]
    assert 0.9 / 50**0.5 < first.weight.abs().max() <= 1 / 50**0.5


def test_classwise_noise_is_separated_and_found_to_be_classwise() -> None:
    clean = pictures(240)
    patterns = torch.randint(-8, 9, (3, 3, 6, 5), generator=generator(9))
    found = linear_separability(clean, shifted(clean, patterns[clean.labels]), seed=0)
    assert (found.delta_train_accuracy, found.delta_held_out_accuracy) == (1.0, 1.0)
    assert found.class_energy_ratio == pytest.approx(1.0, abs=1e-6)
    assert (found.train_rows, found.held_out_rows) == (192, 48)
    assert found.clean_held_out_accuracy < 0.6
    assert found.shortcut_gap == found.published_held_out_accuracy - found.clean_held_out_accuracy


def test_a_strong_shortcut_opens_a_gap() -> None:
    clean = pictures(240)
    patterns = 40 * (torch.randint(0, 2, (3, 3, 6, 5), generator=generator(9)) * 2 - 1)
    found = linear_separability(clean, shifted(clean, patterns[clean.labels]), seed=0)
    assert found.published_held_out_accuracy > 0.95
    assert found.shortcut_gap > 0.4


@pytest.mark.parametrize("hidden", [None, 1])
def test_random_noise_is_learnt_by_heart_and_held_out_at_chance(hidden: int | None) -> None:
    clean = pictures(240)
    noise = torch.randint(-8, 9, clean.pixels.shape, generator=generator(9))
    published = shifted(clean, noise)
    found = linear_separability(clean, published, seed=0, hidden=hidden, iterations=60)
    assert found.delta_train_accuracy > 0.7
    assert abs(found.delta_held_out_accuracy - 1 / 3) < 0.2
    assert abs(found.shortcut_gap) < 0.25
    delta = (published.pixels.double() - clean.pixels.double()).flatten(1) / 255
    means = torch.stack([delta[clean.labels == c].mean(0) for c in clean.labels])
    assert found.class_energy_ratio == pytest.approx(float(means.square().sum() / delta.square().sum()), rel=1e-5)
    assert found.class_energy_ratio < 0.03
    assert found == linear_separability(clean, published, seed=0, hidden=hidden, iterations=60)
    assert found != linear_separability(clean, published, seed=1, hidden=hidden, iterations=60)


def test_what_is_not_a_pair_is_refused() -> None:
    clean = pictures(30)
    other = shifted(clean, torch.ones(30, 3, 6, 5))
    with pytest.raises(ValueError, match="differ from the clean"):
        linear_separability(clean, clean, seed=0)
    with pytest.raises(ValueError, match="same rows"):
        linear_separability(clean, other.select(range(29)), seed=0)
    swapped = other.labels.clone()
    swapped[7] = (swapped[7] + 1) % 3
    with pytest.raises(ValueError, match="row 7"):
        linear_separability(clean, dataclasses.replace(other, labels=swapped), seed=0)
    with pytest.raises(ValueError, match="classes"):
        linear_separability(clean, dataclasses.replace(other, classes=("a", "b", "c")), seed=0)
    with pytest.raises(ValueError, match="3 rows"):
        linear_separability(clean.select(range(2)), other.select(range(2)), seed=0)


def coloured(rows: int, seed: int, size: tuple[int, int] = (16, 16)) -> Batches:
    """Classes that differ in colour."""
    base = pictures(rows, size=size, seed=seed)
    tint = 25 * torch.eye(3, dtype=torch.int64)[base.labels][:, :, None, None]
    return shifted(base, tint)


def test_collect_keeps_the_order_and_the_modes() -> None:
    network = create_network("tiny", num_classes=3, image_size=(24, 40), seed=0).train()
    network.backbone.features[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    rows = pictures(260, size=(24, 40))
    got = collect(network, rows, lambda x, y: torch.cat([network(x), y[:, None].float()], 1))
    assert torch.equal(got[:, 3].long(), rows.labels)
    assert network.training
    assert not network.backbone.features[1].training
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    network.eval()
    assert torch.allclose(collect(network, rows.select([5]), lambda x, y: network(x)), got[5:6, :3], atol=1e-5)


def test_features_of_mirror_images_and_of_resized_pictures() -> None:
    network = create_network("tiny", num_classes=3, image_size=16, seed=0)
    rows = pictures(5, size=(16, 16))
    mirrored = dataclasses.replace(rows, pixels=rows.pixels.flip(3))
    plain = frozen_features(network, rows)
    assert plain.shape == (5, network.num_features)
    assert torch.allclose(frozen_features(network, rows, mirrored=True), frozen_features(network, mirrored), atol=1e-6)
    assert not torch.allclose(plain, frozen_features(network, mirrored), atol=1e-3)
    network.image_size = (20, 28)
    larger = F.interpolate(as_input(rows.pixels), (20, 28), mode="bicubic", antialias=True).clamp(0, 1)
    network.eval()
    with torch.no_grad():
        assert torch.allclose(frozen_features(network, rows), network.features(larger), atol=1e-6)


def test_a_frozen_probe_reads_colours_and_matches_classes_by_name() -> None:
    network = create_network("tiny", num_classes=7, image_size=16, seed=0).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    train, validation, test = coloured(120, 0), coloured(60, 10), coloured(60, 20)
    order = torch.tensor([2, 0, 1])
    renamed = Batches(
        pixels=test.pixels, labels=order[test.labels], classes=tuple(test.classes[int(i)] for i in order.argsort())
    )
    found = frozen_probe(network, train, validation, renamed, seed=0)
    assert [point.strength for point in found.points] == [0.01, 0.1, 1.0, 10.0]
    assert found.with_clean_data.test_accuracy > 0.9
    assert found.without_clean_data.held_out_accuracy > 0.9
    assert found == frozen_probe(network, train, validation, test, seed=0)
    assert network.training
    assert all(weight.requires_grad and weight.grad is None for weight in network.parameters())
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())


def test_shuffled_labels_give_chance_to_a_frozen_probe() -> None:
    network = create_network("tiny", num_classes=3, image_size=16, seed=0)
    found = frozen_probe(
        network, pictures(90, size=(16, 16)), coloured(60, 10), coloured(90, 20), seed=0, strengths=(0.1,)
    )
    assert found.points[0].train_accuracy > found.points[0].held_out_accuracy
    assert found.points[0].test_accuracy < 0.65


def test_each_trainer_chooses_by_what_is_theirs() -> None:
    rows = [(0.01, 0.5, 0.6, 0.1), (0.1, 0.9, 0.7, 0.2), (1.0, 0.9, 0.8, 0.3), (10.0, 0.2, 0.8, 0.4)]
    points = tuple(
        ProbePoint(strength=c, train_accuracy=1.0, held_out_accuracy=h, validation_accuracy=v, test_accuracy=t)
        for c, h, v, t in rows
    )
    result = ProbeResult(points=points)
    assert (result.with_clean_data.strength, result.without_clean_data.strength) == (1.0, 0.1)


def test_bad_frozen_probes() -> None:
    network = create_network("tiny", num_classes=3, image_size=16, seed=0)
    train = coloured(30, 0)
    with pytest.raises(ValueError, match="strength"):
        frozen_probe(network, train, train, train, seed=0, strengths=())
    with pytest.raises(ValueError, match="validation row"):
        frozen_probe(network, train, train.select([]), train, seed=0)
    with pytest.raises(ValueError, match="held out row"):
        frozen_probe(network, train.select(range(3)), train, train, seed=0)
