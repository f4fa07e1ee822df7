"""Clients that offer another protocol, as Java's does with its first request, are answered in HTTP/1.1."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from alone import environment_at
from test_serve import Server, running

OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\n"
BODY = json.dumps({"prompt": "hi", "max_tokens": 1}).encode()
HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\n" + OFFER
SIZED = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY)
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(environment_at(tmp_path_factory.mktemp("home"))) as started:
        yield started


def statuses(server: Server, *parts: bytes) -> list[bytes]:
    """Of the answers on one connection, to requests that are sent in these parts. The last one must close it."""
    host = urlsplit(server.url)
    with socket.create_connection((host.hostname or "", host.port or 0), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(0.02)  # so that they arrive one by one
        received = b""
        while part := connection.recv(65536):
            received += part
    return re.findall(rb"HTTP/1\.1 (\d+) ", received)


LAST = HEALTH + b"Connection: close\r\n\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        (SIZED + BODY, LAST),
        (SIZED, BODY, LAST),
        (SIZED[:40], SIZED[40:] + BODY[:5], BODY[5:], LAST),
        (SIZED + BODY + LAST,),
        (CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY), LAST),
        (HEALTH + OFFER + b"\r\n", LAST),
        (HEALTH + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + LAST,),
    ],
)
def test_the_offer_is_passed_over_and_the_body_is_read(parts: tuple[bytes, ...], server: Server) -> None:
    assert statuses(server, *parts) == [b"200", b"200"]


def test_the_offer_may_be_made_again_and_again(server: Server) -> None:
    assert statuses(server, SIZED + BODY, SIZED + BODY, SIZED + BODY, LAST) == [b"200"] * 4


def test_a_body_behind_an_offer_has_its_limit(environment: dict[str, str]) -> None:
    with running(environment, "--max-body", "20") as small:
        assert statuses(small, SIZED + BODY) == [b"413"]
