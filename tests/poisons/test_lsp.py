import math

import numpy as np
import pytest
import torch
from sklearn.datasets import make_classification

from hf_unlearnable.draws import Draws
from hf_unlearnable.keys import numpy_generator
from hf_unlearnable.poisons import lsp
from hf_unlearnable.poisons.lsp import LspPoison
from tests.conftest import make_dataset, noise_pictures, pixels

SECRET = bytes(range(32))


def uint8(rows: int, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.from_numpy(noise_pictures(rows, height, width)).permute(0, 3, 1, 2).contiguous()


def deltas(poison: LspPoison, pictures: torch.Tensor, labels: list[int]) -> torch.Tensor:
    """What is added, before clipping and rounding."""
    draws = Draws(poison.seed, poison.name, pictures)
    return poison.perturb(torch.zeros(pictures.shape), torch.tensor(labels), draws)


def by_loops(poison: LspPoison, pictures: torch.Tensor, labels: list[int], patch: int) -> np.ndarray:
    """The definition, one number at a time."""
    height, width = pictures.shape[2:]
    down, across = math.ceil(height / patch), math.ceil(width / patch)
    features = 3 * down * across
    z = Draws(poison.seed, poison.name, pictures).normal(features).numpy()
    vertices: list[list[int]] = []
    for label in range(max(labels) + 1):
        generator = numpy_generator(poison.seed, "lsp", "vertex", features, label)
        while len(vertices) == label:
            bits = generator.integers(0, 2, features).tolist()
            vertices += [bits] if bits not in vertices else []
    out = np.zeros((len(labels), 3, height, width))
    for row, label in enumerate(labels):
        mixing = numpy_generator(poison.seed, "lsp", "mixing", features, label).random((features, features)) * 2 - 1
        point = [poison.class_sep * (2 * b - 1) + sum(z[row] * mixing[:, f]) for f, b in enumerate(vertices[label])]
        for i in range(height):
            for j in range(width):
                for c in range(3):
                    out[row, c, i, j] = point[((i // patch) * across + j // patch) * 3 + c]
        out[row] *= 6 / 255 * math.sqrt(3 * height * width) / math.sqrt((out[row] ** 2).sum())
    return out


@pytest.mark.parametrize("seed", [7, SECRET])
@pytest.mark.parametrize(("shape", "patch"), [((32, 32), None), ((17, 30), None), ((16, 16), 4), ((5, 3), 8)])
def test_it_is_the_definition(seed: int | bytes, shape: tuple[int, int], patch: int | None) -> None:
    poison = LspPoison(seed=seed, patch=patch)
    pictures, labels = uint8(5, *shape), [0, 2, 1, 2, 5]
    expected = by_loops(poison, pictures, labels, patch or 8)
    assert np.allclose(deltas(poison, pictures, labels), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("side", "radius"), [(32, 1.304), (224, 9.129)])
def test_the_norm_is_the_official_one(side: int, radius: float) -> None:
    norms = deltas(LspPoison(seed=1), uint8(6, side, side), [0, 1, 2, 3, 4, 5]).flatten(1).norm(dim=1)
    assert torch.allclose(norms, torch.tensor(radius), atol=1e-3)


def test_a_given_radius_is_kept_at_every_size() -> None:
    for shape in ((32, 32), (40, 33), (100, 120)):
        norms = deltas(LspPoison(seed=1, l2_radius=2.5), uint8(3, *shape), [0, 1, 2]).flatten(1).norm(dim=1)
        assert torch.allclose(norms, torch.tensor(2.5), atol=1e-5)


def test_patches_are_of_one_colour() -> None:
    delta = deltas(LspPoison(seed=1), uint8(4), [0, 1, 2, 3])
    blocks = delta.unfold(2, 8, 8).unfold(3, 8, 8)
    assert (blocks == blocks[..., :1, :1]).all()
    assert len(delta[0].unique()) == 48
    large = deltas(LspPoison(seed=1), uint8(1, 100, 130), [0])
    assert (large[:, :, :32, 96:128] == large[:, :, :1, 96:97]).all()
    assert len(large.unique()) == 3 * 4 * 5


def test_amplitudes_are_those_of_the_official_code() -> None:
    found = deltas(LspPoison(seed=1), uint8(500), [i % 10 for i in range(500)]).flatten(1).abs().amax(1) * 255
    assert found.mean().item() == pytest.approx(10.5, abs=0.3)
    assert 13 < found.max() < 20


def test_points_are_distributed_as_those_of_scikit_learn() -> None:
    rows, features, classes = 6000, 48, 10
    theirs, labels = make_classification(
        rows,
        features,
        n_informative=features,
        n_redundant=0,
        n_repeated=0,
        n_classes=classes,
        n_clusters_per_class=1,
        class_sep=10,
        flip_y=0,
        random_state=3,
    )
    z = np.random.default_rng(0).standard_normal((rows, features))
    ours = lsp._points(5, z, labels, 10.0)
    spectra = []
    for points in (theirs, ours):
        own = [points[labels == label] for label in range(classes)]
        centres = np.stack([p.mean(0) for p in own])
        assert np.allclose(np.abs(centres), 10, atol=1)
        assert len(np.unique(np.sign(centres), axis=0)) == classes
        assert 0.4 < (centres > 0).mean() < 0.6
        spectra.append(np.mean([np.sort(np.linalg.eigvalsh(np.cov(p.T))) for p in own], axis=0))
    assert np.allclose(spectra[1][3:], spectra[0][3:], rtol=0.25)
    assert np.allclose(spectra[1][24:], spectra[0][24:], rtol=0.06)
    assert spectra[1].sum() == pytest.approx(features**2 / 3, rel=0.02)


def test_classes_are_linearly_separable() -> None:
    labels = np.arange(1500) % 10
    delta = deltas(LspPoison(seed=SECRET), uint8(1500), labels.tolist()).flatten(1).double()
    train, test = delta[:1000], delta[1000:]
    probe = torch.linalg.lstsq(train, torch.eye(10, dtype=torch.float64)[labels[:1000]], driver="gelsd").solution
    assert ((test @ probe).argmax(1).numpy() == labels[1000:]).all()


@pytest.mark.parametrize("shape", [(32, 32), (100, 120)])
def test_a_row_does_not_depend_on_its_batch(shape: tuple[int, int]) -> None:
    poison, pictures, labels = LspPoison(seed=1), uint8(23, *shape), [i * i % 7 for i in range(23)]
    whole = deltas(poison, pictures, labels)
    for step in (1, 5):
        parts = [deltas(poison, pictures[i : i + step], labels[i : i + step]) for i in range(0, 23, step)]
        assert torch.equal(torch.cat(parts), whole)


def test_no_two_classes_share_a_vertex() -> None:
    vertices = lsp._vertices(3, 3, 8)
    assert len(np.unique(vertices, axis=0)) == 8
    assert np.array_equal(lsp._vertices(3, 3, 4), vertices[:4])
    assert set(np.unique(vertices)) == {-1, 1}
    assert len(np.unique(lsp._vertices(SECRET, 12, 1024), axis=0)) == 1024
    with pytest.raises(ValueError, match="labels below 8.*smaller patch"):
        deltas(LspPoison(seed=1), uint8(1, 8, 8), [8])


def test_published_pixels_keep_the_budget() -> None:
    poison = LspPoison(seed=1)
    dataset = make_dataset(noise_pictures(8, 33, 40), [0, 1, 2, 3] * 2)
    before, after = (
        torch.from_numpy(pixels(d)).permute(0, 3, 1, 2) for d in (dataset, poison.apply(dataset, batch_size=3))
    )
    poison.budget_for(33, 40).check(before, after)
    assert LspPoison(seed=1, l2_radius=1.0).budget_for(50, 60).epsilon == 1.0
    assert (before != after).any(1).float().mean() > 0.9


def test_keys_and_pictures_decide() -> None:
    pictures = uint8(2)
    found = [deltas(LspPoison(seed=s), pictures, [0, 0]) for s in (1, 2, SECRET)]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0][0], found[0][1])


@pytest.mark.parametrize(
    "wrong", [{"patch": 0}, {"l2_radius": 0.0}, {"l2_radius": math.nan}, {"class_sep": -1.0}, {"class_sep": math.inf}]
)
def test_wrong_arguments(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LspPoison(seed=1, **wrong)
