"""Orthogonal projection: what the classifier reads is gone, and nothing else."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from hf_unlearnable.batches import Batches
from hf_unlearnable.defenses.base import describe
from hf_unlearnable.defenses.projection import OrthogonalProjection
from hf_unlearnable.draws import FreshDraws
from hf_unlearnable.images import to_float
from hf_unlearnable.keys import torch_generator
from tests.conftest import make_dataset, noise_pictures, pixels


def fresh(count: int) -> FreshDraws:
    return FreshDraws(count, torch.Generator().manual_seed(0))


def batches(rows: int = 200, height: int = 10, width: int = 14, classes: int = 4) -> Batches:
    """Grey pictures in which one pixel of a channel tells the class."""
    generator = torch.Generator().manual_seed(3)
    u = torch.randint(60, 180, (rows, 3, height, width), generator=generator).to(torch.uint8)
    labels = torch.arange(rows) % classes
    u[torch.arange(rows), 0, labels, labels] = 255
    return Batches(pixels=u, labels=labels, classes=tuple(f"c{i}" for i in range(classes)))


@pytest.fixture(scope="module")
def fitted() -> OrthogonalProjection:
    return OrthogonalProjection(fit_epochs=40, fit_batch_size=64).fit(batches(), seed=0)


def slow_regression(train: Batches, weight: Tensor, epochs: int, size: int, rate: float) -> Tensor:
    weight = weight.clone().requires_grad_()
    sgd = torch.optim.SGD([weight], rate)
    schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, [epochs // 2, epochs * 3 // 4], 0.1)
    order = torch.randperm(len(train), generator=torch_generator(5, "op", "order"))
    for _ in range(epochs):
        for part in order.split(size):
            sgd.zero_grad()
            F.cross_entropy(F.linear(to_float(train.pixels[part]).flatten(1), weight), train.labels[part]).backward()
            sgd.step()
        schedule.step()
    return weight.detach()


def test_rows_that_are_sorted_by_class_do_no_harm() -> None:
    train = batches()
    ordered = train.select(train.labels.argsort())
    found = [
        OrthogonalProjection(fit_epochs=20, fit_batch_size=50).fit(split, seed=0).tensors for split in (train, ordered)
    ]
    spans = [one["directions"].double() for one in found if one]
    assert torch.linalg.svdvals(spans[0].t() @ spans[1]).min() > 0.9


def test_the_regression_is_torchs() -> None:
    train = batches()
    start = OrthogonalProjection(fit_learning_rate=1e-30)._regression(train, 5, False)
    bound = (3 * 10 * 14) ** -0.5
    assert 0.95 * bound < start.abs().max() <= bound
    found = OrthogonalProjection(fit_epochs=20, fit_batch_size=64)._regression(train, 5, False)
    assert torch.allclose(found, slow_regression(train, start, 20, 64, 0.1), atol=1e-5)
    assert (found - start).abs().max() > 0.05


def test_nothing_is_left_for_the_classifier(fitted: OrthogonalProjection) -> None:
    train = batches()
    x = to_float(train.pixels)
    projected = fitted.alter(x, None, fresh(len(x)))
    weight = OrthogonalProjection(fit_epochs=40, fit_batch_size=64)._regression(train, 0, False)
    assert (x.flatten(1) @ weight.t()).argmax(1).eq(train.labels).float().mean() > 0.9
    assert (projected.flatten(1) @ weight.t()).abs().max() < 1e-4
    removed = (x - projected).flatten(1).double()
    assert torch.linalg.matrix_rank(removed, rtol=1e-5) == 4
    assert torch.allclose(fitted.alter(projected, None, fresh(len(x))), projected, atol=1e-5)
    assert (removed * projected.flatten(1)).sum(1).abs().max() < 1e-3


def test_trained_pictures_are_not_clipped_and_stored_ones_are(fitted: OrthogonalProjection) -> None:
    train = batches()
    u = train.pixels.clone()
    u[:8] = u[:8] // 128 * 255
    x = fitted.alter(to_float(u), None, fresh(len(u)))
    assert x.min() < 0
    assert x.max() > 1
    stored = fitted.change(u, None, [""] * len(u))
    assert (stored.float() - 255 * x.clamp(0, 1)).abs().max() < 0.501


def test_fit_depends_on_the_seed_and_the_rows_alone(fitted: OrthogonalProjection) -> None:
    settings = OrthogonalProjection(fit_epochs=40, fit_batch_size=64)
    again, other = settings.fit(batches(), seed=0, progress=True), settings.fit(batches(), seed=1)
    assert again == fitted != other
    assert again.learned == fitted.learned != other.learned
    assert settings.learned is None
    assert describe(fitted)["learned"].startswith("sha256:")
    assert fitted.cache_state() != other.cache_state()


def test_it_pickles_small(fitted: OrthogonalProjection) -> None:
    data = pickle.dumps(fitted)
    assert len(data) < 4 * 4 * 3 * 10 * 14 + 3000
    known = pickle.loads(data)  # noqa: S301
    assert known == fitted
    assert torch.equal(known.tensors["directions"], fitted.tensors["directions"])  # type: ignore[index]


def test_row_batch_and_apply_give_the_same_pixels(small: Dataset) -> None:
    defense = OrthogonalProjection(fit_epochs=4, fit_batch_size=8).fit(Batches.load(small, progress=False), seed=0)
    expected = pixels(small.map(defense, keep_in_memory=True))
    assert np.array_equal(pixels(small.map(defense, batched=True, batch_size=7)), expected)
    assert np.array_equal(pixels(defense.apply(small)), expected)
    mixed = make_dataset([*noise_pictures(3), *noise_pictures(2, 24, 40)], [0] * 5)
    with pytest.raises(ValueError, match=r"expected pictures of 32 x 32 pixels .* got 24 x 40"):
        mixed.map(defense, batched=True)


def test_unfitted() -> None:
    x = torch.rand(1, 3, 10, 14, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"OrthogonalProjection has learnt nothing yet: call \.fit\("):
        OrthogonalProjection().alter(x, None, fresh(1))


def test_too_many_classes() -> None:
    tiny = Batches(
        pixels=torch.zeros(2, 3, 1, 1, dtype=torch.uint8), labels=torch.tensor([0, 1]), classes=("a", "b", "c")
    )
    with pytest.raises(ValueError, match="fewer classes than the 3 values of a picture, got 2 rows and 3 classes"):
        OrthogonalProjection().fit(tiny, seed=0)


@pytest.mark.parametrize("wrong", [{"fit_epochs": 0}, {"fit_batch_size": 0}, {"fit_learning_rate": 0.0}])
def test_bad_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="positive fit_epochs"):
        OrthogonalProjection(**wrong)
