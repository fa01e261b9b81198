"""One shard: from a stream's rows to a file and its manifest, a batch at a time."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from datasets import Features
from tqdm.auto import tqdm

from hf_unlearnable import columns, preview
from hf_unlearnable.digests import columns_digest, file_digest
from hf_unlearnable.images import Picture, decode, decode_many, digest_many, encode_many
from hf_unlearnable.metrics import PixelReport
from hf_unlearnable.poisons.base import Poison
from hf_unlearnable.protect import PREVIEW_ROWS, measure
from hf_unlearnable.sharding.files import SUFFIXES, Writer, form_of, publishable
from hf_unlearnable.sharding.manifest import Manifest, pack
from hf_unlearnable.sharding.plan import Plan
from hf_unlearnable.sharding.storage import Storage
from hf_unlearnable.sizes import batches, values_of
from hf_unlearnable.sources import Stream


def make_shard(
    stream: Stream, poison: Poison, plan: Plan, shard: int, storage: Storage, *, progress: bool = True
) -> Manifest:
    """Poison the rows of one shard, read the file back (some or all of its pictures), measure, and put it in its place.

    Memory holds a batch of pictures (fewer of large ones), some rows of the source undecoded, and a few numbers for
    every row. The manifest is written last.

    Raises:
        ValueError: as `Transform.apply`; other rows than the plan says; begins with the shard.
        OSError: storage that keeps failing.
    """
    began, part = time.monotonic(), plan.parts[shard - 1]
    storage.remove(plan.beside(shard, ".json"))
    form = form_of(stream, plan.terms, shard)
    work = _Work(poison, plan, shard, publishable(stream.features))
    name = f"shard {shard}/{len(plan.parts)}"
    with storage.scratch(plan.beside(shard, ".partial")) as folder:
        file = folder / f"shard{SUFFIXES[plan.terms['container']]}"
        rows = stream.read(part.first, part.last, part.skip, part.rows)
        try:
            with (
                form.writer(file) as writer,
                tqdm(total=part.rows, desc=name, unit="rows", disable=not progress) as bar,
            ):
                for batch in batches(rows, lambda row: values_of(row[work.image]), plan.terms["batch_size"]):
                    work.batch(batch, writer)
                    bar.update(len(batch))
            if part.rows not in (None, work.seen):
                raise ValueError(f"expected {part.rows} rows, the source gave {work.seen}: has it changed?")
            with ThreadPoolExecutor(1) as thread:
                sha256 = thread.submit(file_digest, file)
                work.read_back(form.read(file))
        except (ValueError, TypeError, ArithmeticError) as error:
            counted = "" if part.start is not None else " (rows counted in the shard)"
            kind = type(error) if type(error) in (TypeError, FloatingPointError) else ValueError
            raise kind(f"{name}{counted}: {error}") from error
        evidence = folder / "evidence.npz"
        evidence.write_bytes(pack(work.evidence()))
        manifest = Manifest(
            plan=plan.digest,
            shard=shard,
            start=part.start,
            rows_read=work.seen,
            rows=work.seen - len(work.left_out),
            left_out=work.left_out,
            sha256=sha256.result(),
            size=file.stat().st_size,
            evidence=file_digest(evidence),
            seconds=round(time.monotonic() - began, 3),
        )
        storage.put(plan.beside(shard, ".npz"), evidence)
        storage.put(plan.file(shard), file)
    manifest.save(storage, plan)
    return manifest


@dataclass
class _Work:
    """What is known of a shard while it is being made."""

    poison: Poison
    plan: Plan
    shard: int
    features: Features
    seen: int = 0
    left_out: list[dict[str, Any]] = field(default_factory=list)
    digests: dict[str, bytearray] = field(default_factory=lambda: {"clean": bytearray(), "published": bytearray()})
    meant: Any = field(default_factory=hashlib.sha256)
    pairs: dict[int, tuple[int, int, Picture, Picture]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.image: str = self.plan.terms["source"]["image_column"]
        self.label: str | None = self.plan.terms["source"]["label_column"]
        self.start = self.plan.parts[self.shard - 1].start or 0
        self.report = PixelReport(perceptual_every=self.plan.perceptual_every)
        known = columns.class_names(self.features, self.label) if self.label else None
        known = known if known is not None else self.poison.known_classes
        self.classes = None if known is None else len(known)

    def batch(self, examples: list[dict[str, Any]], writer: Writer) -> None:
        """Write the published rows of these rows of the source."""
        poison, numbers = self.poison, list(range(self.start + self.seen, self.start + self.seen + len(examples)))
        self.seen += len(examples)
        kept, clean = self._decode([example[self.image] for example in examples], [f"row {n}" for n in numbers])
        numbers, examples = [numbers[i] for i in kept], [examples[i] for i in kept]
        where = [f"row {n}" for n in numbers]
        labels = None
        if poison.needs_labels and self.label:
            values = [example[self.label] for example in examples]
            labels = [columns.check_label(v, at, self.label, self.classes) for v, at in zip(values, where, strict=True)]
        poisoned = poison.change_pictures(clean, labels, poison.chosen(clean, labels), where)
        stored = encode_many(
            poisoned,
            image_format=poison.image_format,
            compress_level=poison.compress_level,
            where=where,
            read_back=[n % self.plan.read_back_every == 0 for n in numbers],
        )
        if examples:
            measure(self.report, poison, clean, poisoned, numbers)
            self._remember(examples, numbers, clean, poisoned)
        for name, pictures in (("clean", clean), ("published", poisoned)):
            self.digests[name] += b"".join(digest_many(pictures))
        rows = [
            {**example, self.image: {"bytes": data, "path": None}}
            for example, data in zip(examples, stored, strict=True)
        ]
        self._tell(self.meant, writer.write(rows, where))

    def read_back(self, batches: Iterator[list[dict[str, Any]]]) -> None:
        """Compare the bytes and the other columns of the file with what was meant, and digest the columns."""
        state, others = hashlib.sha256(), bytearray()
        for rows in batches:
            others += self._tell(state, rows)
        if state.digest() != self.meant.digest():
            raise ValueError("the file that was written does not hold the rows that were made")
        self.digests["columns"] = others

    def evidence(self) -> dict[str, np.ndarray]:
        arrays = {name: np.frombuffer(bytes(rows), np.uint8) for name, rows in self.digests.items()}
        if self.seen > len(self.left_out):
            arrays |= {f"pixels.{name}": values for name, values in self.report.arrays().items()}
        for i, (row, label, clean, published) in enumerate(self.pairs.values()):
            arrays[f"preview.{i}.row_label"] = np.array([row, label])
            arrays[f"preview.{i}.clean"] = clean.pixels.numpy()
            arrays[f"preview.{i}.published"] = published.pixels.numpy()
        return arrays

    def _decode(self, values: list[Any], where: Sequence[str]) -> tuple[list[int], list[Picture]]:
        """The places of the readable pictures, and the pictures; the others are left out, or stop everything."""
        try:
            return list(range(len(values))), decode_many(values, where=where)
        except ValueError:
            if self.plan.terms["on_error"] == "stop":
                raise
        kept, pictures = [], []
        for i, (value, at) in enumerate(zip(values, where, strict=True)):
            try:
                pictures.append(decode(value, where=at))
            except ValueError as error:
                row = int(at.removeprefix("row "))
                self.left_out.append({"row": row, "reason": str(error).removeprefix(f"{at}: ")})
            else:
                kept.append(i)
        return kept, pictures

    def _tell(self, state: Any, rows: list[dict[str, Any]]) -> bytes:
        """Add rows to a digest; returns the digests of their other columns."""
        others = bytearray()
        for row in rows:
            told = columns_digest({name: value for name, value in row.items() if name != self.image})
            state.update(told + xxhash.xxh3_128_digest(row[self.image]["bytes"] or b""))
            others += told
        return bytes(others)

    def _remember(
        self, examples: list[dict[str, Any]], numbers: list[int], clean: list[Picture], published: list[Picture]
    ) -> None:
        """Keep what the preview may show: the first row of each of the first classes, or rows spread over the split."""
        for i, row in enumerate(numbers):
            if self.label:
                value = examples[i][self.label]
                key = label = value if isinstance(value, int) else -1
                wanted = key not in self.pairs and (len(self.pairs) < PREVIEW_ROWS or key < max(self.pairs))
            else:
                key, label, wanted = row, -1, row in self.plan.preview_rows or not self.pairs
            if wanted:
                self.pairs[key] = (row, label, preview.thinned(clean[i]), preview.thinned(published[i]))
                if self.label and len(self.pairs) > PREVIEW_ROWS:
                    del self.pairs[max(self.pairs)]
