"""How many pictures are held at a time: fewer where they are large."""

import io
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Image

VALUES, BYTES = 150_000_000, 50_000_000
"""Values of decoded pictures, and bytes of losslessly stored ones, that are held (one picture in any case)."""
_LOOKED_AT, _SMALL = 16, 10_000
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

T = TypeVar("T")


def values_of(picture: Any) -> int:
    """The values of an undecoded picture by its header.

    0 of one of less than 10 kB, which is taken for small, of one at an address, which would have to be fetched, and of
    one that cannot be read, which is left for others to complain about.
    """
    if not isinstance(picture, dict):
        return 0
    data, path = picture.get("bytes"), picture.get("path")
    if data is None and (path is None or "://" in path):
        return 0
    if data is not None and len(data) < _SMALL:
        return 0
    if data is not None and (values := _values_of_jpeg(data)):
        return values
    with (
        suppress(ValueError, OSError, SyntaxError, PIL.Image.DecompressionBombError),
        PIL.Image.open(str(path) if data is None else io.BytesIO(data)) as opened,
    ):
        return 3 * opened.width * opened.height
    return 0


def _values_of_jpeg(data: bytes) -> int:
    """By the frame header, far faster than by opening the picture; 0 where that is not where a plain JPEG has it."""
    place = 2 if data[:2] == b"\xff\xd8" else len(data)
    while place + 9 <= len(data) and data[place] == 0xFF:
        if data[place + 1] in _FRAMES:
            height, width = struct.unpack_from(">HH", data, place + 5)
            return 3 * height * width
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return 0


def batches(items: Iterable[T], values: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Items in their order, in batches of at most `most`, and of at most `VALUES` values."""
    batch: list[T] = []
    held = 0
    for item in items:
        size = values(item)
        if batch and (len(batch) == most or held + size > VALUES):
            yield batch
            batch, held = [], 0
        batch.append(item)
        held += size
    if batch:
        yield batch


def at_once(dataset: Dataset, image: str, most: int) -> int:
    """How many pictures of a split to hold: at most `most`, and at least 1; judged by some rows spread over it."""
    rows = dataset.select(range(0, len(dataset), max(1, len(dataset) // _LOOKED_AT)))
    pictures = rows.with_format(None).cast_column(image, Image(decode=False))[image]
    return max(1, min(most, VALUES // max([1, *map(values_of, pictures)])))


def tables(parquet: pq.ParquetFile, image: str, most: int) -> Iterator[pa.Table]:
    """The rows of a file of lossless pictures in their order, in tables of at most `most` rows and `VALUES` values."""
    rows = max(1, parquet.metadata.num_rows)
    stored = sum(parquet.metadata.row_group(i).total_byte_size for i in range(parquet.metadata.num_row_groups))
    for batch in parquet.iter_batches(max(1, min(most, BYTES * rows // max(1, stored)))):
        table = pa.Table.from_batches([batch])
        values = _values(batch, image)
        for part in batches(range(len(batch)), values.__getitem__, most):
            yield table.slice(part[0], len(part))


def _values(batch: pa.RecordBatch, image: str) -> list[int]:
    column = batch.column(image) if image in batch.schema.names else None
    if column is None or not pa.types.is_struct(column.type) or column.type.get_field_index("bytes") < 0:
        return [0] * len(batch)
    lengths = pc.call_function("binary_length", [column.field("bytes")]).to_pylist()
    return [
        values_of(column[i].as_py()) if length is not None and length >= _SMALL else 0
        for i, length in enumerate(lengths)
    ]
