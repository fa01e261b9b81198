"""Read published parquet files: what they hold, measured on their decoded pictures."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from tqdm.auto import tqdm

from hf_unlearnable import columns
from hf_unlearnable.digests import columns_digest, split_digest
from hf_unlearnable.images import Picture, decode_many, digest_many
from hf_unlearnable.sizes import tables


@dataclass(frozen=True)
class Rows:
    """Rows of published files in their order: `start` is the place of the first one in the split."""

    start: int
    pictures: list[Picture]
    stored: list[dict[str, Any]]
    others: pa.Table

    def labels(self, column: str) -> list[int]:
        return self.others[column].to_pylist()


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a split holds: as the record tells it, or as it was read."""

    rows: int
    pixels_sha256: str
    columns_sha256: str


def features_of(file: Path) -> Features:
    """The features that a parquet file tells."""
    return cast(Features, Features.from_arrow_schema(pq.read_schema(file)))


def rows_of(files: Iterable[Path], image_column: str | None, batch_size: int = 500) -> Iterator[Rows]:
    """Decoded rows, batch by batch, of at most `batch_size` rows.

    Raises:
        ValueError: a picture that cannot be decoded; names the row. Files with other columns.
    """
    start = 0
    for file in files:
        name = columns.image_column(features_of(file), image_column)
        with pq.ParquetFile(file) as parquet:
            for table in tables(parquet, name, batch_size):
                stored = table[name].to_pylist()
                where = [f"published row {start + i}" for i in range(len(stored))]
                yield Rows(start, decode_many(stored, where=where), stored, table.drop_columns([name]))
                start += len(stored)


def contents(rows: Iterable[Rows], *, total: int | None = None, progress: bool = True) -> Contents:
    """Digests over all rows."""
    pixels, others, count = bytearray(), bytearray(), 0
    with tqdm(total=total, desc="reading back", unit="rows", disable=not progress) as bar:
        for some in rows:
            pixels += b"".join(digest_many(some.pictures))
            for row in some.others.to_pylist():
                others += columns_digest(row)
            count += len(some.pictures)
            bar.update(len(some.pictures))
    return Contents(rows=count, pixels_sha256=split_digest([pixels]), columns_sha256=split_digest([others]))
