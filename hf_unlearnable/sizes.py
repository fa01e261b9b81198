"""How many pictures are held at a time: fewer of large ones, so that memory depends on neither rows nor size."""

import io
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import PIL.Image
import pyarrow.parquet as pq
from datasets import Dataset, Image

from hf_unlearnable.images import bytes_of

VALUES, BYTES = 150_000_000, 50_000_000
"""Values of decoded pictures, and bytes of losslessly stored ones, that are held at most (one picture in any case)."""
_LOOKED_AT = 16


def at_once(pictures: Iterable[Any], most: int) -> int:
    """How many pictures like these to hold: at most `most`, and at least 1.

    Args:
        pictures: as `datasets` hands them over undecoded; their headers alone are read. Those that cannot be read are
            left for others to complain about.
    """
    largest = 1
    for value in pictures:
        with suppress(ValueError, OSError, SyntaxError, PIL.Image.DecompressionBombError):
            data = bytes_of(value, "") if isinstance(value, dict) else value
            opened = PIL.Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
            if isinstance(opened, PIL.Image.Image):
                largest = max(largest, 3 * opened.width * opened.height)
    return max(1, min(most, VALUES // largest))


def at_once_of(dataset: Dataset, image: str, most: int) -> int:
    """`at_once` for the pictures of a split, judged by some rows spread over it."""
    rows = dataset.select(range(0, len(dataset), max(1, len(dataset) // _LOOKED_AT)))
    return at_once(rows.with_format(None).cast_column(image, Image(decode=False))[image], most)


def at_once_in(parquet: pq.ParquetFile, most: int) -> int:
    """The same for a file of lossless pictures, judged by the bytes of a row."""
    rows = max(1, parquet.metadata.num_rows)
    stored = sum(parquet.metadata.row_group(i).total_byte_size for i in range(parquet.metadata.num_row_groups))
    return max(1, min(most, BYTES * rows // max(1, stored)))
