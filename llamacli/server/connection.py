"""An HTTP/1 connection: requests in, answers out in their order, a client's patience and ours.

llhttp reads, turn.py writes; uvicorn accepts. Knows nothing of what is asked. Beyond what uvicorn's own protocol does:
limits for slow and for oversized requests, a client that has closed its side of the connection and waits for the
answer, one that closes it while its next request waits, HTTP/1.0, `Upgrade`, and answers that arrive although the
request was not read to its end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import select
import socket
import struct
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import unquote

import httptools

from llamacli.server.exchange import Scope
from llamacli.server.failure import Failure
from llamacli.server.turn import GREETING, Turn

MAX_HEAD = 64 << 10  # bytes of a request's first line and its headers, or of its trailers
MAX_HEADERS = 256
MAX_TURNS = 16  # requests of one client that are read ahead
HIGH_WATER = 64 << 10  # bytes of a body that are read ahead
SEND_BUFFER = 256 << 10  # bytes; left to itself the system keeps megabytes for each client that does not read
_SLICE = 16 << 10  # bytes that are parsed at once: nothing is over its limit by more than that
_LINGER_SECONDS = 2.0  # for a client to read why its request was not read to the end
_FIRST_LOOK, _LAST_LOOK = 0.002, 0.1  # seconds between looks at a connection that cannot be read from
_QUERY = re.compile(rb"\?|%3f", re.IGNORECASE)  # may hold a key, which is not to be told nor logged
_POLLRDHUP = getattr(select, "POLLRDHUP", 0)  # Linux only

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Seconds that a client is given.

    headers   from the first byte of a request to the end of its headers
    body      to the end of its body
    reading   to take anything at all of what is written to it
    idle      until its next request
    """

    headers: float = 15.0
    body: float = 30.0
    reading: float = 60.0
    idle: float = 75.0


class Connection(asyncio.Protocol):
    """One client. `config` and `server` are uvicorn's."""

    def __init__(
        self,
        config: Any,
        server_state: Any,
        app_state: Any,
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        patience: Patience,
    ) -> None:
        self._app = config.loaded_app
        self._server = server_state
        self._loop = _loop or asyncio.get_event_loop()
        self._patience = patience
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._parser = httptools.HttpRequestParser(self)
        self._unparsed = bytearray()
        self._turns: deque[Turn] = deque()  # the first one is being answered
        self._arriving: Turn | None = None  # the last one, until its body is there
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._framing: list[tuple[bytes, bytes]] = []  # those that tell where the body ends
        self._n_head = 0  # bytes of what is neither a body nor whole yet
        self._is_in_head = False
        self._is_resumed = False  # after an Upgrade that was not taken
        self._is_paused = False  # nothing is read
        self._is_deaf = False  # what comes is thrown away
        self._is_half_closed = False
        self._is_greeted = False  # the first bytes of the answer are sent already
        self._is_leaving = False  # no request after those that are here
        self._is_hung_up = False
        self._is_writable = asyncio.Event()
        self._is_writable.set()
        self._deadline: asyncio.TimerHandle | None = None  # for what the client has to do next
        self._doom: asyncio.TimerHandle | None = None  # for what it has to take
        self._watch: asyncio.TimerHandle | None = None

    # -- asyncio.Protocol --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server.connections.add(self)
        self._set(socket.SO_SNDBUF, SEND_BUFFER)
        self._wait_for_client(self._patience.headers, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        for timer in (self._deadline, self._doom, self._watch):
            if timer is not None:
                timer.cancel()
        self._is_deaf = True
        self._unparsed.clear()
        self._is_writable.set()
        for turn in self._turns:
            turn.leave()

    def data_received(self, data: bytes) -> None:
        if not self._is_deaf:
            self._unparsed += data
            self._parse()

    def eof_received(self) -> bool:
        """The client will send nothing more. It may still wait for its answers: see _look."""
        self._is_half_closed = True
        if self._arriving is not None:
            self._arriving.fail(Failure(400, "the request has ended before its body was there"))
        if not self._turns or self._transport.is_closing():
            return False
        self._stop_waiting()
        self._look_again(_FIRST_LOOK)
        return True

    def pause_writing(self) -> None:
        self._is_writable.clear()
        if self._doom is None:
            self._expect_reading()

    def resume_writing(self) -> None:
        self._is_writable.set()
        if self._doom is not None and not self._is_hung_up:
            self._doom.cancel()
            self._doom = None

    def shutdown(self) -> None:
        """For uvicorn: the server is going down."""
        self._is_leaving = True
        if self._turns:
            self._turns[0].keeps_alive = False
        else:
            self._close()

    # -- limits --

    def _wait_for_client(self, seconds: float, late: Any) -> None:
        self._stop_waiting()
        self._deadline = self._loop.call_later(seconds, late)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expect_reading(self) -> None:
        """Something is written that the client has not taken. What it takes slowly is taken all the same."""
        n_left = self._transport.get_write_buffer_size()
        self._doom = self._loop.call_later(self._patience.reading, self._check_reading, n_left)

    def _check_reading(self, n_left_before: int) -> None:
        if self._transport.get_write_buffer_size() < n_left_before:
            self._expect_reading()
        else:
            self._abort()

    def _give_up(self) -> None:
        """The headers have not come. A client that has sent nothing at all is not told."""
        if self._is_paused:  # its requests before this one take long; that is not its fault
            self._wait_for_client(self._patience.headers, self._give_up)
        elif self._is_in_head:
            seconds = self._patience.headers
            self._refuse(Failure(408, f"the headers of the request did not arrive within {seconds:g} s"))
        elif not self._turns:
            self._close()

    def _abort(self) -> None:
        """With a reset: the system, too, is to forget what nobody has taken."""
        with suppress(OSError):
            self._set(socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _set(self, option: int, value: int | bytes) -> None:
        self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, option, value)

    def _close(self, *, is_unread: bool = False) -> None:
        """Hang up when all is written.

        is_unread   the client may still be sending, and would get a reset instead of the answer: wait until it stops
        """
        self._is_deaf = self._is_hung_up = True
        self._stop_waiting()
        if self._transport.is_closing():
            return
        if self._doom is not None:
            self._doom.cancel()
        if is_unread and not self._is_half_closed:
            self._transport.write_eof()
            self._resume()
            self._doom = self._loop.call_later(_LINGER_SECONDS, self._abort)
        else:
            self._expect_reading()
            self._transport.close()

    # -- reading --

    def _parse(self) -> None:
        while self._unparsed and not self._is_deaf and len(self._turns) < MAX_TURNS:
            data = bytes(self._unparsed[:_SLICE])
            del self._unparsed[:_SLICE]
            self._parse_slice(data)
        if len(self._turns) > 1 or self._unparsed:
            self._pause()

    def _parse_slice(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._unparsed[:0] = data[upgrade.args[0] :]
            self._stay_with_http()
        except httptools.HttpParserError as error:
            self._refuse(_not_http(error))
        else:
            self._check_head(len(data))

    def _check_head(self, n_bytes: int) -> None:
        """Trailers count too, and whatever else stands around the chunks of a body."""
        if self._is_in_head or self._arriving is not None:
            self._n_head += n_bytes
            if self._n_head > MAX_HEAD + _SLICE or len(self._headers) > MAX_HEADERS:
                self._refuse(_too_many_headers())

    def _stay_with_http(self) -> None:
        """llhttp takes what follows an Upgrade for another protocol. None is spoken here: it is the request's body."""
        if self._arriving is None:  # CONNECT
            return
        lines = [b"POST / HTTP/1.1", *(name + b": " + value for name, value in self._framing), b"", b""]
        self._parser = httptools.HttpRequestParser(self)
        self._is_resumed = True
        try:
            self._parser.feed_data(b"\r\n".join(lines))
        except httptools.HttpParserError as error:  # what an Upgrade lets pass: Transfer-Encoding: gzip
            self._refuse(_not_http(error))

    def _refuse(self, failure: Failure) -> None:
        """Answer what cannot be read, after all that could be. What follows is not listened to."""
        self._is_deaf = True
        self._unparsed.clear()
        self._stop_waiting()
        self._is_in_head = False
        if self._arriving is not None:
            self._arriving.fail(failure)
            if self._arriving not in self._turns:  # answered already
                self._close(is_unread=True)
            return
        scope = self._scope("GET", b"/", "1.1")
        scope["refusal"] = failure
        self._enqueue(Turn(self, scope, keeps_alive=False))

    def read_on(self) -> None:
        if len(self._turns) <= 1 and not self._unparsed:
            self._resume()

    def _pause(self) -> None:
        if not self._is_paused and not self._transport.is_closing():
            self._is_paused = True
            self._transport.pause_reading()
            self._look_again(_FIRST_LOOK)

    def _resume(self) -> None:
        if self._is_paused and not self._transport.is_closing():
            self._is_paused = False
            self._transport.resume_reading()

    # -- what llhttp finds --

    def on_message_begin(self) -> None:
        if self._is_resumed:
            return
        self._url, self._headers, self._n_head, self._is_in_head = b"", [], 0, True
        self._wait_for_client(self._patience.headers, self._give_up)

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_resumed and len(self._headers) <= MAX_HEADERS:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._is_resumed:
            return
        self._stop_waiting()
        parser, headers = self._parser, self._headers
        self._is_in_head, self._n_head, self._headers = False, 0, []
        self._framing = [each for each in headers if each[0] in (b"content-length", b"transfer-encoding")]
        version = parser.get_http_version()
        scope = self._scope(parser.get_method().decode("ascii"), self._url, version)
        scope["headers"] = headers
        if version not in ("1.0", "1.1"):
            scope["refusal"] = Failure(505, f"HTTP/{version} is not spoken here: use HTTP/1.1")
        elif len(headers) > MAX_HEADERS:
            scope["refusal"] = _too_many_headers()
        elif (name := _told_twice(headers)) is not None:
            scope["refusal"] = Failure(400, f"the header {name} comes more than once: which one counts is not clear")
        keeps_alive = bool(parser.should_keep_alive()) and "refusal" not in scope
        expects = version == "1.1" and (b"expect", b"100-continue") in [(n, v.lower()) for n, v in headers]
        self._arriving = Turn(self, scope, keeps_alive=keeps_alive, awaits_continue=expects)
        self._enqueue(self._arriving)

    def on_body(self, body: bytes) -> None:
        assert self._arriving is not None
        self._n_head = 0
        self._arriving.feed(body)
        if self._arriving.n_buffered > HIGH_WATER:
            self._pause()

    def on_message_complete(self) -> None:
        is_upgrade = self._parser.should_upgrade() and self._parser.get_method() != b"CONNECT"
        if is_upgrade and self._framing and not self._is_resumed:
            return  # its body is still to come: see _stay_with_http
        turn, self._arriving, self._is_resumed = self._arriving, None, False
        if turn is not None:
            turn.complete()
            if turn.is_over:
                self._wait_for_client(self._patience.idle, self._close)

    def _scope(self, method: str, url: bytes, version: str) -> Scope:
        local, peer = (self._transport.get_extra_info(name) for name in ("sockname", "peername"))
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "server": tuple(local[:2]) if isinstance(local, tuple) else (os.fsdecode(local or b""), None),
            "client": tuple(peer[:2]) if isinstance(peer, tuple) else None,
            "scheme": "http",
            "method": method,
            "root_path": "",
            "headers": [],
            "state": {"transport": self._transport},  # for whoever has to break the connection
        }
        try:
            parsed = httptools.parse_url(url)
            path = parsed.path or b"/"
            scope |= {"path": unquote(path.decode("ascii")), "raw_path": path, "query_string": parsed.query or b""}
        except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
            shown = _QUERY.split(url, 1)[0][:100].decode("latin-1")
            scope |= {"path": "", "raw_path": b"", "query_string": b""}
            scope["refusal"] = Failure(400, f"{shown} is no address of anything here")
        return scope

    # -- turns --

    def _enqueue(self, turn: Turn) -> None:
        self._turns.append(turn)
        if len(self._turns) == 1:
            self._begin(turn)

    def _begin(self, turn: Turn) -> None:
        if self._is_leaving:
            turn.keeps_alive = False
        task = self._loop.create_task(turn.run(self._app))
        self._server.tasks.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._server.tasks.discard(task)
        turn = self._turns.popleft()
        self._is_greeted = False
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("an answer has failed", exc_info=error)
        if self._transport.is_closing():
            return
        if not turn.is_over:
            self._abort()  # half an answer must not look like a whole one
        elif not turn.keeps_alive or self._is_leaving:
            self._close(is_unread=not turn.is_received or self._is_deaf)
        elif self._turns:
            self._begin(self._turns[0])
            self._parse()
        else:
            self._expect_next(turn)

    def _expect_next(self, last: Turn) -> None:
        if last.is_received and not self._is_in_head:
            self._wait_for_client(self._patience.idle, self._close)
        elif not last.is_received:  # nobody needed its body; what comes of it is thrown away
            self._wait_for_client(self._patience.body, self._close)
        self._parse()
        self.read_on()
        if self._is_half_closed and not self._turns:
            self._close()

    # -- writing --

    def write(self, data: bytes) -> None:
        if self._is_greeted:
            self._is_greeted = False
            data = data[len(GREETING) :]
        self._transport.write(data)

    async def writable(self) -> None:
        await self._is_writable.wait()

    def default_headers(self) -> Iterable[tuple[bytes, bytes]]:
        return cast(Iterable[tuple[bytes, bytes]], self._server.default_headers)

    # -- clients that cannot be heard --

    def _look_again(self, nap: float) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self._watch = self._loop.call_later(nap, self._look, min(2 * nap, _LAST_LOOK))

    def _look(self, nap: float) -> None:
        """Find out whether a client that has closed its side, or that is not read from, still waits for its answer.

        Closing one side and closing both look the same from here, until something is written: then a client that is
        gone answers with a reset. So the bytes that any answer begins with are sent ahead.
        """
        self._watch = None
        if not self._turns or self._transport.is_closing() or not (self._is_half_closed or self._is_paused):
            return
        found = _state_of(self._transport)
        if found & ~_POLLRDHUP:
            self._abort()
            return
        if (found or self._is_half_closed) and not self._is_greeted and not self._turns[0].is_started:
            self._is_greeted = True
            self._transport.write(GREETING)
        self._look_again(nap)


def _not_http(error: httptools.HttpParserError) -> Failure:
    return Failure(400, f"the request is not HTTP: {error}")


def _told_twice(headers: list[tuple[bytes, bytes]]) -> str | None:
    """Of the headers that say who calls whom (RFC 9112, 3.2): a proxy may go by one, and we by the other."""
    names = [name for name, _ in headers]
    return next((name.decode() for name in (b"host", b"origin") if names.count(name) > 1), None)


def _too_many_headers() -> Failure:
    return Failure(431, f"the headers of the request are more than {MAX_HEAD:,} bytes, or more than {MAX_HEADERS}")


def _state_of(transport: asyncio.Transport) -> int:
    """Which of POLLRDHUP (the client's side is closed), POLLHUP and POLLERR (both are) hold."""
    watched = select.poll()
    watched.register(transport.get_extra_info("socket").fileno(), _POLLRDHUP)
    return sum(events for _, events in watched.poll(0))
