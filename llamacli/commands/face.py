"""What a chat needs of those who read and write it; and the face that it shows to a pipe: a line each, answers bare."""

from __future__ import annotations

import signal
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

from llamacli.commands import terminal
from llamacli.commands.resident import Reply, Resident
from llamacli.commands.slash import QUOTES, is_open
from llamacli.commands.terminal import MAX_INPUT, Answer, Notices
from llamacli.engine.sequence import Delta
from llamacli.errors import InputTooLong


@dataclass(slots=True)
class Said:
    """An answer as far as it has come. `end` is its last delta."""

    text: str = ""
    tokens: array[int] = field(default_factory=lambda: array("i"))
    end: Delta | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        if delta.token is not None:
            self.tokens.append(delta.token)
        if delta.finish_reason is not None:
            self.end = delta


@contextmanager
def ctrl_c_stops(reply: Reply, resident: Resident) -> Iterator[None]:
    """Ctrl-C stops the answer, whose end then says so. A second one is raised: the engine does not stop."""
    before = signal.getsignal(signal.SIGINT)

    def stop(_: int, __: FrameType | None) -> None:
        if reply.is_stopped.is_set():
            raise KeyboardInterrupt
        resident.stop(reply)

    if before is not signal.SIG_IGN:
        # Not an exception: that would come in the middle of whatever is being written or freed.
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Face(Protocol):
    """Where questions come from and answers go to.

    is_asked   somebody can be asked, and told at length
    """

    is_asked: bool

    def read(self, prefilled: str = "") -> str | None:
        """The next thing that was typed. None at the end; nothing where what stood there was not to be changed."""

    def answer(self, reply: Reply, resident: Resident) -> Said:
        """Show an answer while it comes. Ctrl-C may stop it, which its end then says."""

    def choose(self, question: str, choices: str) -> str:
        """One of these letters. The last of them where nothing is chosen."""

    def show(self, text: str) -> None:
        """Something that was asked for: lines beside the answers."""

    def close(self) -> None:
        """Leave everything as it was found."""


def _goes_on(lines: Sequence[str]) -> bool:
    """Whether more lines belong to these: as the last one says, or the first one, of a text in quotes."""
    last = lines[-1].rstrip("\n")
    if len(lines) == 1:
        return is_open(last)
    return is_open((QUOTES if lines[0].lstrip().startswith(QUOTES) else "\\\n") + last)


class Pipe:
    """stdin a line for each question, stdout an answer for each. What else there is to say goes to stderr."""

    is_asked = False

    def __init__(self, notices: Notices) -> None:
        self._notices = notices

    def read(self, prefilled: str = "") -> str | None:
        lines: list[str] = []
        n_bytes = 0
        while True:
            raw = sys.stdin.buffer.readline(MAX_INPUT + 1)
            n_bytes += len(raw)
            if n_bytes > MAX_INPUT:
                raise InputTooLong(f"a question on standard input is longer than {MAX_INPUT >> 20} MiB")
            line = terminal.decoded(raw, "standard input", self._notices).replace("\r\n", "\n")
            if lines or line.strip():
                lines.append(line)
            if not raw or (lines and not _goes_on(lines)):
                return "".join(lines).rstrip("\n") or None

    def answer(self, reply: Reply, resident: Resident) -> Said:
        answer, said = Answer(), Said()
        with ctrl_c_stops(reply, resident):
            while said.end is None:
                delta = reply.get()
                said.add(delta)
                if delta.text:
                    answer.write(delta.text)
            answer.end()
        return said

    def choose(self, question: str, choices: str) -> str:
        return choices[-1]

    def close(self) -> None:
        pass

    def show(self, text: str) -> None:
        for line in text.splitlines():
            self._notices.say(line)
