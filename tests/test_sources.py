from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, DatasetDict

from hf_unlearnable import demo, sources
from tests.conftest import noise_pictures, pixels


def test_folder_of_pictures(tmp_path: Path) -> None:
    for i, picture in enumerate(noise_pictures(6)):
        folder = tmp_path / "train" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(picture).save(folder / f"{i}.png")
    found = sources.load_split(tmp_path)
    assert len(found) == 6
    assert found.features["label"].names == ["cat", "dog"]


def test_a_class_named_like_a_split_hides_no_pictures(tmp_path: Path) -> None:
    for name in ("cat", "dog", "test"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i, picture in enumerate(noise_pictures(2)):
            PIL.Image.fromarray(picture).save(tmp_path / "photos" / name / f"{i}.png")
    with pytest.raises(ValueError, match=r"holds 6 pictures, but 2 were read, as \['test'\]"):
        sources.load_split(tmp_path / "photos")
    (tmp_path / "photos" / "train").mkdir()
    for name in ("cat", "dog", "test"):
        (tmp_path / "photos" / name).rename(tmp_path / "photos" / "train" / name)
    assert sources.load_split(tmp_path / "photos").features["label"].names == ["cat", "dog", "test"]


def test_parquet_and_save_to_disk(small: Dataset, tmp_path: Path) -> None:
    small.to_parquet(tmp_path / "a.parquet")
    small.save_to_disk(tmp_path / "one")
    DatasetDict(train=small, test=small.select(range(4))).save_to_disk(tmp_path / "two")
    for source, split, rows in (
        (tmp_path / "a.parquet", None, 24),
        (tmp_path / "one", None, 24),
        (tmp_path / "two", None, 24),
        (tmp_path / "two", "test", 4),
    ):
        found = sources.load_split(source, split)
        assert np.array_equal(pixels(found), pixels(small)[:rows])


@pytest.mark.parametrize("readme", ["", "---\nconfigs:\n- config_name: default\n  data_files: data/train-*\n---\n"])
def test_a_folder_that_changed_is_read_anew(tmp_path: Path, readme: str) -> None:
    from tests.conftest import make_dataset

    for seed, folder in enumerate(("a/out", "b/out", "a/out")):
        data = tmp_path / folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "README.md").write_text(readme)
        pictures = noise_pictures(4, seed=seed)
        make_dataset(pictures, [0, 1, 2, 3]).to_parquet(data / "train-00000-of-00001.parquet")
        assert np.array_equal(pixels(sources.load_split(tmp_path / folder)), pictures)


def test_the_demo_repeats_and_is_balanced() -> None:
    a, b = (demo.shapes(train_rows=20, test_rows=10)["train"] for _ in range(2))
    assert np.array_equal(pixels(a, "image"), pixels(b, "image"))
    assert np.bincount(a["label"]).tolist() == [2] * 10
    test = demo.shapes(train_rows=20, test_rows=20)["test"]
    assert not np.array_equal(pixels(a, "image"), pixels(test, "image"))


def test_unknown_split_names_the_near_one(small: Dataset, tmp_path: Path) -> None:
    DatasetDict(train=small, validation=small).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"\['train', 'validation'\]; did you mean 'validation'"):
        sources.load_split(tmp_path / "two", "valid")
    small.save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match="which holds one split"):
        sources.load_split(tmp_path / "one", "test")


@pytest.mark.parametrize("source", ["./nowhere", "nowhere.parquet", "a/b/c"])
def test_paths_that_are_not_there(source: str) -> None:
    with pytest.raises(FileNotFoundError, match="there is no"):
        sources.load_split(source)


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="parquet"):
        sources.load_split(tmp_path / "a.csv")


def test_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="neither a path here nor a dataset"):
        sources.load_split("nobody/nothing-at-all")
