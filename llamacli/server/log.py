"""The server's log on stderr: lines for people on a terminal, JSON lines otherwise. Never a prompt, never a key."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TextIO


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
    def __init__(self, stream: TextIO, *, as_json: bool, quiet: bool = False) -> None:
        self._stream = stream
        self._as_json = as_json
        self._quiet = quiet

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
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            pass  # nobody reads the log any more: no reason to stop answering


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[:300])
