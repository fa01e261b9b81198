import io

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Image

from hf_unlearnable import CudaPoison, preview, sizes
from hf_unlearnable.images import Picture
from hf_unlearnable.sharding.plan import settle, terms_of
from hf_unlearnable.sources import stream_of


def stored(width: int, height: int) -> dict[str, object]:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (width, height)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def test_few_large_pictures_and_many_small_ones_are_held(tmp_path) -> None:
    small, photo = stored(32, 32), stored(4000, 3000)
    assert sizes.at_once([small] * 3, 500) == 500
    assert sizes.at_once([small, photo], 500) == sizes.VALUES // 36_000_000 == 4
    assert sizes.at_once([small, photo], 3) == 3
    PIL.Image.new("RGB", (4000, 3000)).save(tmp_path / "a.jpg")
    assert sizes.at_once([{"bytes": None, "path": str(tmp_path / "a.jpg")}], 500) == 4
    assert sizes.at_once([PIL.Image.new("RGB", (4000, 3000))], 500) == 4
    assert sizes.at_once([stored(9000, 9000)], 500) == 1


def test_what_cannot_be_read_is_left_for_others_to_complain_about() -> None:
    assert sizes.at_once([None, {"bytes": b"no picture", "path": None}, {"bytes": None, "path": "/nowhere"}], 7) == 7


def test_files_are_judged_by_the_bytes_of_a_row(tmp_path) -> None:
    for name, size in (("large", 20_000_000), ("small", 100)):
        pq.write_table(
            pa.table({"a": [np.random.default_rng(0).bytes(size)] * 3}), tmp_path / name, use_dictionary=False
        )
    with pq.ParquetFile(tmp_path / "large") as large, pq.ParquetFile(tmp_path / "small") as small:
        assert (sizes.at_once_in(large, 500), sizes.at_once_in(small, 500)) == (2, 500)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Twelve pictures of which two are as many as may be held."""
    monkeypatch.setattr(sizes, "VALUES", 2 * 3 * 40 * 50)
    pictures = [stored(40, 50) for _ in range(12)]
    features = Features(
        {"image": Image(), "label": Features.from_dict({"a": {"_type": "ClassLabel", "names": ["x"]}})["a"]}
    )
    return Dataset.from_dict({"image": pictures, "label": [0] * 12}, features=features)


@pytest.mark.parametrize("how", ["split", "stream"])
def test_apply_holds_few_large_pictures(large: Dataset, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    change = CudaPoison.change_pictures

    def watched(self, pictures, *others):
        held.append(len(pictures))
        return change(self, pictures, *others)

    monkeypatch.setattr(CudaPoison, "change_pictures", watched)
    poison = CudaPoison(seed=1)
    if how == "split":
        poison.apply(large)
    else:
        assert len(list(poison.apply(large.to_iterable_dataset()))) == 12
    assert held == [2] * 6


def test_shards_are_planned_with_few_large_pictures(large: Dataset) -> None:
    stream = stream_of(large, "large")
    poison = settle(CudaPoison(seed=1), stream.features)
    terms = terms_of(stream, poison, container="parquet", batch_size=500, on_error="stop", record_seed=False)
    assert terms["batch_size"] == 2


def test_a_preview_keeps_no_more_pixels_than_it_shows() -> None:
    photo = Picture(
        torch.arange(3 * 1024 * 2048).reshape(3, 1024, 2048).to(torch.uint8), torch.ones(1024, 2048, dtype=torch.uint8)
    )
    thin = preview.thinned(photo)
    assert thin.pixels.shape == (3, 256, 512)
    assert thin.alpha is not None
    assert thin.alpha.shape == (256, 512)
    assert torch.equal(thin.pixels, photo.pixels[:, ::4, ::4])
    small = Picture(photo.pixels[:, :500, :511])
    assert torch.equal(preview.thinned(small).pixels, small.pixels)
