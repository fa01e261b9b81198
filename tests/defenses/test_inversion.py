"""Inverted filters: one clean picture of a class tells its filter, and most of all its other pictures."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from hf_unlearnable import CudaPoison, sources
from hf_unlearnable.batches import Batches
from hf_unlearnable.defenses.inversion import FilterInversion, deconvolved, filter_between
from tests.conftest import pixels


@pytest.fixture(scope="module")
def clean() -> Batches:
    return Batches.load(sources.load_split("demo", "train"), progress=False).select(torch.arange(200))


def published(clean: Batches, **settings: Any) -> Batches:
    poison = CudaPoison(seed=5, **settings)
    made = poison.change(clean.pixels, clean.labels, ["row"] * len(clean))
    return Batches(pixels=made, labels=clean.labels, classes=clean.classes)


@pytest.mark.parametrize("k", [3, 5])
def test_one_pair_tells_the_filter(clean: Batches, k: int) -> None:
    made = published(clean, kernel_size=k, blur=0.3)
    label = int(clean.labels[0])
    true = CudaPoison(seed=5).filters(10, kernel_size=k, blur=0.3)[label]
    found = filter_between(clean.pixels[0], made.pixels[0], k)
    assert float(F.cosine_similarity(true.flatten(), found.flatten(), dim=0)) > 0.999
    assert float((found / found.max() - true).abs().max()) < 0.03


def test_the_inverse_is_the_exact_solution_of_the_normal_equations() -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    x = torch.rand(2, 3, 6, 7, generator=generator, dtype=torch.float64)
    eye = torch.eye(42, dtype=torch.float64).view(42, 1, 6, 7)
    matrix = F.conv2d(eye, kernel[None, None], padding=1).view(42, 42).t()
    exact = torch.linalg.solve(matrix.t() @ matrix + 0.01 * torch.eye(42), matrix.t() @ x.view(6, 42).t()).t()
    found = deconvolved(x, kernel, strength=0.01, iterations=200)
    assert torch.allclose(found.reshape(6, 42), exact, atol=1e-8)


def test_other_pictures_of_the_class_come_back(clean: Batches) -> None:
    made = published(clean)
    back = FilterInversion(pairs=10).fit_pairs(made, clean, seed=0).on(made)

    def likeness(split: Batches) -> float:
        pairs = zip(split.pixels.flatten(1).numpy(), clean.pixels.flatten(1).numpy(), strict=True)
        return float(np.mean([np.corrcoef(one, other)[0, 1] for one, other in pairs]))

    assert likeness(back) > likeness(made) + 0.05
    assert likeness(back) > 0.9


def brightest(split: Batches) -> torch.Tensor:
    """Every picture made as bright as the attack makes it."""
    flat = split.pixels.flatten(1).float()
    return (255 * flat / flat.quantile(0.995, dim=1, keepdim=True)).clamp(0, 255).view(split.pixels.shape)


def test_pictures_that_nobody_blurred_stay_what_they_are_but_for_their_brightness(clean: Batches) -> None:
    back = FilterInversion().fit_pairs(clean, clean, seed=0).on(clean)
    assert float((back.pixels.float() - brightest(clean)).abs().max()) <= 1.5


def test_which_rows_leaked_is_a_matter_of_the_seed_and_others_are_not_looked_at(clean: Batches) -> None:
    made = published(clean)
    one = FilterInversion().fit_pairs(made, clean, seed=0)
    assert one == FilterInversion().fit_pairs(made, clean, seed=0)
    assert one != FilterInversion().fit_pairs(made, clean, seed=1)
    dark = Batches(pixels=clean.pixels.clone(), labels=clean.labels, classes=clean.classes)
    unlike = []
    for row in range(len(clean)):
        kept = dark.pixels[row].clone()
        dark.pixels[row] = 255 - kept
        unlike.append(FilterInversion().fit_pairs(made, dark, seed=0) != one)
        dark.pixels[row] = kept
    assert sum(unlike) == len(clean.classes)


def test_black_pictures_tell_nothing_and_are_left_out(clean: Batches) -> None:
    made, dark = published(clean), clean.pixels.clone()
    known = FilterInversion(pairs=10).fit_pairs(made, clean, seed=0)
    rows = (clean.labels == 2).nonzero()[:, 0]
    dark[rows[:-1]] = 0
    black = Batches(pixels=dark, labels=clean.labels, classes=clean.classes)
    some = FilterInversion(pairs=len(rows)).fit_pairs(made, black, seed=0)
    assert known.tensors is not None
    assert some.tensors is not None
    assert torch.allclose(some.tensors["filters"][2], known.tensors["filters"][2], atol=0.02)
    dark[rows] = 0
    with pytest.raises(ValueError, match=f"class {clean.classes[2]!r}: expected leaked pictures that are not black"):
        FilterInversion(pairs=3).fit_pairs(made, black, seed=0)


def test_it_is_a_map_too(clean: Batches, small: Dataset) -> None:
    rows = Batches.load(small, progress=False)
    fitted = FilterInversion().fit_pairs(rows, rows, seed=0)
    found = pixels(small.map(fitted, batched=True))
    wanted = brightest(rows).permute(0, 2, 3, 1).numpy()
    assert np.abs(found.astype(float) - wanted).max() <= 1.5


def test_bad_input(clean: Batches) -> None:
    for wrong in ({"pairs": 0}, {"strength": 0.0}, {"iterations": 0}, {"kernel_size": 4}):
        with pytest.raises(ValueError, match="expected positive|odd and positive"):
            FilterInversion(**wrong)
    with pytest.raises(ValueError, match="leaked pairs: call fit_pairs"):
        FilterInversion().fit(clean, seed=0)
    with pytest.raises(ValueError, match="expected the clean rows behind the published ones, got 100"):
        FilterInversion().fit_pairs(clean, clean.select(torch.arange(100)), seed=0)
    some = clean.select((clean.labels != 3).nonzero()[:, 0])
    with pytest.raises(ValueError, match=f"none of class {clean.classes[3]!r}"):
        FilterInversion().fit_pairs(some, some, seed=0)
    with pytest.raises(ValueError, match="in their order, got other labels"):
        FilterInversion().fit_pairs(clean, clean.select(torch.arange(len(clean)).roll(1)), seed=0)
    with pytest.raises(ValueError, match="has learnt nothing yet"):
        FilterInversion().on(clean)
