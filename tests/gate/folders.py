"""Protected folders, and how tests change them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features

from hf_unlearnable.digests import columns_digest, file_digest, split_digest
from hf_unlearnable.gate.checks import inspect
from hf_unlearnable.images import Picture, decode, digest, encode
from tests.conftest import make_dataset, noise_pictures

SECRET = bytes(range(100, 132))
Rows = list[dict[str, Any]]


def source(rows: int = 24) -> Dataset:
    return make_dataset(noise_pictures(rows), [i % 4 for i in range(rows)])


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
