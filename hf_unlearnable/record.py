"""Record: everything claimed about a protected dataset, in one JSON file."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from hf_unlearnable.environment import versions

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """Provenance, measured facts and results of one protected dataset.

    Args:
        method: the poison's name; `settings`: its hyper-parameters; neither tells the key.
        key: {"kind": "secret" or "int", "commitment": hash or None}, and "seed" only where the owner asked for it.
        source: what was protected: name, split, rows, columns, classes, digests (`digests.split_digest`) of the decoded
            clean pixels and of the other columns.
        published: files with their SHA-256, digest of the decoded published pixels, picture format.
        pixels: what was done to the pixels (`metrics.PixelReport.summary`).
        results: evaluations; empty means not measured.
    """

    method: str
    settings: dict[str, Any]
    key: dict[str, Any]
    source: dict[str, Any]
    published: dict[str, Any]
    pixels: dict[str, Any]
    results: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=versions)
    schema: int = SCHEMA

    def save(self, path: str | Path) -> None:
        """Write the record, whole or not at all."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(asdict(self), indent=2, allow_nan=False) + "\n")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a record.

        Raises:
            FileNotFoundError: there is none.
            ValueError: not a record, or one of a newer schema.
        """
        try:
            values = json.loads(Path(path).read_text())
            schema = values["schema"]
            if not isinstance(schema, int) or schema < 1:
                raise TypeError(f"its schema is {schema!r}")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a record in JSON, got {type(error).__name__}: {error}") from error
        if schema > SCHEMA:
            raise ValueError(
                f"{path}: expected a record of schema {SCHEMA} or older, got {schema}: update hf_unlearnable"
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{path}: not a record of schema {schema}: {error}") from error
