"""Pictures of any size and any number to measure with: drawn by a key, or real ones resized."""

import io
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image

from hf_unlearnable import columns
from hf_unlearnable.benchmarks.timing import SEED
from hf_unlearnable.images import decode, to_pil
from hf_unlearnable.keys import numpy_generator

CLASSES = 10
QUALITY = 90
ROWS_AT_ONCE = 100
ROWS_PER_FILE = 10_000


@dataclass(frozen=True)
class Pictures:
    """Where pictures come from.

    Args:
        title: what a table says of them.
        source: real pictures, in turn, each cut square and resized; None for drawn ones (smooth patches and noise of at
            most 12 levels), each from a generator of its own for its size and row.
    """

    title: str = "drawn"
    source: Dataset | None = None

    @classmethod
    def largest(cls, datasets: Mapping[str, Dataset]) -> "Pictures":
        """Those of the dataset whose first picture is the largest; drawn ones where there is no dataset."""
        if not datasets:
            return cls()
        sides = {name: min(cls(name, source)._read(0).size) for name, source in datasets.items()}
        name = max(sides, key=lambda name: sides[name])
        return cls(f"{name}, resized from {sides[name]} px", datasets[name])

    def picture(self, row: int, size: int) -> np.ndarray:
        """uint8 RGB of shape (size, size, 3)."""
        bicubic = PIL.Image.Resampling.BICUBIC
        if self.source is not None:
            return np.asarray(PIL.ImageOps.fit(self._read(row % len(self.source)), (size, size), bicubic))
        draws = numpy_generator(SEED, "benchmark rows", size, row)
        patches = PIL.Image.fromarray(draws.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        noise = draws.integers(-12, 13, (size, size, 3), dtype=np.int16)
        return np.clip(np.asarray(patches.resize((size, size), bicubic)) + noise, 0, 255).astype(np.uint8)

    def jpeg(self, row: int, size: int) -> bytes:
        buffer = io.BytesIO()
        PIL.Image.fromarray(self.picture(row, size)).save(buffer, "JPEG", quality=QUALITY)
        return buffer.getvalue()

    def _read(self, row: int) -> PIL.Image.Image:
        assert self.source is not None
        name = columns.image_column(self.source.features)
        value: Any = self.source.cast_column(name, Image(decode=False))[row][name]
        return to_pil(decode(value, where=f"row {row}")).convert("RGB")


def space_needed(rows: int, size: int) -> int:
    """Bytes of a source of JPEGs (at most), and of one protected copy (PNG, hardly compressed)."""
    raw = 3 * size * size
    return rows * (raw * 6 // 10 + 1000 + raw * 105 // 100 + 300)


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        OSError: fewer free bytes; says how many are needed.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: expected {needed / 1e9:.3g} GB free for {what}, got {free / 1e9:.3g} GB: fewer --rows, or "
            "--work with a folder on another disk"
        )


def write_source(
    pictures: Pictures,
    folder: Path,
    rows: int,
    size: int,
    *,
    rows_per_file: int = ROWS_PER_FILE,
    kind: Literal["parquet", "arrow"] = "parquet",
) -> Path:
    """A folder of JPEGs that `load_dataset` reads (columns `image` and `label`, labels in turn), written once.

    A folder of that name that is there already is whole, and used as it is.
    """
    title = pictures.title.split(",")[0]
    target = folder / f"{title}-{size}px-{rows}-by-{rows_per_file}-{kind}"
    if target.exists():
        return target
    partial = _fresh(folder / f"{target.name}.partial")
    schema = Features({"image": Image(), "label": ClassLabel(num_classes=CLASSES)}).arrow_schema
    for number, start in enumerate(range(0, rows, rows_per_file)):
        file, stop = partial / f"train-{number:05d}.{kind}", min(start + rows_per_file, rows)
        with (
            pq.ParquetWriter(file, schema, compression="none")
            if kind == "parquet"
            else pa.ipc.new_stream(str(file), schema) as writer
        ):
            for first in range(start, stop, ROWS_AT_ONCE):
                numbers = range(first, min(first + ROWS_AT_ONCE, stop))
                told = [
                    {"image": {"bytes": pictures.jpeg(row, size), "path": None}, "label": row % CLASSES}
                    for row in numbers
                ]
                writer.write_table(pa.Table.from_pylist(told, schema=schema))
    os.replace(partial, target)
    return target


def first_rows(source: Path, rows: int, target: Path) -> Path:
    """The first rows of a parquet source as one of its own: whole files are linked, the last is cut.

    Raises:
        ValueError: it has fewer.
    """
    partial, left = _fresh(target.with_name(f"{target.name}.partial")), rows
    for file in sorted(source.glob("*.parquet")):
        if left <= 0:
            break
        count = pq.read_metadata(file).num_rows
        if count <= left:
            os.link(file, partial / file.name)
        else:
            pq.write_table(pq.read_table(file).slice(0, left), partial / file.name, compression="none")
        left -= min(count, left)
    if left:
        raise ValueError(f"expected {rows} rows in {source}, got {rows - left}")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    return target


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
