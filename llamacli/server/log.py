"""The server's log on stderr: lines for people on a terminal, JSON lines otherwise. Never a prompt, never a key."""

from __future__ import annotations

import json
import logging
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from queue import Full, Queue
from typing import TextIO

MAX_WAITING = 10_000  # lines; those of a log that nobody reads are lost from here on
CLOSE_SECONDS = 1.0


@dataclass(slots=True)
class Record:
    """One request, when it is over. `status` 499 is a client that went away before its answer.

    source      who has answered in the model's place
    simulated   the fault that was asked for
    """

    method: str
    path: str
    trace_id: str
    status: int = 0
    seconds: float = 0.0
    key: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""
    source: str = ""
    simulated: str = ""


class Log:
    """A thread of its own writes: a pipe that nobody reads, or a slow disk, must not stop the server."""

    def __init__(self, stream: TextIO, *, as_json: bool, quiet: bool = False) -> None:
        self._stream = stream
        self._as_json = as_json
        self._quiet = quiet
        self._lines: Queue[str | None] = Queue(MAX_WAITING)
        self._n_lost = 0
        self._writer = threading.Thread(target=self._write_lines, name="log", daemon=True)
        self._writer.start()

    def close(self) -> None:
        """Write what is waiting, unless nobody reads it."""
        with suppress(Full):
            self._lines.put_nowait(None)
        self._writer.join(CLOSE_SECONDS)

    def request(self, record: Record) -> None:
        if self._quiet:
            return
        if self._as_json:
            self._write({"event": "request", **{k: v for k, v in asdict(record).items() if v != ""}})
            return
        tokens = f" {record.prompt_tokens}+{record.completion_tokens} tokens" if record.prompt_tokens else ""
        key = f" key {record.key}" if record.key else ""
        error = f": {record.error}" if record.error else ""
        source = f" from {record.source}" if record.source else ""
        simulated = f" simulated ({record.simulated})" if record.simulated else ""
        self._print(
            f"{record.method} {_printable(record.path)} {record.status} {1000 * record.seconds:.0f} ms"
            f"{tokens}{key}{_printable(source)}{_printable(simulated)} {record.trace_id}{_printable(error)}"
        )

    def event(self, name: str, message: str) -> None:
        """Something about the server itself: ready, draining, an engine that died."""
        if self._as_json:
            self._write({"event": name, "message": message})
        elif not self._quiet:
            self._print(message)

    def _write(self, record: dict[str, object]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._put(json.dumps({"time": now} | record, ensure_ascii=True))

    def _print(self, text: str) -> None:
        self._put(f"{datetime.now():%H:%M:%S} {text}")

    def _put(self, line: str) -> None:
        try:
            self._lines.put_nowait(line)
        except Full:
            self._n_lost += 1

    def _write_lines(self) -> None:
        while (line := self._lines.get()) is not None:
            with suppress(OSError, ValueError):  # nobody reads the log any more: no reason to stop answering
                self._stream.write(line + "\n")
                self._stream.flush()
            if self._n_lost and self._lines.empty():
                n_lost, self._n_lost = self._n_lost, 0
                self.event("log", f"{n_lost:,} lines of this log are lost: it was not read in time")


class Relay(logging.Handler):
    """What other rooms and libraries report by `logging`, the engine's death above all, as lines of our log."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.event(record.levelname.lower(), self.format(record))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[:300])
