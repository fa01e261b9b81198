"""What a protected folder holds row by row, in one pass over its parquet files."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from tqdm.auto import tqdm

from hf_unlearnable.budget import Budget
from hf_unlearnable.digests import columns_digest
from hf_unlearnable.gate import traces
from hf_unlearnable.gate.clean_checks import (
    Beside,
    budgets_of,
    constant,
    decoded,
    incomparable,
    without_left_out,
)
from hf_unlearnable.gate.containers import describe, kind_of
from hf_unlearnable.gate.finding import Finding, Problems
from hf_unlearnable.gate.folder_checks import features_of
from hf_unlearnable.gate.record_checks import BOUNDED_BY
from hf_unlearnable.images import Picture, digest
from hf_unlearnable.poisons.names import POISONS, arguments_of
from hf_unlearnable.record import Record
from hf_unlearnable.sizes import tables


def check_rows(
    files: Sequence[Path], record: Record, clean: Dataset | None, *, progress: bool, batch_size: int
) -> list[Finding]:
    """All checks that read rows, in one pass over the files. Memory holds a batch of rows, and with clean rows a few
    numbers of every row."""
    found: list[Finding] = []
    schema, total = pq.read_schema(files[0]), sum(pq.read_metadata(file).num_rows for file in files)
    beside = None
    if clean is not None:
        clean = without_left_out(clean, record)
        if problem := incomparable(clean, features_of(schema), record):
            found.append(Finding("source", problem))
        elif total == len(clean):
            beside = Beside(clean, record)
    rows = _Rows(record, beside, schema)
    with tqdm(total=total, desc="checking", unit="rows", disable=not progress) as bar:
        for file in files:
            try:
                with pq.ParquetFile(file) as parquet:
                    for table in tables(parquet, rows.image, batch_size):
                        rows.update(table)
                        bar.update(len(table))
            except (pa.ArrowException, OSError) as error:
                why = str(error).splitlines()[0][:200]
                found.append(Finding("parquet", f"{file.name}: unreadable from row {rows.count} on: {why}"))
                break
    return found + rows.findings()


class _Rows:
    def __init__(self, record: Record, beside: Beside | None, schema: pa.Schema) -> None:
        self.record, self.image, self.beside = record, record.source["image_column"], beside
        self.problems, self.blank = Problems(), Problems()
        self.pixels_sha, self.columns_sha = hashlib.sha256(), hashlib.sha256()
        self.count = self.eligible = self.largest = 0
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.all_decoded = True
        others = [field for field in schema if field.name != self.image]
        self.telling = [field.name for field in others if any(traces.telling(inner.name) for inner in _within(field))]
        self.texts = [field.name for field in others if any(_is_text(inner.type) for inner in _within(field))]

    def update(self, table: pa.Table) -> None:
        others = table.drop_columns([self.image])
        for row, told in enumerate(others.to_pylist(), self.count):
            self.columns_sha.update(columns_digest(told))
            self._texts(told, row)
        pictures = self._pictures(table[self.image].to_pylist())
        for row, picture in enumerate(pictures, self.count):
            if isinstance(picture, str):
                self.all_decoded = False
                continue
            self.pixels_sha.update(digest(picture.pixels))
            self.largest = max(self.largest, picture.pixels.numel())
            height, width = picture.pixels.shape[1:]
            self.sizes[height, width] += 1
            if constant(picture.pixels[None])[0]:
                self.blank.add("blank", "one colour all over", row)
        eligible = self._eligible(table)
        if self.beside is not None:
            self.beside.update(others, pictures, eligible, self.count)
        self.eligible += int(eligible.sum())
        self.count += len(table)

    def _pictures(self, values: list[dict[str, Any] | None]) -> list[Picture | str]:
        wanted = self.record.published["image_format"]
        read: list[bytes | None] = []
        for row, value in enumerate(values, self.count):
            value = value or {}
            if value.get("path") is not None:
                self.problems.add("parquet", f"column {self.image!r} tells the path of a file", row)
            data = value.get("bytes") or b""
            try:
                container = describe(data)
            except ValueError as error:
                self.problems.add("pictures", "no readable picture", row, str(error))
                read.append(None)
                continue
            read.append(data)
            if container.kind != wanted:
                self.problems.add("pictures", f"no {wanted} picture", row, container.kind)
            elif not container.lossless:
                self.problems.add("pictures", "stored with loss", row, container.kind)
            if container.extras:
                self.problems.add("pictures", "more in it than pixels", row, ", ".join(container.extras))
        pictures = decoded(read)
        for row, (data, picture) in enumerate(zip(read, pictures, strict=True), self.count):
            if data is not None and isinstance(picture, str):
                self.problems.add("pictures", "no readable picture", row, picture)
        return pictures

    def _texts(self, told: dict[str, Any], row: int) -> None:
        for name in self.texts:
            for leaf in traces.leaves(told[name]):
                if isinstance(leaf, bytes) and (kind := kind_of(leaf)):
                    self.problems.add("parquet", f"column {name!r} holds pictures too", row, kind)
                elif isinstance(leaf, str | bytes) and (what := traces.trace(leaf)):
                    self.problems.add("paths", f"column {name!r} holds what looks like {what}", row)

    def _eligible(self, table: pa.Table) -> np.ndarray:
        classes, label = self.record.settings["classes"], self.record.source["label_column"]
        if classes is None or label is None:
            return np.ones(len(table), dtype=bool)
        return np.fromiter((value in classes for value in table[label].to_pylist()), dtype=bool, count=len(table))

    # The end.

    def findings(self) -> list[Finding]:
        source, published, beside = self.record.source, self.record.published, self.beside
        found = self.problems.findings()
        found += [
            Finding("paths", f"the column {name!r} is named like EXIF, GPS or camera data") for name in self.telling
        ]
        whole = self.count == published["rows"]
        if beside is not None and (not whole or beside.digest != source["pixels_sha256"]):
            if whole:
                found.append(Finding("source", _not_its_source(beside.digest, source)))
            beside = None
        found += (self.blank if beside is None else beside.problems).findings()
        if not whole:
            return found
        if self.all_decoded and self.pixels_sha.hexdigest() != published["pixels_sha256"]:
            found.append(Finding("pictures", "the pixels are not those of the record (pixels_sha256)"))
        told = beside is not None and beside.problems.has("source")
        if source.get("columns_sha256") is None:
            found.append(Finding("columns-digest", "the record has no digest of the other columns (an older version)"))
        elif self.columns_sha.hexdigest() != source["columns_sha256"] and not told:
            found.append(Finding("source", "labels or other columns are not those of the record (columns_sha256)"))
        found += [Finding("unchanged", problem) for problem in self._miscounted(beside)]
        found += [Finding("budget", problem) for problem in self._misbudgeted(beside)]
        if beside is not None and beside.compared == self.count and not found:
            found += [Finding("measures", problem) for problem in beside.misreported(self.record)]
        return found

    def _miscounted(self, beside: Beside | None) -> Iterator[str]:
        rate, said = self.record.settings["poison_rate"], self.record.pixels["rows_changed"]
        promised = math.floor(rate * self.eligible + 0.5)
        drawn = self.record.published.get("rows_chosen") == "each row drawn"
        spread = 6 * math.sqrt(rate * (1 - rate) * self.eligible) + 1 if drawn and 0 < rate < 1 else 0
        if beside is not None and beside.problems.has("unchanged"):
            return
        if beside is not None and beside.compared == self.count and beside.changed != said:
            yield f"the record says that {said} rows were changed, beside the clean rows it is {beside.changed}"
        elif abs(said - promised) > spread:
            about = f" give or take {spread:.0f}" if spread else ""
            yield f"expected {promised}{about} rows to be changed ({rate:g} of {self.eligible}), the record says {said}"

    def _misbudgeted(self, beside: Beside | None) -> Iterator[str]:
        settings, measures, budgets = self.record.settings, self.record.pixels, budgets_of(self.record)
        promised = _promised(self.record, self.sizes) if self.all_decoded else None
        if promised is not None:
            told = Counter({Budget(one["norm"], one["epsilon"]): one["kept_by_rows"] for one in measures["budgets"]})
            if told != promised:
                settled = f"by its settings {self.record.method!r} keeps {_budgets_told(promised)}"
                yield f"{settled}, the record tells of {_budgets_told(told)}"
        elif not budgets and (bounds := sorted(BOUNDED_BY & settings.keys())):
            yield f"the settings have a bound ({bounds[0]}), and the record no budget that was kept"
        if not budgets:
            return
        budget = budgets[-1][0]
        if beside is not None:
            if not beside.problems.has("budget") and (more := beside.beyond_their_number()):
                yield f"the changes of {more} rows are larger than the budgets of the record allow for their number"
            return
        name = {"linf": "linf_levels", "l2": "l2", "l0": "l0_pixels"}[budget.norm]
        largest = measures[name]["largest"] / (255 if budget.norm == "linf" else 1)
        if largest > budget.epsilon + budget.slack(self.largest) + 1e-6:
            yield f"by the record the largest {name} is {measures[name]['largest']:g}, over its own {budget}"


def _not_its_source(found: str, source: dict[str, Any]) -> str:
    return (
        f"the clean rows are not those of the record (their pixels have the digest {found[:12]}... in place of "
        f"{source['pixels_sha256'][:12]}...): give the split {source['split']!r} of {source['dataset']} in its order. "
        "Nothing was compared with them"
    )


def _promised(record: Record, sizes: Mapping[tuple[int, int], int]) -> Counter[Budget] | None:
    """The budgets that a method's settings promise for pictures of these heights and widths, and for how many; None of
    a method, a version or settings that are not known here."""
    known = POISONS.get(record.method)
    if known is None or record.settings["version"] != known.version:
        return None
    try:
        poison = known(seed=0, **arguments_of(record.settings))
    except (ValueError, TypeError):
        return None
    promised: Counter[Budget] = Counter()
    for (height, width), rows in sizes.items():
        if (budget := poison.budget_for(height, width)) is not None:
            promised[budget] += rows
    return promised


def _budgets_told(budgets: Mapping[Budget, int]) -> str:
    kept = sorted(budgets.items(), key=lambda pair: pair[0].epsilon)
    shown = [
        f"{budget.norm} {255 * budget.epsilon:g}/255" if budget.norm == "linf" else f"{budget.norm} {budget.epsilon:g}"
        for budget, _ in kept[:3]
    ]
    shown = [f"{told} ({rows} rows)" for told, (_, rows) in zip(shown, kept, strict=False)]
    return ", ".join([*shown, *(["more"] if len(kept) > 3 else [])]) or "none"


def _within(field: pa.Field) -> Iterator[pa.Field]:
    """A field and those inside it."""
    yield field
    for i in range(field.type.num_fields):
        yield from _within(field.type.field(i))


def _is_text(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(kind) for test in tests)
