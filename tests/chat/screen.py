"""A terminal with a program in it: a real pseudo-terminal, and a screen that does what the program's bytes say."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import pyte

PATIENCE = 30.0  # seconds; what is waited for comes at once, unless the machine is busy
KEYS = {
    "enter": "\r",
    "c-c": "\x03",
    "c-d": "\x04",
    "up": "\x1b[A",
    "alt-enter": "\x1b\r",
    "left": "\x1b[D",
    "tab": "\t",
}


class _Screen(pyte.HistoryScreen):
    """Answers the program's questions, such as where the cursor is, as a terminal does."""

    reply: Callable[[str], None] = staticmethod(lambda data: None)

    def write_process_input(self, data: str) -> None:
        self.reply(data)


class Terminal:
    """A program at a terminal of its own. Ends with the block, whatever the program does."""

    def __init__(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        *,
        columns: int = 80,
        lines: int = 24,
        term: str = "xterm",
    ) -> None:
        self._screen = _Screen(columns, lines, history=2000, ratio=0.5)
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""
        self._code: int | None = None
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], list(command), environment | {"TERM": term})
        self._screen.reply = self._send
        self.resize(columns, lines)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._code is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._master)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self._screen.resize(lines, columns)

    @property
    def text(self) -> str:
        """All that was ever shown and not drawn over, what has scrolled away first; no white space at line ends."""
        above = ["".join(line[x].data for x in range(self._screen.columns)) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self._screen.display]).rstrip("\n")

    @property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    @property
    def echoes(self) -> bool:
        """Whether what is typed is shown by the terminal itself, as at a shell."""
        flags: int = termios.tcgetattr(self._master)[3]
        return bool(flags & termios.ECHO and flags & termios.ICANON)

    @property
    def signals(self) -> bool:
        """Whether Ctrl-C is a signal now, and no key that the program reads."""
        flags: int = termios.tcgetattr(self._master)[3]
        return bool(flags & termios.ISIG)

    def type(self, text: str, *keys: str) -> None:
        self._send(text + "".join(KEYS[key] for key in keys))

    def press(self, *keys: str) -> None:
        self.type("", *keys)

    def wait_for(self, what: str | Callable[[str], object]) -> str:
        """Until the screen shows it. Returns what there is to see then."""
        deadline = time.monotonic() + PATIENCE
        while not (what in self.text if isinstance(what, str) else what(self.text)):
            assert time.monotonic() < deadline, f"{what} has not come:\n{self.text}"
            assert self._read(0.2) is not None, f"ended without {what}:\n{self.text}"
        return self.text

    def wait_until(self, what: Callable[[], object]) -> None:
        """Until something is so that the screen does not show."""
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < deadline, f"it does not come:\n{self.text}"
            assert self._read(0.1) is not None, f"ended:\n{self.text}"

    def press_until(self, key: str, what: Callable[[str], object]) -> None:
        """Again and again: what was typed before is loaded a moment after the line is there to be typed at."""
        deadline = time.monotonic() + PATIENCE
        while not what(self.text):
            assert time.monotonic() < deadline, f"{key} does not bring it:\n{self.text}"
            self.press(key)
            until = time.monotonic() + 0.3
            while time.monotonic() < until:
                self._read(0.1)

    def end(self) -> int:
        """Wait until the program ends. Returns its exit code."""
        deadline = time.monotonic() + PATIENCE
        while self._read(0.2) is not None:
            assert time.monotonic() < deadline, f"it does not end:\n{self.text}"
        self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def _send(self, text: str) -> None:
        os.write(self._master, text.encode("utf-8", "surrogateescape"))

    def _read(self, seconds: float) -> bytes | None:
        """None when the program has closed its side."""
        if not select.select([self._master], [], [], seconds)[0]:
            return b""
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:
            return None
        if not data:
            return None
        self.raw += data
        self._stream.feed(data)
        return data
