"""Requests as the bytes that they are, for clients that no HTTP library would be; and a server seen from outside."""

from __future__ import annotations

import io
import json
import socket
import time
from contextlib import suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from test_serve import Reply, Server

HOST = b"Host: localhost\r\n"


def connected(server: Server, **options: Any) -> socket.socket:
    place = urlsplit(server.url)
    return socket.create_connection((place.hostname or "", place.port or 0), **{"timeout": 30, **options})


def post(body: Any, *headers: str, path: str = "/v1/getData", version: str = "1.1") -> bytes:
    """A request. `body` is JSON's value, or bytes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: localhost", f"Content-Length: {len(raw)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + raw


def get(path: str, *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: localhost", *headers, "", ""]).encode()


def talk(server: Server, *parts: bytes, is_half_closed: bool = False, nap: float = 0.0) -> bytes:
    """All that the server says until it hangs up; it is an error if it does not. `nap` comes before each part."""
    with connected(server) as client:
        for part in parts:
            time.sleep(nap)
            client.sendall(part)
        if is_half_closed:
            client.shutdown(socket.SHUT_WR)
        return until_closed(client)


def until_closed(client: socket.socket) -> bytes:
    received = b""
    while part := client.recv(1 << 16):
        received += part
    return received


class _Said:
    """What http.client wants of a socket."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream

    def makefile(self, mode: str) -> io.BufferedReader:
        return self._stream


class _KeptOpen(io.BufferedReader):
    def close(self) -> None: ...


def answers(received: bytes, *methods: str) -> list[Reply]:
    """The answers in what a server has said, one to each of the methods; POST where none are named."""
    stream = _KeptOpen(io.BytesIO(received))
    found: list[Reply] = []
    while stream.peek(1):
        method = methods[len(found)] if len(found) < len(methods) else "POST"
        response = HTTPResponse(_Said(stream), method=method)  # type: ignore[arg-type]
        response.begin()
        headers = {name.lower(): value for name, value in response.getheaders()}
        found.append(Reply(response.status, headers, response.read().decode()))
    return found


def metric(server: Server, name: str) -> float:
    text = server.request("GET", "/metrics").text
    return float(text.rpartition(f"\nllamacli_{name} ")[2].split("\n")[0])


def is_quiet(server: Server) -> bool:
    """Nothing is computed, and nothing waits to be."""
    return metric(server, "slots_busy") == metric(server, "queue_depth") == 0


def eventually(happens: Any, seconds: float = 20.0) -> None:
    ends = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < ends
        time.sleep(0.02)


def n_files(pid: int) -> int:
    place = Path(f"/proc/{pid}/fd")
    if not place.exists():
        pytest.skip("needs /proc")
    return sum(1 for _ in place.iterdir())


def resident(pid: int) -> int:
    """Bytes of memory that are a process's own: not those of the model's file, which come and go."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def state_of(pid: int) -> str:
    """R, S, Z ...; empty when there is no such process."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    return ""
