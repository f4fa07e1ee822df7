"""The three streams of a well-behaved filter: text in, the answer out, one-line notices beside it."""

from __future__ import annotations

import codecs
import errno
import os
import re
import select
import signal
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from llamacli.errors import InputTooLong, ResourceError, UsageError

STDIN, STDOUT = 0, 1
MAX_INPUT = 16 << 20  # bytes; `yes | llamacli` must come to an end
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PATIENCE = 3.0  # seconds before a silent stdin is mentioned

# C0 but tab and newline, DEL, C1, and the bidirectional controls that make text read as what it is not.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


def harmless(text: str) -> str:
    """The text with control characters spelt out, so that a terminal shows them and does not obey them."""
    return _UNSAFE.sub(lambda match: _spelt(ord(match[0])), text)


def _spelt(code: int) -> str:
    if code < 0x20:
        return "^" + chr(code + 0x40)
    return "^?" if code == 0x7F else f"<U+{code:04X}>"


class Answer:
    """stdout as the answer and one final newline, written as it comes.

    Newlines are held back until something follows them, so that the last one is ours. On a terminal control
    characters are shown harmless; in a pipe the bytes are the model's own.
    """

    def __init__(self) -> None:
        self._is_terminal = os.isatty(STDOUT)
        self._held = ""
        self.is_empty = True

    def write(self, text: str) -> None:
        text = self._held + text
        body = text.rstrip("\n")
        self._held = text[len(body) :]
        if body:
            self._write(body)

    def end(self) -> None:
        self._held = ""
        self._write("\n")

    def _write(self, text: str) -> None:
        self.is_empty = False
        if self._is_terminal:
            text = harmless(text)
        write_all(STDOUT, text.encode("utf-8", "replace"))


def write_all(descriptor: int, data: bytes) -> None:
    """Write bytes past all buffers. A closed pipe ends the process as SIGPIPE does; a full disk is exit 6."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            select.select([], [descriptor], [])
        except BrokenPipeError:
            die_of(signal.SIGPIPE)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise ResourceError(
                    f"the answer cannot be written: {error.strerror}; make room and ask again"
                ) from None
            raise UsageError(f"the answer cannot be written to standard output: {error.strerror}") from None


def end_stdout() -> None:
    """Nothing more will come: let who reads our output go on, though this process does not end yet."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, STDOUT)  # a number that is free would go to the next file that is opened
        os.close(nowhere)


_LAST: list[Callable[[], None]] = []


def before_dying(action: Callable[[], None]) -> None:
    """What die_of() does first."""
    _LAST.append(action)


def die_of(number: signal.Signals) -> None:
    """End as a program that does not know this signal: at once, silently, and so that the shell can tell."""
    for action in _LAST:
        action()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # only reached if our parent has blocked the signal


class Notices:
    """Lines on stderr, each with our name before it. A closed or full stderr is nobody's problem."""

    def __init__(self, *, quiet: bool = False, verbose: bool = False, stream: TextIO | None = None) -> None:
        self._quiet, self._verbose = quiet, verbose
        self._stream = stream or sys.stderr

    def say(self, line: str) -> None:
        if not self._quiet:
            print_line(line, self._stream)

    def detail(self, line: str) -> None:
        if self._verbose:
            print_line(line, self._stream)


def print_line(line: str, stream: TextIO | None) -> None:
    if stream is None:  # closed by whoever started us
        return
    with suppress(OSError, ValueError):
        stream.write(f"llamacli: {harmless(' '.join(line.splitlines()))}\n")
        stream.flush()


def print_block(text: str) -> None:
    """Several lines on stderr, as they are."""
    with suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(harmless(text))
        sys.stderr.flush()


def complete_standard_streams() -> None:
    """Give descriptors 0-2 something to point to, or the model file would open as one of them and be written to."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            if descriptor == STDOUT:
                raise UsageError("standard output is closed: there is nowhere to write the answer to") from None
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one


def stdin_has_text(*, asked_for: bool) -> bool:
    """Whether stdin is to be read: it is no terminal, or was asked for with "-"."""
    return asked_for or not os.isatty(STDIN)


def stdin_is_pipe() -> bool:
    """Whether somebody could have written into it, unlike /dev/null or a terminal."""
    return not stat.S_ISCHR(os.fstat(STDIN).st_mode)


def stdin_is_connected() -> bool:
    """Whether another program may hold its other end, which it lets go of when it ends."""
    mode = os.fstat(STDIN).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def read_stdin(notices: Notices) -> str:
    """Everything on stdin as text, without the newlines at its end (as in a shell's `$(...)`).

    UTF-8, or UTF-16 with a byte order mark; bytes that are neither become U+FFFD, and a notice says so.
    """
    mention = True
    parts: list[bytes] = []
    n_bytes = 0
    while True:
        if mention and not os.isatty(STDIN) and not _arrives_within(PATIENCE):
            notices.say("waiting for text on standard input (end it with Ctrl-D, or give </dev/null)")
        mention = False
        try:
            part = os.read(STDIN, 1 << 16)
        except BlockingIOError:
            select.select([STDIN], [], [])
            continue
        except OSError as error:
            raise UsageError(f"standard input cannot be read: {error.strerror}") from None
        if not part:
            return decoded(b"".join(parts), "standard input", notices).rstrip("\r\n")
        parts.append(part)
        n_bytes += len(part)
        if n_bytes > MAX_INPUT:
            raise InputTooLong(
                f"standard input is more than {MAX_INPUT >> 20} MiB, thousands of times what a context holds: "
                "pipe in the part that matters"
            )


def _arrives_within(seconds: float) -> bool:
    return bool(select.select([STDIN], [], [], seconds)[0])


def decoded(raw: bytes, what: str, notices: Notices) -> str:
    for bom, encoding in _BOMS:
        if raw.startswith(bom):
            raw, codec = raw[len(bom) :], encoding
            break
    else:
        codec = "utf-8"
    text = raw.decode(codec, "replace")
    n_bad = text.count("\ufffd") - raw.count("\ufffd".encode()) if codec == "utf-8" else text.count("\ufffd")
    if n_bad > 0:
        notices.say(f"{what} is not valid {codec.upper()}; U+FFFD stands for what could not be read ({n_bad:,} times)")
    return text
