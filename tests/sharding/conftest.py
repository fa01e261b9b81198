import json
import tarfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from datasets import Dataset, Image, load_dataset
from fsspec.implementations.memory import MemoryFileSystem

from hf_unlearnable import preview
from hf_unlearnable.images import digest
from hf_unlearnable.sharding import storage
from tests.conftest import pixels


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the previews would show, one list a preview; drawing takes longer than all the rest."""
    shown: list[Any] = []

    def draw(pairs: Any, path: Path, *, title: str) -> None:
        assert pairs
        shown.append([(p.row, p.class_name, digest(p.clean.pixels), digest(p.poisoned.pixels)) for p in pairs])
        Path(path).write_bytes(b"picture")

    monkeypatch.setattr(preview, "draw", draw)
    return shown


@pytest.fixture
def parquet(small: Dataset, tmp_path: Path) -> Path:
    """The 24 small pictures in three files of 7, 8 and 9 rows."""
    folder = tmp_path / "photos"
    for i, (start, stop) in enumerate(((0, 7), (7, 15), (15, 24))):
        small.select(range(start, stop)).to_parquet(folder / f"train-{i:05d}-of-00003.parquet")
    return folder


@pytest.fixture
def archives(small: Dataset, tmp_path: Path) -> Path:
    """The same in three webdataset archives."""
    folder = tmp_path / "archives"
    folder.mkdir()
    stored = small.cast_column("img", Image(decode=False))
    for i, (start, stop) in enumerate(((0, 7), (7, 15), (15, 24))):
        with tarfile.open(folder / f"train-{i:05d}.tar", "w") as archive:
            for row in range(start, stop):
                told = json.dumps({"name": stored[row]["name"]}).encode()
                label = str(stored[row]["label"]).encode()
                for suffix, data in (("png", stored[row]["img"]["bytes"]), ("cls", label), ("json", told)):
                    member = tarfile.TarInfo(f"{row:06d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, BytesIO(data))
    return folder


@pytest.fixture
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.0)


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


class FaultyFileSystem(MemoryFileSystem):
    """Fails every other write, after having written half of it; or all writes to names that hold `broken`."""

    protocol = "faulty"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    writes = 0
    broken: str | None = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("faulty://"))

    def _fail(self, path: str, data: bytes) -> None:
        cls = type(self)
        cls.writes += 1
        if cls.writes % 2 or (cls.broken and cls.broken in path):
            super().pipe_file(path, data[: len(data) // 2])
            if cls.writes % 4 == 1 or cls.broken:
                raise OSError("the network is gone")
            raise _Silent

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        try:
            self._fail(path, value)
        except _Silent:
            return
        super().pipe_file(path, value, mode=mode)

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())


class _Silent(Exception):
    """Half of a write is kept, and nobody is told."""


@pytest.fixture
def faulty(without_pauses: None) -> Iterator[type[FaultyFileSystem]]:
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.writes, FaultyFileSystem.broken = 0, None
    yield FaultyFileSystem
    FaultyFileSystem.store.clear()
    FaultyFileSystem.pseudo_dirs[:] = [""]
    FaultyFileSystem.clear_instance_cache()


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Path], Dataset]:
    def read(folder: Path) -> Dataset:
        return load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))

    return read


def copied(fs: Any, root: str, target: Path) -> Path:
    """A folder of a filesystem, here."""
    for path in fs.find(root):
        file = target / path.removeprefix(root).lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(fs.cat_file(path))
    return target


def same_pixels(a: Dataset, b: Dataset, column: str = "img") -> bool:
    return np.array_equal(pixels(a, column), pixels(b, column))
