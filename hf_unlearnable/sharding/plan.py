"""The plan of a sharded output: what all machines must agree on, and which rows are whose."""

import hashlib
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import numpy as np
from datasets import ClassLabel

from hf_unlearnable import columns
from hf_unlearnable.environment import versions
from hf_unlearnable.keys import Key, subkey
from hf_unlearnable.poisons.base import Poison
from hf_unlearnable.protect import PERCEPTUAL_ROWS, PREVIEW_ROWS, check_request, describe_key, label_column
from hf_unlearnable.sharding.files import SUFFIXES, Container, form_of
from hf_unlearnable.sharding.storage import Storage
from hf_unlearnable.sources import Stream, public_name

FOLDER = ".shards"
PLAN = f"{FOLDER}/plan.json"
SCHEMA = 3
ROWS_PER_SHARD = 10_000
UNCOUNTED_EVERY = 100
"""Of a source whose rows nobody can count beforehand, every n-th row of a shard is looked at closely: PSNR and SSIM are
measured, and what was stored is decoded again."""

OnError: TypeAlias = Literal["stop", "skip"]


@dataclass(frozen=True)
class Part:
    """The rows of one shard: source shards `first` to `last` (excluded), without `skip` rows at the beginning.

    Args:
        rows: how many rows (None: all of those source shards).
        start: the number of its first row in the split; None where the source cannot be counted.
    """

    first: int
    last: int
    skip: int
    rows: int | None
    start: int | None


@dataclass(frozen=True)
class Plan:
    """Written once, by whoever comes first; every other run is compared with it.

    Args:
        terms: what must be the same on all machines (JSON values).
        check: salt and tag by which a key is recognised. An int seed leaves no commitment, and could be enumerated from
            the tag (slowly, by scrypt): the plan is removed when the shards are merged.
    """

    terms: dict[str, Any]
    parts: tuple[Part, ...]
    perceptual_every: int
    preview_rows: tuple[int, ...]
    check: dict[str, str]

    @property
    def read_back_every(self) -> int:
        return self.terms["read_back_every"] or self.perceptual_every

    @property
    def rows(self) -> int | None:
        last = self.parts[-1]
        return None if last.start is None or last.rows is None else last.start + last.rows

    @cached_property
    def digest(self) -> str:
        """What ties a manifest to this plan."""
        told = {name: value for name, value in asdict(self).items() if name != "check"}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def file(self, shard: int) -> str:
        """The name of a finished shard; shards are counted from 1, as in --shard 3/64, and files from 0."""
        suffix = SUFFIXES[self.terms["container"]]
        return f"data/{self.terms['source']['split']}-{shard - 1:05d}-of-{len(self.parts):05d}{suffix}"

    def beside(self, shard: int, suffix: str) -> str:
        """The name of what is kept about a shard until the merge."""
        return f"{FOLDER}/{Path(self.file(shard)).stem}{suffix}"

    def to_json(self) -> bytes:
        return (json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n").encode()

    @classmethod
    def load(cls, storage: Storage) -> Self | None:
        """The plan of an output, or None where there is none.

        Raises:
            ValueError: a damaged one, or one of another schema.
        """
        data = storage.read(PLAN)
        if data is None:
            return None
        try:
            values = json.loads(data)
            schema = values.pop("schema")
            parts = tuple(Part(**part) for part in values.pop("parts"))
            preview_rows = tuple(values.pop("preview_rows"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{storage.url}/{PLAN}: not a plan: {type(error).__name__}: {error}") from error
        if schema != SCHEMA:
            raise ValueError(
                f"{storage.url}/{PLAN}: expected schema {SCHEMA}, got {schema}: the version that began it can finish it"
            )
        return cls(parts=parts, preview_rows=preview_rows, **values)

    def check_same(self, terms: dict[str, Any], key: Key) -> None:
        """Refuse a run that would make other pixels, or keep them otherwise, than the output's plan says.

        Raises:
            ValueError: names the first difference.
        """
        found = next(_differences(self.terms, json.loads(json.dumps(terms)), ""), None)
        if found is None and _tag(key, self.check["salt"]) != self.check["tag"]:
            found = ("key", "the key that the output was begun with", "another one")
        if found is not None:
            raise ValueError(
                f"this output was begun otherwise: {found[0]}: expected {found[1]}, got {found[2]}; use the same, or "
                "another --output"
            )


def settle(poison: Poison, features: Mapping[str, Any]) -> Poison:
    """The poison with its columns settled; `cls`, the label of webdataset archives, is found too."""
    named = any(isinstance(feature, ClassLabel) or name in columns.LABEL_NAMES for name, feature in features.items())
    if poison.label_column is None and "cls" in features and not named:
        poison = replace(poison, label_column="cls")
    image = columns.image_column(features, poison.image_column)
    return replace(poison, image_column=image, label_column=label_column(features, poison))


def terms_of(
    stream: Stream,
    poison: Poison,
    *,
    container: Container,
    batch_size: int,
    on_error: OnError,
    read_back_every: int | None,
    record_seed: bool,
) -> dict[str, Any]:
    """What decides the output. The poison is settled.

    Raises:
        ValueError: anything that cannot be protected, or not in a stream, or not kept in the container.
    """
    if on_error not in ("stop", "skip"):
        raise ValueError(f'on_error is "stop" or "skip", got {on_error!r}')
    if read_back_every is not None and read_back_every < 1:
        raise ValueError(f"read_back_every is 1 or more, got {read_back_every}")
    if container not in SUFFIXES:
        raise ValueError(f"container is one of {', '.join(SUFFIXES)}, got {container!r}")
    check_request(stream.features, poison, stream.split, batch_size)
    image, needed = poison._columns(stream.features)
    names = columns.class_names(stream.features, poison.label_column) if poison.label_column else None
    if needed is not None:
        poison.check_classes(names, f"column {needed!r}")
    terms = {
        "method": poison.name,
        "settings": poison.settings(),
        "container": container,
        "image_format": poison.image_format,
        "compress_level": poison.compress_level,
        "key": describe_key(poison, record_seed),
        "source": {
            "dataset": public_name(stream.name),
            "split": stream.split,
            "identity": stream.identity,
            "features": stream.features.to_dict(),
            "image_column": image,
            "label_column": poison.label_column,
            "classes": list(names) if names else None,
        },
        "on_error": on_error,
        "batch_size": batch_size,
        "read_back_every": read_back_every,
        "versions": versions("pyarrow"),
    }
    form_of(stream, terms, 1)
    return terms


def make_plan(stream: Stream, terms: dict[str, Any], key: Key, *, shards: int | None, processes: int) -> Plan:
    """The plan of a new output.

    Args:
        shards: how many; None for one for each `ROWS_PER_SHARD` rows (where the source cannot be counted, one for each
            source shard), and at least one for each process.
    """
    counts = stream.count()
    total = None if counts is None else sum(counts)
    if total == 0:
        raise ValueError(f"expected rows to protect, got an empty split of {stream.name}")
    if shards is None:
        shards = stream.source_shards if total is None else max(processes, math.ceil(total / ROWS_PER_SHARD))
    parts = divide(counts, stream.source_shards, shards)
    preview = () if total is None else np.linspace(0, total - 1, min(PREVIEW_ROWS, total)).astype(int).tolist()
    salt = secrets.token_hex(16)
    return Plan(
        terms=json.loads(json.dumps(terms)),
        parts=parts,
        perceptual_every=UNCOUNTED_EVERY if total is None else math.ceil(total / PERCEPTUAL_ROWS),
        preview_rows=tuple(preview),
        check={"salt": salt, "tag": _tag(key, salt)},
    )


def divide(counts: Sequence[int] | None, source_shards: int, shards: int) -> tuple[Part, ...]:
    """Contiguous parts in the source's order: whole source shards where there are enough of them, else ranges of rows.

    Raises:
        ValueError: fewer than one shard, more shards than rows, or more than source shards that nobody can count.
    """
    if shards < 1:
        raise ValueError(f"expected 1 shard or more, got {shards}")
    if shards <= source_shards:
        bounds = [source_shards * i // shards for i in range(shards + 1)]
        if counts is None:
            return tuple(Part(a, b, 0, None, None) for a, b in pairwise(bounds))
        starts = np.concatenate([[0], np.cumsum(counts)]).tolist()
        return tuple(Part(a, b, 0, starts[b] - starts[a], starts[a]) for a, b in pairwise(bounds))
    if counts is None:
        raise ValueError(
            f"expected at most {source_shards} shards, as many as the source has, since its rows cannot be counted "
            f"beforehand; got {shards}"
        )
    ends, total = np.cumsum(counts), sum(counts)
    if shards > total:
        raise ValueError(f"expected at most {total} shards, as many as there are rows, got {shards}")
    parts = []
    for i in range(shards):
        start, stop = total * i // shards, total * (i + 1) // shards
        first, last = np.searchsorted(ends, [start, stop - 1], side="right").tolist()
        parts.append(Part(first, last + 1, start - int(ends[first] - counts[first]), stop - start, start))
    return tuple(parts)


def _tag(key: Key, salt: str) -> str:
    secret = subkey(key, "sharding plan", salt)
    if isinstance(key, int):
        secret = hashlib.scrypt(secret, salt=salt.encode(), n=2**14, r=8, p=1)
    return secret.hex()


def _differences(expected: Any, got: Any, where: str) -> Any:
    if isinstance(expected, dict) and isinstance(got, dict):
        for name in [*expected, *(name for name in got if name not in expected)]:
            inner = f"{where}.{name}" if where else name
            if inner != "versions.python":
                yield from _differences(expected.get(name, "nothing"), got.get(name, "nothing"), inner)
    elif expected != got:
        yield where, expected, got
