"""What the local Hub answers, one function a route; `ROUTES` at the end is the table."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, unquote

from tests.publishing.hub_metadata import metadata_problems
from tests.publishing.hub_store import Answer, Call, File, Refused, Repo, Store, Tree, as_json, folders

DATE = "2026-01-01T00:00:00.000Z"
LARGE = 10 << 20
LFS_SUFFIXES = (".parquet", ".arrow", ".safetensors", ".png", ".jpg", ".webp", ".npz", ".bin", ".zip", ".gz")
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


def answer(store: Store, call: Call) -> Answer:
    """What the table says. Raises: Refused."""
    if call.token is not None and call.user is None:
        raise Refused(401, "Invalid credentials in Authorization header")
    for methods, pattern, access, handle in ROUTES:
        if call.method in methods and (found := re.fullmatch(pattern, call.path)):
            parts: dict[str, Any] = {name: unquote(part) for name, part in found.groupdict().items() if part}
            if access is not None:
                kind, repo_id = parts.pop("kind", "models"), parts.pop("id")
                parts["repo"] = store.find(kind, repo_id, call.user, write=access == "write")
            return handle(store, call, **parts)
    raise Refused(404, f"No such route: {call.method} {call.path}")


def address(store: Store, repo: Repo) -> str:
    return f"{store.url}/{'' if repo.kind == 'models' else repo.kind + '/'}{repo.id}"


def whoami(store: Store, call: Call) -> Answer:
    if call.user is None:
        raise Refused(401, "Invalid username or password.")
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    return as_json({"type": "user", "id": "1", "name": call.user, "fullname": call.user, "orgs": [], "auth": auth})


def validate(store: Store, call: Call) -> Answer:
    errors, warnings = metadata_problems(call.json()["content"])
    found = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
    return as_json(found, 400 if errors else 200)


def create(store: Store, call: Call) -> Answer:
    if call.user is None:
        raise Refused(401, "Invalid username or password.")
    asked = call.json()
    kind, namespace = asked.get("type", "model"), asked.get("organization") or call.user
    if namespace != call.user:
        raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    repo = Repo(f"{kind}s", f"{namespace}/{asked['name']}", asked.get("visibility") == "private")
    told = {"url": address(store, repo), "name": repo.id, "id": repo.id}
    if (repo.kind, repo.id) in store.repos:
        return as_json(told | {"error": f"You already created this {kind} repo"}, 409)
    store.repos[repo.kind, repo.id] = repo
    repo.commit("main", "initial commit", {".gitattributes": store.keep(ATTRIBUTES)})
    return as_json(told)


def settings(store: Store, call: Call, repo: Repo) -> Answer:
    repo.private = call.json()["visibility"] == "private"
    return as_json({})


def info(store: Store, call: Call, repo: Repo, revision: str = "main") -> Answer:
    commit = repo.at(revision)
    files = [
        {"rfilename": path} | ({"size": file.size, "blobId": file.oid} if call.asks("blobs") else {})
        for path, file in sorted(commit.tree.items())
    ]
    state = {"private": repo.private, "gated": False, "disabled": False, "lastModified": DATE, "createdAt": DATE}
    rest = {"_id": repo.id, "author": repo.owner, "tags": [], "downloads": 0, "likes": 0}
    return as_json({"id": repo.id, "sha": commit.id, "siblings": files} | state | rest)


def refs(store: Store, call: Call, repo: Repo) -> Answer:
    heads = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": c} for b, c in repo.branches.items()]
    return as_json({"branches": heads, "tags": [], "converts": []})


def history(store: Store, call: Call, repo: Repo, revision: str) -> Answer:
    commit, found = repo.at(revision), []
    while commit is not None:
        authors = [{"user": repo.owner}]
        found.append({"id": commit.id, "title": commit.title, "message": "", "authors": authors, "date": DATE})
        commit = repo.commits[commit.parent] if commit.parent else None
    return as_json(found)


def branch(store: Store, call: Call, repo: Repo, revision: str) -> Answer:
    if revision in repo.branches:
        raise Refused(409, f"Reference already exists: refs/heads/{revision}")
    repo.branches[revision] = repo.at(call.json().get("startingPoint", "main")).id
    return as_json({})


def tree(store: Store, call: Call, repo: Repo, revision: str, path: str = "") -> Answer:
    commit = repo.at(revision)
    above = f"{path.strip('/')}/" if path else ""
    entries = folders(commit.tree) | {p: file.entry(p) for p, file in commit.tree.items()}
    inside = {p: entry for p, entry in sorted(entries.items()) if p.startswith(above)}
    if path and not inside:
        raise Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
    last = {"lastCommit": {"id": commit.id, "title": commit.title, "date": DATE}} if call.asks("expand") else {}
    deep = call.asks("recursive")
    return as_json([entry | last for p, entry in inside.items() if deep or "/" not in p.removeprefix(above)])


def paths_info(store: Store, call: Call, repo: Repo, revision: str) -> Answer:
    held = repo.at(revision).tree
    entries = folders(held) | {path: file.entry(path) for path, file in held.items()}
    asked = [path.rstrip("/") for path in parse_qs(call.body.decode()).get("paths", [])]
    return as_json([entries[path] for path in asked if path in entries])


def resolve(store: Store, call: Call, repo: Repo, revision: str, path: str) -> Answer:
    commit = repo.at(revision)
    if path not in commit.tree:
        missing = Refused(404, "Entry not found", "EntryNotFound").answer
        return missing._replace(headers=missing.headers | {"X-Repo-Commit": commit.id})
    file = commit.tree[path]
    content = store.objects[file.sha256]
    headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range") or "")
    if wanted is None:
        return Answer(200, content, headers)
    first, last = int(wanted[1]), min(int(wanted[2] or file.size), file.size - 1)
    if first >= file.size:
        return Answer(416, b"", headers | {"Content-Range": f"bytes */{file.size}"})
    return Answer(206, content[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{file.size}"})


def preupload(store: Store, call: Call, repo: Repo, revision: str) -> Answer:
    commit = repo.at(revision)
    answers = []
    for asked in call.json()["files"]:
        path, known = asked["path"], commit.tree.get(asked["path"])
        binary = b"\0" in base64.b64decode(asked["sample"])
        mode = "lfs" if path.endswith(LFS_SUFFIXES) or binary or asked["size"] > LARGE else "regular"
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known and known.etag})
    return as_json({"files": answers, "commitOid": commit.id})


def batch(store: Store, call: Call, repo: Repo) -> Answer:
    """Where to PUT the objects that are not here yet; like a signed address, it asks for no token."""
    asked = [{"oid": each["oid"], "size": each["size"]} for each in call.json()["objects"]]
    for each in asked:
        if each["oid"] not in store.objects:
            store.granted.add(each["oid"])
            each["actions"] = {"upload": {"href": f"{store.url}/lfs/{each['oid']}"}}
    return as_json({"transfer": "basic", "objects": asked})


def upload(store: Store, call: Call, sha256: str) -> Answer:
    if sha256 not in store.granted:
        raise Refused(403, "This address was not signed")
    if hashlib.sha256(call.body).hexdigest() != sha256:
        raise Refused(400, "The content is not what its sha256 says")
    store.objects[sha256] = call.body
    return Answer(200, b"", {"ETag": f'"{sha256}"'})


def commit(store: Store, call: Call, repo: Repo, revision: str) -> Answer:
    header, *operations = [json.loads(line) for line in call.body.splitlines() if line.strip()]
    if "create_pr" in call.query:
        raise Refused(400, "This Hub has no pull requests")
    head = repo.at(revision)
    if revision not in repo.branches:
        raise Refused(400, f"{revision} is no branch")
    if not head.id.startswith(header["value"].get("parentCommit") or ""):
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    changed = dict(head.tree)
    for operation in operations:
        APPLY[operation["key"]](store, changed, **operation["value"])
    made = repo.commit(revision, header["value"]["summary"], changed)
    return as_json({"commitOid": made.id, "commitUrl": f"{address(store, repo)}/commit/{made.id}", "success": True})


def put_file(store: Store, changed: Tree, path: str, content: str, encoding: str) -> None:
    plain = base64.b64decode(content)
    errors = metadata_problems(plain.decode())[0] if path == "README.md" else []
    if errors:
        raise Refused(400, "; ".join(errors))
    changed[path] = store.keep(plain)


def put_lfs_file(store: Store, changed: Tree, path: str, oid: str, algo: str, size: int | None = None) -> None:
    if oid not in store.objects:
        raise Refused(400, f"The LFS object {oid} of {path} was not uploaded")
    changed[path] = File.large(oid, len(store.objects[oid]))


def delete(store: Store, changed: Tree, path: str) -> None:
    inside = [held for held in changed if held == path or held.startswith(f"{path.rstrip('/')}/")]
    if not inside:
        raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    for held in inside:
        del changed[held]


APPLY: dict[str, Callable[..., None]] = {
    "file": put_file,
    "lfsFile": put_lfs_file,
    "deletedFile": delete,
    "deletedFolder": delete,
}
READ = ("GET", "HEAD")
API = r"/api/(?P<kind>datasets|models)/(?P<id>[^/]+(?:/[^/]+)?)"
WEB = r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+(?:/[^/]+)?)"
REVISION = r"/(?P<revision>[^/]+)"

# methods, path, what the user must be allowed to do with the repository (None: there is none), the function
ROUTES: list[tuple[tuple[str, ...], str, str | None, Callable[..., Answer]]] = [
    (READ, r"/api/whoami-v2", None, whoami),
    (("POST",), r"/api/validate-yaml", None, validate),
    (("POST",), r"/api/repos/create", None, create),
    (("PUT",), r"/lfs/(?P<sha256>[0-9a-f]{64})", None, upload),
    (("POST",), WEB + r"\.git/info/lfs/objects/batch", "write", batch),
    (READ, WEB + "/resolve" + REVISION + r"/(?P<path>.+)", "read", resolve),
    (READ, API + "/tree" + REVISION + r"(?:/(?P<path>.*))?", "read", tree),
    (("POST",), API + "/paths-info" + REVISION, "read", paths_info),
    (READ, API + "/refs", "read", refs),
    (READ, API + "/commits" + REVISION, "read", history),
    (("POST",), API + "/branch" + REVISION, "write", branch),
    (("POST",), API + "/preupload" + REVISION, "write", preupload),
    (("POST",), API + "/commit" + REVISION, "write", commit),
    (("PUT",), API + "/settings", "write", settings),
    (READ, API + "(?:/revision" + REVISION + ")?", "read", info),
]
