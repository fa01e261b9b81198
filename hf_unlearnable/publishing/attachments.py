"""Evaluations that are sent with a dataset: which of their files, and that they are of these pictures."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from hf_unlearnable.gate import traces
from hf_unlearnable.gate.secret_scan import files_hold_secret
from hf_unlearnable.keys import Key
from hf_unlearnable.record import Record

TEXTS = ("summary.md", "matrix.md", "table.csv", "setting.json", "diagnosis.json")
PICTURES = ("heat-map.png", "curves-*.png", "confusion-*.png")


def is_ours(path: str) -> bool:
    """Whether a file under results/ or assets/ has a name that publishing gives."""
    name = path.rpartition("/")[2]
    known = (*TEXTS, *PICTURES, "record.json", "preview.png")
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in known)


def evaluation_files(folders: Sequence[Path], config: str, record: Record, key: Key | None = None) -> dict[str, Path]:
    """Pages and tables to results/, pictures to assets/; of several evaluations, each in a folder of its name.

    Only what `scripts/evaluate.py` and `scripts/diagnose.py` write themselves; whatever else lies there stays.

    Raises:
        FileNotFoundError: a folder that holds no evaluation.
        ValueError: one of other pictures than the record's, two folders of one name, a text that tells a local path, a
            file that holds the key.
    """
    found: dict[str, Path] = {}
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"expected evaluations in folders of different names, which they keep, got {names}")
    for folder, name in zip(folders, names, strict=True):
        _check_of(folder, record)
        inner = "" if len(folders) == 1 else f"{name}/"
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            if path.name in TEXTS:
                _check_text(path)
                found[f"results/{config}/{inner}{path.name}"] = path
            elif (folder / "jobs").is_dir() and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in PICTURES):
                found[f"assets/{config}/{inner}{path.name}"] = path
    if key is not None and (places := files_hold_secret(found, key)):
        raise ValueError(f"the key is in {', '.join(places)}: nothing was sent")
    return found


def _check_of(folder: Path, record: Record) -> None:
    if not (folder / "summary.md").is_file():
        raise FileNotFoundError(f"expected an evaluation (scripts/evaluate.py) with its summary.md, got {folder}")
    whole = record.published["pixels_sha256"]
    if (folder / "diagnosis.json").is_file():
        if whole not in (folder / "diagnosis.json").read_text():
            raise ValueError(f"{folder}: expected a diagnosis of these pictures ({whole[:8]}...)")
        return
    digest = whole[:8]
    jobs = [path.name for path in (folder / "jobs").iterdir()] if (folder / "jobs").is_dir() else []
    if not any(name.endswith(f"-{digest}") for name in jobs):
        raise ValueError(f"{folder}: expected an evaluation of these pictures ({digest}...), it has jobs of {jobs}")
    if not record.results:
        raise ValueError(
            f"{folder}: the record holds no evaluation, and its card would say that nothing was measured: "
            "`evaluate.py --report-only` with the same arguments notes it"
        )


def _check_text(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if what := traces.trace(line):
            raise ValueError(f"{path}, line {number}: holds what looks like {what}: nothing was sent")
