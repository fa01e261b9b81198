"""Where data come from: a Hub id, a folder or file on disk, or pictures that the project makes."""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import fsspec
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, IterableDataset, load_dataset, load_dataset_builder, load_from_disk
from datasets.config import HF_DATASETS_CACHE
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns
from datasets.exceptions import DatasetNotFoundError

from hf_unlearnable import demo

DEMO = "demo"
ROWS_AT_ONCE = 32


def load_split(source: str | Path, split: str | None = None, *, config: str | None = None) -> Dataset:
    """One split of a dataset.

    Args:
        source: a Hub id, a folder of pictures in one folder a class (imagefolder), a folder or file of parquet, a
            folder made by `save_to_disk`, or "demo" for pictures that are drawn on the spot. Folders and files of
            parquet, and folders of pictures, may lie elsewhere: s3://bucket/folder, or any address that fsspec knows.
        split: its name; None takes the only split, or "train".
        config: the configuration of a Hub dataset with several.

    Raises:
        FileNotFoundError: a path or address that is not there, or a Hub id that cannot be reached.
        ValueError: no such split; names the ones there are.
    """
    return _one_split(_load(str(source), config), source, split)


def _one_split(found: Dataset | DatasetDict, source: str | Path, split: str | None) -> Dataset:
    if isinstance(found, Dataset):
        own = str(found.split) if found.split is not None else "train"
        if split not in (None, own):
            raise ValueError(f"expected split {split!r} of {source}, which holds one split, {own!r}")
        return found
    return found[_choose([str(name) for name in found], source, split)]


def _choose(names: list[str], source: str | Path, split: str | None) -> str:
    wanted = split or (names[0] if len(names) == 1 else "train")
    if wanted not in names:
        raise ValueError(f"expected split {wanted!r} of {source}, got {names}{near(wanted, names)}")
    return wanted


def _load_whole(source: str) -> Dataset | DatasetDict | None:
    """What is not read from files that `datasets` would stream; None for everything else."""
    if source == DEMO:
        return demo.shapes()
    path = Path(source)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return load_from_disk(source)
    return None


def _check_there(source: str) -> None:
    if Path(source).exists():
        return
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).suffix == ".parquet":
        raise FileNotFoundError(f"there is no {source}")


def _not_found(source: str, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(f"{source!r} is neither a path here nor a dataset that the Hub gave: {error}")


def _load(source: str, config: str | None) -> Dataset | DatasetDict:
    whole = _load_whole(source)
    if whole is not None:
        return whole
    if "://" in source:
        kind, files = _files_elsewhere(source)
        state = json.dumps([_told(file, Path()) for some in files.values() for file in some])
        return _as_dict(load_dataset(kind, data_files=files, cache_dir=_cache_folder(hashlib.sha256(state.encode()))))
    _check_there(source)
    path = Path(source)
    if not path.exists():
        try:
            return _as_dict(load_dataset(source, config))
        except (DatasetNotFoundError, ConnectionError, OSError) as error:
            raise _not_found(source, error) from error
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"expected a folder or a .parquet file, got {source}")
        return _as_dict(load_dataset("parquet", data_files=source, cache_dir=_cache_of(path)))
    found = _as_dict(load_dataset(source, config, cache_dir=_cache_of(path)))
    _check_nothing_left_out(path, {str(name): len(split) for name, split in found.items()})
    return found


def _files_elsewhere(url: str) -> tuple[str, dict[str, list[str]]]:
    """How the files below an address are read, and which they are, split by split as `datasets` tells them apart."""
    url, kinds = url.rstrip("/"), {".parquet": "parquet", ".tar": "webdataset"}
    if (suffix := _suffix(url)) in kinds:
        return kinds[suffix], {"train": [url]}
    kinds |= dict.fromkeys(PIL.Image.registered_extensions(), "imagefolder")
    try:
        found = DataFilesDict.from_patterns(get_data_patterns(url), base_path=url)
        filesystem, root = fsspec.url_to_fs(url)
    except (EmptyDatasetError, FileNotFoundError) as error:
        raise FileNotFoundError(f"there is nothing to read at {url}") from error
    except ImportError as error:
        raise ValueError(f"{url}: {error}") from error
    files = {str(split): [file for file in some if _suffix(file) in kinds] for split, some in found.items()}
    seen = {kinds[_suffix(file)] for some in files.values() for file in some}
    if len(seen) != 1:
        got = sorted(seen) or "none of them"
        raise ValueError(f"{url}: expected files of parquet, tar archives or pictures, got {got}")
    kind = seen.pop()
    if kind == "imagefolder":
        everything = filesystem.find(root)
        pictures = sum(_suffix(file) in kinds for file in everything)
        _check_counted(url, pictures, {split: len(some) for split, some in files.items()})
        for file in everything:
            if os.path.basename(file) in ("metadata.csv", "metadata.jsonl", "metadata.parquet"):
                raise ValueError(
                    f"{url} holds a {os.path.basename(file)}, which is read on this machine alone: copy it"
                )
    return kind, {split: some for split, some in files.items() if some}


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _check_nothing_left_out(folder: Path, found: dict[str, int]) -> None:
    """A class folder named `train` or `test` is taken for a split, and the folders beside it are not read at all."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    suffixes = PIL.Image.registered_extensions()
    pictures = sum(path.suffix.lower() in suffixes for path in files)
    if not any(path.suffix in (".parquet", ".arrow", ".csv", ".jsonl", ".tar") for path in files):
        _check_counted(str(folder), pictures, found)


def _check_counted(folder: str, pictures: int, found: dict[str, int]) -> None:
    rows = sum(found.values())
    if pictures > rows:
        raise ValueError(
            f"{folder} holds {pictures} pictures, but {rows} were read, as {list(found)}: is a class "
            f"folder named like a split? Put the class folders into {folder}/train"
        )


@dataclass(frozen=True)
class Stream:
    """One split that is read row by row, from any row on; pictures come as the bytes (or the path) that are stored.

    Args:
        rows: the split; a Dataset counts as one source shard.
        files: the source shards' files in their order, each with what tells its content (its size, or the revision in
            its address).
        kind: how the files are read: "parquet", "webdataset", "imagefolder", ...; "dataset" for a Dataset.
    """

    name: str
    split: str
    rows: Dataset | IterableDataset
    kind: str
    files: tuple[str, ...] = field(default=(), repr=False)
    identity: str = ""

    @property
    def features(self) -> Features:
        assert self.rows.features is not None
        return self.rows.features

    @property
    def source_shards(self) -> int:
        return 1 if isinstance(self.rows, Dataset) else self.rows.num_shards

    def count(self) -> list[int] | None:
        """The rows of every source shard, where that is told without reading the rows: parquet (footers), tar archives
        on this machine (headers), pictures in class folders; None elsewhere."""
        if isinstance(self.rows, Dataset):
            return [len(self.rows)]
        if self.kind == "imagefolder":
            suffixes = PIL.Image.registered_extensions()
            plain = all(Path(file).suffix.lower() in suffixes for file in self.files)
            return [len(self.files)] if plain and self.source_shards == 1 else None
        counter = {"parquet": _count_parquet, "webdataset": _count_tar}.get(self.kind)
        if counter is None or len(self.files) != self.source_shards:
            return None
        if self.kind == "webdataset" and not all(os.path.exists(file) for file in self.files):
            return None
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(counter, self.files))

    def read(self, first: int, last: int, skip: int = 0, rows: int | None = None) -> Iterator[dict[str, Any]]:
        """The rows of source shards `first` to `last` (excluded) without the first `skip`; at most `rows` of them."""
        return islice(self._read(first, last, skip), rows)

    def _read(self, first: int, last: int, skip: int) -> Iterator[dict[str, Any]]:
        if isinstance(self.rows, Dataset):
            yield from _by_tables(self.rows.select(range(skip, len(self.rows))))
            return
        for shard in range(first, last):
            part = self.rows.shard(self.rows.num_shards, shard, contiguous=True)
            part = part.skip(skip) if skip and shard == first else part
            yield from _by_tables(part) if self.kind in ("parquet", "arrow") else part


def _by_tables(rows: Dataset | IterableDataset) -> Iterator[dict[str, Any]]:
    """The rows as Python values, several times faster than `datasets` hands out one after the other.

    For sources that are tables: of others it would make one of rows whose types it has guessed row by row.
    """
    for table in rows.with_format("arrow").iter(ROWS_AT_ONCE):
        yield from cast(pa.Table, table).to_pylist()


def stream_split(source: str | Path, split: str | None = None, *, config: str | None = None) -> Stream:
    """One split of a dataset as a stream: nothing is downloaded or converted as a whole.

    Args:
        source: as in `load_split`, and webdataset: a folder of tar archives, one file a shard. Its column `__url__`
            (where an archive lies) is left out.
        split, config: as in `load_split`.

    Raises:
        FileNotFoundError, ValueError: as `load_split`.
    """
    source = str(source)
    whole = _load_whole(source)
    if whole is not None:
        return stream_of(_one_split(whole, source, split), source)
    elsewhere = _files_elsewhere(source) if "://" in source else None
    if elsewhere is None:
        _check_there(source)
    path = Path(source)
    if path.is_file() and path.suffix not in (".parquet", ".tar"):
        raise ValueError(f"expected a folder, a .parquet or a .tar file, got {source}")
    try:
        if elsewhere is not None:
            builder = load_dataset_builder(elsewhere[0], data_files=elsewhere[1])
        elif path.is_file():
            builder = load_dataset_builder("parquet" if path.suffix == ".parquet" else "webdataset", data_files=source)
        else:
            builder = load_dataset_builder(source, config)
    except (DatasetNotFoundError, ConnectionError, OSError) as error:
        raise _not_found(source, error) from error
    found = {str(name): list(files) for name, files in (builder.config.data_files or {}).items()}
    wanted = _choose(list(found), source, split)
    kind = type(builder).__module__.rsplit(".", 1)[-1]
    if path.is_dir():
        _check_nothing_left_out(path, {name: len(files) for name, files in found.items()})
    try:
        rows = builder.as_streaming_dataset(split=wanted)
    except TypeError as error:  # s3fs is handed an option that it does not know, for archives alone
        if elsewhere is None:
            raise
        raise ValueError(
            f"{source}: `datasets` cannot read these files from there ({error}): copy them to this machine, or take "
            "parquet"
        ) from error
    assert isinstance(rows, IterableDataset)
    if rows.features is None:
        raise ValueError(f"expected columns in {source}, whose features cannot be told without reading all of it")
    rows = rows.decode(False)  # first: `remove_columns` of a decoded stream stores its pictures anew, JPEG with loss
    assert rows.features is not None
    if "__url__" in rows.features:
        rows = rows.remove_columns("__url__")
    files = tuple(found[wanted])
    named = [config, *(_told(file, path) for file in files)]
    identity = hashlib.sha256(json.dumps(named).encode()).hexdigest()
    return Stream(source, wanted, rows, kind, files, identity)


def stream_of(dataset: Dataset, name: str) -> Stream:
    """A dataset that is there, as a stream of one source shard."""
    split = str(dataset.split or "train").split("[")[0].split("+")[0]
    identity = DEMO if name == DEMO else f"{dataset._fingerprint}, {len(dataset)} rows"
    plain = dataset.with_format(None)
    for column, feature in dataset.features.items():
        if hasattr(feature, "decode"):
            plain = plain.cast_column(column, type(feature)(decode=False))
    return Stream(name, split, plain, "dataset", (), identity)


def _told(file: str, root: Path) -> str:
    """What identifies a file on every machine that sees it: its place in the source and its size, or its address (with
    size and tag, where the address does not name a revision)."""
    if "://" in file and not file.startswith("hf://"):
        filesystem, inner = fsspec.url_to_fs(file)
        info = filesystem.info(inner)
        tags = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created")
        return f"{file} {info.get('size')} {next((info[tag] for tag in tags if info.get(tag)), None)}"
    if not os.path.exists(file):
        return file
    inner = os.path.relpath(file, root if root.is_dir() else root.parent)
    return f"{inner} {os.stat(file).st_size}"


def _count_parquet(file: str) -> int:
    with fsspec.open(file, "rb") as opened:
        return pq.ParquetFile(opened).metadata.num_rows  # type: ignore[arg-type]


def _count_tar(file: str) -> int:
    """As webdataset groups them: files that follow each other and share a name up to its first dot are one row."""
    rows, last = 0, None
    with tarfile.open(file) as archive:
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            key = (folder, name.split(".")[0])
            if member.isfile() and "." in name and not name.startswith((".", "__")):
                rows += key != last
                last = key
    return rows


def _cache_of(path: Path) -> str:
    """A cache folder for exactly these files: `datasets` may tell local folders apart by their names alone."""
    state = hashlib.sha256(str(path.resolve()).encode())
    for folder, subfolders, names in os.walk(path) if path.is_dir() else [(path.parent, [], [path.name])]:
        subfolders.sort()
        for name in sorted(names):
            found = os.stat(os.path.join(folder, name))
            state.update(f"{folder}/{name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return _cache_folder(state)


def _cache_folder(state: Any) -> str:
    return os.path.join(HF_DATASETS_CACHE, "hf_unlearnable", state.hexdigest()[:32])


def _as_dict(found: object) -> DatasetDict:
    if not isinstance(found, DatasetDict):
        raise TypeError(f"expected splits, got {type(found).__name__}")
    return found


def public_name(source: str) -> str:
    """What a record says of a source: a Hub id; of a path or an address the last folder or file alone, as they are
    private (of a bucket as a whole: "bucket")."""
    if "://" in source:
        return urlsplit(source).path.rstrip("/").rpartition("/")[2] or "bucket"
    return Path(source).name if Path(source).exists() else source


def near(name: str, names: Iterable[str]) -> str:
    """ ", did you mean ...?" for an unknown name, or nothing."""
    matches = get_close_matches(name, list(names), n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""
