"""What lies in a protected folder, and what its parquet files say beside their rows."""

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, Image, Sequence, Value

from hf_unlearnable.digests import file_digest
from hf_unlearnable.gate.checks import inspect
from tests.gate.folders import SECRET, Rows, checks, edit, only, put, rewrite, sign, source
from tests.gate.test_containers import saved, with_chunk

# Files.


def test_a_folder_that_was_changed_after_protecting(whole: Path) -> None:
    first, second, third = sorted(whole.glob("data/*"))[:3]
    data = bytearray(first.read_bytes())
    data[-30] ^= 1  # in the footer's text: as long as before
    first.write_bytes(data)
    assert f"{first.name}: not the bytes that were protected" in str(inspect(whole, progress=False))
    second.write_bytes(second.read_bytes() + b"more")
    found = [str(f) for f in inspect(whole, progress=False) if f.check == "files"]
    assert len(found) == 2
    assert "bytes, got" in found[1]
    third.unlink()
    assert f"data/{third.name}: is missing" in str(inspect(whole, progress=False))


def test_a_missing_file_is_told_once(whole: Path) -> None:
    sorted(whole.glob("data/*"))[1].unlink()
    assert "is missing" in only(whole, clean=source())


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("state.json", b"{}", "fingerprint"),
        ("dataset_info.json", b"{}", "fingerprint"),
        ("data/cache-0123abcd.arrow", b"ARROW1", "fingerprint"),
        ("results/dataset_info.json", b"{}", "fingerprint"),
        ("data-00000-of-00001.arrow", b"ARROW1", "fingerprint"),
        ("data.lock", b"", "lock"),
        ("tmpx1y2z3", b"", "cache"),
        (".DS_Store", b"", "a hidden file"),
        ("results/.hidden.json", b"{}", "a hidden file"),
        (".git/config", b"", "a hidden folder"),
        ("key", SECRET.hex().encode() + b"\n", "is it the key"),
        ("results/key.json", SECRET.hex().upper().encode(), "is it the key"),
        ("assets/key.md", b"0x" + SECRET.hex().encode(), "is it the key"),
        ("clean/0.png", saved("PNG"), "not in the record"),
        ("data/test-00000-of-00001.parquet", b"PAR1", "not in the record"),
        ("clean.parquet", b"PAR1", "not in the record"),
        ("results/weights.safetensors", b"", "not in the record"),
        ("results", b"", "not in the record"),
        ("notes.txt", b"mine", "not in the record"),
        ("assets/photo.jpg", saved("JPEG"), "not in the record"),
        ("assets/photo.png", saved("JPEG"), "expected a PNG, got jpeg"),
        ("assets/photo.png", b"no picture", "expected a picture"),
        ("assets/photo.png", with_chunk(saved("PNG"), b"eXIf", b"MM"), "holds eXIf beside its pixels"),
        ("assets/photo.png", saved("PNG") + b"tail", "4 bytes after the end"),
    ],
)
def test_what_does_not_belong_into_the_folder(cuda: Path, name: str, data: bytes, message: str) -> None:
    (cuda / name).parent.mkdir(parents=True, exist_ok=True)
    (cuda / name).write_bytes(data)
    told = only(cuda)
    assert told.startswith(f"files: {name.split('/')[0]}")
    assert message in told


def test_links_lead_anywhere(cuda: Path, tmp_path: Path) -> None:
    (tmp_path / "clean").mkdir()
    (cuda / "results").symlink_to(tmp_path / "clean")
    (cuda / "notes.md").symlink_to(tmp_path / "nothing")
    assert only(cuda) == "files: results, notes.md: a link, which may lead anywhere"
    (cuda / "results").unlink()
    (cuda / "notes.md").unlink()
    os.mkfifo(cuda / "pipe.md")
    assert "pipe.md: not a plain file" in only(cuda)


def test_many_strays_are_one_finding(cuda: Path) -> None:
    (cuda / "clean").mkdir()
    for i in range(9):
        (cuda / "clean" / f"{i}.png").write_bytes(b"")
    assert only(cuda).startswith(
        "files: clean/0.png, clean/1.png, clean/2.png, clean/3.png, clean/4.png and 4 more: not"
    )


# Parquet.


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({b"fingerprint": b"abc"}, "tells 'fingerprint' beside"),
        ({b"pandas": b"{}"}, "tells 'pandas' beside"),
        ({b"huggingface": b'{"info": {"features": {}}, "fingerprint": "abc"}'}, "holds fingerprint beside"),
        ({b"huggingface": b'{"info": {"features": {}, "description": "x"}}'}, "holds description beside"),
        ({b"huggingface": b"no json"}, "no description of features"),
    ],
)
def test_a_schema_that_tells_more_than_features(cuda: Path, told: dict[bytes, bytes], message: str) -> None:
    (path,) = cuda.glob("data/*")
    table = pq.read_table(path)
    kept = table.schema.metadata
    if b"huggingface" in told and told[b"huggingface"].startswith(b"{"):
        features = json.loads(kept[b"huggingface"])["info"]["features"]
        told = {
            b"huggingface": told[b"huggingface"].replace(
                b'"features": {}', b'"features": ' + json.dumps(features).encode()
            )
        }
    pq.write_table(table.replace_schema_metadata({**kept, **told}), path)
    sign(cuda)
    found = [str(f) for f in inspect(cuda, clean=source(), progress=False)]
    assert all(text.startswith("parquet: ") for text in found)
    assert any(message in text for text in found)
    if b"no json" not in told.values():
        assert len(found) == 1


def test_a_field_that_tells_more(cuda: Path) -> None:
    (path,) = cuda.glob("data/*")
    table = pq.read_table(path)
    field = table.schema.field("name").with_metadata({b"fingerprint": b"abc"})
    pq.write_table(table.cast(table.schema.set(2, field)), path)
    sign(cuda)
    assert "tells 'field name: fingerprint' beside" in only(cuda)


def test_other_columns_classes_and_pictures_than_the_record_says(cuda: Path) -> None:
    features = Features({"img": Image(), "label": ClassLabel(names=list("dcba")), "name": Value("string")})
    rewrite(cuda, lambda rows: None, features)
    assert "expected the classes ['class0', 'class1', 'class2', 'class3'] in the column 'label', got" in only(cuda)
    rewrite(cuda, lambda rows: None, Features({"img": Image(), "name": Value("string")}))
    assert "expected labels in the column 'label'" in only(cuda)
    put(cuda, "source.image_column", "image")
    assert "expected pictures in the column 'image', got None among" in str(inspect(cuda, progress=False))


def test_a_second_column_of_pictures(cuda: Path) -> None:
    features = Features(
        {"img": Image(), "label": ClassLabel(names=[f"class{i}" for i in range(4)]), "thumbs": Sequence(Image())}
    )
    rewrite(cuda, lambda rows: [row.update(thumbs=[]) for row in rows], features)
    assert "the column 'thumbs' holds pictures too" in only(cuda)


def test_pictures_as_plain_bytes_in_another_column(cuda: Path) -> None:
    names = [f"class{i}" for i in range(4)]
    features = Features({"img": Image(), "label": ClassLabel(names=names), "thumb": Value("binary")})
    rewrite(
        cuda, lambda rows: [row.update(thumb=saved("JPEG") if i > 20 else b"") for i, row in enumerate(rows)], features
    )
    assert only(cuda) == "parquet: rows 21, 22, 23: column 'thumb' holds pictures too (row 21: jpeg)"


def test_what_is_no_parquet_file(cuda: Path) -> None:
    (path,) = cuda.glob("data/*")
    path.write_bytes(b"PAR1 and nothing more")
    edit(
        cuda,
        lambda values: values["published"]["files"][f"data/{path.name}"].update(
            sha256=file_digest(path), bytes=path.stat().st_size
        ),
    )
    assert "expected a parquet file" in only(cuda, clean=source())


def test_pages_that_cannot_be_read_are_found_and_do_not_stop_the_gate(cuda: Path) -> None:
    (path,) = cuda.glob("data/*")
    table = pq.read_table(path)
    pq.write_table(table, path, compression="zstd", row_group_size=10, use_dictionary=False, write_statistics=False)
    with pq.ParquetFile(path) as parquet:
        start = parquet.metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 2000] = bytes(2000)
    path.write_bytes(data)
    edit(
        cuda,
        lambda values: values["published"]["files"][f"data/{path.name}"].update(
            sha256=file_digest(path), bytes=path.stat().st_size
        ),
    )
    assert "parquet: train-00000-of-00001.parquet: unreadable from row 10 on" in only(
        cuda, clean=source(), batch_size=10
    )


def test_rows_that_are_missing_or_too_many(cuda: Path) -> None:
    rewrite(cuda, lambda rows: rows.pop(7))
    put(cuda, "pixels.rows_changed", 23)
    assert only(cuda, clean=source()) == "source: expected the 23 clean rows of me/small (train), got 24"
    assert inspect(cuda, progress=False) == []
    for part in ("source", "published", "pixels"):
        put(cuda, f"{part}.rows", 24)
    for clean in (None, source()):
        assert only(cuda, clean=clean) == "parquet: expected 24 rows, got 23"
    rewrite(cuda, lambda rows: rows.extend(rows[:3]), signed=False)
    assert checks(cuda, clean=source()) == ["files", "parquet"]


def test_a_path_in_the_picture_column(cuda: Path) -> None:
    def change(rows: Rows) -> None:
        for row in (*range(3, 9), 20):
            rows[row]["img"]["path"] = "0003.jpg"

    rewrite(cuda, change)
    told = only(cuda, clean=source())
    assert told == "parquet: rows 3, 4, 5, 6, 7 and 2 more: column 'img' tells the path of a file"
