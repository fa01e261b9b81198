"""What lies in a protected folder: its files, what they are, and what the parquet files say beside their rows."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image

from hf_unlearnable import columns
from hf_unlearnable.digests import file_digest
from hf_unlearnable.gate import traces
from hf_unlearnable.gate.containers import describe
from hf_unlearnable.gate.finding import Finding, first_of
from hf_unlearnable.gate.record_checks import RECORD
from hf_unlearnable.record import Record

_BESIDE = frozenset({RECORD, "README.md", "preview.png"})
_FOLDERS = ("results", "assets")
_SUFFIXES = frozenset({".json", ".csv", ".md", ".png"})
_CACHES = re.compile(r"state\.json|dataset_info\.json|dataset_dict\.json|cache-.*\.arrow|.*\.arrow|.*\.lock|tmp\w*")
_KEY_FILE_BYTES = 200
_KEY_DIGITS = re.compile(rb"\s*(?:0x)?[0-9a-fA-F]{64}\s*")
_DRAWN = frozenset({"tEXt Software", "pHYs"})
"""What a PNG drawn by matplotlib holds beside its pixels."""
_SCHEMA_KEYS = frozenset({b"huggingface", b"ARROW:schema", b"content_defined_chunking"})
_FIELD_KEYS = frozenset({b"PARQUET:field_id"})


def check_files(folder: Path, record: Record | None) -> list[Finding]:
    """That the folder holds the parquet files of its record, unchanged, and beside them only what is meant to be seen.

    Without a record the parquet files are left alone.
    """
    listed = {} if record is None else record.published["files"]
    found: list[Finding] = []
    strays: dict[str, list[str]] = {}
    for name, problem in _walk(folder):
        path = folder / name
        problem = problem or _stray(Path(name), path, listed, known=record is not None)
        if problem:
            strays.setdefault(problem, []).append(name)
        elif path.suffix in _SUFFIXES:
            found += _side_file(name, path)
    found += [Finding("files", f"{first_of(names)}: {problem}") for problem, names in strays.items()]
    for name, said in listed.items():
        path = folder / name
        if not path.is_file():
            found.append(Finding("files", f"{name}: is missing"))
        elif (size := path.stat().st_size) != said["bytes"]:
            found.append(
                Finding("files", f"{name}: expected {said['bytes']} bytes, got {size}: changed after protecting")
            )
        elif file_digest(path) != said["sha256"]:
            found.append(Finding("files", f"{name}: not the bytes that were protected (SHA-256): changed afterwards"))
    return found


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    """Every file and link below a folder, and what is wrong with it being one; of hidden folders, the folder alone."""
    for place, folders, names in os.walk(folder):
        inner = Path(place).relative_to(folder)
        for name in sorted(folders):
            if (Path(place) / name).is_symlink():
                yield str(inner / name), "a link, which may lead anywhere"
            elif name.startswith("."):
                yield str(inner / name), "a hidden folder"
                folders.remove(name)
        folders.sort()
        for name in sorted(names):
            path = Path(place) / name
            if path.is_symlink():
                yield str(inner / name), "a link, which may lead anywhere"
            else:
                yield str(inner / name), "" if path.is_file() else "not a plain file"


def _stray(name: Path, path: Path, listed: dict[str, Any], *, known: bool) -> str:
    """Why a file does not belong into a folder that is published; empty if it does."""
    if name.as_posix() in listed or (not known and name.parts[0] == "data" and name.suffix == ".parquet"):
        return ""
    if name.name.startswith("."):
        return "a hidden file"
    if _CACHES.fullmatch(name.name):
        return "a cache, lock or fingerprint of datasets: clean rows may be in it, or what a seed can be guessed by"
    if path.stat().st_size <= _KEY_FILE_BYTES and _KEY_DIGITS.fullmatch(path.read_bytes()):
        return "64 hexadecimal digits alone: is it the key?"
    if str(name) in _BESIDE or (name.parts[0] in _FOLDERS and len(name.parts) > 1 and name.suffix in _SUFFIXES):
        return ""
    return "not in the record, and neither README.md, preview.png nor a .json, .csv, .md or .png in results/ or assets/"


def _side_file(name: str, path: Path) -> Iterator[Finding]:
    data = path.read_bytes()
    if path.suffix == ".png":
        try:
            container = describe(data)
        except ValueError as error:
            yield Finding("files", f"{name}: {error}")
            return
        if container.kind != "png":
            yield Finding("files", f"{name}: expected a PNG, got {container.kind}")
        elif more := [extra for extra in container.extras if extra not in _DRAWN]:
            yield Finding("files", f"{name}: holds {', '.join(more)} beside its pixels")
        return
    text = data.decode(errors="replace")
    try:
        texts = (
            [leaf for leaf in traces.leaves(json.loads(text)) if isinstance(leaf, str)]
            if path.suffix == ".json"
            else [text]
        )
    except json.JSONDecodeError:
        texts = [text]
    for what in sorted({what for text in texts if (what := traces.trace(text))}):
        yield Finding("paths", f"{name} holds what looks like {what}")


def check_parquet(files_by_name: Mapping[str, Path], record: Record) -> tuple[list[Finding], list[Path]]:
    """What the parquet files say beside their rows; and the files, in order, if their rows can be read and compared.

    Args:
        files_by_name: where each file of the record is, in their order.
    """
    found: list[Finding] = []
    files: list[Path] = []
    schemas: list[pa.Schema] = []
    rows = 0
    for name, path in files_by_name.items():
        if not path.is_file():
            continue
        try:
            with pq.ParquetFile(path) as parquet:
                schemas.append(parquet.schema_arrow)
                told = parquet.metadata.metadata or {}
                rows += parquet.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            found.append(Finding("parquet", f"{name}: expected a parquet file, got {_short(error)}"))
            continue
        files.append(path)
        found += [Finding("parquet", f"{name}: {problem}") for problem in _told_beside(told, schemas[-1])]
    if len(files) < len(record.published["files"]) or not files:
        return found, []
    if rows != record.published["rows"]:
        found.append(Finding("parquet", f"expected {record.published['rows']} rows, got {rows}"))
    if any(not schema.equals(schemas[0]) for schema in schemas):
        return [*found, Finding("parquet", "the files differ in their columns")], []
    problems = list(_columns(schemas[0], record))
    return found + [Finding("parquet", problem) for problem in problems], [] if problems else files


def features_of(schema: pa.Schema) -> Features:
    """The features of a parquet file of `datasets`.

    Raises:
        ValueError: they cannot be read.
    """
    try:
        return Features.from_arrow_schema(schema)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the features in the schema cannot be read: {_short(error)}") from error


def _told_beside(told: dict[bytes, bytes], schema: pa.Schema) -> Iterator[str]:
    keys = (told.keys() | (schema.metadata or {}).keys()) - _SCHEMA_KEYS
    for field in schema:
        keys |= {b"field " + field.name.encode() + b": " + key for key in (field.metadata or {}).keys() - _FIELD_KEYS}
    if keys:
        shown = ", ".join(repr(key.decode(errors="replace")) for key in sorted(keys))
        yield f"its schema tells {shown} beside the features"
    try:
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        beside = {*said} - {"info"} | {*said.get("info", {})} - {"features"}
    except (ValueError, TypeError, AttributeError):
        beside = {"what is no description of features"}
    if beside:
        yield f"its description by datasets holds {', '.join(sorted(map(str, beside)))} beside the features"


def _columns(schema: pa.Schema, record: Record) -> Iterator[str]:
    image, label = record.source["image_column"], record.source["label_column"]
    try:
        features = features_of(schema)
    except ValueError as error:
        yield str(error)
        return
    if not isinstance(features.get(image), Image):
        yield f"expected pictures in the column {image!r}, got {features.get(image)} among {list(features)}"
    elif {field.name for field in schema.field(image).type} != {"bytes", "path"}:
        yield f"expected bytes and path in the column {image!r}, got {schema.field(image).type}"
    for name, feature in features.items():
        if name != image and columns.holds_pictures(feature):
            yield f"the column {name!r} holds pictures too"
    if label is not None:
        feature = features.get(label)
        names = list(feature.names) if isinstance(feature, ClassLabel) else None
        if feature is None:
            yield f"expected labels in the column {label!r}, got the columns {list(features)}"
        elif names != record.source["classes"]:
            yield f"expected the classes {record.source['classes']} in the column {label!r}, got {names}"


def _short(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
