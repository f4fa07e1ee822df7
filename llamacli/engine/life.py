"""One engine process, from its start to its exit status: the socket, its stderr, and what it died of. For asyncio."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from time import monotonic
from typing import Any, cast

from llamacli.engine.protocol import Frames, ModelFacts, Recipe, Tell, error_named, packed
from llamacli.errors import EngineCrashed

EXIT_SECONDS = 2.0  # for a process whose socket is closed to be gone by itself
_N_LINES = 50  # of its stderr are kept
_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); from llamacli.engine.worker import main; "
    "main(int(sys.argv[2]), int(sys.argv[3]))"
)
_PACKAGES = str(Path(__file__).resolve().parents[2])

log = logging.getLogger(__name__)


class Life(asyncio.Protocol):
    """One child, from its start to its exit status: the socket, its stderr, and what it died of.

    ready    the model's facts, or the LlamacliError that it could not be loaded for; EngineCrashed if it just died
    ended    its socket is closed
    """

    def __init__(self, hear: Callable[[Life, tuple[Any, ...]], None]) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[ModelFacts] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.n_answers = 0
        self._loop = loop
        self._hear = hear
        self._frames = Frames()
        self._outbox: list[tuple[Any, ...]] = []
        self._transport: asyncio.Transport | None = None
        self._socket: socket.socket | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._stderr = Tail(loop.create_future())

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None else None

    async def begin(self, recipe: Recipe) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            # A session of its own: Ctrl-C in a terminal goes to the server alone, which then drains in order.
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, _PACKAGES, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        await self._loop.connect_read_pipe(lambda: self._stderr, self._child.stderr)
        try:
            await self._loop.create_unix_connection(lambda: self, sock=self._socket)
        except asyncio.CancelledError:
            self._transport = None  # uvloop has closed it, and never says that it is lost
            raise
        assert self._transport is not None
        self._transport.write(packed(astuple(recipe)))

    def say(self, command: tuple[Any, ...]) -> None:
        """Send a command, together with all others of this turn of the loop."""
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(command)

    def _flush(self) -> None:
        commands, self._outbox = self._outbox, []
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(packed(commands))

    async def autopsy(self) -> str:
        """What it died of: signal or exit status, and the last thing that it said. Waits until it is gone."""
        status = await self._exit_status(EXIT_SECONDS)
        with suppress(TimeoutError):
            async with asyncio.timeout(EXIT_SECONDS):
                await asyncio.shield(self._stderr.closed)
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        said = self._stderr.last_line()
        for line in self._stderr.lines:
            log.debug("engine: %s", line)
        return f"{how}; its last words: {said}" if said else how

    async def end(self, seconds: float) -> None:
        """Close the socket, which ends the child; kill it if it does not go in time. Nothing of it is left."""
        if self._transport is not None:
            self._transport.close()
        elif self._socket is not None:  # stopped in the middle of begin()
            self._socket.close()
        if self._child is not None:
            await self._exit_status(seconds)
        if self._transport is not None:
            await asyncio.shield(self.ended)
        self._stderr.close()
        if self._child is not None and self._child.stderr is not None:
            self._child.stderr.close()

    async def _exit_status(self, seconds: float) -> int:
        """Waits for it, and kills it when that takes too long. Negative: a signal's number."""
        assert self._child is not None
        deadline, nap = monotonic() + seconds, 0.001
        while (status := self._child.poll()) is None:
            if monotonic() > deadline:
                self._child.kill()
                deadline = float("inf")
            await asyncio.sleep(nap)
            nap = min(2 * nap, 0.02)
        return status

    # -- asyncio.Protocol --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            if message[0] == Tell.READY and not self.ready.done():
                self.ready.set_result(ModelFacts(**message[1]))
            elif message[0] == Tell.FAILED and not self.ready.done():
                self.ready.set_exception(error_named(*message[1:]))
            else:
                self._hear(self, message)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ready.done():
            self.ready.set_exception(EngineCrashed("the engine's process died while it started"))
        self.ended.set_result(None)


class Tail(asyncio.Protocol):
    """The last lines of a pipe."""

    def __init__(self, closed: asyncio.Future[None]) -> None:
        self.lines: deque[str] = deque(maxlen=_N_LINES)
        self.closed = closed
        self._rest = b""
        self._transport: asyncio.BaseTransport | None = None

    def last_line(self) -> str:
        return next((line[:300] for line in reversed([*self.lines, self._text(self._rest)]) if line.strip()), "")

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *whole, rest = (self._rest + data).split(b"\n")
        self._rest = rest[-4096:]
        self.lines.extend(map(self._text, whole))

    def connection_lost(self, error: Exception | None) -> None:
        self.closed.set_result(None)

    @staticmethod
    def _text(raw: bytes) -> str:
        return raw.decode("utf-8", "replace").rstrip()
