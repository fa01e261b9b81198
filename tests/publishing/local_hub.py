"""A Hub on this machine and in memory, which the real `huggingface_hub` and `datasets` clients talk to.

It keeps repositories of datasets and models with branches and commits, knows tokens, refuses what the Hub refuses,
fails on demand, and remembers every byte it was sent. Nothing leaves the machine.
"""

import contextlib
import os
import re
import socket
import threading
import traceback
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from tests.publishing import hub_answers
from tests.publishing.hub_store import Answer, Call, Refused, Store, as_json


class Request(NamedTuple):
    """A line of the log; `status` is None where the connection was dropped, `user` where no known token was sent."""

    method: str
    path: str
    status: int | None
    user: str | None


@dataclass
class Fault:
    """A failure of requests to come; `injected` counts how often it struck."""

    method: str
    path: str
    status: int | None
    times: int
    after: int
    headers: dict[str, str]
    late: bool
    seen: int = 0
    injected: int = 0

    def strikes(self, call: Call) -> bool:
        if not (re.fullmatch(self.method, call.method) and re.search(self.path, unquote(call.target))):
            return False
        self.seen += 1
        struck = self.after < self.seen <= self.after + self.times
        self.injected += struck
        return struck

    def answer(self) -> Answer | None:
        return None if self.status is None else as_json({"error": "injected failure"}, self.status, self.headers)


class Hub:
    """A Hub at `url`. Use it as a context manager, or `stop()` it.

    Args:
        tokens: the user of every token; a user owns the namespace of that name.
        home: folder for the caches of clients (`environment`).

    Attributes:
        requests: what was asked so far, in order.
        slept: seconds that clients of this process would have slept between tries (the fixture fills it).
        errors: tracebacks of this Hub's own mistakes; the fixture says that there are none.
    """

    def __init__(self, tokens: dict[str, str], home: Path) -> None:
        self.tokens, self.home = tokens, home
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.received: list[bytes] = []
        self.slept: list[float] = []
        self.errors: list[str] = []
        self._lock = threading.Lock()
        self._server = Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.store = Store(self.url)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "Hub":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port and every connection: this Hub is unreachable from now on. A second call does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.hang_up()
            self._server.server_close()

    def fail(
        self,
        method: str = ".*",
        path: str = "",
        status: int | None = 500,
        times: int = 1,
        after: int = 0,
        headers: dict[str, str] | None = None,
        late: bool = False,
    ) -> Fault:
        """Let requests to come fail.

        Args:
            method: regular expression that the whole method matches.
            path: regular expression found in the path with its query, unquoted.
            status: of the answer; None drops the connection without one.
            times, after: the `after` first requests that match are spared, the next `times` fail.
            headers: of the answer, like Retry-After.
            late: the request takes effect, only its answer is lost.
        """
        self.faults.append(Fault(method, path, status, times, after, headers or {}, late))
        return self.faults[-1]

    def asked(self, method: str, path: str = "") -> list[Request]:
        """The requests of this method whose unquoted path the regular expression is found in."""
        return [r for r in self.requests if r.method == method and re.search(path, unquote(r.path))]

    def files(self, kind: str, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository of this kind ("dataset" or "model") holds, by path; nothing where there is none."""
        repo = self.store.repos.get((f"{kind}s", repo_id))
        held = repo.at(revision).tree if repo else {}
        return {path: self.store.objects[file.sha256] for path, file in sorted(held.items())}

    def everything(self) -> list[bytes]:
        """Every byte this Hub was sent or keeps: request lines with headers, bodies, objects."""
        return [*self.received, *self.store.objects.values()]

    def environment(self, token: str | None = None) -> dict[str, str]:
        """This process's environment for a subprocess whose clients know this Hub only, with or without a token."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_OFFLINE"))}
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.home)} | ({"HF_TOKEN": token} if token else {})
        off = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS"), "0")
        on = dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"), "1")
        return kept | ours | off | on | dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")

    def answer(self, call: Call) -> Answer | None:
        """The answer to a call, None where the connection is dropped; one call at a time."""
        with self._lock:
            self.received += [f"{call.method} {call.target}\n{call.headers}".encode(), call.body]
            call.user = self.tokens.get(call.token or "")
            fault = next((fault for fault in self.faults if fault.strikes(call)), None)
            answer = None if fault and not fault.late else self._answer(call)
            answer = fault.answer() if fault else answer
            self.requests.append(Request(call.method, call.target, answer and answer.status, call.user))
            return answer

    def _answer(self, call: Call) -> Answer:
        try:
            return hub_answers.answer(self.store, call)
        except Refused as refused:
            return refused.answer
        except Exception:  # noqa: BLE001
            self.errors.append(traceback.format_exc())
            return as_json({"error": "Internal Error"}, 500)


class Server(ThreadingHTTPServer):
    """Threads that end with their connections, so that nothing outlives a test."""

    daemon_threads = False

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no mistake of the Hub's."""

    def hang_up(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """The Hub keeps its own log."""

    def body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def serve(self) -> None:
        assert isinstance(self.server, Server)
        answer = self.server.hub.answer(Call(self.command, self.path, self.headers, self.body()))
        if answer is None:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in (answer.headers | {"Content-Length": str(len(answer.body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve
