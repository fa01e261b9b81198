import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, DatasetDict

from hf_unlearnable import demo, sources
from hf_unlearnable.images import decode, decode_many
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


# Streams.


def in_files(small: Dataset, folder: Path) -> Path:
    for i, (start, stop) in enumerate(((0, 7), (7, 15), (15, 24))):
        small.select(range(start, stop)).to_parquet(folder / f"train-{i}.parquet")
    return folder


def shown(stream: sources.Stream, column: str, *where: int) -> np.ndarray:
    return np.stack([decode(row[column]).pixels.permute(1, 2, 0).numpy() for row in stream.read(*where)])


def test_a_stream_of_parquet_begins_at_any_row(small: Dataset, tmp_path: Path) -> None:
    folder = in_files(small, tmp_path / "photos")
    stream = sources.stream_split(folder)
    assert (stream.kind, stream.split, stream.count()) == ("parquet", "train", [7, 8, 9])
    assert stream.features["label"] == small.features["label"]
    expected = pixels(small)
    for where, rows in (((0, 3), (0, 24)), ((0, 3, 5, 4), (5, 9)), ((1, 2), (7, 15)), ((1, 3, 7, 3), (14, 17))):
        assert np.array_equal(shown(stream, "img", *where), expected[slice(*rows)])
    (tmp_path / "moved").mkdir()
    folder.rename(tmp_path / "moved" / "photos")
    assert sources.stream_split(tmp_path / "moved" / "photos").identity == stream.identity
    small.select(range(3)).to_parquet(tmp_path / "moved" / "photos" / "train-1.parquet")
    assert sources.stream_split(tmp_path / "moved" / "photos").identity != stream.identity


def test_a_stream_of_what_is_there(small: Dataset, tmp_path: Path) -> None:
    small.save_to_disk(tmp_path / "saved")
    small.to_parquet(tmp_path / "one.parquet")
    for source, kind in ((tmp_path / "saved", "dataset"), (tmp_path / "one.parquet", "parquet")):
        stream = sources.stream_split(source)
        assert (stream.kind, stream.count()) == (kind, [24])
        assert np.array_equal(shown(stream, "img", 0, 1, 3, 5), pixels(small)[3:8])
    assert sources.stream_split("demo", "test").count() == [1000]


def test_a_stream_of_a_folder_of_pictures(tmp_path: Path) -> None:
    for i, picture in enumerate(noise_pictures(6)):
        folder = tmp_path / "photos" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(picture).save(folder / f"{i}.png")
    stream = sources.stream_split(tmp_path / "photos")
    assert (stream.kind, stream.count()) == ("imagefolder", [6])
    whole = sources.load_split(tmp_path / "photos")
    assert np.array_equal(shown(stream, "image", 0, 1, 2), pixels(whole, "image")[2:])
    assert [row["label"] for row in stream.read(0, 1)] == whole["label"][:]
    (tmp_path / "photos" / "cat").rename(tmp_path / "photos" / "test")
    with pytest.raises(ValueError, match="holds 6 pictures, but 3 were read"):
        sources.stream_split(tmp_path / "photos")


def test_a_stream_of_archives(tmp_path: Path) -> None:
    pictures = noise_pictures(5)
    (tmp_path / "tars").mkdir()
    for name, rows in (("a", (0, 1, 2)), ("b", (3, 4))):
        with tarfile.open(tmp_path / "tars" / f"{name}.tar", "w") as archive:
            for file in ("folder/", ".hidden.png"):
                archive.addfile(tarfile.TarInfo(file))
            for row in rows:
                buffer = io.BytesIO()
                PIL.Image.fromarray(pictures[row]).save(buffer, "PNG")
                for suffix, data in (("png", buffer.getvalue()), ("cls", str(row).encode())):
                    member = tarfile.TarInfo(f"folder/{row}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    stream = sources.stream_split(tmp_path / "tars")
    assert (stream.kind, stream.count()) == ("webdataset", [3, 2])
    assert list(stream.features) == ["png", "cls", "__key__"]
    assert np.array_equal(shown(stream, "png", 0, 2, 1), pictures[1:])
    assert [row["cls"] for row in stream.read(1, 2)] == [3, 4]
    assert sources.stream_split(tmp_path / "tars" / "b.tar").count() == [2]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_archives_hand_over_the_bytes_that_are_stored(kind: str, tmp_path: Path) -> None:
    suffix, stored = kind.lower(), []
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for row, picture in enumerate(noise_pictures(7)):
            buffer = io.BytesIO()
            PIL.Image.fromarray(picture).save(buffer, kind)
            stored.append(buffer.getvalue())
            member = tarfile.TarInfo(f"{row}.{suffix}")
            member.size = len(stored[-1])
            archive.addfile(member, io.BytesIO(stored[-1]))
    stream = sources.stream_split(tmp_path / "a.tar")
    assert [row[suffix]["bytes"] for row in stream.read(0, 1)] == stored
    assert [row[suffix]["bytes"] for row in stream.read(0, 1, skip=2, rows=3)] == stored[2:5]


def test_a_stream_of_archives_whose_rows_differ(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    PIL.Image.fromarray(noise_pictures(1)[0]).save(buffer, "PNG")
    told = [{"caption": "a", "tags": ["x"]} for _ in range(8)]
    told[6:] = [{"caption": None, "tags": ["y"]}, {"caption": "c", "tags": []}]
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        for i, row in enumerate(told):
            members = {
                "png": buffer.getvalue(),
                "json": json.dumps(row).encode(),
                **({} if i == 7 else {"txt": b"text"}),
            }
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    rows = list(sources.stream_split(tmp_path / "train-0.tar").read(0, 1))
    assert [row["json"] for row in rows] == told
    assert [row["txt"] for row in rows] == [*["text"] * 7, None]


def test_streams_that_are_not_there(small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    with pytest.raises(FileNotFoundError, match="there is no ./nowhere"):
        sources.stream_split("./nowhere")
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"a folder, a .parquet or a .tar file"):
        sources.stream_split(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"expected split 'trian' .*; did you mean 'train'"):
        sources.stream_split(in_files(small, tmp_path / "photos"), "trian")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="neither a path here nor a dataset"):
        sources.stream_split("nobody/nothing-at-all")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Callable[[Path, str], str]]:
    """Copies a folder to an address; what lies there is gone afterwards."""
    store = fsspec.filesystem("memory")

    def copied(folder: Path, name: str) -> str:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                store.pipe_file(f"/bucket/{name}/{path.relative_to(folder)}", path.read_bytes())
        return f"memory://bucket/{name}"

    yield copied
    store.rm("/bucket", recursive=True)


def test_parquet_at_an_address(
    small: Dataset, tmp_path: Path, elsewhere: Callable[[Path, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)  # it is about addresses of any kind
    folder = in_files(small, tmp_path / "photos")
    small.select(range(4)).to_parquet(folder / "test-0.parquet")
    (folder / "record.json").write_text("{}")
    url = elsewhere(folder, "photos")
    stream = sources.stream_split(f"{url}/")
    assert (stream.kind, stream.split, stream.count()) == ("parquet", "train", [7, 8, 9])
    assert stream.features["label"] == small.features["label"]
    assert np.array_equal(shown(stream, "img", 1, 3, 7, 3), pixels(small)[14:17])
    assert sources.stream_split(url, "test").count() == [4]
    assert sources.stream_split(f"{url}/train-1.parquet").count() == [8]
    assert np.array_equal(pixels(sources.load_split(url, "train")), pixels(small))
    again = sources.stream_split(url)
    assert again.identity == sources.stream_split(url).identity
    small.select(range(3)).to_parquet(folder / "train-1.parquet")
    assert sources.stream_split(elsewhere(folder, "photos")).identity != again.identity
    url = elsewhere(folder, "photos")
    assert len(sources.load_split(url, "train")) == 19, "what changed is read anew"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("s3://bucket/private/photos", "photos"),
        ("s3://bucket/photos/", "photos"),
        ("s3://bucket", "bucket"),
        ("s3://secret-bucket/", "bucket"),
        ("s3://KEY:SECRET@store", "bucket"),
        ("https://host/photos.parquet?sig=SECRET", "photos.parquet"),
        ("https://host/get?sig=SECRET&f=x.parquet", "get"),
        ("demo", "demo"),
        ("someone/photos", "someone/photos"),
    ],
)
def test_records_tell_neither_buckets_nor_keys(source: str, told: str) -> None:
    assert sources.public_name(source) == told


def test_pictures_at_an_address(tmp_path: Path, elsewhere: Callable[[Path, str], str]) -> None:
    for i, picture in enumerate(noise_pictures(6)):
        folder = tmp_path / "photos" / "train" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(picture).save(folder / f"{i}.png")
    stream = sources.stream_split(elsewhere(tmp_path / "photos", "photos"))
    assert (stream.kind, stream.count()) == ("imagefolder", [6])
    assert stream.features["label"].names == ["cat", "dog"]
    whole = sources.load_split(tmp_path / "photos")
    assert np.array_equal(shown(stream, "image", 0, 1, 2), pixels(whole, "image")[2:])
    assert [row["label"] for row in stream.read(0, 1)] == whole["label"][:]
    for name in ("train", "left", "right"):
        (tmp_path / "split" / name).mkdir(parents=True)
        PIL.Image.fromarray(noise_pictures(1)[0]).save(tmp_path / "split" / name / "0.png")
    url = elsewhere(tmp_path / "split", "split")
    with pytest.raises(ValueError, match=r"holds 3 pictures, but 1 were read, as \['train'\]"):
        sources.stream_split(url)
    (tmp_path / "photos" / "train" / "metadata.csv").write_text("file_name,caption\n")
    with pytest.raises(ValueError, match=r"holds a metadata.csv, which is read on this machine alone"):
        sources.stream_split(elsewhere(tmp_path / "photos", "told"))


def test_a_picture_that_went_away_is_its_row(tmp_path: Path, elsewhere: Callable[[Path, str], str]) -> None:
    for i, picture in enumerate(noise_pictures(2)):
        (tmp_path / "photos").mkdir(exist_ok=True)
        PIL.Image.fromarray(picture).save(tmp_path / "photos" / f"{i}.png")
    rows = list(sources.stream_split(elsewhere(tmp_path / "photos", "photos")).read(0, 1))
    fsspec.filesystem("memory").rm_file("/bucket/photos/1.png")
    with pytest.raises(ValueError, match="^row 1: expected a readable picture file, got no such file$"):
        decode_many([row["image"] for row in rows], where=["row 0", "row 1"])


def test_addresses_with_nothing_or_too_much(
    small: Dataset, tmp_path: Path, elsewhere: Callable[[Path, str], str]
) -> None:
    for load in (sources.load_split, sources.stream_split):
        with pytest.raises(FileNotFoundError, match="there is nothing to read at memory://bucket/nothing"):
            load("memory://bucket/nothing")
        with pytest.raises(ValueError, match="nosuch"):
            load("nosuch://bucket/photos")
    mixed = in_files(small, tmp_path / "mixed")
    PIL.Image.fromarray(noise_pictures(1)[0]).save(mixed / "train-9.png")
    url = elsewhere(mixed, "mixed")
    with pytest.raises(
        ValueError, match=r"expected files of parquet, tar archives or pictures, got \['imagefolder', 'parquet'\]"
    ):
        sources.stream_split(url)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text("words")
    with pytest.raises(ValueError, match="got none of them"):
        sources.stream_split(elsewhere(tmp_path / "text", "text"))
