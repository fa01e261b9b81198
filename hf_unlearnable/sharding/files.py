"""What the rows of a shard are kept in: a parquet file, or a tar archive in webdataset form."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features

from hf_unlearnable.sources import Stream

Container: TypeAlias = Literal["parquet", "webdataset"]
SUFFIXES: dict[Container, str] = {"parquet": ".parquet", "webdataset": ".tar"}
KEY = "__key__"
_BLOCK = 1 << 20
_READ_AT_ONCE = 32
_ROW_GROUP = 100

Row: TypeAlias = Mapping[str, Any]
"""A published row: its columns in their order; the picture as {"bytes": ..., "path": None}, of bytes or a buffer."""


class Writer(Protocol):
    def write(self, rows: Sequence[Row], where: Sequence[str]) -> list[dict[str, Any]]:
        """Append rows; returns them as a reader shall find them.

        Args:
            where: a prefix for the error of each row.
        """
        ...


class Form(Protocol):
    def writer(self, file: Path) -> AbstractContextManager[Writer]: ...

    def read(self, file: Path) -> Iterator[list[dict[str, Any]]]:
        """The rows of a file, some at a time."""
        ...


def form_of(stream: Stream, terms: Mapping[str, Any], shard: int) -> Form:
    """What a plan's terms say, for a shard of this source.

    Raises:
        ValueError: a column that the container cannot hold.
    """
    features, source = publishable(stream.features), terms["source"]
    if terms["container"] == "parquet":
        return ParquetFile(features, source["image_column"])
    return Archive(
        features,
        image=source["image_column"],
        label=source["label_column"],
        image_format=terms["image_format"],
        archives=stream.kind == "webdataset",
        shard=shard,
    )


def publishable(features: Features) -> Features:
    """The columns as a reader of the output shall see them: pictures decoded."""
    return Features(
        {
            name: replace(feature, decode=True) if hasattr(feature, "decode") else feature
            for name, feature in features.items()
        }
    )


class ParquetFile:
    """Row groups of at most 100 rows, as `datasets` writes pictures.

    Args:
        features: the columns, pictures decoded.
        image: the name of the column that holds pictures.
    """

    def __init__(self, features: Features, image: str) -> None:
        self.schema, self.image = features.arrow_schema, image

    @contextmanager
    def writer(self, file: Path) -> Iterator[Writer]:
        others = [field for field in self.schema if field.name != self.image]
        nested = any(pa.types.is_nested(field.type) for field in others)  # whose parts have names of their own
        how: dict[str, Any] = {"use_dictionary": nested or [field.name for field in others]}
        with pq.ParquetWriter(file, self.schema, compression="none", **how) as parquet:
            yield _ParquetWriter(parquet, self)

    def read(self, file: Path) -> Iterator[list[dict[str, Any]]]:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(_READ_AT_ONCE, use_threads=False):
                pictures = batch.column(self.image)
                told = zip(pictures.field("bytes"), pictures.field("path").to_pylist(), strict=True)
                yield self.rows(batch, [{"bytes": data.as_buffer(), "path": path} for data, path in told])

    def rows(self, table: pa.Table | pa.RecordBatch, pictures: Sequence[Any]) -> list[dict[str, Any]]:
        """The rows of a table with these pictures, which are not copied."""
        others = table.drop_columns([self.image]).to_pylist()
        return [
            {name: picture if name == self.image else row[name] for name in self.schema.names}
            for row, picture in zip(others, pictures, strict=True)
        ]


class _ParquetWriter:
    def __init__(self, parquet: pq.ParquetWriter, form: ParquetFile) -> None:
        self.parquet, self.form = parquet, form

    def write(self, rows: Sequence[Row], where: Sequence[str]) -> list[dict[str, Any]]:
        del where
        table = pa.Table.from_pylist(list(rows), schema=self.parquet.schema)
        if len(table):
            self.parquet.write_table(table, row_group_size=_ROW_GROUP)
        return self.form.rows(table, [row[self.form.image] for row in rows])


def _text(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode()


_CODERS: dict[str, tuple[type, Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    **dict.fromkeys(("cls", "cls2", "id", "index", "inx"), (int, lambda value: b"%d" % value, int)),
    **dict.fromkeys(("txt", "text", "transcript"), (str, str.encode, bytes.decode)),
    **dict.fromkeys(("json", "jsn"), (object, _text, json.loads)),
}
"""What webdataset readers turn a member into by its last suffix, and how; bytes of any other suffix stay bytes."""
_DECODED = ("ten", "tb", "mp", "msg", "npy", "npz", "cbor", "pth")
"""Suffixes that readers decode too, to values that do not tell the bytes they came from."""


class Archive:
    """A tar archive in webdataset form: the members of a row share a key and follow each other.

    Rows from webdataset archives keep their keys and the names of their members, but for the picture's, which ends in
    its new format. Of any other source a row is the picture, its label as `.cls` (a number), and all other columns as
    one `.json`; keys are the numbers of the shard and of the row. `load_dataset` and webdataset readers read both. The
    same rows make the same bytes.

    Args:
        features: the columns.
        image, label: names of the columns that hold pictures and labels.
        image_format: "png" or "webp".
        archives: whether the source is in webdataset form.
        shard: the number of the shard, for keys.

    Raises:
        ValueError: a column that an archive cannot hold.
    """

    def __init__(
        self, features: Features, *, image: str, label: str | None, image_format: str, archives: bool, shard: int
    ) -> None:
        self.names, self.image, self.label, self.shard = list(features), image, label, shard
        self.keyed = archives
        head = image.rpartition(".")[0] if archives else ""
        self.picture = f"{head}.{image_format}" if head else image_format
        self.others = [name for name in self.names if name not in ((image, KEY) if archives else (image, label))]
        self._check()

    def _check(self) -> None:
        for name in self.others if self.keyed else ():
            if name == self.picture:
                raise ValueError(f"column {name!r} has the name that the pictures of {self.image!r} need")
            if name.rpartition(".")[2].lower() in _DECODED:
                raise ValueError(
                    f"column {name!r} cannot be kept in webdataset form: readers decode it, and what it was made of is "
                    "not known; expected text, numbers, json or bytes"
                )

    @contextmanager
    def writer(self, file: Path) -> Iterator[Writer]:
        with tarfile.open(file, "w:", format=tarfile.PAX_FORMAT) as archive:
            yield _ArchiveWriter(archive, self)

    def read(self, file: Path) -> Iterator[list[dict[str, Any]]]:
        with tarfile.open(file, "r:", bufsize=_BLOCK) as archive:
            batch = []
            for key, members in groupby(archive, lambda member: _parted(member.name)[0]):
                batch.append(self._row(key, {_parted(m.name)[1]: _content(archive, m) for m in members}))
                if len(batch) == _READ_AT_ONCE:
                    yield batch
                    batch = []
            if batch:
                yield batch

    def members(self, row: Row) -> dict[str, bytes]:
        """The contents of a row's members by what follows their key; None is left out.

        Raises:
            ValueError: a value that an archive cannot hold; begins with the column.
        """
        found = {self.picture: row[self.image]["bytes"]}
        if self.keyed:
            return found | {name: _encode(name, row[name]) for name in self.others if row[name] is not None}
        if self.label is not None:
            if row[self.label] is None:
                raise ValueError(f"column {self.label!r}: webdataset form needs a label in every row, got None")
            found["cls"] = _encode("cls", row[self.label])
        if self.others:
            found["json"] = _encode("json", {name: row[name] for name in self.others})
        return found

    def _row(self, key: str, members: Mapping[str, bytes]) -> dict[str, Any]:
        told: dict[str, Any] = {self.image: {"bytes": members.get(self.picture, b""), "path": None}}
        if self.keyed:
            told[KEY] = key
            told |= {name: _decode(name, members[name]) if name in members else None for name in self.others}
        else:
            if self.label is not None:
                told[self.label] = _decode("cls", members.get("cls", b""))
            if self.others:
                told |= _decode("json", members.get("json", b""))
        return {name: told[name] for name in self.names}


class _ArchiveWriter:
    def __init__(self, archive: tarfile.TarFile, form: Archive) -> None:
        self.archive, self.form, self.count, self.last = archive, form, 0, ""

    def write(self, rows: Sequence[Row], where: Sequence[str]) -> list[dict[str, Any]]:
        found = []
        for row, at in zip(rows, where, strict=True):
            key = row[KEY] if self.form.keyed else f"{self.form.shard - 1:05d}-{self.count:09d}"
            if key == self.last:
                raise ValueError(f"{at}: the row before has the key {key!r} too: readers would take them for one")
            try:
                members = self.form.members(row)
            except ValueError as error:
                raise ValueError(f"{at}: {error}") from error
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size, member.mode = len(content), 0o644
                self.archive.addfile(member, io.BytesIO(content))
            self.count, self.last = self.count + 1, key
            found.append({**row, self.form.image: {"bytes": members[self.form.picture], "path": None}})
        return found


def _encode(name: str, value: Any) -> bytes:
    kind, encode, _ = _CODERS.get(name.rpartition(".")[2].lower(), (bytes, bytes, bytes))
    try:
        if not isinstance(value, kind):
            raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
        return encode(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"column {name!r} cannot be kept in webdataset form: {error}") from error


def _decode(name: str, content: bytes) -> Any:
    return _CODERS.get(name.rpartition(".")[2].lower(), (bytes, bytes, bytes))[2](content)


def _parted(name: str) -> tuple[str, str]:
    """Key and suffix: what stands before and after the first dot of a file's name."""
    folder, slash, file = name.rpartition("/")
    head, _, suffix = file.partition(".")
    return f"{folder}{slash}{head}", suffix


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = archive.extractfile(member)
    if opened is None:
        raise ValueError(f"expected files in an archive, got {member.name!r}")
    return opened.read()
