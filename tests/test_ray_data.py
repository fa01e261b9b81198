"""A real Ray on two CPUs: the pixels, rows and features of `ds.map`, and nothing of the key in its logs."""

import importlib
import io
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset

from hf_unlearnable import CudaPoison, LspPoison, PilPoison, Poison, RandomNoisePoison, images
from hf_unlearnable.batches import Batches
from hf_unlearnable.recipes import changed
from tests.conftest import make_dataset, noise_pictures, pixels

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.", r"ignore::FutureWarning:ray\.")
ROWS = 24
LABELS = [i % 4 for i in range(ROWS)]


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Ray with its export API on: what it writes about operators can then be read."""
    reason = "Ray Data is not installed: pip install 'hf_unlearnable[ray]'"
    ray = pytest.importorskip("ray", reason=reason)
    pytest.importorskip("ray.data", reason=reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_enable_export_api_write", "1")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        logging.getLogger("ray.data").setLevel("ERROR")
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module")
def ray_data(ray: Any) -> ModuleType:
    return importlib.import_module("hf_unlearnable.ray_data")


@pytest.fixture(scope="module")
def source() -> Dataset:
    """Lossless pictures, a JPEG with a path, one with alpha, and integers of which one is missing."""
    rows: list[Any] = list(noise_pictures(ROWS))
    buffer = io.BytesIO()
    PIL.Image.fromarray(rows[3]).save(buffer, "JPEG", quality=75)
    rows[3] = {"bytes": buffer.getvalue(), "path": "class3/three.jpg"}
    made = make_dataset(rows, LABELS)
    return made.add_column("number", [None if i == 5 else 2**60 + i for i in range(ROWS)])


@pytest.fixture(scope="module")
def clean(ray: Any, source: Dataset) -> Any:
    """One block."""
    return ray.data.from_arrow(source.data.table.replace_schema_metadata(source.features.arrow_schema.metadata))


@pytest.fixture(scope="module")
def pil(source: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Poison:
    rows = Batches.load(source, progress=False)
    surrogate = PilPoison(pgd_steps=5).fit(
        rows, recipe=changed(PilPoison.recipe, batch_size=12, epochs=1), progress=False
    )
    return PilPoison.from_surrogate(surrogate.save(tmp_path_factory.mktemp("pil") / "pil.safetensors"))


def read(values: list[dict[str, Any]]) -> np.ndarray:
    assert all(value["path"] is None and value["bytes"][:4] == b"\x89PNG" for value in values)
    return np.stack([np.asarray(PIL.Image.open(io.BytesIO(value["bytes"]))) for value in values])


def broken(source: Dataset, ray: Any, **column: list[Any]) -> Any:
    table = source.data.table
    for name, values in column.items():
        table = table.set_column(
            table.column_names.index(name), name, pa.array(values, None if name != "img" else Image().pa_type)
        )
    return ray.data.from_arrow(table.replace_schema_metadata(None))


@pytest.mark.parametrize("method", ["cuda", "lsp", "random-noise", "pil"])
def test_the_pixels_rows_and_columns_of_map(
    method: str, source: Dataset, clean: Any, pil: Poison, ray_data: ModuleType
) -> None:
    poisons: dict[str, Poison] = {
        "cuda": CudaPoison(seed=7, poison_rate=0.7),
        "lsp": LspPoison(seed=7),
        "random-noise": RandomNoisePoison(seed=bytes(range(32))),
        "pil": pil,
    }
    poison = poisons[method]
    expected = source.map(poison, batched=True, batch_size=5)
    done = ray_data.protect(clean, poison, batch_size=5).materialize()
    assert done.num_blocks() in (4, 5)
    rows = done.take_all()
    assert np.array_equal(read([row["img"] for row in rows]), pixels(expected))
    for name in ("label", "name", "number"):
        assert [row[name] for row in rows] == source[name][:]
    assert ray_data.features_of(done) == source.features


def test_from_parquet_to_parquet(source: Dataset, ray: Any, ray_data: ModuleType, tmp_path: Path) -> None:
    poison = CudaPoison(seed=7)
    source.to_parquet(tmp_path / "clean.parquet")
    clean = ray.data.read_parquet(str(tmp_path / "clean.parquet"))
    protected = ray_data.protect(clean, poison, batch_size=7, concurrency=1, num_cpus=1)
    ray_data.write(protected, str(tmp_path / "out"), ray_data.features_of(clean))
    assert 1 < len(list((tmp_path / "out").glob("*.parquet"))) <= 4
    found = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert found.features == source.features
    assert np.array_equal(pixels(found), pixels(poison.apply(source)))
    for name in ("label", "name", "number"):
        assert found[name][:] == source[name][:]
    with pytest.raises(ValueError, match="already holds files"):
        ray_data.write(protected, str(tmp_path / "out"), source.features)
    with pytest.raises(ValueError, match=r"\['img'\], got \['img', 'label'"):
        ray_data.write(clean, str(tmp_path / "other"), Features(img=Image()))


def test_the_bare_callable(source: Dataset, clean: Any, ray_data: ModuleType, tmp_path: Path) -> None:
    poison = CudaPoison(seed=7)
    features = source.remove_columns("number").features
    mapped = clean.drop_columns(["number"]).map_batches(poison, batch_size=500)
    ray_data.write(mapped, str(tmp_path / "out"), features)
    found = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert found.features == features
    assert np.array_equal(pixels(found), pixels(poison.apply(source)))
    assert found["label"][:] == LABELS


def test_a_batch_and_a_row_of_ray_keep_their_columns(source: Dataset) -> None:
    poison = CudaPoison(seed=7)
    plain = source.cast_column("img", Image(decode=False))
    pictures = np.empty(ROWS, dtype=object)
    pictures[:] = plain["img"][:]
    batch = {"img": pictures, "label": np.array(LABELS), "name": np.array(source["name"][:], dtype=object)}
    given = dict(batch)
    done = poison(batch)
    assert list(done) == list(batch)
    assert all(batch[name] is given[name] for name in batch)
    assert done["img"].dtype == object
    assert done["label"] is batch["label"]
    expected = pixels(poison.apply(source))
    assert np.array_equal(read(list(done["img"])), expected)
    row = poison({"img": plain[2]["img"], "label": 2})
    assert row["label"] == 2
    assert np.array_equal(read([row["img"]])[0], expected[2])


def test_what_is_wrong_is_named(source: Dataset, ray: Any, ray_data: ModuleType) -> None:
    values = source.cast_column("img", Image(decode=False))["img"][:]
    corrupt = [{"bytes": b"broken", "path": "class1/bad.jpg"} if i == 13 else value for i, value in enumerate(values)]
    labels: dict[str, list[Any]] = {
        "row 3 of a batch: expected one of 4 classes .*got 9": [9 if i == 13 else y for i, y in enumerate(LABELS)],
        "row 3 of a batch: expected a class .*got None": [None if i == 13 else y for i, y in enumerate(LABELS)],
        "row 0 of a batch: expected a class .*got 'class0'": [f"class{y}" for y in LABELS],
    }
    cases = [(broken(source, ray, label=given), text) for text, given in labels.items()]
    cases.append(
        (broken(source, ray, img=corrupt), r"row 3 of a batch \(class1/bad.jpg\): expected a readable picture")
    )
    for dataset, text in cases:
        with pytest.raises(ray.exceptions.RayTaskError, match=text):
            ray_data.protect(dataset, CudaPoison(seed=7), features=source.features, batch_size=10).materialize()


def test_what_does_not_suit_is_refused_at_once(source: Dataset, clean: Any, ray: Any, ray_data: ModuleType) -> None:
    bare = broken(source, ray)
    with pytest.raises(ValueError, match=r"features of its columns \['img', 'label', .*features="):
        ray_data.protect(bare, CudaPoison(seed=7))
    strings = Features({**source.features, "label": Value("string")})
    with pytest.raises(ValueError, match="no label column"):
        ray_data.protect(bare, CudaPoison(seed=7), features=strings)
    with pytest.raises(ValueError, match="at most 3 classes .*got 4"):
        ray_data.protect(clean, CudaPoison(seed=7, num_classes=3))
    with pytest.raises(ValueError, match="batch size of 1 or more, got 0"):
        ray_data.protect(clean, CudaPoison(seed=7), batch_size=0)


def test_other_columns_and_decoded_pictures_are_refused(source: Dataset, ray: Any, ray_data: ModuleType) -> None:
    arrays = ray.data.from_numpy(noise_pictures(4)).rename_columns({"data": "img"})
    with pytest.raises(
        ray.exceptions.RayTaskError, match="expected pictures as {bytes, path} or bytes in column 'img'"
    ):
        ray_data.protect(arrays, RandomNoisePoison(seed=7), features=Features(img=Image())).materialize()
    fewer = Features(img=Image(), label=ClassLabel(num_classes=4))
    with pytest.raises(ray.exceptions.RayTaskError, match=r"expected the columns of the features, \['img', 'label'\]"):
        ray_data.protect(broken(source, ray), CudaPoison(seed=7), features=fewer).materialize()


def test_bytes_are_pictures_too(source: Dataset, ray: Any, ray_data: ModuleType) -> None:
    data = [value["bytes"] for value in source.cast_column("img", Image(decode=False))["img"]]
    plain = ray.data.from_arrow(pa.table({"img": pa.array(data, pa.binary())}))
    rows = ray_data.protect(plain, RandomNoisePoison(seed=7), features=Features(img=Image())).take_all()
    assert np.array_equal(read([row["img"] for row in rows]), pixels(RandomNoisePoison(seed=7).apply(source)))


def test_the_key_is_not_in_the_logs(clean: Any, ray: Any, ray_data: ModuleType) -> None:
    """The bare callable shows that the search would find it."""
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path()) / "logs"

    def logged(key: bytes) -> bool:
        text = r"[\s\"']*,[\s\"']*".join(str(value) for value in key[:8])
        found = [file.read_text(errors="replace") for file in session.rglob("*") if file.is_file()]
        return any(re.search(text, page) or key.hex() in page for page in found)

    secret, other, told = (bytes(range(first, first + 32)) for first in (100, 150, 200))
    ray_data.protect(clean, CudaPoison(seed=secret)).materialize()
    clean.map_batches(CudaPoison(seed=other).__call__).materialize()
    clean.map_batches(CudaPoison(seed=told)).materialize()
    assert logged(told)
    assert not logged(secret)
    assert not logged(other)


def test_ray_workers_are_seen(ray: Any) -> None:
    assert not images.in_worker_process()
    assert ray.get(ray.remote(images.in_worker_process).remote())


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ray.data", raising=False)
    monkeypatch.delitem(sys.modules, "hf_unlearnable.ray_data", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'hf_unlearnable\[ray\]'"):
        importlib.import_module("hf_unlearnable.ray_data")


def test_the_library_does_not_import_ray() -> None:
    script = "import sys, hf_unlearnable; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=120, check=False).returncode == 0
