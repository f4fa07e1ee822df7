"""Faults on demand: what may go wrong between a client and a server, said in a line and done to an answer.

    status=429, retry-after=2, delay=1.5, cut-after=10, token-rate=20, malformed

Which requests it happens to is said by their own header, or by rules (rules.py).
"""

from __future__ import annotations

import asyncio
import math
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from llamacli.errors import UsageError
from llamacli.server.exchange import ClientGone, Exchange, Send
from llamacli.server.failure import Failure

HEADER = "x-simulate"
MARK = "x-simulated"
MAX_SECONDS = 3600.0  # of a delay; a model's answer waits as long for its slowed stream
LET_GO_SECONDS = 5.0  # for what was sent before the cut to be read
_EVENT = re.compile(rb"(.*?)(\r?\n\r?\n)", re.DOTALL)
_DRIPS = 10  # a second, of slow bytes
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+/[\x21-\x7e ]+", re.ASCII)


class CutOff(Exception):
    """The connection was broken, as it was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """shown          as it was asked for
    status         an error instead of the answer, in the shape of its API
    retry_after    seconds, in the header of that name
    delay          seconds before the answer
    token_rate     events of a stream in a second
    cut_after      events of a stream after which the connection ends, without a last chunk
    malformed      half of the JSON, of a stream's first event
    content_type   instead of the right one
    reset          the connection is reset: at once, or after so many events
    slow_bytes     of the body in a second
    """

    shown: str = ""
    status: int | None = None
    retry_after: int | None = None
    delay: float = 0.0
    token_rate: float | None = None
    cut_after: int | None = None
    malformed: bool = False
    content_type: str | None = None
    reset: bool = False
    slow_bytes: float | None = None


def parse(text: str) -> Fault:
    """Raises UsageError naming what is wrong; an unknown key with all that are known."""
    given: dict[str, Any] = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        if not (part.isascii() and part.isprintable()):  # it is told in a header
            raise UsageError(f"the simulation {part[:50]!r} must be of printable ASCII characters")
        key, sign, value = (each.strip() for each in part.partition("="))
        read = _KEYS.get(key)
        if read is None:
            raise UsageError(f"the simulation {key[:50]!r} is unknown; known are {', '.join(_KEYS)}")
        name = key.replace("-", "_")
        if name in given:
            raise UsageError(f"the simulation {key} is given twice")
        try:
            given[name] = read(value if sign else None)
        except ValueError as error:
            raise UsageError(f"the simulation {key} must be {error}, not {value[:50]!r}") from None
    if not given:
        raise UsageError(f"a simulation is missing; known are {', '.join(_KEYS)}")
    return Fault(shown=", ".join(part.strip() for part in text.split(",") if part.strip())[:300], **given)


def _number(low: float, high: float, *, is_low_allowed: bool = True) -> Callable[[str | None], float]:
    span = f"a number between {low:g} and {high:g}" if is_low_allowed else f"a number above {low:g}, up to {high:g}"

    def read(value: str | None) -> float:
        try:
            number = float(value or "")
        except ValueError:
            raise ValueError(span) from None
        if not low <= number <= high or (number == low and not is_low_allowed):
            raise ValueError(span)
        return number

    return read


def _integer(low: int, high: int) -> Callable[[str | None], int]:
    def read(value: str | None) -> int:
        if value is None or not re.fullmatch("[0-9]{1,9}", value) or not low <= int(value) <= high:
            raise ValueError(f"an integer between {low} and {high}")
        return int(value)

    return read


def _flag(value: str | None) -> bool:
    if value is not None:
        raise ValueError("without a value")
    return True


def _media_type(value: str | None) -> str:
    if value is None or not _TOKEN.fullmatch(value):
        raise ValueError("a type such as text/html")
    return value


_KEYS: dict[str, Callable[[str | None], object]] = {
    "status": _integer(400, 599),
    "retry-after": _integer(0, 86_400),
    "delay": _number(0, MAX_SECONDS),
    "token-rate": _number(0, 1e6, is_low_allowed=False),
    "cut-after": _integer(0, 10**6),
    "malformed": _flag,
    "content-type": _media_type,
    "reset": _flag,
    "slow-bytes": _number(0, 1e9, is_low_allowed=False),
}


async def befall(fault: Fault, exchange: Exchange) -> None:
    """Let it happen to an answer of which nothing has been sent. Only after the body has been read.

    Raises Failure for a status, CutOff for a connection that is broken, ClientGone when nobody waits any more.
    """
    exchange.extra.append((MARK, fault.shown))
    await _wait(fault.delay, exchange)
    if fault.reset and fault.cut_after is None:
        await _break(exchange, is_reset=True)
    exchange.send_through(lambda send: _Way(fault, exchange, send))
    if fault.status is not None:
        raise Failure(fault.status, f"simulated: {fault.shown}", code="simulated")


class _Way:
    """What is sent on its way to the client, with what befalls it there."""

    def __init__(self, fault: Fault, exchange: Exchange, send: Send) -> None:
        self._fault = fault
        self._exchange = exchange
        self._send = send
        self._start: MutableMapping[str, Any] | None = None
        self._length: int | None = None  # of the body; None for a stream
        self._n_events = 0
        self._rest = b""  # of an event whose end has not come yet

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._begin(message)
        elif self._length is not None:
            await self._whole(message["body"])
        else:
            await self._stream(message.get("body", b""), is_last=not message.get("more_body"))

    def _begin(self, message: MutableMapping[str, Any]) -> None:
        """Held back until the body is there: half of one has another length."""
        headers = {name.lower(): value for name, value in message["headers"]}
        if self._fault.content_type is not None:
            headers[b"content-type"] = self._fault.content_type.encode()
        if self._fault.retry_after is not None:
            headers[b"retry-after"] = str(self._fault.retry_after).encode()
        self._length = int(headers[b"content-length"]) if b"content-length" in headers else None
        self._start = {**message, "headers": list(headers.items())}

    async def _whole(self, body: bytes) -> None:
        assert self._start is not None
        if self._fault.malformed:
            body = body[: len(body) // 2]
            kept = [pair for pair in self._start["headers"] if pair[0] != b"content-length"]
            self._start["headers"] = [*kept, (b"content-length", str(len(body)).encode())]
        await self._send(self._start)
        async for piece in self._dripping(body):
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        await self._send({"type": "http.response.body", "body": b""})

    async def _stream(self, data: bytes, *, is_last: bool) -> None:
        if self._start is not None:
            await self._send(self._start)
            self._start = None
            # The server keeps the head until something follows it; one that is cut at once has its head all the same.
            await self._send({"type": "http.response.body", "body": b"", "more_body": True})
            await self._cut_if_due()
        self._rest += data
        while event := _EVENT.match(self._rest):
            self._rest = self._rest[event.end() :]
            await self._event(self._halved(event[1]) + event[2])
        if is_last:
            await self._send({"type": "http.response.body", "body": self._rest})

    async def _event(self, event: bytes) -> None:
        if self._n_events and self._fault.token_rate:
            await _wait(1 / self._fault.token_rate, self._exchange)
        async for piece in self._dripping(event):
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        self._n_events += 1
        await self._cut_if_due()

    def _halved(self, event: bytes) -> bytes:
        is_first = self._n_events == 0
        return event[: len(event) // 2] if self._fault.malformed and is_first else event

    async def _cut_if_due(self) -> None:
        if self._fault.cut_after == self._n_events:
            await _break(self._exchange, is_reset=self._fault.reset)

    async def _dripping(self, data: bytes) -> AsyncIterator[bytes]:
        rate = self._fault.slow_bytes
        if rate is None:
            yield data
            return
        size = max(1, math.ceil(rate / _DRIPS))
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            if start:
                await _wait(len(piece) / rate, self._exchange)
            yield piece


async def _wait(seconds: float, exchange: Exchange) -> None:
    """Raises ClientGone when the client goes first."""
    if seconds <= 0:
        return
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await exchange.gone()
        raise ClientGone


async def _break(exchange: Exchange, *, is_reset: bool) -> None:
    """End the connection as it is. Raises CutOff."""
    transport = exchange.transport
    assert transport is not None, "the server gives each exchange its transport"
    if is_reset:
        with suppress(TimeoutError):
            async with asyncio.timeout(LET_GO_SECONDS):
                while transport.get_write_buffer_size():
                    await asyncio.sleep(0.01)
        found = transport.get_extra_info("socket")
        if found is not None and found.family != socket.AF_UNIX:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()
    # uvicorn complains of an application that ends before its answer, unless the connection has ended before.
    try:
        async with asyncio.timeout(LET_GO_SECONDS):
            await exchange.gone()
    except TimeoutError:
        transport.abort()
        await exchange.gone()
    raise CutOff
