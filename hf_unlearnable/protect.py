"""Protect a dataset: from a split to a folder that `load_dataset` reads, with its record and pictures."""

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Image
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from hf_unlearnable import card, columns, preview
from hf_unlearnable.digests import columns_digest, file_digest, split_digest
from hf_unlearnable.images import Picture, decode_many, digest_many
from hf_unlearnable.keys import commitment
from hf_unlearnable.metrics import PixelReport
from hf_unlearnable.poisons.base import Poison
from hf_unlearnable.poisons.with_surrogate import SurrogatePoison
from hf_unlearnable.record import Record
from hf_unlearnable.sizes import at_once, tables
from hf_unlearnable.sources import public_name

SHARD_BYTES = 500_000_000
ROWS_PER_GROUP = 100
PERCEPTUAL_ROWS = 10_000
PREVIEW_ROWS = 8
WRITTEN = {"data", "record.json", "preview.png", "README.md"}


def protect(
    dataset: Dataset,
    poison: Poison,
    output: str | Path,
    *,
    source: str,
    split: str = "train",
    num_proc: int | None = None,
    batch_size: int = 500,
    overwrite: bool = False,
    record_seed: bool = False,
    progress: bool = True,
) -> Record:
    """Poison a split and write a folder: `data/` (parquet), `record.json`, `preview.png` and a `README.md` card.

    Everything is made in a hidden folder beside `output`, which takes its place only when all of it has been written,
    read back and measured; after an interruption a further call goes on with the shards that are complete.

    Args:
        source: the name of the dataset for the record and the card; of a path, the last part is kept.
        batch_size: pictures held at most at a time; fewer of large ones (`sizes`).
        overwrite: replace an existing `output`.
        record_seed: write an int seed into the record, for reproducible research.

    Raises:
        FileExistsError: `output` exists (and, with `overwrite`, is anything but an earlier output), holds the source,
            or is being written by another run.
        ValueError: anything `Poison.apply` refuses, a row over budget, or published data that differ from the source
            in rows, order, labels or other columns.
    """
    output = Path(os.path.abspath(output))
    if not len(dataset):
        raise ValueError(f"expected rows to protect, got an empty split of {source}")
    check_request(dataset.features, poison, split, batch_size)
    _check_place(output, source, overwrite)
    staging = output.parent / f".{output.name}.partial"
    staging.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(staging) + ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FileExistsError(f"another run is writing {output}") from None
    with lock:
        for path in staging.iterdir():
            if path.name != "cache":
                _remove(path)
        (staging / "cache").mkdir(exist_ok=True)
        poisoned = poison.apply(dataset, num_proc=num_proc, batch_size=batch_size, cache_dir=staging / "cache")
        files = _write(
            poisoned, columns.image_column(poisoned.features, poison.image_column), staging / "data", split, progress
        )
        record = _measure(dataset, poison, files, source, split, record_seed, staging, progress)
        record.save(staging / "record.json")
        (staging / "README.md").write_text(card.local_page(record))
        del poisoned
        _remove(staging / "cache")
        retired = output.parent / f".{output.name}.retired"
        _remove(retired)
        if output.exists():
            os.replace(output, retired)
        os.replace(staging, output)
        _remove(retired)
    _remove(Path(lock.lock_file))
    return record


def check_request(features: Mapping[str, Any], poison: Poison, split: str, batch_size: int) -> None:
    """Refuse what could not be published: a bad split name or batch size, more than one column of pictures."""
    if not re.fullmatch(r"\w+(\.\w+)*", split):
        raise ValueError(f"expected a split name of letters, digits and _, got {split!r}")
    if batch_size < 1:
        raise ValueError(f"expected a batch size of 1 or more, got {batch_size}")
    image = columns.image_column(features, poison.image_column)
    others = [name for name, feature in features.items() if name != image and columns.holds_pictures(feature)]
    if others:
        raise ValueError(
            f"columns {others} hold pictures too, which would be published as they are: "
            f"ds.remove_columns({others}) first"
        )


def _check_place(output: Path, source: str, overwrite: bool) -> None:
    """Only an earlier output is ever replaced, and never the source."""
    if Path(source).exists() and Path(source).resolve().is_relative_to(output.resolve()):
        raise FileExistsError(f"the output {output} holds the source {source}: choose another output")
    if not output.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists: choose another output, or overwrite it (--overwrite)")
    if not (output / "record.json").is_file() or {path.name for path in output.iterdir()} - WRITTEN:
        raise FileExistsError(f"{output} is not (only) a protected dataset: it is not overwritten")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write(dataset: Dataset, image: str, folder: Path, split: str, progress: bool) -> list[Path]:
    folder.mkdir()
    rows_per_group = at_once(dataset, image, ROWS_PER_GROUP)
    shards = max(1, math.ceil(dataset.data.nbytes / SHARD_BYTES))
    files = [folder / f"{split}-{i:05d}-of-{shards:05d}.parquet" for i in range(shards)]
    for i, file in enumerate(tqdm(files, desc="writing", unit="shard", disable=not progress)):
        dataset.shard(shards, i, contiguous=True).to_parquet(str(file), batch_size=rows_per_group)
    return files


def _published(files: list[Path], image: str, batch_size: int) -> Iterator[pa.Table]:
    for file in files:
        with pq.ParquetFile(file) as parquet:
            yield from tables(parquet, image, batch_size)


def _measure(
    clean: Dataset,
    poison: Poison,
    files: list[Path],
    source: str,
    split: str,
    record_seed: bool,
    folder: Path,
    progress: bool,
    batch_size: int = 500,
) -> Record:
    """Read the published files again, beside the source."""
    image = columns.image_column(clean.features, poison.image_column)
    label = label_column(clean.features, poison)
    names = columns.class_names(clean.features, label) if label else None
    wanted = _preview_rows(clean, label)
    plain = clean.with_format("arrow").cast_column(image, Image(decode=False))
    report = PixelReport(perceptual_every=max(1, math.ceil(len(clean) / PERCEPTUAL_ROWS)))
    clean_rows, published_rows, other_rows = bytearray(), bytearray(), bytearray()
    pairs: dict[int, preview.Pair] = {}
    start = 0
    bar = tqdm(total=len(clean), desc="measuring", unit="rows", disable=not progress)
    for table in _published(files, image, batch_size):
        rows = list(range(start, start + len(table)))
        before = cast(pa.Table, plain[start : start + len(table)])
        others = table.drop_columns([image])
        _check_others(before.drop_columns([image]), others, start)
        for row in others.to_pylist():
            other_rows += columns_digest(row)
        old = decode_many(before[image].to_pylist(), where=[f"row {row}" for row in rows])
        new = decode_many(table[image].to_pylist(), where=[f"published row {row}" for row in rows])
        clean_rows += b"".join(digest_many(old))
        published_rows += b"".join(digest_many(new))
        measure(report, poison, old, new, rows)
        for row in wanted.intersection(rows):
            value = before[label][row - start].as_py() if label else None
            name = names[value] if names and value is not None and value >= 0 else f"class {value}" if label else ""
            pairs[row] = preview.Pair(row, name, *(preview.thinned(some[row - start]) for some in (old, new)))
        start += len(table)
        bar.update(len(table))
    bar.close()
    if start != len(clean):
        raise ValueError(f"expected {len(clean)} published rows, got {start}")
    pixels = report.summary()
    title = f"{poison.name}: {pixels['rows_changed']} of {pixels['rows']} pictures changed"
    preview.draw([pairs[row] for row in sorted(pairs)], folder / "preview.png", title=title)
    return Record(
        method=poison.name,
        settings=poison.settings(),
        key=describe_key(poison, record_seed),
        source={
            "dataset": public_name(source),
            "split": split,
            "rows": len(clean),
            "image_column": image,
            "label_column": label,
            "classes": list(names) if names else None,
            "pixels_sha256": split_digest([clean_rows]),
            "columns_sha256": split_digest([other_rows]),
        },
        published={
            "rows": start,
            "image_format": poison.image_format,
            "compress_level": poison.compress_level,
            "pixels_sha256": split_digest([published_rows]),
            "files": {
                f"data/{file.name}": {"sha256": file_digest(file), "bytes": file.stat().st_size} for file in files
            },
        },
        pixels=pixels,
    )


def label_column(features: Mapping[str, Any], poison: Poison) -> str | None:
    """The label column; where the poison needs none, None if it cannot be told."""
    try:
        return columns.label_column(features, poison.label_column)
    except ValueError:
        if poison.needs_labels:
            raise
        return None


def describe_key(poison: Poison, record_seed: bool) -> dict[str, Any]:
    """What a record tells of the key: never the key; an int seed only on request."""
    kind = "int" if isinstance(poison.seed, int) else "secret"
    described: dict[str, Any] = {"kind": kind, "commitment": commitment(poison.seed)}
    if isinstance(poison, SurrogatePoison) and poison.drawn_from_surrogate:
        trained = poison.surrogate.provenance.get("seed") if poison.surrogate else None
        described["surrogate"] = "an int seed" if isinstance(trained, int) else "a secret"
    return {**described, "seed": poison.seed} if record_seed and kind == "int" else described


def _preview_rows(dataset: Dataset, label: str | None) -> set[int]:
    """The first rows of up to eight classes; without labels, rows spread over the split."""
    if label is None:
        return set(np.linspace(0, len(dataset) - 1, min(PREVIEW_ROWS, len(dataset))).astype(int).tolist())
    _, first = np.unique(np.asarray(dataset.with_format("numpy")[label]), return_index=True)
    return set(first[:PREVIEW_ROWS].tolist())


def measure(report: PixelReport, poison: Poison, old: list[Picture], new: list[Picture], rows: list[int]) -> None:
    """Add a batch to the report: clean and published pictures of these rows of the split.

    Raises:
        ValueError: a row over budget, or whose shape or transparency differs; names it.
    """
    sizes: dict[torch.Size, list[int]] = {}
    for i, (before, after) in enumerate(zip(old, new, strict=True)):
        if before.pixels.shape != after.pixels.shape:
            raise ValueError(
                f"row {rows[i]}: expected a picture of shape {before.pixels.shape}, got {after.pixels.shape}"
            )
        if (before.alpha is None) != (after.alpha is None) or (
            before.alpha is not None and after.alpha is not None and not torch.equal(before.alpha, after.alpha)
        ):
            raise ValueError(f"row {rows[i]}: the transparency of the published picture differs from the source")
        sizes.setdefault(before.pixels.shape, []).append(i)
    for places in sizes.values():
        report.update(
            [old[i].pixels for i in places],
            [new[i].pixels for i in places],
            [rows[i] for i in places],
            poison.budget_for(*old[places[0]].pixels.shape[1:]),
        )


def _check_others(before: pa.Table, after: pa.Table, start: int) -> None:
    if before.column_names != after.column_names:
        raise ValueError(f"expected columns {before.column_names}, published {after.column_names}")
    for name in before.column_names:
        old, new = before[name].to_pylist(), after[name].to_pylist()
        differ = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b and repr(a) != repr(b)]
        if differ:
            raise ValueError(f"row {start + differ[0]}: column {name!r} of the published data differs from the source")
