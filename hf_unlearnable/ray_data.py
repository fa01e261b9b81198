"""Poisons on Ray Data, an optional extra: `pip install 'hf_unlearnable[ray]'`. Nothing else of the library imports Ray.

    clean = ray.data.read_parquet("clean")
    protected = protect(clean, CudaPoison(seed=key))
    write(protected, "protected", features_of(clean))
    load_dataset("protected")  # pictures and classes, as they were

`clean.map_batches(CudaPoison(seed=key), batch_size=500)` gives the same pixels. But Ray files the fields of a
dataclass, **the key with them**, among the arguments of its operators, and logs those where its export API is on
(`map_batches(poison.__call__)` keeps the key out); the features are lost, the order of rows is not promised, and
integers beside a missing one become floats, as in all numpy batches of Ray. `protect` has none of these. Either way the
pickled poison, key and all, is in the memory of the cluster and of every worker: use machines that you trust with it.
"""

from dataclasses import replace
from typing import Any

import pyarrow as pa
from datasets import Features, Image
from datasets.table import table_cast
from pyarrow.fs import FileSelector, FileSystem, LocalFileSystem

from hf_unlearnable import columns
from hf_unlearnable.images import decode_many, encode_many, one_thread_in_workers
from hf_unlearnable.poisons.base import Poison

try:
    import ray.data  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError("poisons on Ray need Ray Data: pip install 'hf_unlearnable[ray]'") from error


def protect(
    dataset: "ray.data.Dataset",
    poison: Poison,
    *,
    features: Features | None = None,
    batch_size: int = 500,
    concurrency: int | None = None,
    **resources: Any,
) -> "ray.data.Dataset":
    """The dataset with its pictures changed: lazy, with every column, in the order of the rows.

    The pixels are those of `ds.map(poison)`; what was stored is decoded and compared before it is handed on. The blocks
    carry the features. A share of the rows (`poison_rate`) is each row's own draw, as with `ds.map`.

    The work is cut into tasks of one batch each, also where everything came in one block. Tasks need a free CPU: actors
    of another stage that hold all of them would make it wait for ever. The order is kept because `preserve_order` is
    switched on in `dataset.context`, which Ray shares between a dataset and what is made of it.

    Args:
        dataset: pictures as {bytes, path} or bytes (`read_parquet`, `from_huggingface`, `read_binary_files`); every
            machine must be able to read the paths. `read_images` has already lost palettes and rotation: refused.
        features: of all columns; None for those that the dataset tells (`features_of`).
        batch_size: rows of a task, of a block and of a file: more for small pictures.
        concurrency: tasks at a time; None for as many as there are CPUs.
        resources: of each task, as for `map_batches`: `num_cpus`, `num_gpus`, `memory`.

    Raises:
        ValueError: no features, or columns that do not suit the poison.
        ray.exceptions.RayTaskError: while it runs; the text ends in our ValueError: a bad label, an unreadable picture.
            It names the row of the batch, and the picture's path where there is one.
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch size of 1 or more, got {batch_size}")
    features = features_of(dataset) if features is None else features
    work = _Work(poison, features)
    if concurrency is not None:
        resources["compute"] = ray.data.TaskPoolStrategy(size=concurrency)
    dataset.context.execution_options.preserve_order = True
    return dataset.repartition(target_num_rows_per_block=batch_size).map_batches(
        work, batch_size=batch_size, batch_format="pyarrow", **resources
    )


def write(dataset: "ray.data.Dataset", path: str, features: Features) -> None:
    """Parquet files, about one for each block, that `load_dataset(path)` reads as `features`.

    Also for what `map_batches(poison)` gave. There is no record of what was done, nor a check of the whole; a job that
    failed leaves the files that were finished (`scripts/protect.py` does better).

    Args:
        path: a new folder, or an address of any storage that pyarrow knows (s3://bucket/folder).

    Raises:
        ValueError: the folder holds files; columns that are not those of the features.
    """
    names = dataset.columns()
    if names is not None and set(names) != set(features):
        raise ValueError(f"expected the columns of the features, {list(features)}, got {names}")
    storage, folder = FileSystem.from_uri(path) if "://" in path else (LocalFileSystem(), path)
    if storage.get_file_info(FileSelector(folder, allow_not_found=True)):
        raise ValueError(f"{path} already holds files: choose a new folder")
    dataset.write_parquet(path, schema=_readable(features).arrow_schema)


def features_of(dataset: "ray.data.Dataset") -> Features:
    """The features that a Ray dataset carries, as do parquet files of `datasets`, `from_huggingface` and `protect`.

    Raises:
        ValueError: it carries none.
    """
    schema = dataset.schema()
    known: Any = None if schema is None else schema.base_schema
    if b"huggingface" not in (getattr(known, "metadata", None) or {}):
        names = [] if schema is None else schema.names
        raise ValueError(
            f"this Ray dataset does not tell the features of its columns {names}: say them with "
            "features=datasets.Features(...), e.g. img=Image(), label=ClassLabel(names=[...])"
        )
    return Features.from_arrow_schema(known)


def _readable(features: Features) -> Features:
    """With pictures that are decoded when they are read."""
    return Features({n: replace(f, decode=True) if isinstance(f, Image) else f for n, f in features.items()})


class _Work:
    """What a task does with a table. No dataclass: Ray would file its fields, the key with them."""

    def __init__(self, poison: Poison, features: Features) -> None:
        self.poison, self.features = poison, _readable(features)
        self.image, self.label = poison._columns(self.features)
        names = columns.class_names(self.features, self.label) if self.label else None
        poison.check_classes(names, f"column {self.label!r}")
        known = names if names is not None else poison.known_classes
        self.classes = None if known is None else len(known)

    def __repr__(self) -> str:
        return self.poison.name

    def __call__(self, table: pa.Table) -> pa.Table:
        one_thread_in_workers()
        poison, kind = self.poison, table.schema.field(self.image).type if self.image in table.column_names else None
        if set(table.column_names) != set(self.features):
            raise ValueError(f"expected the columns of the features, {list(self.features)}, got {table.column_names}")
        if not (pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise ValueError(
                f"expected pictures as {{bytes, path}} or bytes in column {self.image!r}, got {kind}: "
                "use ray.data.read_parquet or read_binary_files"
            )
        values = table[self.image].to_pylist()
        where = [_where(row, value) for row, value in enumerate(values)]
        labels = None
        if self.label is not None:
            labels = [
                columns.check_label(label, at, self.label, self.classes)
                for label, at in zip(table[self.label].to_pylist(), where, strict=True)
            ]
        pictures = decode_many(values, where=where)
        changed = poison.change_pictures(pictures, labels, poison.chosen(pictures, labels), where)
        stored = encode_many(
            changed, image_format=poison.image_format, compress_level=poison.compress_level, where=where
        )
        column = pa.array([{"bytes": value, "path": None} for value in stored], Image().pa_type)
        table = table.set_column(table.column_names.index(self.image), self.image, column)
        return table_cast(table.select(list(self.features)), self.features.arrow_schema)


def _where(row: int, value: Any) -> str:
    path = value.get("path") if isinstance(value, dict) else None
    return f"row {row} of a batch" + (f" ({path})" if path else "")
