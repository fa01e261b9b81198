"""From finished shards to a protected dataset: nothing missing, nothing twice, and its record."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_unlearnable import card, preview
from hf_unlearnable.digests import ROW_BYTES, split_digest
from hf_unlearnable.images import Picture
from hf_unlearnable.metrics import PixelReport
from hf_unlearnable.protect import PREVIEW_ROWS
from hf_unlearnable.record import Record
from hf_unlearnable.sharding.manifest import Manifest, load_evidence
from hf_unlearnable.sharding.plan import FOLDER, PLAN, Plan
from hf_unlearnable.sharding.storage import Storage

_DIGESTS = ("clean", "published", "columns")


def merge(output: str | Path, *, progress: bool = True) -> Record:
    """Check all shards, write what `protect` writes beside `data/`, and remove `.shards/`.

    Every file is read again (SHA-256), every row must be there once, and in its place. `record.json` is written last: a
    merge that was stopped is begun again, and one that is finished does nothing more.

    Raises:
        FileNotFoundError: no shards were made here.
        FileExistsError: another run is merging.
        ValueError: shards that are missing, files that are not those of their manifests or of no manifest, rows that
            are missing or there twice, no rows.
    """
    storage = Storage(output)
    if storage.size("record.json") is not None:
        storage.clear(FOLDER)
        return _read_record(storage)
    plan = Plan.load(storage)
    if plan is None:
        raise FileNotFoundError(f"{storage.url}/{PLAN} is not there: no shards were made here")
    with storage.lock(f"{FOLDER}/merge.lock", f"merging {storage.url}"):
        manifests = _all_there(storage, plan)
        record, pairs = _combine(storage, plan, manifests, progress)
        with tempfile.TemporaryDirectory(prefix="hf_unlearnable-") as folder:
            pixels = record.pixels
            title = f"{record.method}: {pixels['rows_changed']} of {pixels['rows']} pictures changed"
            preview.draw(pairs, Path(folder) / "preview.png", title=title)
            (Path(folder) / "README.md").write_text(card.local_page(record))
            record.save(Path(folder) / "record.json")
            for name in ("preview.png", "README.md", "record.json"):
                storage.put(name, Path(folder) / name)
        storage.clear(FOLDER)
    return record


def _read_record(storage: Storage) -> Record:
    with tempfile.TemporaryDirectory(prefix="hf_unlearnable-") as folder:
        copy = Path(folder) / "record.json"
        copy.write_bytes(storage.read("record.json") or b"")
        return Record.load(copy)


def _all_there(storage: Storage, plan: Plan) -> list[Manifest]:
    numbers = range(1, len(plan.parts) + 1)
    found = {number: Manifest.load(storage, plan, number) for number in numbers}
    missing = [number for number, manifest in found.items() if manifest is None]
    if missing:
        raise ValueError(f"{storage.url}: {_few(missing)} of {len(numbers)} shards are missing or not finished")
    for folder, known in (("data", {plan.file(number) for number in numbers}), ("", {"data", FOLDER})):
        for name in storage.names(folder):
            inner = f"{folder}/{name}" if folder else name
            if name.endswith(".partial"):
                storage.remove(inner)
            elif inner not in known and inner not in ("preview.png", "README.md"):
                raise ValueError(f"{storage.url}/{inner} belongs to no shard: remove it")
    return [manifest for manifest in found.values() if manifest is not None]


def _combine(
    storage: Storage, plan: Plan, manifests: list[Manifest], progress: bool
) -> tuple[Record, list[preview.Pair]]:
    report = PixelReport(perceptual_every=plan.perceptual_every)
    digests: dict[str, list[bytes]] = {name: [] for name in _DIGESTS}
    left_out, files, pairs, start = [], {}, [], 0
    for manifest in tqdm(manifests, desc="merging", unit="shard", disable=not progress):
        where = f"{storage.url}: shard {manifest.shard}/{len(manifests)}"
        if manifest.start not in (None, start):
            kind = "missing" if manifest.start > start else "there twice"
            raise ValueError(f"{where}: expected row {start} first, got {manifest.start}: rows are {kind}")
        name = plan.file(manifest.shard)
        found = storage.digest(name)
        if found != manifest.sha256:
            raise ValueError(f"{where}: {name} is not the file of the manifest: remove it and make the shard again")
        files[name] = {"sha256": manifest.sha256, "bytes": manifest.size}
        evidence = load_evidence(storage, plan, manifest)
        shift = start if manifest.start is None else 0
        _check_rows(evidence, manifest, where)
        for kind in _DIGESTS:
            digests[kind].append(evidence[kind].tobytes())
        measured = {key[7:]: values for key, values in evidence.items() if key.startswith("pixels.")}
        if measured:
            report.add(measured, shift)
        left_out += [{**row, "row": row["row"] + shift} for row in manifest.left_out]
        pairs += _pairs(evidence, shift, plan)
        start += manifest.rows_read
    if plan.rows not in (None, start):
        raise ValueError(f"{storage.url}: expected {plan.rows} rows, got {start}")
    rows = start - len(left_out)
    if not rows:
        raise ValueError(f"{storage.url}: all {start} rows were left out, the first because: {left_out[0]['reason']}")
    terms, source = plan.terms, plan.terms["source"]
    told = {name: source[name] for name in ("dataset", "split")}
    record = Record(
        method=terms["method"],
        settings=terms["settings"],
        key=terms["key"],
        source={
            **told,
            "rows": rows,
            **{name: source[name] for name in ("image_column", "label_column", "classes")},
            "pixels_sha256": split_digest(digests["clean"]),
            "columns_sha256": split_digest(digests["columns"]),
            **({"left_out": left_out} if terms["on_error"] == "skip" else {}),
        },
        published={
            "rows": rows,
            "image_format": terms["image_format"],
            "compress_level": terms["compress_level"],
            "pixels_sha256": split_digest(digests["published"]),
            "files": files,
            **({"rows_chosen": "each row drawn"} if terms["settings"]["poison_rate"] < 1 else {}),
            **({"pictures_read_back_every": plan.read_back_every} if plan.read_back_every > 1 else {}),
        },
        pixels=report.summary(),
        versions=terms["versions"],
    )
    return record, _shown(pairs, plan)


def _check_rows(evidence: dict[str, np.ndarray], manifest: Manifest, where: str) -> None:
    """Every row that was read was published or left out, once."""
    published = evidence.get("pixels.row", np.empty(0, dtype=int))
    told = np.sort(np.concatenate([published, np.array([row["row"] for row in manifest.left_out], dtype=int)]))
    first = manifest.start or 0
    if not np.array_equal(told, np.arange(first, first + manifest.rows_read)):
        raise ValueError(f"{where}: rows of {first} to {first + manifest.rows_read - 1} are missing or there twice")
    for kind in _DIGESTS:
        if len(evidence[kind]) != ROW_BYTES * manifest.rows:
            raise ValueError(
                f"{where}: expected {manifest.rows} digests ({kind}), got {len(evidence[kind]) / ROW_BYTES:g}"
            )


def _pairs(evidence: dict[str, np.ndarray], shift: int, plan: Plan) -> Iterator[tuple[int, preview.Pair]]:
    """Labels and rows that a preview may show."""
    source: dict[str, Any] = plan.terms["source"]
    for i in range(PREVIEW_ROWS + 1):
        if f"preview.{i}.row_label" not in evidence:
            return
        row, label = evidence[f"preview.{i}.row_label"].tolist()
        names = source["classes"]
        name = names[label] if names and label >= 0 else f"class {label}" if source["label_column"] else ""
        clean, published = (
            Picture(torch.from_numpy(evidence[f"preview.{i}.{kind}"])) for kind in ("clean", "published")
        )
        yield label, preview.Pair(row + shift, name, clean, published)


def _shown(pairs: list[tuple[int, preview.Pair]], plan: Plan) -> list[preview.Pair]:
    """The first rows of up to eight classes; without labels, rows spread over the split."""
    if plan.terms["source"]["label_column"]:
        first: dict[int, preview.Pair] = {}
        for label, pair in pairs:
            first.setdefault(label, pair)
        shown = [first[label] for label in sorted(first)[:PREVIEW_ROWS]]
    else:
        wanted = [pair for _, pair in pairs if pair.row in plan.preview_rows]
        shown = wanted or [pairs[i][1] for i in sorted(set(np.linspace(0, len(pairs) - 1, PREVIEW_ROWS).astype(int)))]
    return sorted(shown, key=lambda pair: pair.row)


def _few(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 12 else f"{numbers[:12]} and {len(numbers) - 12} more"
