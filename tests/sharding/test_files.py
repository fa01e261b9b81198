"""Tar archives in webdataset form: what goes in comes out, for our readers and for those of `datasets`."""

import datetime
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, List, Value, load_dataset

from hf_unlearnable import CudaPoison, RandomNoisePoison
from hf_unlearnable.digests import file_digest
from hf_unlearnable.sharding.files import Archive, ParquetFile
from hf_unlearnable.sharding.merge import merge
from hf_unlearnable.sharding.run import protect_shards
from hf_unlearnable.sources import Stream, stream_of, stream_split
from tests.conftest import load_script, make_dataset, noise_pictures, pixels

SECRET = bytes(range(32))
CUDA = CudaPoison(seed=SECRET)


def make(source: Path | Stream, output: Path, **more: Any) -> list[int]:
    stream = source if isinstance(source, Stream) else stream_split(source)
    told = {"poison": CUDA, "batch_size": 5, "progress": False, "container": "webdataset", **more}
    return protect_shards(stream, output=output, **told)


def load(folder: Path, cache: Path) -> Dataset:
    return load_dataset(str(folder), split="train", cache_dir=str(cache))


def members(file: Path) -> dict[str, bytes]:
    with tarfile.open(file) as archive:
        opened = {member.name: archive.extractfile(member) for member in archive}
        return {name: file.read() for name, file in opened.items() if file is not None}


def test_any_source_becomes_archives_that_datasets_reads(small: Dataset, parquet: Path, tmp_path: Path) -> None:
    make(parquet, tmp_path / "out", shards=5)
    record = merge(tmp_path / "out", progress=False)
    assert list(record.published["files"]) == [f"data/train-{i:05d}-of-00005.tar" for i in range(5)]
    for name, file in record.published["files"].items():
        assert file["sha256"] == file_digest(tmp_path / "out" / name)
    found = load(tmp_path / "out", tmp_path / "cache")
    assert np.array_equal(pixels(found, "png"), pixels(CUDA.apply(small)))
    assert found["cls"] == small["label"]
    assert [told["name"] for told in found["json"]] == small["name"]
    assert found["__key__"][3:5] == ["00000-000000003", "00001-000000000"]


def test_digests_and_pixels_are_those_of_parquet(parquet: Path, tmp_path: Path) -> None:
    records = []
    for container in ("webdataset", "parquet"):
        make(parquet, tmp_path / container, shards=3, container=container)
        records.append(merge(tmp_path / container, progress=False))
    archives, files = records
    assert archives.source == files.source
    assert archives.pixels == files.pixels
    assert archives.published["pixels_sha256"] == files.published["pixels_sha256"]


def test_archives_keep_their_keys_and_members(small: Dataset, archives: Path, tmp_path: Path) -> None:
    make(archives, tmp_path / "out", shards=3)
    merge(tmp_path / "out", progress=False)
    expected = pixels(CUDA.apply(small))
    for i, count in enumerate((7, 8, 9)):
        before = members(archives / f"train-{i:05d}.tar")
        after = members(tmp_path / "out" / "data" / f"train-{i:05d}-of-00003.tar")
        assert sorted(after) == sorted(before)
        assert len(after) == 3 * count
        for name, content in after.items():
            if name.endswith(".png"):
                row = int(name.partition(".")[0])
                assert np.array_equal(np.asarray(PIL.Image.open(io.BytesIO(content))), expected[row])
            else:
                assert json.loads(content) == json.loads(before[name])


def test_what_was_made_is_a_source_again(small: Dataset, parquet: Path, tmp_path: Path) -> None:
    make(parquet, tmp_path / "one", shards=3, poison=RandomNoisePoison(seed=SECRET, image_format="webp"))
    merge(tmp_path / "one", progress=False)
    stream = stream_split(tmp_path / "one")
    assert stream.kind == "webdataset"
    assert stream.count() == [7, 8, 9]
    make(stream, tmp_path / "two", shards=2)
    merge(tmp_path / "two", progress=False)
    found = load(tmp_path / "two", tmp_path / "cache")
    assert found["cls"] == small["label"]
    noisy = RandomNoisePoison(seed=SECRET).apply(small)
    assert np.array_equal(pixels(found, "png"), pixels(CUDA.apply(noisy)))


def test_the_same_rows_make_the_same_bytes(parquet: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        make(parquet, tmp_path / name, shards=2)
    names = [f"data/train-{i:05d}-of-00002.tar" for i in range(2)]
    assert [file_digest(tmp_path / "one" / n) for n in names] == [file_digest(tmp_path / "two" / n) for n in names]


def test_left_out_rows_are_not_in_the_archives(parquet: Path, tmp_path: Path, small: Dataset) -> None:
    stored = small.cast_column("img", Image(decode=False)).to_list()
    stored[3]["img"]["bytes"] = b"no picture"
    broken = Dataset.from_list(stored, features=small.features)
    make(stream_of(broken, "broken"), tmp_path / "out", shards=2, on_error="skip")
    record = merge(tmp_path / "out", progress=False)
    assert [row["row"] for row in record.source["left_out"]] == [3]
    found = load(tmp_path / "out", tmp_path / "cache")
    kept = [i for i in range(24) if i != 3]
    assert np.array_equal(pixels(found, "png"), pixels(CUDA.apply(small.select(kept))))


def features(**more: Any) -> Features:
    return Features({"jpg": Image(), "cls": Value("int64"), "__key__": Value("string"), **more})


def archive(columns: Features, **more: Any) -> Archive:
    told = {"image": "jpg", "label": "cls", "image_format": "png", "archives": True, "shard": 1, **more}
    return Archive(columns, **told)


def row(**more: Any) -> dict[str, Any]:
    return {"jpg": {"bytes": b"p", "path": "a.jpg"}, "cls": 3, "__key__": "d.1/7", **more}


def test_names_and_values_of_members(tmp_path: Path) -> None:
    form = archive(features(**{"txt": Value("string"), "x.json": {"a": Value("int64")}, "raw": Value("binary")}))
    rows = [
        row(**{"txt": "é", "x.json": {"a": None}, "raw": b"\0"}),
        row(__key__="8", txt=None, **{"x.json": [], "raw": b""}),
    ]
    with form.writer(tmp_path / "a.tar") as writer:
        meant = writer.write(rows, ["row 0", "row 1"])
    assert members(tmp_path / "a.tar") == {
        "d.1/7.png": b"p", "d.1/7.cls": b"3", "d.1/7.txt": "é".encode(), "d.1/7.x.json": b'{"a": null}',
        "d.1/7.raw": b"\0",
        "8.png": b"p", "8.cls": b"3", "8.x.json": b"[]", "8.raw": b"",
    }  # fmt: skip
    assert [one for batch in form.read(tmp_path / "a.tar") for one in batch] == meant
    assert archive(Features({"in.jpg": Image()}), image="in.jpg", label=None).picture == "in.png"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"npy": Value("binary")}, "column 'npy' cannot be kept"),
        ({"png": Value("binary")}, "column 'png' has the name that the pictures of 'jpg' need"),
    ],
)
def test_columns_that_an_archive_cannot_hold(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        archive(features(**columns))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"cls": "3"}, "row 4: column 'cls' cannot be kept in webdataset form: expected int, got str"),
        ({"json": datetime.date(2020, 1, 1)}, "row 4: column 'json' cannot be kept in webdataset form"),
        ({"json": float("nan")}, "row 4: column 'json' cannot be kept in webdataset form"),
        ({"__key__": ""}, "row 4: the row before has the key '' too"),
    ],
)
def test_values_that_an_archive_cannot_hold(value: dict[str, Any], message: str, tmp_path: Path) -> None:
    form = archive(features(json=Value("string")))
    with form.writer(tmp_path / "a.tar") as writer, pytest.raises(ValueError, match=message):
        writer.write([row(**{"json": None, **value})], ["row 4"])


def test_rows_without_a_label_are_refused_and_nothing_is_left(small: Dataset, tmp_path: Path) -> None:
    unlabelled = make_dataset([PIL.Image.fromarray(p) for p in noise_pictures(4, 8, 8)], [0, 1, None, 1])
    noise = RandomNoisePoison(seed=SECRET)
    with pytest.raises(ValueError, match="row 2: column 'label': webdataset form needs a label in every row"):
        make(stream_of(unlabelled, "some"), tmp_path / "out", poison=noise)
    assert not list(tmp_path.rglob("*.tar"))


def test_the_container_is_part_of_the_plan(parquet: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="container is one of parquet, webdataset, got 'zip'"):
        make(parquet, tmp_path / "out", container="zip")
    make(parquet, tmp_path / "out", shards=2, only=[1])
    with pytest.raises(ValueError, match="container: expected webdataset, got parquet"):
        make(parquet, tmp_path / "out", container="parquet")


def test_nothing_is_begun_when_a_column_cannot_be_kept(small: Dataset, tmp_path: Path) -> None:
    arrays = small.rename_column("label", "cls").rename_column("name", "npy").cast_column("cls", Value("int64"))
    stream = replace(stream_of(arrays, "arrays"), kind="webdataset")
    with pytest.raises(ValueError, match="column 'npy' cannot be kept in webdataset form"):
        make(stream, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line(parquet: Path, tmp_path: Path) -> None:
    told = [
        "--dataset",
        str(parquet),
        "--streaming",
        "--poison",
        "cuda",
        "--seed",
        "7",
        "--output",
        str(tmp_path / "o"),
    ]
    load_script("protect").main([*told, "--container", "webdataset"])
    assert [path.name for path in (tmp_path / "o" / "data").iterdir()] == ["train-00000-of-00001.tar"]


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_has_groups_of_100_rows_and_dictionaries(tmp_path: Path, nested: bool) -> None:
    value: Any = ["the same words"] * 3 if nested else "the same words"
    words = List(Value("string")) if nested else Value("string")
    form = ParquetFile(Features({"image": Image(), "words": words}), "image")
    rows = [{"image": {"bytes": bytes([i]), "path": None}, "words": value} for i in range(250)]
    with form.writer(tmp_path / "x.parquet") as writer:
        assert writer.write(rows, [""] * 250) == rows
    with pq.ParquetFile(tmp_path / "x.parquet") as parquet:
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        assert [group.num_rows for group in groups] == [100, 100, 50]
        encodings = {groups[0].column(i).path_in_schema: groups[0].column(i).encodings for i in range(3)}
        told = next(encoding for name, encoding in encodings.items() if name.startswith("words"))
        assert "RLE_DICTIONARY" in told
        assert ("RLE_DICTIONARY" in encodings["image.bytes"]) == nested
    read = [row for batch in form.read(tmp_path / "x.parquet") for row in batch]
    assert [{**row, "image": {**row["image"], "bytes": bytes(row["image"]["bytes"])}} for row in read] == rows
