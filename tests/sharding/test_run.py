"""Sharded equals one process; only what is missing is made; who differs is refused."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Image

from hf_unlearnable import CudaPoison, RandomNoisePoison, images
from hf_unlearnable.digests import file_digest
from hf_unlearnable.gate.record_checks import read_record
from hf_unlearnable.poisons.base import Poison
from hf_unlearnable.protect import protect
from hf_unlearnable.record import Record
from hf_unlearnable.sharding import plan as plans
from hf_unlearnable.sharding import shard as shards_room
from hf_unlearnable.sharding.merge import merge
from hf_unlearnable.sharding.run import place, protect_shards
from hf_unlearnable.sharding.storage import Storage
from hf_unlearnable.sources import Stream, stream_of, stream_split
from tests.conftest import make_dataset, noise_pictures, pixels
from tests.sharding.conftest import copied, same_pixels

SECRET = bytes(range(32))
NOISE = RandomNoisePoison(seed=SECRET)


def make(source: Path | str, output: Path | str, poison: Poison = NOISE, **more: Any) -> list[int]:
    return protect_shards(stream_split(source), poison, output, **{"batch_size": 5, "progress": False, **more})


def told(record: Record) -> dict[str, Any]:
    """A record but for its files and the version of pyarrow, which only shards ask for."""
    values = asdict(record)
    del values["published"]["files"]
    values["versions"].pop("pyarrow", None)
    return values


def close(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[name], b[name]) for name in a)
    return a == pytest.approx(b, rel=1e-6) if isinstance(a, float) else a == b


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 24])
def test_shards_are_the_rows_and_the_record_of_one_process(
    small: Dataset, parquet: Path, tmp_path: Path, read: Callable[[Path], Dataset], drawn: list[Any], shards: int
) -> None:
    poison = CudaPoison(seed=SECRET)
    expected = protect(small, poison, tmp_path / "one", source=str(parquet), progress=False)
    assert make(parquet, tmp_path / "out", poison, shards=shards) == list(range(1, shards + 1))
    record = merge(tmp_path / "out", progress=False)
    found = read(tmp_path / "out")
    assert found.features == small.features
    assert same_pixels(found, read(tmp_path / "one"))
    assert found.remove_columns("img").to_dict() == small.remove_columns("img").to_dict()
    assert close(told(record), told(expected))
    assert drawn[0] == drawn[1]
    assert [row for row, *_ in drawn[0]] == [0, 1, 2, 3]
    assert Record.load(tmp_path / "out" / "record.json") == record
    names = [f"data/train-{i:05d}-of-{shards:05d}.parquet" for i in range(shards)]
    assert list(record.published["files"]) == names
    for name, file in record.published["files"].items():
        path = tmp_path / "out" / name
        assert file == {"sha256": file_digest(path), "bytes": path.stat().st_size}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "data", "preview.png", "record.json"]
    assert sorted(p.name for p in (tmp_path / "out" / "data").iterdir()) == [name[5:] for name in names]


def test_sizes_modes_transparency_and_rows_in_batches(tmp_path: Path, read: Callable[[Path], Dataset]) -> None:
    rgb = PIL.Image.fromarray(noise_pictures(1, 24, 40)[0])
    rgba = rgb.copy()
    rgba.putalpha(120)
    many = [rgb, rgb.convert("L"), rgba, rgb.resize((33, 20)), rgb.rotate(90, expand=True)] * 3
    source = make_dataset(many, [i % 4 for i in range(15)])
    expected = protect(source, NOISE, tmp_path / "one", source="mixed", progress=False)
    protect_shards(stream_of(source, "mixed"), NOISE, tmp_path / "out", shards=4, batch_size=3, progress=False)
    record = merge(tmp_path / "out", progress=False)
    assert close(told(record), told(expected))
    for a, b in zip(read(tmp_path / "out")["img"], read(tmp_path / "one")["img"], strict=True):
        assert a.mode == b.mode
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_other_columns_are_kept_whatever_they_hold(small: Dataset, tmp_path: Path) -> None:
    rich = small.add_column("box", [[0.5, i] for i in range(24)]).add_column("more", [{"a": [1, 2], "b": None}] * 24)
    rich = rich.add_column("empty", [None, "x"] * 12)
    expected = protect(rich, NOISE, tmp_path / "one", source="rich", progress=False)
    protect_shards(stream_of(rich, "rich"), NOISE, tmp_path / "out", shards=2, progress=False)
    assert close(told(merge(tmp_path / "out", progress=False)), told(expected))


def test_imagefolder_and_archives(
    small: Dataset, archives: Path, tmp_path: Path, read: Callable[[Path], Dataset]
) -> None:
    poison = CudaPoison(seed=SECRET)
    expected = pixels(poison.apply(small))
    for i, picture in enumerate(pixels(small)):
        folder = tmp_path / "folder" / f"class{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(picture).save(folder / f"{i:02d}.png")
    by_class = np.argsort(np.arange(24) % 4, kind="stable")
    for source, column, order in ((tmp_path / "folder", "image", by_class), (archives, "png", np.arange(24))):
        for shards in (2, 7):
            output = tmp_path / f"out-{column}-{shards}"
            make(source, output, poison, shards=shards)
            record = merge(output, progress=False)
            assert np.array_equal(pixels(read(output), column), expected[order])
            assert record.source["label_column"] == ("label" if column == "image" else "cls")
            assert str(tmp_path).encode() not in b"".join(p.read_bytes() for p in output.rglob("*") if p.is_file())


def test_a_rerun_makes_only_what_is_missing(parquet: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert make(parquet, output, shards=4, only=[2]) == [2]
    assert make(parquet, output, only=[2]) == []
    assert make(parquet, output) == [1, 3, 4]
    before = {path: path.stat().st_mtime_ns for path in (output / "data").iterdir()}
    (output / ".shards" / "train-00000-of-00004.json").unlink()
    (output / "data" / "train-00001-of-00004.parquet").unlink()
    broken = output / "data" / "train-00003-of-00004.parquet"
    broken.write_bytes(broken.read_bytes()[:-1])
    assert make(parquet, output) == [1, 2, 4]
    kept = output / "data" / "train-00002-of-00004.parquet"
    assert [path for path in before if path.stat().st_mtime_ns == before[path]] == [kept]
    merge(output, progress=False)
    with pytest.raises(FileExistsError, match="is finished"):
        make(parquet, output)
    assert merge(output, progress=False).source["rows"] == 24


def test_processes_share_the_shards(parquet: Path, tmp_path: Path, read: Callable[[Path], Dataset]) -> None:
    made = [make(parquet, tmp_path / "out", shards=5, rank=rank, processes=3) for rank in range(3)]
    assert made == [[1, 4], [2, 5], [3]]
    merge(tmp_path / "out", progress=False)
    assert same_pixels(read(tmp_path / "out"), NOISE.apply(read(parquet)))


def test_who_differs_is_refused(parquet: Path, small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    make(parquet, output, shards=3, only=[1])
    before = sorted(path.name for path in output.rglob("*"))
    other = RandomNoisePoison(seed=bytes(32))
    for poison, more, message in (
        (other, {}, "key.commitment: expected sha256"),
        (RandomNoisePoison(seed=SECRET, epsilon=4 / 255), {}, "settings.epsilon: expected 0.03"),
        (RandomNoisePoison(seed=SECRET, image_format="webp"), {}, "image_format: expected png, got webp"),
        (CudaPoison(seed=SECRET), {}, "method: expected random-noise, got cuda"),
        (NOISE, {"batch_size": 4}, "batch_size: expected 5, got 4"),
        (NOISE, {"on_error": "skip"}, "on_error: expected stop, got skip"),
        (NOISE, {"shards": 4}, "begun with 3 shards, got 4"),
        (NOISE, {"only": [4]}, "expected shards from 1 to 3, got"),
        (NOISE, {"only": [0]}, "expected shards from 1 to 3, got"),
    ):
        with pytest.raises(ValueError, match=message):
            make(parquet, output, poison, **more)
    versions = plans.versions("pyarrow")
    monkeypatch.setattr(plans, "versions", lambda *_: {**versions, "pillow": "1.0"})
    with pytest.raises(ValueError, match=f"versions.pillow: expected {versions['pillow']}, got 1.0"):
        make(parquet, output)
    monkeypatch.setattr(plans, "versions", lambda *_: {**versions, "python": "3.99"})
    assert make(parquet, output, only=[1]) == []
    small.select(range(3)).to_parquet(parquet / "train-00001-of-00003.parquet")
    with pytest.raises(ValueError, match="source.identity"):
        make(parquet, output)
    assert sorted(path.name for path in output.rglob("*")) == before


def test_another_int_seed_is_refused_and_none_is_told(parquet: Path, tmp_path: Path) -> None:
    make(parquet, tmp_path / "out", RandomNoisePoison(seed=987654321), shards=3, only=[1])
    assert make(parquet, tmp_path / "out", RandomNoisePoison(seed=987654321), only=[1]) == []
    with pytest.raises(ValueError, match="expected the key that the output was begun with"):
        make(parquet, tmp_path / "out", RandomNoisePoison(seed=987654322), only=[1])
    make(parquet, tmp_path / "secret", shards=3, only=[1])
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for form in (SECRET, SECRET.hex().encode(), b"987654321", (987654321).to_bytes(4, "little")):
        assert form not in written


def test_foreign_places_are_refused(parquet: Path, tmp_path: Path) -> None:
    protect(make_dataset(noise_pictures(4), [0, 1, 2, 3]), NOISE, tmp_path / "whole", source="x", progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    for output, message in (
        (tmp_path / "whole", "is finished"),
        (tmp_path / "mine", r"holds \['notes'\], and no plan"),
        (parquet, "holds the source"),
        (tmp_path, "holds the source"),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(FileExistsError, match=message):
            make(parquet, output)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_run_at_work_is_left_alone(parquet: Path, tmp_path: Path, memory: Any) -> None:
    for output in (tmp_path / "out", "memory://bucket/out"):
        make(parquet, output, shards=3, only=[1])
        with Storage(output).lock(".shards/train-00001-of-00003.lock", "shard 2"):
            with pytest.raises(FileExistsError, match=r"another run is at work on shards \[2\] of 3"):
                make(parquet, output, only=[2])
            with pytest.raises(FileExistsError, match=r"this one made \[3\]"):
                make(parquet, output)
        assert make(parquet, output) == [2]


def test_from_one_address_to_another(
    parquet: Path, small: Dataset, tmp_path: Path, memory: Any, read: Callable[[Path], Dataset]
) -> None:
    for path in parquet.rglob("*.parquet"):
        memory.pipe_file(f"/bucket/photos/{path.name}", path.read_bytes())
    for output in ("memory://bucket/photos", "memory://bucket/"):
        with pytest.raises(FileExistsError, match="holds the source memory://bucket/photos"):
            make("memory://bucket/photos", output)
    make("memory://bucket/photos", "memory://bucket/out", shards=2)
    record = merge("memory://bucket/out", progress=False)
    assert record.source["dataset"] == "photos"
    make(parquet, tmp_path / "out", shards=2)
    assert merge(tmp_path / "out", progress=False).published["pixels_sha256"] == record.published["pixels_sha256"]
    assert same_pixels(read(copied(memory, "/bucket/out", tmp_path / "copy")), NOISE.apply(small))


def test_elsewhere_two_runs_make_the_same_bytes(parquet: Path, memory: Any, tmp_path: Path) -> None:
    make(parquet, "memory://bucket/out", shards=2)
    before = {path: memory.cat_file(path) for path in memory.find("/bucket/out") if not path.endswith(".json")}
    for path in memory.find("/bucket/out/.shards"):
        if path.endswith("2.json"):
            memory.rm_file(path)
    assert make(parquet, "memory://bucket/out") == [1, 2]
    assert {path: memory.cat_file(path) for path in before} == before
    scratch = Storage("memory://bucket/out").here
    assert scratch.exists()
    assert not list(scratch.rglob("*.parquet"))
    record = merge("memory://bucket/out", progress=False)
    assert not scratch.exists()
    here = copied(memory, "/bucket/out", tmp_path / "copy")
    assert sorted(p.name for p in here.iterdir()) == ["README.md", "data", "preview.png", "record.json"]
    make(parquet, tmp_path / "out", shards=2)
    assert told(merge(tmp_path / "out", progress=False)) == told(record)


# What is in the rows.


def damaged(small: Dataset, rows: tuple[int, ...]) -> Dataset:
    values = small.cast_column("img", Image(decode=False))["img"][:]
    for row in rows:
        values[row] = {"bytes": b"not a picture", "path": None}
    plain = small.cast_column("img", Image(decode=False))
    plain = plain.remove_columns("img").add_column("img", values, feature=Image(decode=False))
    return plain.select_columns(small.column_names).cast_column("img", Image())


def test_an_unreadable_picture_stops_or_is_left_out(
    small: Dataset, tmp_path: Path, read: Callable[[Path], Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = stream_of(damaged(small, (2, 13, 14)), "damaged")
    more = {"shards": 3, "batch_size": 4, "progress": False}
    with pytest.raises(ValueError, match="shard 2/3: row 13: expected a readable picture, got 13 bytes"):
        protect_shards(stream, NOISE, tmp_path / "stop", only=[2], **more)
    kept = small.select([row for row in range(24) if row not in (2, 13, 14)])
    expected = protect(kept, NOISE, tmp_path / "one", source="damaged", progress=False)
    for counted in (True, False):
        output = tmp_path / f"skip-{counted}"
        shards = 3 if counted else 1
        if not counted:
            monkeypatch.setattr(Stream, "count", lambda _: None)
        protect_shards(stream, NOISE, output, on_error="skip", **{**more, "shards": shards})
        record = merge(output, progress=False)
        assert same_pixels(read(output), NOISE.apply(kept))
        left_out = record.source["left_out"]
        assert [row["row"] for row in left_out] == [2, 13, 14]
        assert left_out[0]["reason"] == "expected a readable picture, got 13 bytes of no known format"
        for name in ("rows", "pixels_sha256", "columns_sha256"):
            assert record.source[name] == expected.source[name]
        assert record.published["rows"] == 21


def test_nothing_readable_is_no_dataset(small: Dataset, tmp_path: Path) -> None:
    stream = stream_of(damaged(small, tuple(range(24))), "damaged")
    protect_shards(stream, NOISE, tmp_path / "out", shards=2, on_error="skip", progress=False)
    with pytest.raises(ValueError, match="all 24 rows were left out, the first because: expected a readable picture"):
        merge(tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "record.json").exists()


@pytest.mark.parametrize("label", [None, -1])
def test_a_bad_label_names_its_row(tmp_path: Path, label: int | None) -> None:
    labels: list[int | None] = [i % 4 for i in range(12)]
    labels[7] = label
    stream = stream_of(make_dataset(noise_pictures(12), labels), "labels")
    with pytest.raises(ValueError, match=f"shard 2/3: row 7: expected a class .* in column 'label', got {label}"):
        protect_shards(stream, CudaPoison(seed=7), tmp_path / "out", shards=3, on_error="skip", progress=False)
    assert not list((tmp_path / "out").rglob("*00001-of-00003.parquet"))


def test_pictures_without_labels(
    small: Dataset, tmp_path: Path, read: Callable[[Path], Dataset], drawn: list[Any]
) -> None:
    bare = small.remove_columns(["label", "name"])
    expected = protect(bare, NOISE, tmp_path / "one", source="bare", progress=False)
    protect_shards(stream_of(bare, "bare"), NOISE, tmp_path / "out", shards=3, batch_size=5, progress=False)
    assert close(told(merge(tmp_path / "out", progress=False)), told(expected))
    assert same_pixels(read(tmp_path / "out"), read(tmp_path / "one"))
    assert drawn[0] == drawn[1]
    assert [row for row, *_ in drawn[0]] == [0, 3, 6, 9, 13, 16, 19, 23]
    with pytest.raises(ValueError, match="no label column"):
        protect_shards(stream_of(bare, "bare"), CudaPoison(seed=7), tmp_path / "cuda", progress=False)
    assert not (tmp_path / "cuda").exists()


def test_a_share_of_the_rows_is_drawn_row_by_row(
    small: Dataset, parquet: Path, tmp_path: Path, read: Callable[[Path], Dataset]
) -> None:
    poison = RandomNoisePoison(seed=SECRET, poison_rate=0.4)
    make(parquet, tmp_path / "out", poison, shards=4)
    record = merge(tmp_path / "out", progress=False)
    assert record.published["rows_chosen"] == "each row drawn"
    assert same_pixels(read(tmp_path / "out"), small.map(poison, batched=True))


def test_a_source_that_cannot_be_counted(
    archives: Path, small: Dataset, tmp_path: Path, read: Callable[[Path], Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = protect(small, NOISE, tmp_path / "one", source="small", progress=False)
    monkeypatch.setattr(Stream, "count", lambda _: None)
    monkeypatch.setattr(plans, "UNCOUNTED_EVERY", 1)
    with pytest.raises(ValueError, match="expected at most 3 shards"):
        make(archives, tmp_path / "out", shards=4)
    assert not (tmp_path / "out").exists()
    make(archives, tmp_path / "out")
    record = merge(tmp_path / "out", progress=False)
    assert close(record.pixels, expected.pixels)
    assert same_pixels(read(tmp_path / "out").rename_column("png", "img"), NOISE.apply(small))


@pytest.fixture
def wrong_encoder(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pictures that are encoded to other ones: those of the 3rd and the 17th row that are made, from 0."""
    encode, seen = images.encode, []

    def encoded(picture: images.Picture, **how: Any) -> bytes:
        seen.append(len(seen))
        wrong = images.Picture(255 - picture.pixels) if seen[-1] in (3, 17) else picture
        return encode(wrong, **how)

    monkeypatch.setattr(images, "encode", encoded)
    monkeypatch.setattr(images, "in_worker_process", lambda: True)  # one after the other
    return seen


def test_every_stored_picture_of_a_small_split_is_decoded_again(
    parquet: Path, tmp_path: Path, wrong_encoder: list[int]
) -> None:
    with pytest.raises(ValueError, match="row 3: the stored picture is not the one that was made"):
        make(parquet, tmp_path / "out", shards=1)


@pytest.mark.parametrize(
    ("few", "every", "noticed"),
    [
        (12, None, None),
        (8, None, 3),
        (2, None, None),
        (12, 16, None),
        (12, 17, 17),
        (12, 4, None),
        (12, 3, 3),
        (12, 1, 3),
    ],
)
def test_of_a_large_split_every_nth_is_and_the_record_says_so(
    parquet: Path,
    tmp_path: Path,
    wrong_encoder: list[int],
    monkeypatch: pytest.MonkeyPatch,
    few: int,
    every: int | None,
    noticed: int | None,
) -> None:
    monkeypatch.setattr(plans, "PERCEPTUAL_ROWS", few)  # of 24
    more = {"shards": 1, "read_back_every": every}
    if noticed is not None:
        with pytest.raises(ValueError, match=f"row {noticed}: the stored picture is not the one that was made"):
            make(parquet, tmp_path / "out", **more)
        return
    make(parquet, tmp_path / "out", **more)
    with pytest.raises(ValueError, match="read_back_every: expected"):
        make(parquet, tmp_path / "out", **{**more, "read_back_every": 5})
    record = merge(tmp_path / "out", progress=False)
    assert record.published["pictures_read_back_every"] == (every or 24 // few)
    assert read_record(tmp_path / "out")[1] == []


def test_what_is_read_back_is_one_or_more(parquet: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="read_back_every is 1 or more, got 0"):
        make(parquet, tmp_path / "out", read_back_every=0)


def test_no_more_than_a_batch_is_held(parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    encode = shards_room.encode_many
    monkeypatch.setattr(shards_room, "encode_many", lambda p, **k: seen.append(len(p)) or encode(p, **k))
    make(parquet, tmp_path / "out", shards=2, batch_size=5)
    assert seen == [5, 2, 5, 5, 5, 2]


def test_an_empty_split(small: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty split"):
        protect_shards(stream_of(small.select([]), "none"), NOISE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, (1, 4)),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, (2, 3)),
    ],
)
def test_which_process_this_is(environment: dict[str, str], expected: tuple[int, int]) -> None:
    assert place(environment) == expected


def test_a_rank_outside() -> None:
    with pytest.raises(ValueError, match="from 0 to 1, got 2"):
        place({"RANK": "2", "WORLD_SIZE": "2"})


# Parts.


@pytest.mark.parametrize("counts", [[24], [7, 8, 9], [1, 0, 3, 0, 0, 5], [2] * 12])
def test_parts_are_all_rows_once_and_in_order(counts: list[int]) -> None:
    total, ends = sum(counts), np.cumsum(counts)
    for shards in range(1, total + 1):
        parts = plans.divide(counts, len(counts), shards)
        rows: list[int] = []
        for part in parts:
            assert part.rows is not None
            assert part.start == len(rows)
            first = int(ends[part.first] - counts[part.first]) + part.skip
            assert 0 <= part.skip <= counts[part.first]
            assert first + part.rows <= ends[part.last - 1]
            rows += range(first, first + part.rows)
        assert len(parts) == shards
        assert rows == list(range(total))
    with pytest.raises(ValueError, match="as many as there are rows|expected 1 shard"):
        plans.divide(counts, len(counts), total + 1)
    with pytest.raises(ValueError, match="1 shard or more"):
        plans.divide(counts, len(counts), 0)


def test_a_damaged_plan(parquet: Path, tmp_path: Path) -> None:
    make(parquet, tmp_path / "out", shards=3, only=[1])
    path = tmp_path / "out" / ".shards" / "plan.json"
    text = path.read_text()
    path.write_text(text[:-20])
    with pytest.raises(ValueError, match="not a plan"):
        make(parquet, tmp_path / "out")
    path.write_text(json.dumps({**json.loads(text), "schema": 99}))
    with pytest.raises(ValueError, match="expected schema 3, got 99"):
        make(parquet, tmp_path / "out")
