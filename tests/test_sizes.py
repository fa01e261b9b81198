import io
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image

from hf_unlearnable import CudaPoison, preview, sizes
from hf_unlearnable.images import Picture
from hf_unlearnable.protect import protect
from hf_unlearnable.sharding.merge import merge
from hf_unlearnable.sharding.run import protect_shards
from hf_unlearnable.sources import stream_of
from tests.conftest import noise_pictures

SIDE = 80


def stored(width: int, height: int) -> dict[str, object]:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (width, height)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def noisy(count: int, side: int = SIDE) -> list[dict[str, object]]:
    buffers = [io.BytesIO() for _ in range(count)]
    for picture, buffer in zip(noise_pictures(count, side, side), buffers, strict=True):
        PIL.Image.fromarray(picture).save(buffer, "PNG")
    return [{"bytes": buffer.getvalue(), "path": None} for buffer in buffers]


def test_values_are_told_by_the_header(tmp_path: Path) -> None:
    assert sizes.values_of(stored(4000, 3000)) == 36_000_000
    assert sizes.values_of(stored(32, 32)) == 0  # a few bytes: small
    PIL.Image.new("RGB", (4000, 3000)).save(tmp_path / "a.jpg")
    assert sizes.values_of({"bytes": None, "path": str(tmp_path / "a.jpg")}) == 36_000_000


def jpeg(**options: object) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(noise_pictures(1, 120, 200)[0]).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"quality": 95, "subsampling": 0},
        {"exif": b"Exif\0\0" + bytes(300)},
        {"comment": b"x"},
    ],
)
def test_frames_of_jpegs(options: dict[str, object]) -> None:
    data = jpeg(quality=100) if not options else jpeg(**{"quality": 100, **options})
    assert sizes.values_of({"bytes": data, "path": None}) == 3 * 120 * 200
    assert sizes._values_of_jpeg(data) == 3 * 120 * 200


def test_jpegs_that_are_not_plain_are_left_to_the_decoder() -> None:
    data = jpeg(quality=100)
    frame = data.index(b"\xff\xc0")
    filled = data[:frame] + b"\xff\xff" + data[frame:]  # fill bytes before a marker are allowed
    assert sizes._values_of_jpeg(filled) == 0
    assert sizes.values_of({"bytes": filled, "path": None}) == 3 * 120 * 200
    for broken in (data[:frame], data[: frame + 6], b"\xff\xd8" + b"\xff\xe0\0\0" * 3000, b"\xff\xd8\xff"):
        assert sizes._values_of_jpeg(broken) == 0


def test_what_cannot_be_read_is_left_for_others_to_complain_about() -> None:
    unreadable = {"bytes": b"no picture" * 10_000, "path": None}
    for value in (None, unreadable, {"bytes": None, "path": "/nowhere"}, {"bytes": None, "path": "s3://bucket/a.jpg"}):
        assert sizes.values_of(value) == 0


def test_batches_hold_a_bounded_number_of_items_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "VALUES", 10)
    assert list(sizes.batches([1] * 7, lambda item: item, 3)) == [[1] * 3, [1] * 3, [1]]
    assert list(sizes.batches([4, 4, 4, 99, 0, 1], lambda item: item, 3)) == [[4, 4], [4], [99], [0, 1]]
    assert list(sizes.batches([], lambda item: item, 3)) == []


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """A small picture, and eleven of which two are as many as may be held."""
    monkeypatch.setattr(sizes, "VALUES", 2 * 3 * SIDE * SIDE)
    features = Features({"image": Image(), "label": ClassLabel(names=["x"])})
    return Dataset.from_dict({"image": [stored(20, 20), *noisy(11)], "label": [0] * 12}, features=features)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures are changed at a time."""
    found: list[int] = []
    change = CudaPoison.change_pictures

    def watched(self, pictures, *others):
        found.append(len(pictures))
        return change(self, pictures, *others)

    monkeypatch.setattr(CudaPoison, "change_pictures", watched)
    return found


def test_apply_and_protect_hold_few_large_pictures(large: Dataset, held: list[int], tmp_path: Path) -> None:
    CudaPoison(seed=1).apply(large)
    assert held == [2] * 6
    protect(large, CudaPoison(seed=1), tmp_path / "out", source="large", progress=False)
    (file,) = (tmp_path / "out/data").glob("*.parquet")
    assert pq.read_metadata(file).num_row_groups == 6
    with pq.ParquetFile(file) as parquet:
        tables = list(sizes.tables(parquet, "image", 500))
    assert [len(table) for table in tables] == [3, *[2] * 4, 1]
    assert pa.concat_tables(tables)["image"].to_pylist() == pq.read_table(file)["image"].to_pylist()


def test_choosing_rows_holds_few_large_pictures(large: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    ranked: list[int] = []
    ranks = CudaPoison._ranks
    monkeypatch.setattr(CudaPoison, "_ranks", lambda self, some: (ranked.append(len(some)), ranks(self, some))[1])
    CudaPoison(seed=1, poison_rate=0.5).apply(large)
    assert ranked == [2] * 6


def test_shards_hold_few_large_pictures_and_any_batch_size_is_gone_on_with(
    large: Dataset, held: list[int], tmp_path: Path
) -> None:
    stream = stream_of(large, "large")
    for shard in (1, 2):
        protect_shards(stream, CudaPoison(seed=1), tmp_path / "out", shards=2, only=[shard], progress=False)
    assert held == [3, 2, 1, 2, 2, 2]
    assert merge(tmp_path / "out", progress=False).published["rows"] == 12


def test_bad_batch_sizes_are_refused(large: Dataset) -> None:
    for some in (large, large.to_iterable_dataset()):
        with pytest.raises(ValueError, match="batch size of 1 or more, got 0"):
            CudaPoison(seed=1).apply(some, batch_size=0)


def test_a_stream_is_not_read_before_it_is_iterated() -> None:
    read: list[int] = []

    def rows():
        for i, picture in enumerate(noisy(3)):
            read.append(i)
            yield {"image": picture, "label": 0}

    from datasets import IterableDataset

    features = Features({"image": Image(), "label": ClassLabel(names=["x"])})
    stream = CudaPoison(seed=1).apply(IterableDataset.from_generator(rows, features=features))
    assert read == []
    assert len(list(stream)) == 3


def test_a_preview_keeps_no_more_pixels_than_it_needs() -> None:
    pixels = torch.arange(3 * 1024 * 2048).reshape(3, 1024, 2048).to(torch.uint8)
    thin = preview.thinned(Picture(pixels, torch.ones(1024, 2048, dtype=torch.uint8)))
    assert thin.alpha is not None
    assert (thin.pixels.shape, thin.alpha.shape) == ((3, 256, 512), (256, 512))
    assert torch.equal(thin.pixels, pixels[:, ::4, ::4])
    small = Picture(pixels[:, :500, :511])
    assert torch.equal(preview.thinned(small).pixels, small.pixels)
    assert preview.thinned(Picture(pixels[:, :10])).pixels.shape == (3, 5, 1024)
    assert np.prod(preview.thinned(Picture(pixels[:, :1])).pixels.shape) <= 3 * 1024
