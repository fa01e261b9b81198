"""What the local Hub keeps: bytes by their sha256, and repositories with branches and commits that point to them."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from email.message import Message
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))


class Refused(Exception):
    """An error as the Hub words it: the message in the body and in a header, the kind of error in another header."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = as_json({"error": message}, status, headers)


@dataclass
class Call:
    """One request; `user` is who the token belongs to, if it is known."""

    method: str
    target: str
    headers: Message
    body: bytes
    user: str | None = None

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip() or None

    @cached_property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query)

    def asks(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("true", "1")

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class File:
    """What a path of a commit points to: bytes by their sha256, and the id that git gives to them or to a pointer."""

    sha256: str
    size: int
    lfs: bool
    oid: str

    @classmethod
    def regular(cls, content: bytes) -> "File":
        return cls(hashlib.sha256(content).hexdigest(), len(content), False, git_oid(content))

    @classmethod
    def large(cls, sha256: str, size: int) -> "File":
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return cls(sha256, size, True, git_oid(pointer.encode()))

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def entry(self, path: str) -> dict[str, Any]:
        lfs = {"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": 130}} if self.lfs else {}
        return {"type": "file", "path": path, "size": self.size, "oid": self.oid, **lfs}


Tree = dict[str, File]


def folders(paths: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The entries of all folders above these paths, by path; the root is not among them."""
    found = {str(folder) for path in paths for folder in list(PurePosixPath(path).parents)[:-1]}
    return {folder: {"type": "directory", "path": folder, "size": 0, "oid": git_oid(b"")} for folder in found}


class Commit(NamedTuple):
    id: str
    title: str
    tree: Tree
    parent: str | None


@dataclass
class Repo:
    kind: str
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def commit(self, branch: str, title: str, tree: Tree) -> Commit:
        parent = self.branches.get(branch)
        content = json.dumps([self.kind, self.id, len(self.commits), title, parent, sorted(tree)])
        made = Commit(hashlib.sha1(content.encode()).hexdigest(), title, tree, parent)
        self.commits[made.id], self.branches[branch] = made, made.id
        return made

    def at(self, revision: str) -> Commit:
        """The commit of a branch's head or of an id. Raises: Refused (404) when there is none."""
        found = self.commits.get(self.branches.get(revision, revision))
        if found is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found


@dataclass
class Store:
    """All that the Hub keeps; `granted` are the objects that somebody was told to upload."""

    url: str
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    granted: set[str] = field(default_factory=set)

    def keep(self, content: bytes) -> File:
        file = File.regular(content)
        self.objects[file.sha256] = content
        return file

    def find(self, kind: str, repo_id: str, user: str | None, write: bool) -> Repo:
        """A repository that `user` may read, or write; the private ones of others are as if they were not there."""
        repo = self.repos.get((kind, repo_id))
        if repo is not None and (user == repo.owner or not (repo.private or write)):
            return repo
        if user is None:  # without the code, clients know this 401 for a missing repository only behind https://
            raise Refused(401, "Invalid username or password.", "RepoNotFound")
        if repo is None or repo.private:
            raise Refused(404, "Repository not found", "RepoNotFound")
        raise Refused(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
