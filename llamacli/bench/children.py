"""Other processes: run to their end, timed to their first byte, or talked with in lines of JSON; none outlives us."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from time import perf_counter
from typing import Any


class ChildFailed(Exception):
    """A program that ended otherwise than well, or said nothing. The message is one line."""


class Children:
    """A thread runs them; another one may kill() them, and from then on none is started."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = Lock()
        self._is_over = False

    def output(self, command: Sequence[str]) -> bytes:
        """What it writes to stdout. Raises ChildFailed."""
        with self._started(command, stdin=subprocess.DEVNULL) as process:
            found, _ = process.communicate()
        _check(process, command)
        return found

    def first_byte(self, command: Sequence[str]) -> float:
        """Seconds from its start until something that is no white space has come out of it. Raises ChildFailed."""
        elapsed = 0.0
        started = perf_counter()
        with self._started(command, stdin=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            while piece := os.read(process.stdout.fileno(), 4096):
                if not elapsed and piece.strip():
                    elapsed = perf_counter() - started
        _check(process, command)
        if not elapsed:
            raise ChildFailed(f"{_name(command)} gave an empty answer")
        return elapsed

    @contextmanager
    def _started(self, command: Sequence[str], *, stdin: int) -> Iterator[subprocess.Popen[bytes]]:
        process = self.open(command, stdin=stdin)
        try:
            yield process
            process.wait()
        finally:
            self.end(process)

    def open(self, command: Sequence[str], *, stdin: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
        """Raises ChildFailed."""
        with self._lock:
            if self._is_over:
                raise ChildFailed("interrupted")
            try:
                process = subprocess.Popen(
                    command, bufsize=0, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
            except OSError as error:
                raise ChildFailed(f"{_name(command)} does not start: {error.strerror}") from None
            self._running.add(process)
            return process

    def ask(self, process: subprocess.Popen[bytes], question: dict[str, Any]) -> Any:
        """Send a line of JSON, wait for one. Raises ChildFailed."""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
        except OSError:
            raise ChildFailed("it has ended by itself") from None
        line = b""
        while not line.endswith(b"\n"):
            piece = process.stdout.read(1 << 16)
            if not piece:
                raise ChildFailed("it has ended by itself")
            line += piece
        return json.loads(line)

    def end(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.kill()
            process.wait()
        self._running.discard(process)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()

    def kill(self) -> None:
        """From any thread: end all, at once."""
        with self._lock:
            self._is_over = True
            for process in list(self._running):
                process.kill()
                process.wait()


def _check(process: subprocess.Popen[bytes], command: Sequence[str]) -> None:
    if process.returncode:
        raise ChildFailed(f"{_name(command)} has failed (exit code {process.returncode})")


def _name(command: Sequence[str]) -> str:
    return os.path.basename(command[0])  # noqa: PTH119
