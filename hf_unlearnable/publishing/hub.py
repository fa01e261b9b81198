"""What publishing and verifying need of the Hub, with errors that say what to do."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] (the client's own, whichever it is)
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

T = TypeVar("T")
WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between tries."""
RepoType = Literal["dataset", "model"]


class HubError(OSError):
    """The Hub did not do what was asked; the message says why and what helps."""


class Unreachable(HubError):
    """There is no network, or the Hub is switched off."""


@dataclass(frozen=True)
class Repository:
    """A repository at a branch or commit.

    Args:
        token: None for the one that `hf auth login` stored, or `HF_TOKEN`.
    """

    repo_id: str
    kind: RepoType = "dataset"
    revision: str | None = None
    token: str | None = None

    @property
    def api(self) -> HfApi:
        return HfApi(token=self.token, library_name="hf_unlearnable")

    @property
    def url(self) -> str:
        """The page that people read."""
        prefix = "datasets/" if self.kind == "dataset" else ""
        return f"{self.api.endpoint}/{prefix}{self.repo_id}"

    def create(self, *, private: bool | None) -> None:
        """Make the repository and the branch where they are not there yet.

        Raises:
            HubError: no token, no rights, no network, a bad name; `private`, and it is there and public.
        """
        ask = partial(asked, self.repo_id)
        ask(self.api.create_repo, self.repo_id, repo_type=self.kind, private=private, exist_ok=True)
        if private and not ask(self.api.repo_info, self.repo_id, repo_type=self.kind).private:
            raise HubError(
                f"{self.repo_id} is there already and is public: make it private on the Hub, or drop --private"
            )
        if self.revision is not None:
            ask(self.api.create_branch, self.repo_id, branch=self.revision, repo_type=self.kind, exist_ok=True)

    def commit_id(self) -> str:
        """The commit that the revision stands for.

        Raises:
            HubError: there is no such repository or revision.
        """
        info = asked(self.repo_id, self.api.repo_info, self.repo_id, repo_type=self.kind, revision=self.revision)
        return str(info.sha)

    def commit_id_or_none(self) -> str | None:
        """The same; None where there is no such repository or revision, or none that the token may see."""
        try:
            return self.commit_id()
        except HubError as error:
            if isinstance(error.__cause__, RepositoryNotFoundError | RevisionNotFoundError):
                return None
            raise

    def files(self) -> dict[str, dict[str, Any]]:
        """Every file by its path: its size in bytes, and its SHA-256 where the Hub tells it (large files)."""

        def listed() -> list[Any]:
            where = {"repo_type": self.kind, "revision": self.revision}
            return list(self.api.list_repo_tree(self.repo_id, recursive=True, **where))  # type: ignore[arg-type]

        found = {}
        for entry in asked(self.repo_id, listed):
            if (size := getattr(entry, "size", None)) is not None and hasattr(entry, "blob_id"):
                lfs = entry.lfs
                found[entry.path] = {"sha256": None if lfs is None else lfs.sha256, "bytes": size}
        return found

    def download(self, path: str, folder: str | Path | None = None) -> Path:
        """A file, in the cache or in a folder.

        Raises:
            FileNotFoundError: the repository has no such file.
        """
        where = {"repo_type": self.kind, "revision": self.revision, "token": self.token, "local_dir": folder}
        try:
            return Path(asked(self.repo_id, hf_hub_download, self.repo_id, path, **where))
        except HubError as error:
            if isinstance(error.__cause__, RemoteEntryNotFoundError):
                raise FileNotFoundError(f"{self.repo_id}: there is no {path}") from error
            raise

    def text(self, path: str) -> str | None:
        """A small text file, or None where there is none."""
        try:
            return self.download(path).read_text()
        except FileNotFoundError:
            return None

    def commit(
        self, message: str, add: dict[str, str | bytes | Path], delete: Sequence[str] = (), parent: str | None = None
    ) -> str:
        """One commit: files by their path in the repository (text, bytes, or a local file), and what goes.

        Raises:
            HubError: among others, the branch has moved away from `parent`.
        """
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path, content.encode() if isinstance(content, str) else content)
            for path, content in add.items()
        ]
        operations += [CommitOperationDelete(path) for path in delete]
        made = asked(
            self.repo_id,
            self.api.create_commit,
            self.repo_id,
            operations,
            commit_message=message,
            repo_type=self.kind,
            revision=self.revision,
            parent_commit=parent,
        )
        return str(made.oid)


def asked(repo_id: str, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What a call to the Hub gives. Passing trouble (429, 5xx, a dropped connection) is waited out: the client itself
    tries some requests again, and commits and questions about repositories only once.

    Raises:
        HubError: it failed for good; says what to do.
    """
    for wait in (*WAITS, None):
        try:
            return call(*args, **kwargs)
        except (HTTPError, OSError, RuntimeError, HFValidationError) as error:
            cause = _cause(error)
            if wait is None or not _passes(cause):
                told = _told(cause)
                if told is None:
                    raise
                unreachable = _is_network(cause) and not isinstance(cause, HfHubHTTPError)
                raise (Unreachable if unreachable else HubError)(f"{repo_id}: {told}") from error
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _cause(error: BaseException) -> BaseException:
    """What the Hub or the network did, where the client has wrapped it."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, HTTPError | ConnectionError | TimeoutError | LocalEntryNotFoundError):
            return found
        found = found.__cause__
    return error


def _passes(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in (408, 429, 500, 502, 503, 504)
    return _is_network(error) and not isinstance(error, OfflineModeIsEnabled)


def _is_network(error: BaseException) -> bool:
    return isinstance(error, HTTPError | ConnectionError | TimeoutError | LocalEntryNotFoundError)


def _told(error: BaseException) -> str | None:
    """What is wrong and what helps; None for an error that is not the Hub's."""
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub is switched off (HF_HUB_OFFLINE is set): unset it"
    if isinstance(error, LocalTokenNotFoundError):
        return "no token: `hf auth login`, or set HF_TOKEN to one with write access"
    if isinstance(error, HFValidationError):
        return f"expected a repository id like user/name: {error}"
    if isinstance(error, HfHubHTTPError):
        return _meaning(error)
    return f"the Hub cannot be reached: {error}" if _is_network(error) else None


def _meaning(error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else None
    said = error.server_message or str(error).strip().splitlines()[0]
    if status == 401:
        return f"the Hub knows no such user: no token, or a wrong one (`hf auth login`, or HF_TOKEN): {said}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such repository, or it is private and your token may not see it: {said}"
    if status == 403:
        return f"your token may not write here: is the name yours, and has the token write access? {said}"
    if status in (409, 412):
        return f"the repository changed meanwhile (another run?): run the same command again: {said}"
    if status == 429:
        return f"the Hub asks to wait (too many requests): run the same command later: {said}"
    if isinstance(error, BadRequestError) or status == 400:
        return f"the Hub refuses what was sent: {said}"
    return f"the Hub failed with status {status}: run the same command again, it goes on: {said}"
