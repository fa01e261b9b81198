"""The gate: what a protected folder must pass before anything of it leaves."""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from hf_unlearnable.gate.finding import Finding
from hf_unlearnable.gate.folder_checks import check_files, check_parquet
from hf_unlearnable.gate.record_checks import check_key, check_results, read_record
from hf_unlearnable.gate.row_checks import check_rows
from hf_unlearnable.record import Record


class Check(NamedTuple):
    """One check: its name, what passes it, and whether the owner may accept what it finds."""

    name: str
    meaning: str
    acceptable: bool = False


CHECKS = (
    Check("record", "record.json is there, complete and of one mind"),
    Check("results", "every evaluation in the record was measured on these pictures"),
    Check("key", "the record commits to a secret key and tells no seed (an int seed: --allow-guessable-key)"),
    Check("files", "the parquet files are those that were protected; no clean copy, cache, fingerprint or key beside"),
    Check("parquet", "columns and rows are those of the record; schema and pictures tell no fingerprint and no path"),
    Check("pictures", "every picture can be read, is lossless, holds pixels alone, and is the one of the record"),
    Check("source", "labels, order, other columns, sizes and transparency are those of the source"),
    Check("columns-digest", "the record tells a digest of the other columns (older records do not)", acceptable=True),
    Check("blank", "no picture is of one colour, unless the clean one is", acceptable=True),
    Check("unchanged", "the rows that were to be changed are, and the others are not", acceptable=True),
    Check("budget", "no picture is changed by more than its budget, in whole 255ths"),
    Check("measures", "what the record measured is what the pixels beside the clean ones give"),
    Check("paths", "no column and no text holds local paths, EXIF, GPS or camera data", acceptable=True),
)
ACCEPTABLE = tuple(known.name for known in CHECKS if known.acceptable)


class Refused(ValueError):
    """A folder that must not be published; `findings` says why, and so does the message."""

    def __init__(self, folder: str | Path, findings: Collection[Finding]) -> None:
        self.findings = tuple(findings)
        told = "".join(f"\n- {finding}" for finding in self.findings)
        super().__init__(f"{folder} must not be published:{told}")


def inspect(
    folder: str | Path,
    *,
    clean: Dataset | None = None,
    allow_guessable_key: bool = False,
    accept: Collection[str] = (),
    progress: bool = True,
    batch_size: int = 500,
) -> list[Finding]:
    """All that speaks against publishing a protected folder, in the order of `CHECKS`; empty if nothing does.

    One pass over the rows. Without the clean rows, what was done to the pixels is judged by the record's own measures
    and digests, and other columns by their digest.

    Args:
        clean: the clean split that was protected, in its order: then every row is compared with it.
        allow_guessable_key: let an int seed pass.
        accept: names of checks whose findings the owner accepts, of `ACCEPTABLE`.
        batch_size: pictures held at most at a time; fewer of large ones.

    Raises:
        ValueError: `accept` names no check that may be accepted, or a batch size below 1.
    """
    found = _inspect(folder, clean, allow_guessable_key, accept, progress, batch_size)[1]
    return [finding for finding in found if finding.check not in accept]


def check(
    folder: str | Path,
    *,
    clean: Dataset | None = None,
    allow_guessable_key: bool = False,
    accept: Collection[str] = (),
    progress: bool = True,
    batch_size: int = 500,
) -> Record:
    """The record of a folder that may be published, with what the owner accepted in `published["accepted"]`.

    The arguments are those of `inspect`.

    Raises:
        Refused: anything speaks against it; holds all findings.
        ValueError: as `inspect`.
    """
    record, found = _inspect(folder, clean, allow_guessable_key, accept, progress, batch_size)
    refused = [finding for finding in found if finding.check not in accept]
    if record is None or refused:
        raise Refused(folder, refused)
    if found:
        record.published["accepted"] = [str(finding) for finding in found]
    return record


def _inspect(
    folder: str | Path,
    clean: Dataset | None,
    allow_guessable_key: bool,
    accept: Collection[str],
    progress: bool,
    batch_size: int,
) -> tuple[Record | None, list[Finding]]:
    if unknown := [accept] if isinstance(accept, str) else sorted(set(accept) - set(ACCEPTABLE)):
        raise ValueError(f"accept takes a collection of {', '.join(ACCEPTABLE)}, got {', '.join(unknown)}")
    if batch_size < 1:
        raise ValueError(f"expected a batch size of 1 or more, got {batch_size}")
    folder = Path(folder)
    record, found = read_record(folder)
    if folder.is_dir():
        found += check_files(folder, record)
    if record is not None:
        found += check_results(record)
        found += check_key(record, allow_guessable_key=allow_guessable_key)
        problems, files = check_parquet({name: folder / name for name in sorted(record.published["files"])}, record)
        found += problems
        if files:
            found += check_rows(files, record, clean, progress=progress, batch_size=batch_size)
    order = {known.name: i for i, known in enumerate(CHECKS)}
    return record, sorted(found, key=lambda finding: order[finding.check])
