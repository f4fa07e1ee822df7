"""One request of a connection and its answer: ASGI messages inside, HTTP/1 on the wire.

Knows nothing of parsing, nor of the requests before and behind it. Reference: RFC 9110, RFC 9112.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from http import HTTPStatus
from typing import Protocol

from llamacli.server.exchange import App, Message, Scope
from llamacli.server.failure import Failure

GREETING = b"HTTP/1.1 "  # every answer begins with it
_CONTINUE = GREETING + b"100 Continue\r\n\r\n"
_WITHOUT_BODY = (204, 304)


class Wire(Protocol):
    """The connection, as a turn sees it."""

    def write(self, data: bytes) -> None: ...

    async def writable(self) -> None:
        """Waits while the client does not take what was written. Returns when it is gone, too."""

    def read_on(self) -> None:
        """The turn has taken what there was of its body."""

    def default_headers(self) -> Iterable[tuple[bytes, bytes]]: ...


class Turn:
    """A request, its body as far as it has come, and the answer as far as it has gone.

    scope          ASGI's; `refusal` in it is a Failure that is to be its answer
    keeps_alive    another request may follow
    is_received    the whole request is there
    is_started     the first bytes of the answer are written; `is_over`: all of them are
    is_gone        the client is not there any more
    """

    def __init__(self, wire: Wire, scope: Scope, *, keeps_alive: bool, awaits_continue: bool = False) -> None:
        self.scope = scope
        self.keeps_alive = keeps_alive
        self.is_received = False
        self.is_started = False
        self.is_over = False
        self.is_gone = False
        self._wire = wire
        self._awaits_continue = awaits_continue
        self._body = bytearray()
        self._broken: Failure | None = None
        self._news = asyncio.Event()
        self._head = b""  # is sent together with what follows it
        self._is_bodiless = False  # whatever is given for a body
        self._is_chunked = False
        self._n_missing: int | None = None  # bytes of a body whose length is told beforehand

    @property
    def n_buffered(self) -> int:
        """Bytes of the body that nobody has taken yet."""
        return len(self._body)

    # -- what the connection tells --

    def feed(self, data: bytes) -> None:
        if not self.is_over:
            self._body += data
            self._news.set()

    def complete(self) -> None:
        self.is_received = True
        self._news.set()

    def fail(self, failure: Failure) -> None:
        """The rest of the request cannot be read."""
        self._broken = failure
        self.keeps_alive = False
        self._news.set()

    def leave(self) -> None:
        self.is_gone = True
        self._news.set()

    # -- ASGI --

    async def run(self, app: App) -> None:
        await app(self.scope, self.receive, self.send)

    async def receive(self) -> Message:
        """Raises Failure for a body that cannot be read."""
        if self._awaits_continue and not self.is_gone:
            self._awaits_continue = False
            self._wire.write(_CONTINUE)
        if not self._is_done:
            self._wire.read_on()
            await self._news.wait()
            self._news.clear()
        if self._is_done:
            return {"type": "http.disconnect"}
        if self._broken is not None:
            raise self._broken
        body = bytes(self._body)
        self._body.clear()
        return {"type": "http.request", "body": body, "more_body": not self.is_received}

    @property
    def _is_done(self) -> bool:
        return self.is_gone or self.is_over

    async def send(self, message: Message) -> None:
        """`closes` in the last message: no other request may follow."""
        if not self.is_gone:
            await self._wire.writable()
        if self.is_gone:
            return
        if message["type"] == "http.response.start":
            assert not self._head and not self.is_started
            self._head = self._started(message["status"], list(message.get("headers", ())))
            return
        assert not self.is_over, "there is an end to every answer"
        body, more = message.get("body", b""), message.get("more_body", False)
        data = self._head + self._framed(body, more)
        self._head = b""
        if data:
            self.is_started = True
            self._wire.write(data)
        if not more:
            assert not self._n_missing, f"{self._n_missing} bytes of the answer are missing"
            self.keeps_alive = self.keeps_alive and not message.get("closes", False)
            self.is_over = True
            self._body.clear()
            self._news.set()

    def _started(self, status: int, headers: list[tuple[bytes, bytes]]) -> bytes:
        """Status line and headers; settles how the end of the body will be told."""
        named = dict(headers)
        if self._awaits_continue or b"close" in named.get(b"connection", b"").lower():
            self.keeps_alive = False  # whether a body is to come that nobody has asked for, only the client knows
        # RFC 9110, 8.6: a 204 has no length either; that of a HEAD or a 304 is the one that a GET would have had.
        unwanted = (b"connection", b"content-length") if status == HTTPStatus.NO_CONTENT else (b"connection",)
        headers = [(name, value) for name, value in headers if name not in unwanted]
        is_old = self.scope["http_version"] != "1.1"
        self._is_bodiless = self.scope["method"] == "HEAD" or status in _WITHOUT_BODY
        if not self._is_bodiless:
            if b"content-length" in named:
                self._n_missing = int(named[b"content-length"])
            elif is_old:
                self.keeps_alive = False  # the end of the connection is the end of the body
            else:
                self._is_chunked = True
                headers.append((b"transfer-encoding", b"chunked"))
        if not self.keeps_alive:
            headers.append((b"connection", b"close"))
        elif is_old:
            headers.append((b"connection", b"keep-alive"))
        lines = [name + b": " + value for name, value in (*self._wire.default_headers(), *headers)]
        return b"\r\n".join([GREETING + b"%d %s" % (status, _phrase(status)), *lines, b"", b""])

    def _framed(self, body: bytes, more: bool) -> bytes:
        if self._n_missing is not None:
            self._n_missing -= len(body)
            assert self._n_missing >= 0, "the answer is longer than it was said to be"
        if self._is_bodiless:
            return b""
        if not self._is_chunked:
            return body
        chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
        return chunk if more else chunk + b"0\r\n\r\n"


def _phrase(status: int) -> bytes:
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b""
