import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from hf_unlearnable.draws import Draws
from hf_unlearnable.poisons import ar
from hf_unlearnable.poisons.ar import ArPoison
from tests.conftest import make_dataset, noise_pictures, pixels

SECRET = bytes(range(32))


def uint8(rows: int, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.from_numpy(noise_pictures(rows, height, width)).permute(0, 3, 1, 2).contiguous()


def deltas(poison: ArPoison, pictures: torch.Tensor, labels: list[int]) -> torch.Tensor:
    """What is added, before clipping and rounding."""
    draws = Draws(poison.seed, poison.name, pictures)
    return poison.perturb(torch.zeros(pictures.shape), torch.tensor(labels), draws)


def filters(weights: torch.Tensor) -> torch.Tensor:
    found = weights.clone()
    found[:, :, 2, 2] = -1
    return found


def by_loops(weights: np.ndarray, starts: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The definition, one pixel at a time in the order of a page."""
    field = np.zeros((3, rows, columns))
    for c in range(3):
        field[c, :2] = starts[c, : 2 * columns].reshape(2, columns)
        field[c, 2:, :2] = starts[c, 2 * columns :].reshape(rows - 2, 2)
        for i in range(rows - 2):
            for j in range(columns - 2):
                field[c, i + 2, j + 2] = sum(
                    weights[c, u, v] * field[c, i + u, j + v] for u in range(3) for v in range(3)
                )
    return field


@pytest.mark.parametrize(("shape", "margin"), [((32, 32), 4), ((9, 14), 4), ((13, 5), 4), ((1, 1), 4), ((3, 97), 2)])
@pytest.mark.parametrize("seed", [7, SECRET])
def test_it_is_the_definition(seed: int | bytes, shape: tuple[int, int], margin: int) -> None:
    poison = ArPoison(seed=seed)
    pictures, labels = uint8(3, *shape), [2, 0, 1]
    weights = poison.coefficients(3, large=margin == 2).numpy()
    rows, columns = shape[0] + margin, shape[1] + margin
    starts = Draws(seed, "ar", pictures).normal(3, 2 * columns + 2 * (rows - 2), purpose="start").numpy()
    for label, start, found in zip(labels, starts, deltas(poison, pictures, labels), strict=True):
        field = by_loops(weights[label], start, rows, columns)[:, margin:, margin:]
        field *= math.sqrt(shape[0] * shape[1]) / 32 / math.sqrt((field**2).sum())
        assert np.allclose(found, field, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(32, 32), (40, 64), (110, 90)])
def test_the_filter_of_a_class_answers_its_own_patterns_with_nothing(shape: tuple[int, int]) -> None:
    poison = ArPoison(seed=3)
    delta = deltas(poison, uint8(4, *shape), [0, 1, 2, 3]).double()
    answers = F.conv2d(delta, filters(poison.coefficients(4, large=max(shape) >= 96))).relu().sum((2, 3))
    scale = shape[0] * shape[1] / 1024
    assert answers.diagonal().max() < 1e-5 * scale
    assert answers[~torch.eye(4, dtype=torch.bool)].min() > 1 * scale


def test_l2_norm() -> None:
    for shape, expected in (((32, 32), 1.0), ((224, 224), 7.0), ((16, 64), 1.0)):
        norms = deltas(ArPoison(seed=1), uint8(2, *shape), [0, 1]).flatten(1).norm(dim=1)
        assert torch.allclose(norms, torch.tensor(expected), atol=1e-5)
    norms = deltas(ArPoison(seed=1, epsilon=3.0), uint8(2, 96, 96), [0, 1]).flatten(1).norm(dim=1)
    assert torch.allclose(norms, torch.tensor(3.0), atol=1e-5)


@pytest.mark.parametrize(("epsilon", "levels"), [(None, 8), (4 / 255, 4), (0.0339, 8)])
def test_linf_norm_is_reached_and_kept_in_whole_levels(epsilon: float | None, levels: int) -> None:
    poison = ArPoison(seed=1, norm="linf", epsilon=epsilon)
    grey = torch.full((4, 3, 32, 32), 128, dtype=torch.uint8)
    grey[:, 0, 0, 0] = torch.arange(4)
    out = poison.change(grey, torch.tensor([0, 1, 2, 3]), [""] * 4)
    assert ((out.int() - grey.int()).abs().flatten(1).amax(1) == levels).all()
    pictures = uint8(8)
    poison.change(pictures, torch.arange(8) % 4, [""] * 8)


def test_published_pixels_keep_the_budget(small: Dataset) -> None:
    poison = ArPoison(seed=1)
    before, after = (torch.from_numpy(pixels(d)).permute(0, 3, 1, 2) for d in (small, poison.apply(small)))
    poison.budget_for(32, 32).check(before, after)
    assert poison.budget_for(224, 224).epsilon == 7
    assert ArPoison(seed=1, norm="linf").budget_for(32, 40).epsilon == 8 / 255


@pytest.mark.parametrize("shape", [(32, 32), (60, 100)])
def test_a_row_does_not_depend_on_its_batch(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for norm in ("l2", "linf"):
        poison = ArPoison(seed=1, norm=norm)
        pictures, labels = uint8(23, *shape), [i * i % 7 for i in range(23)]
        whole = deltas(poison, pictures, labels)
        for step in (1, 5):
            parts = [deltas(poison, pictures[i : i + step], labels[i : i + step]) for i in range(0, 23, step)]
            assert torch.equal(torch.cat(parts), whole)
        with monkeypatch.context() as patch:
            patch.setattr(ar, "_BYTES_AT_ONCE", 8 * 3 * (shape[0] + 4) * (shape[1] + 4) * 4)
            assert torch.equal(deltas(poison, pictures, labels), whole)


@pytest.mark.parametrize("large", [False, True])
def test_the_search_is_greedy_and_its_responses_large(large: bool) -> None:
    count = 30 if large else 6
    expected: list[torch.Tensor] = []
    for process, pattern in ar._bounded(5, large):
        assert np.sqrt((pattern**2).sum()) == pytest.approx(1)
        required = 3 if len(expected) >= 10 else 5 if large else 10
        if expected:
            answers = F.conv2d(torch.from_numpy(pattern)[None], filters(torch.stack(expected))).relu().sum((0, 2, 3))
            if answers.min() < required:
                continue
        expected.append(torch.from_numpy(process))
        if len(expected) == count:
            break
    assert torch.equal(ArPoison(seed=5).coefficients(count, large=large), torch.stack(expected))


@pytest.mark.parametrize("seed", [5, SECRET])
def test_processes_are_normalised_bounded_and_do_not_depend_on_how_many(seed: int | bytes) -> None:
    poison = ArPoison(seed=seed)
    for large in (False, True):
        weights = poison.coefficients(6, large=large)
        assert torch.allclose(weights.sum((2, 3)), torch.ones(6, 3, dtype=torch.float64))
        assert (weights[:, :, 2, 2] == 0).all()
        assert torch.equal(poison.coefficients(2, large=large), weights[:2])
        starts = np.random.default_rng(0).standard_normal((60, 3, 140))
        fields = ar._fields(weights.numpy()[np.arange(60) % 6], starts, 36, 36)[:, :, 4:, 4:]
        norms = np.sqrt((fields**2).sum((1, 2, 3)))
        assert np.quantile(norms, 0.8) < 50
    assert not torch.equal(poison.coefficients(6), weights)
    assert not torch.equal(poison.coefficients(2), ArPoison(seed=6).coefficients(2))


def test_channels_dropped_one_by_one_leave_the_law_of_the_plain_search() -> None:
    generator = np.random.default_rng(0)
    channels = generator.standard_normal((6000, 3, 3, 3))
    channels[..., 2, 2] = 0
    channels /= channels.sum((2, 3), keepdims=True)
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(3):
            fields = ar._fields(channels, generator.standard_normal((len(channels), 3, 140)), 36, 36)[:, :, 4:, 4:]
            channels = channels[np.sqrt((fields**2).sum((1, 2, 3))) <= 50]
    assert 60 < len(channels) < 110
    plain = np.abs(channels).reshape(-1, 27)
    ours = np.abs([process.ravel() for process, _ in itertools.islice(ar._bounded(11, False), 1000)])
    for statistic in (np.mean, np.max, np.median):
        a, b = statistic(plain, axis=1), statistic(ours, axis=1)
        assert abs(a.mean() - b.mean()) < 4 * a.std() / math.sqrt(len(a))


def test_large_processes_stay_bounded_and_the_criterion_tells() -> None:
    known = np.zeros((4, 3, 3))
    known[0] = 1 / 8
    known[1, 1, 2] = 1
    known[2, 2, 1], known[2, 2, 0], known[2, 1, 2] = 1.9, -1.2, 0.3
    known[3, 1, 2], known[3, 0, 2] = 2.1, -1.1
    known[0, 2, 2] = 0
    assert ar._stay_bounded(known).tolist() == [True, True, False, False]
    generator = np.random.default_rng(1)
    channels = generator.standard_normal((3000, 3, 3))
    channels[:, 2, 2] = 0
    channels /= channels.sum((1, 2), keepdims=True)
    with np.errstate(over="ignore", invalid="ignore"):
        tame = np.abs(ar._fields(channels[:, None], generator.standard_normal((3000, 1, 140)), 36, 36)).max((1, 2, 3))
    channels = channels[tame < 20][:160]
    fields = ar._fields(channels[:, None], generator.standard_normal((len(channels), 1, 1196)), 300, 300)[:, 0]
    growth = (fields[:, -20:, -20:] ** 2).mean((1, 2)) / (fields[:, :60, :60] ** 2).mean((1, 2))
    bounded = ar._stay_bounded(channels)
    assert 0.2 < bounded.mean() < 0.95
    assert growth[bounded].max() < 3
    assert np.median(growth[~bounded]) > 100


def test_less_is_asked_when_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ar, "_LARGE_RESPONSE", 1e4)
    monkeypatch.setattr(ar, "_PATIENCE", 4)
    found = list(itertools.islice(ar._search(5, True), 3))
    assert len(found) == 3
    monkeypatch.undo()
    assert np.array_equal(found[0], ArPoison(seed=5).coefficients(1, large=True)[0])


def test_pictures_decide_the_start_and_keys_the_process() -> None:
    pictures = uint8(2, 100, 100)
    found = [deltas(ArPoison(seed=s), pictures, [0, 0]) for s in (1, 2)]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0][0], found[0][1])
    dataset = make_dataset(noise_pictures(4, 20, 30), [0, 1, 2, 3])
    assert pixels(ArPoison(seed=1).apply(dataset)).shape == (4, 20, 30, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epsilon": 0.0},
        {"epsilon": math.nan},
        {"norm": "linf", "epsilon": 8.0},
        {"norm": "linf", "epsilon": 0.001},
    ],
)
def test_wrong_arguments(wrong: dict) -> None:
    with pytest.raises(ValueError, match="epsilon is"):
        ArPoison(seed=1, **wrong)


def test_an_unknown_norm() -> None:
    with pytest.raises((ValueError, TypeError), match="norm"):
        ArPoison(seed=1, norm="l1")  # type: ignore[arg-type]
