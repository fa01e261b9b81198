"""Verify what is published: is it whole, is it what its record says, whose is it?"""

import hmac
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Image
from tqdm.auto import tqdm

from hf_unlearnable import card, columns
from hf_unlearnable.digests import file_digest
from hf_unlearnable.gate.checks import CHECKS
from hf_unlearnable.gate.clean_checks import without_left_out
from hf_unlearnable.gate.folder_checks import check_parquet
from hf_unlearnable.gate.record_checks import check_key, check_results, disagreements, lacking
from hf_unlearnable.gate.row_checks import check_rows
from hf_unlearnable.images import Picture, decode_many
from hf_unlearnable.keys import Key, commitment
from hf_unlearnable.ownership.proof import Proof, prove
from hf_unlearnable.poisons.base import Poison
from hf_unlearnable.poisons.names import POISONS
from hf_unlearnable.poisons.with_surrogate import SurrogatePoison
from hf_unlearnable.publishing import pages
from hf_unlearnable.publishing.hub import Repository
from hf_unlearnable.publishing.readback import Rows, rows_of
from hf_unlearnable.publishing.rebuild import rebuild
from hf_unlearnable.publishing.standing import README, read_record
from hf_unlearnable.record import Record
from hf_unlearnable.sizes import at_once

SAME_VALUES = 0.99
"""Of a method with a surrogate: the share of values that must be recomputed exactly (its arithmetic may differ in the
last bits between machines)."""
FALSE_POSITIVES = 1e-6
KEYLESS = frozenset({"ops", *(name for name, known in POISONS.items() if issubclass(known, SurrogatePoison))})
"""Methods whose pixels may be the same under other keys."""

_FIGURES = re.compile(r"\d+\.\d+(?: ± \d+\.\d+)? %")

Status = Literal["passed", "failed", "not checked"]


@dataclass(frozen=True)
class Outcome:
    """One check: its name, how it went, and what was found."""

    name: str
    status: Status
    detail: str


def verify(
    source: Repository | Path,
    *,
    config: str = "default",
    clean: Dataset | None = None,
    key: Key | None = None,
    surrogate: str | Path | None = None,
    decoys: int = 1_000_000,
    batch_size: int = 500,
    progress: bool = True,
) -> list[Outcome]:
    """Check a published dataset (or a protected folder) against its record, the clean rows and a key, where given.

    With the clean rows and the key (or the surrogate that the key was drawn from) the poison is recomputed and compared
    pixel by pixel. With the key alone, `prove` tests whether the pictures carry this key's perturbation.

    Args:
        decoys: see `prove`.
        batch_size: pictures held at most at a time; fewer of large ones.

    Raises:
        FileNotFoundError: there is no record, and so nothing to check against.
        HubError: the Hub cannot be reached, there is no such repository.
        ValueError: a record of a newer schema; a key that is none.
    """
    done: list[Outcome] = []
    if isinstance(source, Repository):
        source = Repository(source.repo_id, source.kind, source.commit_id(), source.token)
        record = read_record(source, config)
        if record is None:
            raise FileNotFoundError(f"{source.repo_id}: no results/{config}/record.json, so there is nothing to check")
        whole = pages.finished(source.text(README) or "", config)
        done.append(_outcome("finished", whole, "the card says so", "its publication was begun, and not finished"))
        files = {name: lambda name=name: cast(Repository, source).download(name) for name in _named(record)}
    else:
        record = Record.load(source / "record.json")
        files = {name: lambda name=name: cast(Path, source) / name for name in _named(record)}
    if wrong := [*lacking(record)] or [*disagreements(record)]:
        return [*done, Outcome("record", "failed", "; ".join(wrong))]
    done.append(Outcome("record", "passed", "complete, and of one mind"))
    wrong = "; ".join(finding.problem for finding in check_key(record, allow_guessable_key=True))
    done.append(_outcome("key", not wrong, "the record tells of it what it should", wrong))
    wrong = "; ".join(finding.problem for finding in check_results(record))
    done.append(_outcome("results", not wrong, "evaluations are of these pictures, or there are none", wrong))
    clean = None if clean is None else without_left_out(clean, record)
    paths, outcome = _files(files, record)
    done.append(outcome)
    if isinstance(source, Repository):
        done.append(_what_loads(source, record, config, paths))
        done.append(_card(source.text(README) or "", record, config))
    if outcome.status == "passed":
        done += _rows(dict(zip(_named(record), paths, strict=True)), record, clean, batch_size, progress)
    if key is not None:
        done.append(_commitment(record, key))
    if key is not None or surrogate is not None:
        failed = [one.name for one in done if one.status == "failed"]
        if clean is not None and "source" in failed:
            done.append(Outcome("owner", "not checked", "the clean rows are not those of the record"))
        elif "parquet" in failed:
            done.append(Outcome("owner", "not checked", "the files cannot be read as the record says"))
        elif outcome.status == "passed":
            owner = _whose(paths, record, clean, key, surrogate, decoys, batch_size, progress)
            done.append(_of_this_key(owner, done) if key is not None and record.method in KEYLESS else owner)
    else:
        done.append(Outcome("owner", "not checked", "give the key (or the surrogate) to prove whose it is"))
    return done


def recognise(
    dataset: Dataset,
    record: Record,
    key: Key,
    *,
    surrogate: str | Path | None = None,
    original_size: tuple[int, int] | None = None,
    decoys: int = 1_000_000,
    batch_size: int = 500,
    progress: bool = True,
) -> Proof:
    """Whether pictures that somebody else shows carry the perturbation that a record of one's own tells of.

    Args:
        dataset: pictures and labels; the labels must number the classes as the record does.
        original_size: height and width at which they were published, if they were resized since.

    Raises:
        Unprovable: a method without such a test; too few classes.
        ValueError: no such columns, other class names than the record's, an unreadable picture.
    """
    if wrong := [*lacking(record)]:
        raise ValueError(f"the record is incomplete: {'; '.join(wrong)}")
    poison = rebuild(record, key, surrogate=surrogate)
    image = columns.image_column(dataset.features, None)
    label = columns.label_column(dataset.features, None)
    names, told = columns.class_names(dataset.features, label), record.source["classes"]
    if names is not None and told is not None and list(names) != told:
        raise ValueError(f"expected the classes of the record in their order, {told}, got {list(names)}")
    plain = dataset.with_format(None).cast_column(image, Image(decode=False))
    batch_size = at_once(plain, image, batch_size)

    def batches() -> Iterator[tuple[list[Picture], list[int]]]:
        for start in range(0, len(plain), batch_size):
            batch = plain[start : start + batch_size]
            where = [f"row {start + i}" for i in range(len(batch[label]))]
            labels = [columns.check_label(value, at, label) for value, at in zip(batch[label], where, strict=True)]
            yield decode_many(batch[image], where=where), labels

    how: dict[str, Any] = {"decoys": decoys, "original_size": original_size, "progress": progress}
    return prove(batches(), poison, decoy_key=secrets.token_bytes(32), **how)


def judged(proof: Proof) -> Outcome:
    """A proof as an outcome: passed where a key chosen blindly does as well at most once in a million."""
    told = (
        f"p = {proof.p_value:.2g} that a key chosen without looking at these {proof.rows:,} pictures fits them as well "
        f"({proof.decoys:,} decoys, {proof.classes} classes)"
    )
    more = f"; {'; '.join(proof.notes)}" if proof.notes else ""
    return Outcome("owner", "passed" if proof.p_value <= FALSE_POSITIVES else "failed", told + more)


def _outcome(name: str, good: bool, passed: str, failed: str) -> Outcome:
    return Outcome(name, "passed" if good else "failed", passed if good else failed)


def _named(record: Record) -> list[str]:
    files = record.published.get("files") if isinstance(record.published, dict) else None
    return sorted(files) if isinstance(files, dict) else []


def _files(files: dict, record: Record) -> tuple[list[Path], Outcome]:
    paths: list[Path] = []
    for name, get in files.items():
        try:
            path = get()
        except FileNotFoundError:
            return paths, Outcome("files", "failed", f"{name} is missing")
        if not path.is_file():
            return paths, Outcome("files", "failed", f"{name} is missing")
        wanted, size = record.published["files"][name]["sha256"], record.published["files"][name]["bytes"]
        if (found := path.stat().st_size) != size:
            return paths, Outcome("files", "failed", f"{name}: expected {size} bytes, got {found}")
        if (got := file_digest(path)) != wanted:
            return paths, Outcome("files", "failed", f"{name}: expected SHA-256 {wanted}, got {got}")
        paths.append(path)
    return paths, Outcome("files", "passed", f"{len(paths)} parquet files with the SHA-256 of the record")


def _of_this_key(owner: Outcome, done: Sequence[Outcome]) -> Outcome:
    """Where other keys may give the same pixels, equal ones say something of a key only if the record commits to it."""
    committed = any(one.name == "commitment" and one.status == "passed" for one in done)
    if owner.status != "passed" or committed:
        return owner
    return Outcome(
        "owner", "not checked", f"{owner.detail}; but other keys may give these pixels, and none is committed to"
    )


def _what_loads(repository: Repository, record: Record, config: str, paths: Sequence[Path]) -> Outcome:
    """`load_dataset` gives the files of the record and no others, and their columns and class names."""
    readme = repository.text(README) or ""
    try:
        told = pages.loaded(readme, repository.files(), config)
        other = pages.other_features(readme, config, pq.read_schema(paths[0])) if paths else ""
    except (ValueError, OSError, pa.ArrowException) as error:
        return Outcome("loads", "failed", str(error))
    if told is None:
        return Outcome("loads", "failed", f"the card's front matter does not say which files {config!r} has")
    named, split = set(record.published["files"]), record.source["split"]
    if unlike := sorted(named ^ set(told.get(split, ()))):
        state = "is not in the record" if unlike[0] not in named else "is not loaded"
        return Outcome("loads", "failed", f"{unlike[0]} {state}, of {len(unlike)} such files")
    if other:
        return Outcome("loads", "failed", other)
    others = f"; of other splits, {sorted(set(told) - {split})}, the record tells nothing" if len(told) > 1 else ""
    return Outcome("loads", "passed", f"`load_dataset` reads these files as {config!r}, {split!r}{others}")


def _card(readme: str, record: Record, config: str) -> Outcome:
    """What the card says first, before its first section, is what the record's evaluations say."""
    top = (pages.part_of(readme, config) or "").partition("\n## ")[0]
    wanted = card.learned(record)
    figures, own = sorted(_FIGURES.findall(top)), sorted(_FIGURES.findall(wanted))
    if wanted in top and figures == own:
        return Outcome("card", "passed", "it says of what a trainer still learns what the record says, and no more")
    if own and figures == own:
        told = "it gives the figures of the record, but not this version's sentence about them: read it beside this one"
        return Outcome("card", "not checked", f"{told}: {wanted}")
    return Outcome("card", "failed", f"it does not begin with what the record says of what a trainer learns: {wanted}")


def _rows(
    files: dict[str, Path], record: Record, clean: Dataset | None, batch_size: int, progress: bool
) -> list[Outcome]:
    """The gate's checks of files and rows, one outcome for each."""
    found, readable = check_parquet(files, record)
    if not readable:
        return [Outcome("parquet", "failed", "; ".join(finding.problem for finding in found))]
    found += check_rows(readable, record, clean, progress=progress, batch_size=batch_size)
    beside = {"source", "unchanged", "budget", "measures"}
    done = []
    for check in (check for check in CHECKS if check.name not in ("record", "results", "key", "files")):
        problems = [finding.problem for finding in found if finding.check == check.name]
        if problems:
            done.append(Outcome(check.name, "failed", "; ".join(problems)))
        elif check.name == "budget" and not record.pixels["budgets"]:
            done.append(Outcome(check.name, "not checked", "the record tells of no budget"))
        elif check.name in beside and clean is None:
            agrees = "" if check.name == "measures" else "agrees with the record; "
            done.append(Outcome(check.name, "not checked", f"{agrees}give the clean rows to compare"))
        else:
            done.append(Outcome(check.name, "passed", check.meaning))
    return done


def _commitment(record: Record, key: Key) -> Outcome:
    told = record.key["commitment"]
    if told is None:
        return Outcome("commitment", "not checked", "the record commits to no key: it was made under an int seed")
    got = commitment(key)
    good = got is not None and hmac.compare_digest(got.encode(), str(told).encode())
    return _outcome("commitment", good, "the record commits to this key", "the record commits to another key")


def _whose(
    paths: Sequence[Path],
    record: Record,
    clean: Dataset | None,
    key: Key | None,
    surrogate: str | Path | None,
    decoys: int,
    batch_size: int,
    progress: bool,
) -> Outcome:
    try:
        poison = rebuild(record, key, surrogate=surrogate, clean=clean)
        rows = rows_of(paths, record.source["image_column"], batch_size)
        if clean is not None:
            return _recomputed(rows, record, clean, poison, progress)
        label = record.source["label_column"]
        if label is None:
            return Outcome("owner", "not checked", "without labels, this takes the clean rows")
        labelled = ((some.pictures, some.labels(label)) for some in rows)
        return judged(prove(labelled, poison, decoys=decoys, decoy_key=secrets.token_bytes(32), progress=progress))
    except (ValueError, TypeError, ArithmeticError, KeyError) as error:  # settings that are none, unreadable pictures
        return Outcome("owner", "not checked", str(error))


def _recomputed(rows: Iterator[Rows], record: Record, clean: Dataset, poison: Poison, progress: bool) -> Outcome:
    """Every published picture against the recomputed one, or (where not all were to be changed) the clean one."""
    image, label = record.source["image_column"], record.source["label_column"]
    plain = clean.with_format(None).cast_column(image, Image(decode=False))
    learns = isinstance(poison, SurrogatePoison)
    bad: list[int] = []
    equal = values = changed = 0
    for some in tqdm(rows, desc="recomputing", unit=" batches", disable=not progress):
        stop = some.start + len(some.pictures)
        batch = plain[some.start : stop]
        where = [f"clean row {row}" for row in range(some.start, stop)]
        before = decode_many(batch[image], where=where)
        labels = list(batch[label]) if label is not None and poison.needs_labels else None
        eligible = np.ones(len(before), bool)
        if poison.classes is not None and labels is not None:
            eligible = np.isin(labels, poison.classes)
        after = poison.change_pictures(before, labels, eligible, where)
        for row, (published, old, new) in enumerate(zip(some.pictures, before, after, strict=True), some.start):
            if poison.poison_rate < 1 and _same(published, old):
                continue
            if published.pixels.shape != new.pixels.shape:
                bad.append(row)
                continue
            same = int((published.pixels == new.pixels).sum())
            if not _same(new, old):
                equal, values, changed = equal + same, values + new.pixels.numel(), changed + 1
            if same < (SAME_VALUES * new.pixels.numel() if learns else new.pixels.numel()):
                bad.append(row)
    share = f"{100 * equal / values:.4g} % of the values" if values else "none"
    if changed == 0:
        return Outcome("owner", "failed", "this key changes no picture: nothing to recognise")
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        return Outcome("owner", "failed", f"the recomputed pictures differ at rows {shown} ({share} are equal)")
    return Outcome("owner", "passed", f"{changed:,} pictures recomputed from the clean ones: {share} are equal")


def _same(one: Picture, other: Picture) -> bool:
    return one.pixels.shape == other.pixels.shape and torch.equal(one.pixels, other.pixels)
