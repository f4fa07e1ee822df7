"""One HTTP request and its answer over ASGI: the body within its limits, an answer at once or as an event stream.

Knows nothing of routes or of what is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any
from urllib.parse import parse_qsl

from llamacli.server.failure import Failure

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

JSON = "application/json"
EVENTS = "text/event-stream"
Headers = Iterable[tuple[str, str]]


class ClientGone(Exception):
    """The client has closed the connection, or has read nothing for too long."""


class Exchange:
    """A request, and the answer as far as it has gone.

    shown_path   what of the path may be told and logged: with its "?" encoded, a key may stand behind it
    headers   names in lower case; of a header sent twice, the last
    socket    path of the Unix socket that it came by; None for TCP
    refusal   why the request cannot be answered: it could not even be read
    port      that it came to; None for a Unix socket
    status    None until the answer has begun
    transport   the connection itself, for whoever has to break it
    extra     headers that every answer of this exchange carries
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.shown_path: str = self.path.partition("?")[0]
        self.scheme: str = scope.get("scheme", "http")
        host, port = scope.get("server") or ("", 0)
        self.socket: str | None = host if port is None else None
        self.port: int | None = port
        self.peer: str = (scope.get("client") or ("local",))[0]
        self.headers: dict[str, str] = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        self.query_string: str = scope["query_string"].decode("latin-1")
        self.refusal: Failure | None = scope.get("refusal")
        self.status: int | None = None
        self.extra: list[tuple[str, str]] = []
        self.transport: asyncio.Transport | None = scope.get("state", {}).get("transport")
        self._receive = receive
        self._send = send

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.query_string, keep_blank_values=True)) if self.query_string else {}

    @property
    def forbids_storing(self) -> bool:
        """Cache-Control: no-store (RFC 9111, 5.2.1.5)."""
        return "no-store" in map(str.strip, self.headers.get("cache-control", "").lower().split(","))

    async def body(self, limit: int, seconds: float) -> bytes:
        """The whole body. Raises Failure 413 above `limit` bytes, 408 when it takes longer than `seconds`."""
        declared = self.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            raise self._too_large(limit)
        try:
            async with asyncio.timeout(seconds):
                return await self._read(limit)
        except TimeoutError:
            raise Failure(
                408, f"the body did not arrive within {seconds:g} s", headers={"connection": "close"}
            ) from None

    async def _read(self, limit: int) -> bytes:
        parts = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise self._too_large(limit)
            parts.append(part)
            if not message.get("more_body"):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    def _too_large(self, limit: int) -> Failure:
        return Failure(413, f"the body is larger than {limit:,} bytes", headers={"connection": "close"})

    async def gone(self) -> None:
        """Returns when the client has closed the connection. Only after the body has been read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def send_through(self, way: Callable[[Send], Send]) -> None:
        """From now on all that is sent goes this way."""
        self._send = way(self._send)

    async def respond(self, status: int, body: bytes, content_type: str = JSON, headers: Headers = ()) -> None:
        await self._start(status, [("content-type", content_type), ("content-length", str(len(body))), *headers])
        await self._send({"type": "http.response.body", "body": b"" if self.method == "HEAD" else body})

    async def start_events(self, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """`headers` in place of those of the same name."""
        usual = {"content-type": EVENTS, "cache-control": "no-cache", "x-accel-buffering": "no"}
        await self._start(status, [*(usual | dict(headers or {})).items()])

    async def events(self, data: bytes, *, last: bool = False, closes: bool = False) -> None:
        """Send events that are already in their wire form. Waits while the client does not read.

        closes   the connection, after the last ones
        """
        await self._send({"type": "http.response.body", "body": data, "more_body": not last, "closes": closes})

    async def _start(self, status: int, headers: Headers) -> None:
        encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (*headers, *self.extra)]
        self.status = status  # not before: with a header that cannot be sent, nothing has begun
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})


def event(data: str) -> bytes:
    """A server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html) of one line."""
    return f"data: {data}\n\n".encode()


DONE = event("[DONE]")
