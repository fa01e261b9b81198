"""Digests of a split: equal for equal rows in equal order, however they are stored, batched or sharded."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROW_BYTES = 16
_JSON = json.JSONEncoder(default=repr)


def columns_digest(row: Mapping[str, Any]) -> bytes:
    """16 bytes that identify what a row holds beside its picture: BLAKE2b of its columns' names and values as JSON."""
    return hashlib.blake2b(_JSON.encode(list(row.items())).encode(), digest_size=ROW_BYTES).digest()


def split_digest(rows: Iterable[bytes | bytearray]) -> str:
    """SHA-256 (hex) over the digests of all rows in order."""
    state = hashlib.sha256()
    for row in rows:
        state.update(row)
    return state.hexdigest()


def file_digest(path: str | Path) -> str:
    """SHA-256 (hex) of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
