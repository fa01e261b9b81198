import base64
import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value, concatenate_datasets

from hf_unlearnable import CudaPoison, LspPoison, RandomNoisePoison
from hf_unlearnable import protect as protecting
from hf_unlearnable.digests import columns_digest, file_digest, split_digest
from hf_unlearnable.environment import versions
from hf_unlearnable.gate.checks import ACCEPTABLE, CHECKS, Refused, check, inspect
from hf_unlearnable.gate.secret_scan import holds_secret
from hf_unlearnable.images import Picture, decode, digest, encode
from hf_unlearnable.protect import protect
from hf_unlearnable.record import Record
from tests.conftest import make_dataset, noise_pictures
from tests.gate.test_containers import png_chunk, saved, with_chunk

SECRET = bytes(range(100, 132))
Rows = list[dict[str, Any]]


def source(rows: int = 24) -> Dataset:
    return make_dataset(noise_pictures(rows), [i % 4 for i in range(rows)])


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "home"))
        protect(source(), CudaPoison(seed=SECRET), folder / "cuda", source="me/small", progress=False)
        noise = RandomNoisePoison(seed=SECRET, poison_rate=0.5, classes=(0, 2))
        protect(source(), noise, folder / "noise", source="me/small", progress=False)
        patch.setattr(protecting, "SHARD_BYTES", source().data.nbytes // 3)
        whole = RandomNoisePoison(seed=SECRET)
        protect(source(), whole, folder / "whole", source="me/small", progress=False)
    return folder


@pytest.fixture
def cuda(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "cuda", tmp_path / "cuda"))


@pytest.fixture
def noise(originals: Path, tmp_path: Path) -> Path:
    """Half of the rows of classes 0 and 2, under 8/255."""
    return Path(shutil.copytree(originals / "noise", tmp_path / "noise"))


@pytest.fixture
def whole(originals: Path, tmp_path: Path) -> Path:
    """All rows, under 8/255, in several files."""
    return Path(shutil.copytree(originals / "whole", tmp_path / "whole"))


def checks(folder: Path, **options: Any) -> list[str]:
    return [finding.check for finding in inspect(folder, progress=False, **options)]


def only(folder: Path, **options: Any) -> str:
    """The one finding there is, as text."""
    found = inspect(folder, progress=False, **options)
    assert len(found) == 1, [str(finding) for finding in found]
    return str(found[0])


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "record.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def put(folder: Path, place: str, value: Any) -> None:
    def change(values: dict[str, Any]) -> None:
        *parts, last = place.split(".")
        for part in parts:
            values = values[part]
        values[last] = value

    edit(folder, change)


def sign(folder: Path, *, pixels: bool = True, others: bool = True) -> None:
    """Let the record say that the data in the folder are what was published."""

    def change(values: dict[str, Any]) -> None:
        names = sorted(str(path.relative_to(folder)) for path in folder.glob("data/*"))
        said = {name: {"sha256": file_digest(folder / name), "bytes": (folder / name).stat().st_size} for name in names}
        values["published"]["files"] = said
        rows = [row for name in names for row in pq.read_table(folder / name).to_pylist()]
        values["published"]["rows"] = values["source"]["rows"] = values["pixels"]["rows"] = len(rows)
        values["pixels"].update(perceptual_rows=len(rows), worst_rows_by_psnr=[0])
        if pixels:
            shown = [digest(decode(row["img"]["bytes"]).pixels) for row in rows]
            values["published"]["pixels_sha256"] = split_digest(shown)
        if others:
            told = [{name: value for name, value in row.items() if name != "img"} for row in rows]
            values["source"]["columns_sha256"] = split_digest(map(columns_digest, told))

    edit(folder, change)


def rewrite(
    folder: Path,
    change: Callable[[Rows], Any],
    features: Features | None = None,
    *,
    signed: bool = True,
    **digests: bool,
) -> None:
    """Change the rows of the (one) parquet file."""
    (path,) = folder.glob("data/*.parquet")
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    schema = table.schema if features is None else features.arrow_schema
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    if signed:
        sign(folder, **digests)


def set_picture(row: int, data: bytes | None) -> Callable[[Rows], None]:
    return lambda rows: rows[row].update(img={"bytes": data, "path": None})


def array_of(folder: Path, row: int) -> np.ndarray:
    rows = [row for file in sorted(folder.glob("data/*")) for row in pq.read_table(file).to_pylist()]
    return np.array(PIL.Image.open(io.BytesIO(rows[row]["img"]["bytes"])))


def png(array: np.ndarray) -> bytes:
    return encode(Picture(torch.from_numpy(array.transpose(2, 0, 1).copy())))


# What passes.


@pytest.mark.parametrize("name", ["cuda", "noise", "whole"])
@pytest.mark.parametrize("batch_size", [5, 500])
def test_what_protect_wrote_passes(originals: Path, name: str, batch_size: int) -> None:
    folder = originals / name
    for clean in (None, source()):
        assert inspect(folder, clean=clean, progress=False, batch_size=batch_size) == []
    assert check(folder, clean=source(), progress=False) == Record.load(folder / "record.json")


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_modes_sizes_and_formats_pass(tmp_path: Path, image_format: Any) -> None:
    rgb = PIL.Image.fromarray(noise_pictures(1, 40, 52)[0])
    rgba = rgb.copy()
    rgba.putalpha(120)
    jpeg = PIL.Image.open(io.BytesIO(saved("JPEG")))
    mixed = make_dataset(
        [rgb, rgb.convert("L"), rgba, rgb.resize((33, 20)), rgb.convert("P"), jpeg], [0, 1, 2, 3, 0, 1]
    )
    for poison in (
        CudaPoison(seed=SECRET, image_format=image_format),
        RandomNoisePoison(seed=SECRET, image_format=image_format),
        LspPoison(seed=SECRET, image_format=image_format),
    ):
        folder = tmp_path / poison.name
        record = protect(mixed, poison, folder, source="mixed", progress=False)
        if poison.name == "lsp":
            assert len(record.pixels["budgets"]) == 3
        for clean in (None, mixed):
            assert inspect(folder, clean=clean, progress=False) == []


def test_other_columns_of_many_types_pass(tmp_path: Path) -> None:
    small = source(8)
    table = small.add_column("score", [float("nan"), *range(7)]).add_column("tags", [["a", None]] * 8)
    table = table.add_column("box", [{"x": 1, "y": [2]}] * 8).add_column("raw", [b"\x00\xff"] * 8)
    table = table.add_column("url", ["https://example.org/home/cat?file=/tmp"] * 8)
    protect(table, CudaPoison(seed=SECRET), tmp_path / "out", source="many", progress=False)
    for clean in (None, table):
        assert inspect(tmp_path / "out", clean=clean, progress=False) == []


def test_without_labels_and_with_bare_integers(tmp_path: Path) -> None:
    plain = source(8).cast_column("label", Value("int64"))
    for name, data in (("bare", plain), ("none", plain.remove_columns("label"))):
        protect(data, RandomNoisePoison(seed=SECRET), tmp_path / name, source="small", progress=False)
        assert inspect(tmp_path / name, clean=data, progress=False) == []


def test_evaluation_files_and_pictures_may_lie_beside(cuda: Path) -> None:
    for name, data in (("results/default/table.csv", b"a,b\n1,2\n"), ("results/summary.md", b"# ok\n")):
        (cuda / name).parent.mkdir(parents=True, exist_ok=True)
        (cuda / name).write_bytes(data)
    (cuda / "results" / "default" / "cuda.json").write_text(json.dumps({"accuracy": 0.5, "where": "eval/demo"}))
    (cuda / "assets").mkdir()
    shutil.copy(cuda / "preview.png", cuda / "assets" / "heat-map.png")
    assert inspect(cuda, clean=source(), progress=False) == []


def test_the_checks_are_named_once_with_one_line_each() -> None:
    names = [known.name for known in CHECKS]
    assert len(set(names)) == len(names)
    assert all(known.meaning and "\n" not in known.meaning for known in CHECKS)
    assert set(ACCEPTABLE) == {"columns-digest", "blank", "unchanged", "paths"}


# The record.


def test_no_folder_and_no_record(cuda: Path, tmp_path: Path) -> None:
    assert "there is no folder" in only(tmp_path / "nowhere")
    (cuda / "record.json").unlink()
    assert "there is no record.json" in only(cuda)
    (cuda / "state.json").write_text("{}")
    assert checks(cuda) == ["record", "files"]
    with pytest.raises(
        Refused, match=r"must not be published:\n- record: there is no record.json.*\n- files: state.json"
    ):
        check(cuda, progress=False)


@pytest.mark.parametrize("text", ["", "[]", "{}", "\xff\xfe", '{"schema": "x"}', '{"schema": 99}', '{"schema": 1}'])
def test_what_is_no_record(cuda: Path, text: str) -> None:
    (cuda / "record.json").write_text(text, encoding="latin-1")
    assert "record.json cannot be read" in only(cuda)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("method", "", "method is missing"),
        ("settings", {}, "settings.version is missing; settings.poison_rate is missing"),
        ("settings", [], "settings is no mapping"),
        ("settings.poison_rate", float("nan"), "settings.poison_rate: expected a finite number"),
        ("key", {"kind": "secret"}, "key.commitment is missing"),
        ("source.pixels_sha256", 7, "source.pixels_sha256: expected str, got int"),
        ("source.label_column", 7, "source.label_column: expected str or null, got int"),
        ("published.files", [], "published.files: expected dict"),
        ("published.files", {"../key": {}}, "expected data/....parquet, got '../key'"),
        ("published.files", {"data/train-00000-of-00001.parquet": {"bytes": 1}}, "expected the sha256 and bytes"),
        ("pixels.rows", True, "pixels.rows: expected int, got bool"),
        ("pixels", {}, "pixels.rows is missing"),
        ("pixels.linf_levels", {"largest": 8}, "pixels.linf_levels: expected the numbers mean, sd"),
        ("pixels.l2.largest", 0.1, "pixels.l2: expected the numbers mean, sd"),
        ("settings.epsilon", "x", "settings.epsilon: expected a number, 0 or more, got 'x'"),
        (
            "pixels.budgets",
            [{"norm": "l7", "epsilon": 1, "kept_by_rows": 24}],
            "expected norm, epsilon and kept_by_rows",
        ),
        ("pixels.budgets", [None], "expected norm, epsilon and kept_by_rows"),
        ("versions", {"python": "3"}, "versions of datasets, hf_unlearnable, numpy, pillow, torch, torchvision are"),
        ("versions", None, "versions of datasets"),
        ("results", None, "results: expected a list"),
    ],
)
def test_an_incomplete_record(cuda: Path, place: str, value: Any, message: str) -> None:
    put(cuda, place, value)
    told = only(cuda, clean=source())
    assert told.startswith("record: incomplete: ")
    assert message in told


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("pixels.rows", 23, "expected one number of rows, 1 or more, got 24 (source), 24 (published), 23 (pixels)"),
        ("published.image_format", "jpeg", "expected png or webp"),
        ("settings.poison_rate", 2, "expected a poison_rate from 0 to 1, got 2"),
        ("settings.classes", [0, 9], "expected classes from 0 to 3, got [0, 9]"),
        ("pixels.values_changed", 1.5, "expected values_changed from 0 to 1, got 1.5"),
        ("pixels.perceptual_rows", 25, "expected 1 to 24 rows seen by PSNR and SSIM, got 25"),
        ("source.dataset", "", "expected the name of the source dataset"),
        ("published.compress_level", 10, "a compress_level from 0 to 9, got 1 and 10"),
        ("pixels.rows_changed", 25, "expected 0 to 24 rows changed, got 25"),
        ("pixels.rows_changed", 0, "0 rows changed do not go with a largest change of"),
        ("source.pixels_sha256", "abc", "source.pixels_sha256: expected 64 hexadecimal digits"),
        ("source.split", "test", "expected the shards of the split 'test'"),
        (
            "pixels.budgets",
            [{"norm": "linf", "epsilon": 1.0, "kept_by_rows": 3}],
            "expected all 24 rows to keep a budget, got 3",
        ),
    ],
)
def test_a_record_that_contradicts_itself(cuda: Path, place: str, value: Any, message: str) -> None:
    put(cuda, place, value)
    assert any(message in str(f) for f in inspect(cuda, progress=False) if f.check == "record")
    with pytest.raises(Refused):
        check(cuda, progress=False)


def places_in(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for name, below in inner:
        yield (*above, name)
        yield from places_in(below, (*above, name))


def test_nonsense_anywhere_in_the_record_is_found_and_stops_nothing(whole: Path) -> None:
    may_be_so = {"method", "source.dataset", "source.label_column", "pixels.ssim"}
    may_be_so |= {f"settings.{name}" for name in ("version", "classes", "num_classes", "epsilon")}
    may_be_so |= {f"versions.{name}" for name in versions()}
    record = json.loads((whole / "record.json").read_text())
    for i, place in enumerate(places_in(record)):
        nonsense = ([], "x", -1, None, 10**30, [[1]], {"a": None})
        for odd in (nonsense[i % len(nonsense)], nonsense[(i + 1) % len(nonsense)]):
            values = json.loads(json.dumps(record))
            inner = values
            for name in place[:-1]:
                inner = inner[name]
            inner[place[-1]] = odd
            (whole / "record.json").write_text(json.dumps(values))
            found = inspect(whole, progress=False)
            assert found or ".".join(map(str, place)) in may_be_so, (place, odd)


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


# Pictures.


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "no readable picture (expected a picture, got 0 bytes"),
        (b"", "no readable picture (expected a picture, got 0 bytes"),
        (b"hello", "no readable picture (expected a picture, got 5 bytes"),
        (saved("PNG")[:-30], "no readable picture (expected"),
        (
            saved("PNG")[:33] + png_chunk(b"IDAT", b"no zlib") + png_chunk(b"IEND"),
            "no readable picture (expected a readable",
        ),
    ],
)
def test_pictures_that_cannot_be_read_do_not_stop_the_gate(cuda: Path, data: bytes | None, message: str) -> None:
    rewrite(cuda, set_picture(7, data), signed=False)
    rewrite(cuda, set_picture(11, with_chunk(png(array_of(cuda, 11)), b"tIME", bytes(7))), signed=False)
    (path,) = cuda.glob("data/*")
    edit(
        cuda,
        lambda values: values["published"]["files"][f"data/{path.name}"].update(
            sha256=file_digest(path), bytes=path.stat().st_size
        ),
    )
    first, second = sorted(str(f) for f in inspect(cuda, progress=False, clean=source()))
    assert first == "pictures: row 11: more in it than pixels (tIME)"
    assert second.startswith(f"pictures: row 7: {message}")


def test_other_containers_and_loss(cuda: Path) -> None:
    buffer = io.BytesIO()
    PIL.Image.fromarray(array_of(cuda, 3)).save(buffer, "JPEG")
    rewrite(cuda, set_picture(3, buffer.getvalue()))
    assert only(cuda, clean=source()) == "pictures: row 3: no png picture (jpeg)"


def test_webp_with_loss(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    protect(source(), CudaPoison(seed=SECRET, image_format="webp"), folder, source="small", progress=False)
    buffer = io.BytesIO()
    PIL.Image.fromarray(array_of(folder, 3)).save(buffer, "WEBP", quality=90)
    rewrite(folder, set_picture(3, buffer.getvalue()))
    assert only(folder, clean=source()) == "pictures: row 3: stored with loss (webp)"
    rewrite(folder, set_picture(3, png(array_of(folder, 3))))
    assert only(folder) == "pictures: row 3: no webp picture (png)"


def test_more_in_pictures_than_pixels(cuda: Path) -> None:
    def change(rows: Rows) -> None:
        for i in range(1, 24, 2):
            rows[i]["img"]["bytes"] = with_chunk(rows[i]["img"]["bytes"], b"tEXt", b"Author\0me") + b"tail"

    rewrite(cuda, change)
    told = only(cuda, clean=source())
    assert told == (
        "pictures: rows 1, 3, 5, 7, 9 and 7 more: more in it than pixels (row 1: tEXt Author, 4 bytes after the end)"
    )


def test_other_pixels_than_the_record_says(cuda: Path) -> None:
    array = array_of(cuda, 9)
    array[0, 0, 0] ^= 1
    rewrite(cuda, set_picture(9, png(array)), pixels=False)
    assert only(cuda, clean=source()) == "pictures: the pixels are not those of the record (pixels_sha256)"
    rewrite(cuda, lambda rows: rows.reverse(), pixels=False)
    assert "pictures" in checks(cuda)


# Blank.


def test_one_colour_all_over(cuda: Path) -> None:
    for colour in ((0, 0, 0), (255, 0, 0)):
        rewrite(cuda, set_picture(5, png(np.full((32, 32, 3), colour, dtype=np.uint8))))
        assert only(cuda) == "blank: row 5: one colour all over"
        assert only(cuda, clean=source()) == "blank: row 5: one colour all over, and the clean picture is not"
    assert inspect(cuda, clean=source(), accept={"blank"}, progress=False) == []


def test_one_colour_where_the_clean_picture_is_too(tmp_path: Path) -> None:
    pictures = [*noise_pictures(5), np.full((32, 32, 3), (10, 200, 30), dtype=np.uint8)]
    clean = make_dataset(pictures, [0, 0, 0, 0, 0, 1])
    protect(clean, CudaPoison(seed=SECRET, classes=(0,)), tmp_path / "out", source="small", progress=False)
    assert only(tmp_path / "out") == "blank: row 5: one colour all over"
    assert inspect(tmp_path / "out", clean=clean, progress=False) == []


# What was to be changed.


def test_rows_left_as_they_were(cuda: Path) -> None:
    clean = np.asarray(source()[6]["img"])
    rewrite(cuda, set_picture(6, png(clean)))
    assert only(cuda, clean=source()) == "unchanged: row 6: the clean picture as it was, though it was to be changed"
    put(cuda, "pixels.rows_changed", 23)
    assert only(cuda) == "unchanged: expected 24 rows to be changed (1 of 24), the record says 23"
    assert inspect(cuda, clean=source(), accept=["unchanged"], progress=False) == []


def test_rows_of_other_classes_that_were_changed(noise: Path) -> None:
    array = array_of(noise, 1)
    array[0, 0, 0] = array[0, 0, 0] - 1 if array[0, 0, 0] else 1
    rewrite(noise, set_picture(1, png(array)))
    assert inspect(noise, progress=False) == []
    assert only(noise, clean=source()) == "unchanged: row 1: changed, though of a class that was to stay as it is"


def test_another_share_than_promised(noise: Path) -> None:
    record = Record.load(noise / "record.json")
    assert record.pixels["rows_changed"] == 6
    changed = next(i for i in range(0, 24, 2) if (array_of(noise, i) != np.asarray(source()[i]["img"])).any())
    rewrite(noise, set_picture(changed, png(np.asarray(source()[changed]["img"]))))
    assert inspect(noise, progress=False) == []
    told = "unchanged: the record says that 6 rows were changed, beside the clean rows it is 5"
    assert only(noise, clean=source()) == told
    put(noise, "pixels.rows_changed", 5)
    for clean in (None, source()):
        assert only(noise, clean=clean) == "unchanged: expected 6 rows to be changed (0.5 of 12), the record says 5"


def test_a_share_that_each_row_was_drawn_for(noise: Path) -> None:
    """As sharded runs choose: about the share, and not exactly."""
    put(noise, "pixels.rows_changed", 8)
    assert checks(noise) == ["unchanged"]
    put(noise, "published.rows_chosen", "each row drawn")
    assert inspect(noise, progress=False) == []
    put(noise, "pixels.rows_changed", 19)
    assert only(noise) == "unchanged: expected 6 give or take 11 rows to be changed (0.5 of 12), the record says 19"


# The source.


def test_rows_that_were_left_out(cuda: Path) -> None:
    """As sharded runs may skip unreadable rows."""
    extra = make_dataset(noise_pictures(2, seed=9), [3, 3])
    more = concatenate_datasets([source().select(range(5)), extra, source().select(range(5, 24))])
    assert "source: expected the 24 clean rows of me/small (train), got 26" in only(cuda, clean=more)
    put(cuda, "source.left_out", [{"row": 5, "reason": "unreadable"}, {"row": 6, "reason": "unreadable"}])
    for clean in (None, source(), more):
        assert inspect(cuda, clean=clean, progress=False) == []
    put(cuda, "source.left_out", [{"row": 5, "reason": "unreadable"}, {"row": 7, "reason": "unreadable"}])
    assert "the clean rows are not those of the record" in only(cuda, clean=more)
    put(cuda, "source.left_out", [5])
    assert "source.left_out: expected a list of rows and reasons" in only(cuda)


def test_another_clean_set_is_told_once(cuda: Path) -> None:
    other = make_dataset(noise_pictures(24, seed=5), [i % 4 for i in range(24)])
    for clean in (other, source().select([1, 0, *range(2, 24)])):
        told = only(cuda, clean=clean)
        assert told.startswith("source: the clean rows are not those of the record")
        assert "'train' of me/small in its order. Nothing was compared" in told
    assert "expected the 24 clean rows of me/small (train), got 20" in only(cuda, clean=source(20))
    assert "in the column 'img', got the columns ['image'" in only(cuda, clean=source().rename_column("img", "image"))
    assert "expected the columns of the clean rows, ['img', 'label']" in only(
        cuda, clean=source().remove_columns("name")
    )
    names = source().cast_column("label", ClassLabel(names=["class0", "class1", "class3", "class2"]))
    assert "column 'label': expected ClassLabel" in only(cuda, clean=names)


def test_labels_and_other_columns_that_differ(cuda: Path) -> None:
    def change(rows: Rows) -> None:
        rows[4]["label"], rows[5]["label"] = rows[5]["label"], rows[4]["label"]
        rows[9]["name"] = None

    rewrite(cuda, change, others=False)
    assert only(cuda) == "source: labels or other columns are not those of the record (columns_sha256)"
    found = [str(f) for f in inspect(cuda, clean=source(), progress=False)]
    assert found == [
        "source: rows 4, 5: column 'label' differs from the clean rows",
        "source: row 9: column 'name' differs from the clean rows",
    ]
    sign(cuda)
    assert inspect(cuda, progress=False) == []
    assert [str(f) for f in inspect(cuda, clean=source(), progress=False)] == found


def test_another_order_than_the_source(cuda: Path) -> None:
    rewrite(cuda, lambda rows: rows.__setitem__(slice(4, 6), rows[5:3:-1]), others=False)
    assert checks(cuda) == ["source"]
    assert "rows 4, 5: column 'label' differs" in str(inspect(cuda, clean=source(), progress=False)[0])


def test_an_older_record_without_a_digest_of_the_columns(cuda: Path) -> None:
    edit(cuda, lambda values: values["source"].pop("columns_sha256"))
    assert only(cuda).startswith("columns-digest: the record has no digest of the other columns")
    assert inspect(cuda, accept=("columns-digest",), progress=False) == []


def test_size_and_transparency_that_differ(cuda: Path) -> None:
    array = array_of(cuda, 2)
    rewrite(cuda, set_picture(2, png(np.ascontiguousarray(array[:30]))))
    told = "source: row 2: a picture of another size than the clean one ((30, 32) in place of (32, 32))"
    assert only(cuda, clean=source()) == told
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.dstack([array, np.full((32, 32), 9, np.uint8)])).save(buffer, "PNG")
    rewrite(cuda, set_picture(2, buffer.getvalue()))
    assert only(cuda, clean=source()) == "source: row 2: other transparency than in the clean picture"


# The budget.


def test_one_level_over_the_budget(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    protect(source(), RandomNoisePoison(seed=SECRET), folder, source="me/small", progress=False)
    clean = np.asarray(source()[13]["img"]).astype(int)
    clean[0, 0, 0] += 9 if clean[0, 0, 0] < 128 else -9
    rewrite(folder, set_picture(13, png(clean.astype(np.uint8))))
    assert inspect(folder, progress=False) == []
    told = "budget: row 13: over the budget of the record (linf 9/255 in place of 8/255)"
    assert only(folder, clean=source()) == told


def test_a_record_over_its_own_budget(whole: Path) -> None:
    put(whole, "pixels.linf_levels.largest", 9.0)
    assert "by the record the largest linf_levels is 9, over its own Budget" in only(whole)
    assert only(whole, clean=source()).startswith("measures: the record says linf_levels largest 9, beside the clean")


def test_budgets_that_the_settings_do_not_promise(whole: Path) -> None:
    put(whole, "pixels.budgets", [])
    assert "the settings have a bound (epsilon), and the record no budget" in only(whole, clean=source())
    put(whole, "pixels.budgets", [{"norm": "linf", "epsilon": 16 / 255, "kept_by_rows": 24}])
    assert "has kept linf 16/255, its settings say 8/255" in only(whole, clean=source())


def test_l2_budgets_that_depend_on_the_size(tmp_path: Path) -> None:
    large, little = noise_pictures(3, 40, 52), noise_pictures(3, 20, 24)
    clean = make_dataset([*large, *little], [0, 1, 2, 3, 0, 1])
    record = protect(clean, LspPoison(seed=SECRET), tmp_path / "out", source="small", progress=False)
    wide, narrow = sorted((said["epsilon"] for said in record.pixels["budgets"]), reverse=True)
    array = np.asarray(clean[4]["img"]).astype(int)
    rough = np.where(array < 128, array + 8, array - 8)
    assert narrow + 0.5 / 255 * rough.size**0.5 < 8 / 255 * rough.size**0.5 < wide
    rewrite(tmp_path / "out", set_picture(4, png(rough.astype(np.uint8))))
    assert "the changes of 1 rows are larger than the budgets" in only(tmp_path / "out", clean=clean)
    rough = np.where(array < 128, array + 40, array - 40)
    rewrite(tmp_path / "out", set_picture(4, png(rough.astype(np.uint8))))
    assert "budget: row 4: over the budget of the record (l2 " in only(tmp_path / "out", clean=clean)


# Paths.


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("/home/me/photos/cat.jpg", "a local path"),
        ("/Users/me/cat.jpg", "a local path"),
        ("from /root/cat.jpg", "a local path"),
        (r"C:\Users\me\cat.jpg", "a local path"),
        ("file:///cat.jpg", "a local path"),
        ("GPSLatitude: 48.1", "EXIF or GPS data"),
        ("{'DateTimeOriginal': '2020:01:01'}", "EXIF or GPS data"),
        ("48.85837, 2.29448", "EXIF or GPS data"),
        ("48°51'30\"N", "EXIF or GPS data"),
    ],
)
def test_values_that_tell_of_a_person_or_machine(cuda: Path, text: str, what: str) -> None:
    rewrite(cuda, lambda rows: [rows[i].update(name=text) for i in (2, 8)])
    assert only(cuda) == f"paths: rows 2, 8: column 'name' holds what looks like {what}"
    assert inspect(cuda, accept={"paths"}, progress=False) == []


@pytest.mark.parametrize(
    "text", ["https://example.org/home/me", "and/or", "x/home/y", "a: b", "1.5, 2.5", "the root/home of it", "10:30"]
)
def test_values_that_do_not(cuda: Path, text: str) -> None:
    rewrite(cuda, lambda rows: rows[2].update(name=text))
    assert inspect(cuda, progress=False) == []


def test_columns_and_bytes_of_exif(cuda: Path) -> None:
    names = [f"class{i}" for i in range(4)]
    inner = {"gps_latitude": Value("float64"), "note": Value("binary")}
    features = Features({"img": Image(), "label": ClassLabel(names=names), "meta": inner})
    note = {"gps_latitude": None, "note": b"..Exif\0\0MM"}
    rewrite(cuda, lambda rows: [row.update(meta=note) for row in rows], features)
    found = [str(f) for f in inspect(cuda, progress=False)]
    assert found == [
        "paths: rows 0, 1, 2, 3, 4 and 19 more: column 'meta' holds what looks like EXIF or GPS data",
        "paths: the column 'meta' is named like EXIF, GPS or camera data",
    ]


def test_paths_in_texts_beside_the_data(cuda: Path) -> None:
    (cuda / "results").mkdir()
    (cuda / "results" / "a.json").write_text(json.dumps({"log": [{"at": "C:\\Users\\me\\run"}], "n": "Plan B:\nnext"}))
    assert only(cuda) == "paths: results/a.json holds what looks like a local path"
    (cuda / "results" / "a.json").write_text("not json: file:///x")
    assert only(cuda) == "paths: results/a.json holds what looks like a local path"
    (cuda / "results" / "a.json").unlink()
    (cuda / "README.md").write_text("made from /home/me/data\n")
    assert only(cuda) == "paths: README.md holds what looks like a local path"
    put(cuda, "source.dataset", "/Users/me/data")
    assert checks(cuda) == ["paths", "paths"]


# The key.


def test_an_int_seed_needs_to_be_allowed(tmp_path: Path) -> None:
    for name, told in (("silent", False), ("spoken", True)):
        poison = RandomNoisePoison(seed=987654321)
        protect(source(8), poison, tmp_path / name, source="small", record_seed=told, progress=False)
        assert inspect(tmp_path / name, allow_guessable_key=True, progress=False) == []
    assert "--allow-guessable-key" in only(tmp_path / "silent")
    found = inspect(tmp_path / "spoken", progress=False)
    assert [f.check for f in found] == ["key", "key"]
    assert "tells the seed" in found[1].problem
    assert "987654321" not in str(found)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ({"kind": "secret", "commitment": None}, "expected a commitment"),
        ({"kind": "secret", "commitment": "sha256:abc"}, "expected a commitment"),
        ({"kind": "secret", "commitment": "sha256:" + "0" * 64, "seed": 3}, "tells the seed"),
        ({"kind": "secret", "commitment": "sha256:" + "0" * 64, "bytes": "abcd"}, "alone, got bytes too"),
        ({"kind": "none", "commitment": None}, 'expected the kind "secret" or "int"'),
        ({"kind": "int", "commitment": "sha256:" + "0" * 64}, "gives it away"),
    ],
)
def test_what_the_record_says_of_the_key(cuda: Path, key: dict[str, Any], message: str) -> None:
    put(cuda, "key", key)
    told = only(cuda, allow_guessable_key=True)
    assert told.startswith("key: ")
    assert message in told


def test_a_key_that_follows_from_a_surrogate(cuda: Path) -> None:
    put(cuda, "key.surrogate", "a secret")
    assert inspect(cuda, progress=False) == []
    put(cuda, "key.surrogate", "an int seed")
    assert "key: the key follows from a surrogate that was trained under an int seed" in only(cuda)
    assert inspect(cuda, allow_guessable_key=True, progress=False) == []
    put(cuda, "key.surrogate", 7)
    assert 'to be "a secret" or "an int seed", got 7' in only(cuda)


def test_a_key_in_the_settings(cuda: Path) -> None:
    put(cuda, "settings.seed", 7)
    assert "the settings hold seed" in only(cuda)


# Arguments.


def test_what_cannot_be_accepted(cuda: Path) -> None:
    for accept in (["budget"], ["blanks"], "blank"):
        with pytest.raises(
            ValueError, match="accept takes a collection of columns-digest, blank, unchanged, paths, got"
        ):
            inspect(cuda, accept=accept)
    with pytest.raises(ValueError, match="batch size of 1 or more"):
        inspect(cuda, batch_size=0)


def test_a_refusal_holds_all_findings_in_order(cuda: Path) -> None:
    put(cuda, "key.commitment", None)
    (cuda / "state.json").write_text("{}")
    rewrite(cuda, set_picture(5, png(np.zeros((32, 32, 3), dtype=np.uint8))), pixels=False)
    with pytest.raises(Refused) as refused:
        check(cuda, clean=source(), progress=False)
    assert [f.check for f in refused.value.findings] == ["key", "files", "pictures", "blank"]
    assert str(refused.value).count("\n- ") == 4
    assert not list(cuda.glob("**/*.lock"))


# The scan for a secret.


def test_a_protected_folder_holds_no_secret(originals: Path) -> None:
    for name in ("cuda", "noise", "whole"):
        assert holds_secret(originals / name, SECRET) == []
        assert holds_secret(originals / name, 987654321) == []


def with_pixels(secret: bytes) -> bytes:
    array = np.frombuffer((secret * 100)[: 32 * 32 * 3], dtype=np.uint8).reshape(32, 32, 3)
    return saved_array(array)


def saved_array(array: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "form"),
    [
        (b"--" + SECRET + b"--", "raw bytes"),
        (SECRET[::-1], "raw bytes, reversed"),
        (b"key=" + SECRET.hex().encode(), "hex"),
        (SECRET.hex().upper().encode(), "hex, upper case"),
        (base64.b64encode(SECRET), "base64"),
        (base64.b64encode(b"x" + SECRET + b"more"), "base64"),
        (base64.urlsafe_b64encode(b"xy" + SECRET), "base64"),
        (base64.b64encode(b"a key: " + SECRET.hex().encode()), "base64 of hex"),
        (str(int.from_bytes(SECRET, "big")).encode(), "decimal digits"),
        (json.dumps(list(SECRET)).encode(), "a list of numbers"),
        (repr(SECRET).encode(), "bytes as Python shows them"),
        (with_chunk(saved("PNG"), b"zTXt", b"note\0\0" + zlib.compress(SECRET.hex().encode())), "hex inside a picture"),
        (with_chunk(saved("PNG"), b"iTXt", b"n\0\1\0\0\0" + zlib.compress(SECRET)), "raw bytes inside a picture"),
        (with_pixels(SECRET), "raw bytes inside a picture"),
        (saved_array(np.frombuffer((SECRET * 40)[:1024], np.uint8).reshape(32, 32)), "raw bytes inside a picture"),
        (
            saved_array(np.frombuffer((SECRET * 100)[:3072], np.uint8).reshape(32, 32, 3), "WEBP", lossless=True),
            "raw bytes inside a picture",
        ),
    ],
)
@pytest.mark.parametrize("place", ["file", "rows"])
def test_a_secret_is_found_wherever_it_is(tmp_path: Path, data: bytes, form: str, place: str) -> None:
    if place == "file":
        (tmp_path / "found.bin").write_bytes(b"before" + data + b"after")
    else:
        table = pa.table({"label": [1, 2, 3], "deep": [[{"x": b"none"}], [], [{"x": b"before" + data + b"after"}]]})
        pq.write_table(table, tmp_path / "found.bin", compression="zstd")
    found = holds_secret(tmp_path, SECRET)
    assert any(line.startswith(f"found.bin: {form}") for line in found), found
    wrong = bytes([SECRET[0] ^ 1]) + SECRET[1:]
    assert holds_secret(tmp_path, wrong) == []


def test_a_secret_in_a_schema_a_name_or_a_dictionary(tmp_path: Path) -> None:
    text = SECRET.hex()
    for name, table in (
        ("field", pa.table([pa.array([1])], pa.schema([pa.field("a", pa.int64(), metadata={"k": text})]))),
        ("schema", pa.table({"a": [1]}).replace_schema_metadata({"k": text})),
        ("dictionary", pa.table({"a": pa.array([text, text]).dictionary_encode()})),
    ):
        (tmp_path / name).mkdir()
        pq.write_table(table, tmp_path / name / "a.parquet", compression="zstd")
        assert any("inside its rows or schema" in line for line in holds_secret(tmp_path / name, SECRET))
    (tmp_path / "named" / "deep").mkdir(parents=True)
    (tmp_path / "named" / "deep" / f"cache-{text}").write_bytes(b"")
    (line,) = holds_secret(tmp_path / "named", SECRET)
    assert line.endswith(": hex in the name")


def test_a_secret_in_a_bomb_and_past_the_first_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_unlearnable.gate import secret_scan

    monkeypatch.setattr(secret_scan, "_PIECE", 1000)
    for shift in range(968, 1001, 8):
        content = b"n\0\0" + zlib.compress(bytes(shift) + SECRET + bytes(5000))
        (tmp_path / "a.png").write_bytes(with_chunk(saved("PNG"), b"zTXt", content))
        assert holds_secret(tmp_path, SECRET) == ["a.png: raw bytes inside a picture"]


def test_an_int_seed_is_found_and_a_short_one_is_refused(tmp_path: Path) -> None:
    seed = 4_123_456_789
    for data, form in (
        (b'{"seed": 4123456789}', "decimal digits"),
        (struct.pack("<I", seed), "4 bytes"),
        (struct.pack(">Q", seed), "8 bytes"),
    ):
        (tmp_path / "a").write_bytes(data)
        assert any(line == f"a: {form}" for line in holds_secret(tmp_path, seed))
    (tmp_path / "a").write_bytes(b"14123456789 41234567890")
    assert holds_secret(tmp_path, seed) == []
    for short in (0, 7, 99_999):
        with pytest.raises(ValueError, match="at least 6 digits"):
            holds_secret(tmp_path, short)
    assert holds_secret(tmp_path, 10**40) == []
    with pytest.raises(ValueError, match="32 bytes"):
        holds_secret(tmp_path, b"short")
    with pytest.raises(FileNotFoundError, match="no folder"):
        holds_secret(tmp_path / "nowhere", SECRET)


def test_what_cannot_be_looked_through_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 broken")
    (tmp_path / "b.png").write_bytes(saved("PNG")[:60])
    assert holds_secret(tmp_path, SECRET) == ["a.parquet: cannot be looked through (ArrowInvalid)"]
