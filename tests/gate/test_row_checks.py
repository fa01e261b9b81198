"""What the rows hold: pictures, blanks, what was changed, traces of a person."""

import io
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Features, Image, Value

from hf_unlearnable import CudaPoison
from hf_unlearnable.digests import file_digest
from hf_unlearnable.gate.checks import inspect
from hf_unlearnable.protect import protect
from hf_unlearnable.record import Record
from tests.conftest import make_dataset, noise_pictures
from tests.gate.folders import SECRET, Rows, array_of, checks, edit, only, png, put, rewrite, set_picture, source
from tests.gate.test_containers import png_chunk, saved, with_chunk

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


# Paths.


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("/home/me/photos/cat.jpg", "a local path"),
        ("/Users/me/cat.jpg", "a local path"),
        ("from /root/cat.jpg", "a local path"),
        (r"C:\Users\me\cat.jpg", "a local path"),
        ("file:///cat.jpg", "a local path"),
        ("C:/Users/me/cat.jpg", "a local path"),
        (r"\\nas\me\cat.jpg", "a local path"),
        ("from ~/cats/cat.jpg", "a local path"),
        ("path:/home/me/cat.jpg", "a local path"),
        ("/lustre/u/me/cat.jpg", "a local path"),
        ("/scratch/me/cat.jpg", "a local path"),
        ("/kaggle/input/cat.jpg", "a local path"),
        ("../cats/1", "a local path"),
        ("from ./cats", "a local path"),
        ("mia/IMG_0001.JPG", "a local path"),
        ("Mia Smith/IMG_0001.CR2", "a local path"),
        (r"mia\cats.tar", "a local path"),
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
    "text", ["cat.jpg", "cats and/or dogs", "https://example.org/a/cat.jpg", "example.org/cat.jpg", "a .\\n b", "1/2."]
)
def test_values_that_tell_of_nobody(cuda: Path, text: str) -> None:
    rewrite(cuda, lambda rows: [rows[i].update(name=text) for i in (2, 8)])
    assert checks(cuda) == []


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org/home/me",
        "and/or",
        "x/home/y",
        "a: b",
        "1.5, 2.5",
        "the root/home of it",
        "10:30",
        "s3://data/x",
        "~5",
        "in data/x",
    ],
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
