"""Arms: the rows that victims are trained on are those that were published, and the clean ones behind them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import DatasetDict, concatenate_datasets

from hf_unlearnable import LspPoison
from hf_unlearnable.batches import Batches, stratified_rows
from hf_unlearnable.digests import split_digest
from hf_unlearnable.evaluation.arms import Arm, Rows
from hf_unlearnable.evaluation.protocol import protected_arms
from hf_unlearnable.images import digest
from hf_unlearnable.protect import protect
from tests.conftest import make_dataset, noise_pictures


def rows_of(shapes: DatasetDict, **changes) -> Rows:
    how = {"rows": None, "validation_rows": 60, "progress": False, **changes}
    return Rows(shapes["train"], shapes["test"], **how)


def arm(kind: str, path: Path, **more) -> Arm:
    return Arm(label="x", kind=kind, path=str(path), **more)  # type: ignore[arg-type]


def test_the_protected_arm_is_what_was_published_and_clean_what_is_behind(
    shapes: DatasetDict, protected_once: list[Path]
) -> None:
    rows = rows_of(shapes)
    published = rows.training(arm("protected", protected_once[0]))
    clean = rows.training(arm("clean", protected_once[0]))
    expected = Batches.load(LspPoison(seed=0).apply(shapes["train"]), progress=False)
    assert torch.equal(published.pixels, expected.pixels)
    assert torch.equal(clean.pixels, Batches.load(shapes["train"], progress=False).pixels)
    record = json.loads((protected_once[0] / "record.json").read_text())
    assert split_digest(map(digest, published.pixels)) == record["published"]["pixels_sha256"]
    assert split_digest(map(digest, clean.pixels)) == record["source"]["pixels_sha256"]


def test_pictures_of_any_size_are_seen_at_one(tmp_path: Path) -> None:
    sizes = [(40, 56), (33, 33), (64, 40)]
    pictures = [noise_pictures(1, *sizes[i % 3], seed=i)[0] for i in range(60)]
    splits = [make_dataset(pictures[:40], [i % 2 for i in range(40)], classes=2)]
    splits.append(make_dataset(pictures[40:], [i % 2 for i in range(20)], classes=2))
    train, test = splits
    protect(train, LspPoison(seed=0, num_classes=2), tmp_path / "out", source="any", progress=False)
    how = {"rows": None, "validation_rows": 10, "progress": False}
    with pytest.raises(ValueError, match="of one size|of the same size|pixels"):
        Rows(train, test, **how)
    rows = Rows(train, test, image_size=24, **how)
    expected = Batches.load(LspPoison(seed=0, num_classes=2).apply(train), image_size=24, progress=False)
    assert torch.equal(rows.training(arm("protected", tmp_path / "out")).pixels, expected.pixels)
    clean = Batches.load(train, image_size=24, progress=False)
    assert torch.equal(rows.training(arm("clean", tmp_path / "out")).pixels, clean.pixels)
    assert rows.test.image_size == (24, 24)
    with pytest.raises(ValueError, match="40 of 40 test rows .* are among the training rows"):
        Rows(train, train, image_size=24, **how)


def test_validation_and_test_rows_part_the_test_split_evenly(shapes: DatasetDict) -> None:
    rows = rows_of(shapes)
    assert (len(rows.validation), len(rows.test)) == (60, 140)
    assert torch.bincount(rows.validation.labels).tolist() == [6] * 10
    together = torch.cat([rows.validation.pixels, rows.test.pixels]).flatten(1)
    whole = Batches.load(shapes["test"], progress=False).pixels.flatten(1)
    assert sorted(map(bytes, together.numpy())) == sorted(map(bytes, whole.numpy()))


def test_mixed_and_remaining_rows_are_complements_and_nested(shapes: DatasetDict, protected_once: list[Path]) -> None:
    rows = rows_of(shapes)
    published, clean = rows.protected(str(protected_once[0]))
    kept = {}
    for fraction in (0.25, 0.5):
        mixed = rows.training(arm("mix", protected_once[0], fraction=fraction))
        poisoned = (mixed.pixels != clean.pixels).flatten(1).any(1)
        assert int(poisoned.sum()) == round(160 * fraction)
        assert torch.equal(mixed.pixels[poisoned], published.pixels[poisoned])
        rest = rows.training(arm("remainder", protected_once[0], fraction=fraction))
        assert torch.equal(rest.pixels, clean.pixels[~poisoned])
        assert torch.equal(rest.labels, clean.labels[~poisoned])
        kept[fraction] = poisoned
    assert bool((kept[0.5] | ~kept[0.25]).all())


def test_controls(shapes: DatasetDict, protected_once: list[Path]) -> None:
    rows = rows_of(shapes)
    clean = rows.training(arm("clean", protected_once[0]))
    noisy = rows.training(arm("noise", protected_once[0], epsilon=4 / 255))
    assert int((noisy.pixels.int() - clean.pixels.int()).abs().max()) == 4
    shuffled = rows.training(arm("shuffled", protected_once[0]))
    assert torch.equal(shuffled.pixels, clean.pixels)
    assert torch.bincount(shuffled.labels).tolist() == torch.bincount(clean.labels).tolist()
    assert (shuffled.labels != clean.labels).float().mean() > 0.7


def test_fewer_rows_are_the_same_rows_in_every_arm(shapes: DatasetDict, protected_once: list[Path]) -> None:
    few, all_rows = rows_of(shapes, rows=40), rows_of(shapes)
    chosen = stratified_rows(all_rows.clean.labels, 40, key=0)
    for kind in ("protected", "clean"):
        whole = all_rows.training(arm(kind, protected_once[0]))
        assert torch.equal(few.training(arm(kind, protected_once[0])).pixels, whole.pixels[chosen])


def test_a_protected_part_is_matched_with_its_clean_rows(shapes: DatasetDict, tmp_path: Path) -> None:
    label = torch.tensor(shapes["train"]["label"])
    drawn = shapes["train"].select(stratified_rows(label, 50, key=0).tolist())
    for name, part in (("first", shapes["train"].select(range(40))), ("drawn", drawn)):
        protect(part, LspPoison(seed=3), tmp_path / name, source="demo", progress=False)
        clean = rows_of(shapes).training(arm("clean", tmp_path / name))
        assert torch.equal(clean.pixels, Batches.load(part, progress=False).pixels)
    other = shapes["train"].select(range(5, 60))
    protect(other, LspPoison(seed=3), tmp_path / "other", source="demo", progress=False)
    with pytest.raises(ValueError, match="give the one that was protected"):
        rows_of(shapes).training(arm("clean", tmp_path / "other"))


def test_a_changed_folder_is_refused(protected_once: list[Path], shapes: DatasetDict, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(protected_once[0], folder)
    shutil.copy(next((protected_once[1] / "data").iterdir()), next((folder / "data").iterdir()))
    with pytest.raises(ValueError, match="changed after it was protected"):
        rows_of(shapes).training(arm("protected", folder))


def test_test_rows_among_the_training_rows_are_left_out_or_refused(shapes: DatasetDict) -> None:
    def leaky(count: int) -> DatasetDict:
        both = concatenate_datasets([shapes["test"], shapes["train"].select(range(count))])
        return DatasetDict({"train": shapes["train"], "test": both})

    found, clean = rows_of(leaky(2)), rows_of(shapes)
    assert (found.left_out, clean.left_out) == (2, 0)
    assert torch.equal(found.test.pixels, clean.test.pixels)
    with pytest.raises(ValueError, match=r"3 of 203 test rows \(the first is row 200\) are among the training rows"):
        rows_of(leaky(3))


def test_test_pictures_of_another_size_are_refused(shapes: DatasetDict) -> None:
    larger = shapes["test"].map(lambda row: {"image": row["image"].resize((40, 40))})
    with pytest.raises(ValueError, match=r"expected test pictures of \(32, 32\) pixels, got \(40, 40\)"):
        rows_of(DatasetDict({"train": shapes["train"], "test": larger}))


@pytest.mark.parametrize("count", [0, 49, 101])
def test_too_few_rows_to_choose_on(shapes: DatasetDict, count: int) -> None:
    with pytest.raises(ValueError, match="at least 5 rows a class"):
        rows_of(shapes, validation_rows=count)


def test_test_classes_in_another_order_are_matched_by_name(shapes: DatasetDict) -> None:
    names = shapes["test"].features["label"].names
    turned = names[3:] + names[:3]

    def renamed(row: dict) -> dict:
        return {"label": turned.index(names[row["label"]])}

    features = shapes["test"].features.copy()
    features["label"] = type(features["label"])(names=turned)
    other = shapes["test"].map(renamed, features=features)
    found = rows_of(DatasetDict({"train": shapes["train"], "test": other})).test
    assert np.array_equal(found.labels, rows_of(shapes).test.labels)


def test_arms_from_the_command_line(protected_once: list[Path], tmp_path: Path, shapes: DatasetDict) -> None:
    a, b = map(str, protected_once)
    arms = protected_arms([a, f"mine={b}"])
    assert [one.label for one in protected_arms([a, b])] == ["lsp", "lsp"]
    assert [one.label for one in arms] == ["lsp", "mine"]
    assert len({one.name for one in arms}) == 2
    for wrong, message in ((["a/b=" + a], "expected a label"), ([a, f"other={a}"], "hold the same pictures")):
        with pytest.raises(ValueError, match=message):
            protected_arms(wrong)
    protect(shapes["train"], LspPoison(seed=3, patch=4), tmp_path / "finer", source="demo", progress=False)
    with pytest.raises(ValueError, match="different methods or settings"):
        protected_arms([a, str(tmp_path / "finer")])
    assert len(protected_arms([a, f"finer={tmp_path / 'finer'}"])) == 2
    with pytest.raises(FileNotFoundError, match=r"record\.json"):
        protected_arms([str(tmp_path)])
    protect(shapes["train"].select(range(40)), LspPoison(seed=3), tmp_path / "few", source="demo", progress=False)
    with pytest.raises(ValueError, match="the same clean rows"):
        protected_arms([a, str(tmp_path / "few")])
