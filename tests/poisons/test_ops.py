import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from hf_unlearnable.budget import Budget
from hf_unlearnable.images import Picture
from hf_unlearnable.poisons import ops
from hf_unlearnable.poisons.ops import OpsPoison
from tests.conftest import make_dataset, noise_pictures, pixels

SECRET = bytes(range(32))
LABELS = [i % 4 for i in range(40)]
COLOURS = [(code // 4, code // 2 % 2, code % 2) for code in range(8)]


@pytest.fixture(scope="module")
def source() -> Dataset:
    return make_dataset(noise_pictures(40, 7, 10), LABELS)


@pytest.fixture(scope="module")
def poison(source: Dataset) -> OpsPoison:
    return OpsPoison.fit(source, seed=SECRET, progress=False)


def by_loops(pictures: np.ndarray, labels: list[int], sparsity: int) -> tuple:
    """The definition: every score from its own numbers, every choice from a sorted list."""
    used: set[tuple[int, int, int]] = set()
    result = []
    for label in sorted(set(labels)):
        own = pictures[np.asarray(labels) == label] / 255
        scores = {}
        for h in range(pictures.shape[1]):
            for w in range(pictures.shape[2]):
                for v in range(8):
                    difference = np.abs(np.array(COLOURS[v]) - own[:, h, w, :])
                    scores[h, w, v] = difference.mean() / (difference.std() + 1e-12)
        chosen: list[tuple[int, int, int]] = []
        for h, w, v in sorted(scores, key=lambda at: -scores[at]):
            if (h, w, v) not in used and (h, w) not in [at[:2] for at in chosen] and len(chosen) < sparsity:
                chosen.append((h, w, v))
        used |= set(chosen)
        result.append(tuple(chosen))
    return tuple(result)


@pytest.mark.parametrize("sparsity", [1, 3])
def test_pixels_are_those_of_the_definition(source: Dataset, sparsity: int) -> None:
    expected = by_loops(pixels(source), LABELS, sparsity)
    for batch_size in (40, 7, 1):
        fitted = OpsPoison.fit(source, seed=1, sparsity=sparsity, batch_size=batch_size, progress=False)
        assert fitted.pixels == expected
        assert (fitted.size, fitted.sparsity, fitted.num_classes) == ((7, 10), sparsity, 4)


def test_scores_are_those_of_the_definition_to_float64() -> None:
    own = noise_pictures(30, 4, 5)
    own[:, 1, 1], own[:, 2, 2] = (10, 0, 250), 255
    levels = own.astype(np.int64).transpose(0, 3, 1, 2)
    scores = ops._scores(30, levels.sum(0), (levels**2).sum(0))
    for v in range(8):
        difference = np.abs(np.array(COLOURS[v]) - own / 255)
        expected = difference.mean((0, 3)) / (difference.std((0, 3)) + 1e-12)
        spread = difference.std((0, 3)) > 1e-9
        assert np.allclose(scores[:, :, v][spread], expected[spread], rtol=1e-12)
    assert scores[2, 2, 0] == pytest.approx(1e12)
    assert scores[2, 2, 7] == 0


def test_a_constant_pixel_is_chosen_and_the_used_one_left_to_its_class() -> None:
    pictures = noise_pictures(8, 6, 6)
    pictures[:, 2, 3] = 255
    found = OpsPoison.fit(make_dataset(pictures, [0, 1] * 4, 2), seed=1, progress=False).pixels
    assert found[0] == ((2, 3, 0),)
    assert found[1] != found[0]


def test_one_pixel_of_a_row_changes_the_same_for_its_class(source: Dataset, poison: OpsPoison) -> None:
    before, after = pixels(source), pixels(poison.apply(source))
    assert len(set(poison.pixels)) == 4
    for label, ((h, w, v),) in enumerate(poison.pixels):
        own = np.asarray(LABELS) == label
        changed = (before[own] != after[own]).any(3)
        assert changed.sum((1, 2)).max() == 1
        changed[:, h, w] = False
        assert not changed.any()
        assert (after[own][:, h, w] == 255 * np.array(COLOURS[v])).all()


def test_a_picture_that_has_the_colour_stays_as_it_is(poison: OpsPoison) -> None:
    (h, w, v) = poison.pixels[0][0]
    picture = torch.zeros(1, 3, 7, 10, dtype=torch.uint8)
    picture[0, :, h, w] = 255 * torch.tensor(COLOURS[v])
    assert torch.equal(poison.change(picture, torch.tensor([0]), ["row 0"]), picture)


def test_sparsity(source: Dataset) -> None:
    fitted = OpsPoison.fit(source, seed=1, sparsity=5, progress=False)
    assert fitted.budget_for(32, 32) == Budget("l0", 5)
    changed = (pixels(source) != pixels(fitted.apply(source))).any(3).sum((1, 2))
    assert changed.max() == 5
    assert changed.min() >= 4
    places = [at for own in fitted.pixels for at in own]
    assert len(set(places)) == 20


def test_every_way_of_mapping_gives_the_same_pixels(source: Dataset, poison: OpsPoison) -> None:
    expected = pixels(poison.apply(source))
    assert np.array_equal(pixels(source.map(poison, batched=True, batch_size=7, keep_in_memory=True)), expected)
    assert np.array_equal(pixels(source.select([5, 0, 9]).map(poison)), expected[[5, 0, 9]])
    assert np.array_equal(pixels(poison.apply(source, num_proc=2)), expected)


def test_poison_rate_and_classes(source: Dataset) -> None:
    half = OpsPoison.fit(source, seed=1, poison_rate=0.5, progress=False)
    whole = dataclasses.replace(half, poison_rate=1.0)
    assert whole.pixels == OpsPoison.fit(source, seed=2, progress=False).pixels
    before, after = pixels(source), pixels(half.apply(source))
    assert (before != after).any((1, 2, 3)).sum() == 20
    some = OpsPoison.fit(source, seed=1, classes=(1,), progress=False)
    changed = (before != pixels(some.apply(source))).any((1, 2, 3))
    assert np.array_equal(changed, np.asarray(LABELS) == 1)


def test_it_is_a_value_that_does_not_show_its_pixels(source: Dataset, poison: OpsPoison) -> None:
    assert pickle.loads(pickle.dumps(poison)) == poison  # noqa: S301
    assert hash(poison) == hash(dataclasses.replace(poison))
    assert OpsPoison(seed=SECRET, pixels=poison.pixels, size=(7, 10)) == poison
    text = json.dumps(poison.cache_state())
    for h, w, v in (own[0] for own in poison.pixels):
        assert f"{h}, {w}, {v}" not in repr(poison)
        assert f"{h}, {w}, {v}" not in text
    assert "pixels" not in poison.settings()
    assert poison.settings()["size"] == (7, 10)
    other = OpsPoison.fit(source.select(range(12)), seed=SECRET, progress=False)
    assert other.pixels != poison.pixels
    assert other.cache_state()["pixels"] != poison.cache_state()["pixels"]
    assert dataclasses.replace(poison).cache_state() == poison.cache_state()
    assert np.array_equal(pixels(other.apply(source)), pixels(source.map(other, batched=True)))
    assert not np.array_equal(pixels(other.apply(source)), pixels(poison.apply(source)))


def test_a_label_without_a_pixel_is_named(poison: OpsPoison) -> None:
    with pytest.raises(ValueError, match=r"row 2: expected one of 4 classes.*got label 5"):
        poison.change(torch.zeros(3, 3, 7, 10, dtype=torch.uint8), torch.tensor([0, 1, 5]), ["row 0", "row 1", "row 2"])
    more = make_dataset(noise_pictures(5, 7, 10), [0, 1, 2, 3, 4], 5)
    with pytest.raises(ValueError, match="at most 4 classes"):
        poison.apply(more)


def test_another_size_is_refused(poison: OpsPoison) -> None:
    with pytest.raises(ValueError, match="7 x 10 pixels, for which this poison was fitted, got 10 x 7"):
        poison.apply(make_dataset(noise_pictures(2, 10, 7), [0, 1]))


def test_fit_names_the_row_of_another_size(source: Dataset) -> None:
    pictures = [*noise_pictures(9, 7, 10), *noise_pictures(1, 7, 11), *noise_pictures(2, 7, 10)]
    odd = make_dataset(pictures, LABELS[:12])
    for batch_size in (500, 9, 4):
        with pytest.raises(ValueError, match=r"row 9: expected pictures of one size, 7 x 10 .* got 7 x 11"):
            OpsPoison.fit(odd, seed=1, batch_size=batch_size, progress=False)


def test_fit_names_a_class_without_rows(source: Dataset) -> None:
    few = source.filter(lambda label: label != 2, input_columns="label")
    with pytest.raises(ValueError, match=r"none of class 2 \(class2\)"):
        OpsPoison.fit(few, seed=1, progress=False)
    with pytest.raises(ValueError, match="none of class 0"):
        OpsPoison.fit(source.select([]), seed=1, progress=False)


def test_fit_checks_labels_and_columns(source: Dataset) -> None:
    bare = source.remove_columns("label").add_column("number", LABELS)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="no label column"):
        OpsPoison.fit(bare, seed=1, progress=False)
    fitted = OpsPoison.fit(bare, seed=1, label_column="number", image_column="img", progress=False)
    assert (fitted.label_column, fitted.image_column, fitted.num_classes) == ("number", "img", 4)
    assert fitted.pixels == OpsPoison.fit(source, seed=1, progress=False).pixels
    with pytest.raises(ValueError, match="row 3: expected one of 3 classes"):
        OpsPoison.fit(bare, seed=1, label_column="number", num_classes=3, progress=False)
    with pytest.raises(ValueError, match="none of class 4"):
        OpsPoison.fit(bare, seed=1, label_column="number", num_classes=5, progress=False)
    with pytest.raises(ValueError, match="expected a dataset with rows"):
        OpsPoison.fit(bare.select([]), seed=1, label_column="number", progress=False)
    with pytest.raises(TypeError, match="Dataset"):
        OpsPoison.fit(DatasetDict({"train": source}), seed=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sparsity"):
        OpsPoison.fit(source, seed=1, sparsity=0, progress=False)


def test_fit_refuses_more_pixels_than_there_are() -> None:
    tiny = make_dataset(noise_pictures(9, 1, 1), list(range(9)), 9)
    with pytest.raises(ValueError, match="1 for each of 9 classes are more than 1 x 1"):
        OpsPoison.fit(tiny, seed=1, progress=False)
    with pytest.raises(ValueError, match="2 for each"):
        OpsPoison.fit(make_dataset(noise_pictures(1, 1, 1), [0], 1), seed=1, sparsity=2, progress=False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"pixels": ()},
        {"pixels": (((0, 0, 0),), ())},
        {"pixels": (((0, 0, 8),),)},
        {"pixels": (((2, 0, 0),),)},
        {"pixels": (((0, -1, 0),),)},
        {"pixels": (((0, 0, 0), (0, 0, 1)),), "sparsity": 2},
        {"pixels": (((0, 0, 0),),), "num_classes": 2},
        {"pixels": (((0, 0, 0),),), "sparsity": 0},
    ],
)
def test_wrong_arguments(wrong: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        OpsPoison(seed=1, size=(2, 2), **wrong)


def test_transparency_is_carried_over(poison: OpsPoison) -> None:
    alpha = torch.full((7, 10), 9, dtype=torch.uint8)
    changed = poison.change_pictures(
        [Picture(torch.zeros(3, 7, 10, dtype=torch.uint8), alpha)], [1], np.ones(1, bool), [""]
    )
    assert torch.equal(changed[0].alpha, alpha)  # type: ignore[arg-type]
