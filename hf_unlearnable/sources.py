"""Where data come from: a Hub id, a folder or file on disk, or pictures that the project makes."""

import hashlib
import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

import PIL.Image
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetNotFoundError

from hf_unlearnable import demo

DEMO = "demo"


def load_split(source: str | Path, split: str | None = None, *, config: str | None = None) -> Dataset:
    """One split of a dataset.

    Args:
        source: a Hub id, a folder of pictures in one folder a class (imagefolder), a folder or file of parquet, a
            folder made by `save_to_disk`, or "demo" for pictures that are drawn on the spot.
        split: its name; None takes the only split, or "train".
        config: the configuration of a Hub dataset with several.

    Raises:
        FileNotFoundError: a path that is not there, or a Hub id that cannot be reached.
        ValueError: no such split; names the ones there are.
    """
    found = _load(str(source), config)
    if isinstance(found, Dataset):
        own = str(found.split) if found.split is not None else "train"
        if split not in (None, own):
            raise ValueError(f"expected split {split!r} of {source}, which holds one split, {own!r}")
        return found
    names = [str(name) for name in found]
    wanted = split or (names[0] if len(names) == 1 else "train")
    if wanted not in names:
        raise ValueError(f"expected split {wanted!r} of {source}, got {names}{near(wanted, names)}")
    return found[wanted]


def _load(source: str, config: str | None) -> Dataset | DatasetDict:
    if source == DEMO:
        return demo.shapes()
    path = Path(source)
    if not path.exists():
        if source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix == ".parquet":
            raise FileNotFoundError(f"there is no {source}")
        try:
            return _as_dict(load_dataset(source, config))
        except (DatasetNotFoundError, ConnectionError, OSError) as error:
            raise FileNotFoundError(
                f"{source!r} is neither a path here nor a dataset that the Hub gave: {error}"
            ) from error
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return load_from_disk(source)
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"expected a folder or a .parquet file, got {source}")
        return _as_dict(load_dataset("parquet", data_files=source, cache_dir=_cache_of(path)))
    found = _as_dict(load_dataset(source, config, cache_dir=_cache_of(path)))
    _check_nothing_left_out(path, found)
    return found


def _check_nothing_left_out(folder: Path, found: DatasetDict) -> None:
    """A class folder named `train` or `test` is taken for a split, and the folders beside it are not read at all."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    suffixes = PIL.Image.registered_extensions()
    pictures = sum(path.suffix.lower() in suffixes for path in files)
    rows = sum(len(split) for split in found.values())
    if pictures > rows and not any(path.suffix in (".parquet", ".arrow", ".csv", ".jsonl") for path in files):
        raise ValueError(
            f"{folder} holds {pictures} pictures, but {rows} were read, as {[str(name) for name in found]}: is a class "
            f"folder named like a split? Put the class folders into {folder / 'train'}"
        )


def _cache_of(path: Path) -> str:
    """A cache folder for exactly these files: `datasets` may tell local folders apart by their names alone."""
    state = hashlib.sha256(str(path.resolve()).encode())
    for folder, subfolders, names in os.walk(path) if path.is_dir() else [(path.parent, [], [path.name])]:
        subfolders.sort()
        for name in sorted(names):
            found = os.stat(os.path.join(folder, name))
            state.update(f"{folder}/{name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return os.path.join(HF_DATASETS_CACHE, "hf_unlearnable", state.hexdigest()[:32])


def _as_dict(found: object) -> DatasetDict:
    if not isinstance(found, DatasetDict):
        raise TypeError(f"expected splits, got {type(found).__name__}")
    return found


def near(name: str, names: Iterable[str]) -> str:
    """ ", did you mean ...?" for an unknown name, or nothing."""
    matches = get_close_matches(name, list(names), n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""
