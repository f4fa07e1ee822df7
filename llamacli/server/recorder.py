"""Listens to answers on their way out and adds them to a recording, a line each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from pathlib import Path
from time import perf_counter
from typing import Any

from llamacli.errors import UsageError
from llamacli.server import recording
from llamacli.server.exchange import EVENTS, Send
from llamacli.server.recording import Chunk, Recorded

# Of an answer's headers, those that mean something to a client. Others may hold secrets: cookies, keys.
_KEPT = ("content-type", "cache-control", "retry-after", "www-authenticate", "allow")
_KEPT_PREFIXES = ("x-ratelimit-", "ratelimit-")


class Tape:
    """One answer as it goes out. `send_to` makes it part of the way."""

    def __init__(self) -> None:
        self._last = perf_counter()
        self._status = 0
        self._headers: tuple[tuple[str, str], ...] = ()
        self._is_stream = False
        self._chunks: list[Chunk] = []
        self.is_whole = False

    def send_to(self, send: Send) -> Send:
        async def hear(message: MutableMapping[str, Any]) -> None:
            self._note(message)
            await send(message)

        return hear

    def _note(self, message: Mapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in message["headers"]]
            self._is_stream = dict(headers).get("content-type", "").startswith(EVENTS)
            self._headers = tuple(pair for pair in headers if is_kept(pair[0]))
            return
        now = perf_counter()
        data = message.get("body", b"")
        self.is_whole = not message.get("more_body")
        if data or not self._is_stream:
            self._chunks.append(Chunk(data, now - self._last))
            self._last = now

    def recorded(self, path: str, body: bytes, trace_id: str) -> Recorded:
        return Recorded(
            path=path,
            body=body,
            status=self._status,
            headers=self._headers,
            chunks=tuple(self._chunks) or (Chunk(b""),),
            is_stream=self._is_stream,
            trace_id=trace_id,
        )


def is_kept(header: str) -> bool:
    """Whether a header of an answer goes into a recording, and from an upstream server to its client."""
    return header in _KEPT or header.startswith(_KEPT_PREFIXES)


class Recorder:
    """A recording that grows. One that is there already is gone on with.

    report   is told, in a line, when answers are not recorded because the disk does not take them

    Raises UsageError for a file that is no whole recording, or cannot be written.
    """

    def __init__(
        self, path: Path, *, model: str, defaults: Mapping[str, object], report: Callable[[str], None]
    ) -> None:
        self._path = path
        self._report = report
        self._has_failed = False
        try:
            is_new = not path.exists() or not path.stat().st_size
            if not is_new:
                recording.read(path)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(f"--record {path} cannot be written: {error.strerror}") from None
        if is_new:
            self._put(recording.head(model, defaults))
        elif not path.read_bytes().endswith(b"\n"):
            self._put(b"\n")

    def close(self) -> None:
        os.close(self._file)

    def add(self, entry: Recorded, secrets: Iterable[str]) -> None:
        """A line at a time, and whole: what a full disk cuts is taken back."""
        self._put(recording.written(entry, secrets))

    def _put(self, line: bytes) -> None:
        before = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            if written == len(line):
                self._has_failed = False
                return
            why = f"{written:,} of {len(line):,} bytes were taken"
        except OSError as error:
            why = error.strerror or str(error)
        try:
            os.ftruncate(self._file, before)
        except OSError as error:
            why = f"{why}; and its last line cannot be taken back: {error.strerror}"
        if not self._has_failed:
            self._report(f"answers are not recorded: {self._path.name} cannot be written: {why}")
        self._has_failed = True
