"""A folder on any filesystem that fsspec knows, whose files are written whole or not at all."""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

T = TypeVar("T")
ATTEMPTS = 8
FIRST_PAUSE = 0.2
LONGEST_PAUSE = 10.0
CHUNK = 1 << 22
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


class Busy(FileExistsError):
    """Another run holds what this one wants to write."""


class Storage:
    """Files by their names below one folder: a path here, or a URL such as `s3://bucket/folder`.

    On this machine a file is made under another name and renamed. Elsewhere it is sent in one piece and its size is
    compared. Reads and writes that fail are tried again, up to `ATTEMPTS` times with pauses that double. Credentials
    and other options are fsspec's own (its configuration file or environment variables).

    Raises:
        ValueError: a protocol that fsspec does not know.
        ImportError: one whose library is not installed.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        self.fs, root = url_to_fs(self.url)
        self.root = root.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)
        told = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.here = Path(self.root if self.local else f"{tempfile.gettempdir()}/hf_unlearnable-{os.getuid()}-{told}")

    def path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def read(self, name: str) -> bytes | None:
        """A whole file, or None where there is none."""

        def read() -> bytes:
            self.fs.invalidate_cache()
            return self.fs.cat_file(self.path(name))

        try:
            return self._patiently(f"reading {name}", read)
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """A file in place of any earlier one."""
        with tempfile.TemporaryDirectory(prefix="hf_unlearnable-") as folder:
            file = Path(folder) / "file"
            file.write_bytes(data)
            self.put(name, file)

    def write_new(self, name: str, data: bytes) -> bool:
        """A file where there is none; whether it was written. Of several that try at once one succeeds.

        On a store whose fsspec implementation cannot create a file only if it is absent, the last one succeeds, and the
        others find that out when they read it.
        """
        target = self.path(name)

        def create_here() -> bool:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            partial = f"{target}.{_token()}.partial"
            try:
                Path(partial).write_bytes(data)
                os.link(partial, target)
            finally:
                Path(partial).unlink(missing_ok=True)
            return True

        def create() -> bool:
            self.fs.invalidate_cache()
            there = self.fs.cat_file(target) if self.fs.exists(target) else None
            if there is not None and there != data and data.startswith(there):
                self.fs.rm_file(target)  # what an attempt of ours left behind
            elif there is not None:
                return there == data
            self.fs.makedirs(os.path.dirname(target), exist_ok=True)
            self.fs.pipe_file(target, data, mode="create")
            self._check_size(name, len(data))
            return True

        try:
            return self._patiently(f"writing {name}", create_here if self.local else create)
        except FileExistsError:
            return False

    def put(self, name: str, file: Path) -> None:
        """A file from this machine, which is moved or copied."""
        target = self.path(name)

        def move() -> None:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if os.stat(file).st_dev == os.stat(os.path.dirname(target)).st_dev:
                os.replace(file, target)
                return
            partial = f"{target}.{_token()}.partial"
            try:
                self.fs.put_file(str(file), partial)
                os.replace(partial, target)
            finally:
                Path(partial).unlink(missing_ok=True)

        def send() -> None:
            self.fs.makedirs(os.path.dirname(target), exist_ok=True)
            self.fs.put_file(str(file), target)
            self._check_size(name, file.stat().st_size)

        self._patiently(f"writing {name}", move if self.local else send)

    def size(self, name: str) -> int | None:
        """The bytes of a file, or None where there is none."""

        def size() -> int:
            self.fs.invalidate_cache()
            return self.fs.info(self.path(name))["size"]

        try:
            return self._patiently(f"looking for {name}", size)
        except FileNotFoundError:
            return None

    def names(self, folder: str = "") -> list[str]:
        """The names of what lies in a folder, sorted; none if there is no such folder."""

        def names() -> list[str]:
            self.fs.invalidate_cache()
            return self.fs.ls(self.path(folder), detail=False)

        try:
            found = self._patiently(f"listing {folder or self.url}", names)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def digest(self, name: str) -> str | None:
        """SHA-256 (hex) of a file, or None where there is none."""

        def digest() -> str:
            self.fs.invalidate_cache()
            state = hashlib.sha256()
            with self.fs.open(self.path(name), "rb") as file:
                while chunk := file.read(CHUNK):
                    state.update(chunk)
            return state.hexdigest()

        try:
            return self._patiently(f"reading {name}", digest)
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """Remove a file or a folder, if it is there."""

        def remove() -> None:
            self.fs.invalidate_cache()
            if self.fs.exists(self.path(name)):
                self.fs.rm(self.path(name), recursive=True)

        with contextlib.suppress(FileNotFoundError):
            self._patiently(f"removing {name}", remove)

    def clear(self, folder: str) -> None:
        """Remove a folder, and what scratch and locks of it have left on this machine."""
        self.remove(folder)
        if not self.local:
            shutil.rmtree(self.here, ignore_errors=True)

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """An empty folder on this machine for files that `put` will take; what an earlier run left there is removed."""
        folder = self.here / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self, name: str, what: str) -> Iterator[None]:
        """Keeps other runs from the same work: all that see the folder, or, of a URL, those on this machine.

        Raises:
            Busy: another run holds it; begins with `what`.
        """
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(path))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise Busy(f"{what}: another run is at work on it") from None
        try:
            yield
        finally:
            lock.release()

    def _check_size(self, name: str, expected: int) -> None:
        self.fs.invalidate_cache()
        found = self.fs.info(self.path(name))["size"]
        if found != expected:
            raise OSError(f"expected {expected} bytes in {self.path(name)}, found {found}")

    def _patiently(self, what: str, action: Callable[[], T]) -> T:
        attempt = 1
        while True:
            try:
                return action()
            except _FINAL:
                raise
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise
                if attempt == ATTEMPTS:
                    told = f"{type(error).__name__}: {error}"
                    raise OSError(f"{self.url}: {what} failed {attempt} times, at last with {told}") from error
            time.sleep(min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE))
            attempt += 1


def _token() -> str:
    return f"{os.getpid()}-{secrets.token_hex(4)}"
