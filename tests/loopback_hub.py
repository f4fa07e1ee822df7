"""A stand-in for the Hugging Face hub on this machine: two origins, faults on demand, and a memory of every request.

The hub's own origin answers the API and redirects LFS files to a second one, as the real hub does to its CDN, with
signed addresses. Written from what the hub sends: X-Repo-Commit, X-Linked-ETag, X-Linked-Size, X-Error-Code.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request. Without a status, something happens to the body, after `after` bytes.

    how   cut (an orderly close), reset, stall (for `seconds`), flip (one wrong byte), short (says less than there
          is), html (a login page), slow (`seconds` between pieces)
    """

    status: int = 0
    how: str = ""
    after: int = 0
    seconds: float = 0.0
    retry_after: str | None = None


@dataclass(frozen=True)
class Seen:
    """A request that came."""

    kind: str  # head, resolve, api, body
    path: str
    start: int
    token: str | None


@dataclass
class Repository:
    commit: str
    files: dict[str, bytes] = field(default_factory=dict)
    token: str | None = None  # gated: only who has it may read
    lfs: bool = True


class LoopbackHub:
    """Start it, point HF_ENDPOINT at `url`, and say what is to go wrong."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.history: dict[str, dict[str, Repository]] = {}
        self.requests: list[Seen] = []
        self.has_ranges = True
        self.is_portal = False
        self.announced: dict[str, int] = {}  # sizes that the hub claims, where they are not true
        self.sent = 0  # bytes of bodies
        self._faults: list[tuple[str, Fault]] = []
        self._signature = 0
        self._expired: set[str] = set()
        self._lock = threading.Lock()
        self._servers: list[_Server] = []
        self._ports = (0, 0)
        self.on_body: Callable[[int], None] = lambda sent: None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    def start(self) -> None:
        self._servers = [_Server(("127.0.0.1", port), self, i) for i, port in enumerate(self._ports)]
        self._ports = (self._servers[0].server_port, self._servers[1].server_port)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """As a machine that is switched off: open connections end."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
            server.drop()
        self._servers = []

    def add(self, repo_id: str, name: str, content: bytes, *, token: str | None = None, lfs: bool = True) -> str:
        """Publish a file: a new commit. Returns its sha256."""
        old = self.repositories.get(repo_id)
        files = dict(old.files if old else {}) | {name: content}
        digest = hashlib.sha256(b"".join(key.encode() + value for key, value in sorted(files.items())))
        repository = Repository(digest.hexdigest()[:40], files, token, lfs)
        self.repositories[repo_id] = repository
        self.history.setdefault(repo_id, {})[repository.commit] = repository
        return _sha256(content)

    def fault(self, kind: str, *faults: Fault) -> None:
        """For the next requests of a kind (head, resolve, api, body), one each."""
        self._faults += [(kind, each) for each in faults]

    def expire(self) -> None:
        """All addresses signed so far."""
        self._expired |= {str(i) for i in range(self._signature + 1)}

    def of(self, kind: str) -> list[Seen]:
        return [seen for seen in self.requests if seen.kind == kind]

    def find(self, repo_id: str, revision: str | None) -> Repository | None:
        if revision in (None, "main"):
            return self.repositories.get(repo_id)
        return self.history.get(repo_id, {}).get(str(revision))

    def take_fault(self, kind: str) -> Fault:
        with self._lock:
            for i, (wanted, fault) in enumerate(self._faults):
                if wanted == kind:
                    del self._faults[i]
                    return fault
        return Fault()

    def sign(self) -> str:
        with self._lock:
            self._signature += 1
            return str(self._signature)

    def is_expired(self, signature: str) -> bool:
        return signature in self._expired

    def note(self, seen: Seen) -> None:
        with self._lock:
            self.requests.append(seen)

    def count(self, n: int) -> None:
        with self._lock:
            self.sent += n
        self.on_body(self.sent)

    @property
    def cdn(self) -> str:
        return f"http://127.0.0.1:{self._ports[1]}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], hub: LoopbackHub, number: int) -> None:
        self.hub, self.number = hub, number
        self.open: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def drop(self) -> None:
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients are killed in these tests


def _reset(connection: socket.socket) -> None:
    """Close with RST instead of FIN."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
        connection.close()
    except OSError:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.open.add(self.connection)

    def finish(self) -> None:
        self.server.open.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer("head")

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self._answer("body" if self.server.number else "api" if path.startswith("/api/") else "resolve")

    @property
    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _answer(self, kind: str) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        hub.note(Seen(kind, path, int(match[1]) if match else 0, self._token))
        fault = hub.take_fault(kind)
        if hub.is_portal or fault.how == "html":
            self._send(200, b"<html>Please log in</html>", {"Content-Type": "text/html"})
        elif fault.status:
            extra = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            self._send(fault.status, b"busy", extra)
        elif kind == "body":
            self._blob(fault)
        elif kind == "api":
            self._api(path)
        else:
            self._resolve(path, fault)

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _refused(self, repository: Repository) -> bool:
        """Whether a gated repository is closed to this request; then it has been answered."""
        if repository.token is None or self._token == repository.token:
            return False
        if self._token == "known":
            self._error(403, "GatedRepo", "Access to this repository is restricted")
        elif self._token:
            self._error(401, "", "Invalid credentials in Authorization header")
        else:
            self._error(401, "GatedRepo", "Access to this repository is restricted")
        return True

    def _api(self, path: str) -> None:
        match = _API.fullmatch(path)
        hub = self.server.hub
        if not match:
            self._send(404, b"{}")  # telemetry and the like
            return
        if match["repo"] not in hub.repositories:
            self._error(401, "RepoNotFound", "Repository not found")
            return
        repository = hub.find(match["repo"], match["revision"])
        if repository is None:
            self._error(404, "RevisionNotFound", "Invalid rev id")
            return
        siblings = [
            {"rfilename": name, "size": len(content), "blobId": "0" * 40}
            | ({"lfs": _lfs(content)} if repository.lfs else {})
            for name, content in repository.files.items()
        ]
        body = {"id": match["repo"], "modelId": match["repo"], "sha": repository.commit, "siblings": siblings}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _resolve(self, path: str, fault: Fault) -> None:
        match = _RESOLVE.fullmatch(path)
        hub = self.server.hub
        if not match or match["repo"] not in hub.repositories:
            self._error(401, "RepoNotFound", "Repository not found")
            return
        repository = hub.find(match["repo"], match["revision"])
        if repository is None:
            self._error(404, "RevisionNotFound", "Invalid rev id")
            return
        if self._refused(repository):
            return
        content = repository.files.get(match["name"])
        if content is None:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        headers = {"X-Repo-Commit": repository.commit}
        if not repository.lfs:
            self._content(content, fault, headers | {"ETag": '"%s"' % hashlib.sha1(content).hexdigest()})  # noqa: UP031
            return
        sha256 = _sha256(content)
        size = hub.announced.get(match["name"], len(content))
        place = f"{hub.cdn}/{match['repo']}/{repository.commit}/{match['name']}?signature={hub.sign()}"
        headers |= {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(size), "Location": place}
        self._send(302, b"", headers)

    def _blob(self, fault: Fault) -> None:
        hub = self.server.hub
        parts = urlsplit(self.path)
        if hub.is_expired(parts.query.rpartition("=")[2]):
            self._send(403, b"Request has expired")
            return
        _, owner, name, commit, file = unquote(parts.path).split("/", 4)
        repository = hub.history[f"{owner}/{name}"][commit]
        self._content(repository.files[file], fault, {})

    def _content(self, content: bytes, fault: Fault, headers: dict[str, str]) -> None:
        match = _RANGE.fullmatch(self.headers.get("Range", "")) if self.server.hub.has_ranges else None
        start = int(match[1]) if match else 0
        if start >= len(content):
            self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        end = min(len(content), int(match[2]) + 1) if match and match[2] else len(content)
        body = memoryview(content)[start:end]
        if match:
            headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
        self.send_response(206 if match else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        length = fault.after if fault.how == "short" else len(body)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self._write(body[:length], fault)

    def _write(self, body: memoryview, fault: Fault) -> None:
        if fault.how == "flip":
            flipped = bytearray(body)
            flipped[fault.after] ^= 1
            body = memoryview(flipped)
        whole = fault.after if fault.how in ("cut", "reset", "stall") else len(body)
        step = 1 << 14 if fault.how == "slow" else 1 << 20
        for i in range(0, whole, step):
            piece = body[i : min(i + step, whole)]
            self.wfile.write(piece)
            self.server.hub.count(len(piece))
            if fault.how == "slow":
                time.sleep(fault.seconds)
        self.wfile.flush()
        if fault.how in ("cut", "reset", "stall"):
            time.sleep(fault.seconds)
            self.close_connection = True
            if fault.how == "reset":
                _reset(self.connection)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@lru_cache(maxsize=64)
def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _lfs(content: bytes) -> dict[str, object]:
    return {"sha256": _sha256(content), "size": len(content), "pointerSize": 130}
