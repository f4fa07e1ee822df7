"""Another server that answers in the model's place: the question goes on to it, and its answer comes back as it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from llamacli.remote import address
from llamacli.remote.post import Line, Reply, post
from llamacli.server.access import KEY_HEADER, presented_key
from llamacli.server.exchange import EVENTS, JSON, ClientGone, Exchange
from llamacli.server.failure import Failure, speaks_openai
from llamacli.server.log import Record
from llamacli.server.matching import GET_DATA, route_of
from llamacli.server.recorder import is_kept
from llamacli.server.service import AT_ONCE_BESIDE
from llamacli.server.standin import UPSTREAM, take_over_trace_id

OPTION = "--upstream"
KEY_VARIABLE = "LLAMACLI_UPSTREAM_KEY"
_PASSED_ON = ("content-type", "accept", "cache-control", "traceparent", "x-request-id")


@dataclass(slots=True)
class Upstream:
    """url       as address.of() takes it
    key       for that server; None passes on what the client has sent
    silence   seconds without a byte after which it is given up
    is_ours   whether a client's key is one of this server's own, which is nobody else's business
    """

    url: str
    key: str | None
    silence: float
    is_ours: Callable[[str], bool] = lambda key: False
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(AT_ONCE_BESIDE, thread_name_prefix="upstream")
    )

    def __post_init__(self) -> None:
        """Raises UsageError for a URL that is none."""
        self._address(GET_DATA)

    @property
    def shown(self) -> str:
        return self._address(GET_DATA).shown

    async def answer(self, raw: bytes, exchange: Exchange, record: Record) -> Failure | None:
        """A StandIn, which always has an answer. Raises RemoteError (502) when it has none to give."""
        record.source = UPSTREAM
        loop = asyncio.get_running_loop()
        to, headers = self._address(route_of(exchange.path)), self._headers(exchange)
        watcher, line = asyncio.ensure_future(exchange.gone()), Line()
        asking = loop.run_in_executor(self._threads, lambda: post(to, raw, headers, silence=self.silence, line=line))
        try:
            await _first(asking, watcher)
            if not asking.done():
                raise ClientGone
            await self._pass_back(asking.result(), watcher, exchange, record)
        finally:
            watcher.cancel()
            line.cut()  # a thread that nobody waits for would be missing for others
            asking.add_done_callback(_forget)
        return None

    async def _pass_back(self, reply: Reply, watcher: asyncio.Future[None], exchange: Exchange, record: Record) -> None:
        kept = {name.lower(): value for name, value in reply.headers if is_kept(name.lower())}
        take_over_trace_id(_plain(reply.header("x-trace-id")), exchange, record)
        parts = _Parts(reply, self._threads)
        try:
            if reply.content_type == EVENTS:
                await self._stream(reply.status, kept, parts, watcher, exchange)
            else:
                body = await parts.whole(watcher)
                kind = kept.pop("content-type", JSON)
                await exchange.respond(reply.status, body, kind, kept.items())
        finally:
            parts.close()

    async def _stream(
        self,
        status: int,
        headers: Mapping[str, str],
        parts: _Parts,
        watcher: asyncio.Future[None],
        exchange: Exchange,
    ) -> None:
        async for part in parts.until(watcher):
            if exchange.status is None:
                await exchange.start_events(status, headers)
            await exchange.events(part)
        if exchange.status is None:
            await exchange.start_events(status, headers)
        await exchange.events(b"", last=True)

    def _address(self, route: str) -> address.Address:
        return address.of(self.url, route, option=OPTION, key=KEY_VARIABLE)

    def _headers(self, exchange: Exchange) -> dict[str, str]:
        found = exchange.headers
        headers = {name: found[name] for name in _PASSED_ON if name in found}
        headers.setdefault("content-type", JSON)
        if self.key is not None:
            openai_s = {"authorization": f"Bearer {self.key}"}
            return headers | (openai_s if speaks_openai(exchange.path) else {KEY_HEADER: self.key})
        theirs = presented_key(found, exchange.query)
        if theirs is None or self.is_ours(theirs):
            return headers
        as_sent = {name: found[name] for name in (KEY_HEADER, "authorization") if name in found}
        return headers | (as_sent or {KEY_HEADER: theirs})


class _Parts:
    """The body of a reply, read in a thread, a part at a time and no further than somebody wants it."""

    def __init__(self, reply: Reply, threads: ThreadPoolExecutor) -> None:
        self._reply = reply
        self._threads = threads
        self._parts = reply.parts()

    async def until(self, watcher: asyncio.Future[None]) -> AsyncIterator[bytes]:
        """Raises RemoteError when it breaks off, ClientGone when `watcher` is done first."""
        loop = asyncio.get_running_loop()
        while True:
            reading = loop.run_in_executor(self._threads, next, self._parts, None)
            await _first(reading, watcher)
            if not reading.done():
                reading.add_done_callback(_forget)
                raise ClientGone
            part = reading.result()
            if part is None:
                return
            yield part

    async def whole(self, watcher: asyncio.Future[None]) -> bytes:
        """Raises what until() raises, and RemoteError for a body that is too big."""
        parts, size = [], 0
        async for part in self.until(watcher):
            parts.append(part)
            size += len(part)
            self._reply.check_size(size)
        return b"".join(parts)

    def close(self) -> None:
        self._reply.close()


async def _first(one: asyncio.Future[Any], other: asyncio.Future[Any]) -> None:
    await asyncio.wait({one, other}, return_when=asyncio.FIRST_COMPLETED)


def _forget(asked: asyncio.Future[Any]) -> None:
    if not asked.cancelled():
        asked.exception()


def _plain(trace_id: str) -> str:
    return trace_id[:128] if trace_id.isascii() and trace_id.isprintable() else ""
