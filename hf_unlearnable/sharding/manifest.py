"""What is kept about a finished shard until the merge: a manifest (JSON) and its evidence (arrays, one a row)."""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from hf_unlearnable.sharding.plan import Plan
from hf_unlearnable.sharding.storage import Storage


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Written last: a shard without a manifest is not finished.

    Args:
        plan: `Plan.digest` of the plan that it was made under, which tells settings, key commitment, versions, source.
        shard: its number, from 1.
        start: the number of its first row in the split; None where the source cannot be counted.
        rows_read, rows: rows of the source, and rows published: the others are in `left_out`, with row and reason (rows
            are counted in the split, or in the shard where `start` is None).
        sha256, size: of the parquet file.
        evidence: SHA-256 of the file of arrays.
    """

    plan: str
    shard: int
    start: int | None
    rows_read: int
    rows: int
    left_out: list[dict[str, Any]]
    sha256: str
    size: int
    evidence: str
    seconds: float

    def save(self, storage: Storage, plan: Plan) -> None:
        storage.write(plan.beside(self.shard, ".json"), (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def load(cls, storage: Storage, plan: Plan, shard: int) -> Self | None:
        """The manifest of a finished shard; None where the shard is missing or half of it is.

        Raises:
            ValueError: it was made under another plan, or for another shard.
        """
        name = plan.beside(shard, ".json")
        data = storage.read(name)
        if data is None:
            return None
        try:
            found = cls(**json.loads(data))
        except (ValueError, TypeError):
            return None
        if found.plan != plan.digest:
            raise ValueError(f"{storage.url}/{name}: made under another plan: remove it and make shard {shard} again")
        if found.shard != shard:
            raise ValueError(f"{storage.url}/{name}: expected shard {shard}, got {found.shard}")
        return found if storage.size(plan.file(shard)) == found.size else None


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays as the bytes of an .npz file, the same for the same arrays; not compressed, as most of it are digests."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            inner = io.BytesIO()
            np.lib.format.write_array(inner, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), inner.getvalue())
    return buffer.getvalue()


def unpack(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def load_evidence(storage: Storage, plan: Plan, manifest: Manifest) -> dict[str, np.ndarray]:
    """The arrays of a shard.

    Raises:
        ValueError: missing, or not those of the manifest.
    """
    name = plan.beside(manifest.shard, ".npz")
    data = storage.read(name)
    if data is None or hashlib.sha256(data).hexdigest() != manifest.evidence:
        state = "missing" if data is None else "not the one of the manifest"
        raise ValueError(f"{storage.url}/{name} is {state}: remove the manifest and make shard {manifest.shard} again")
    return unpack(data)
