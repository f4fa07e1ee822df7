"""The bytes of one file, as long as it is one that comes to an end. Knows nothing of what is in it."""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from llamacli.documents.document import MAX_TEXT, check_size, shown
from llamacli.documents.pdf import MAX_FILE, is_pdf
from llamacli.errors import InputTooLong, UsageError

_HEAD = 1 << 13
_DESCRIPTOR = re.compile(r"/dev/fd/\d+|/proc/self/fd/\d+")  # what a shell makes of <(command)
_NO_FILES = (
    (stat.S_ISFIFO, "a named pipe: say `< PIPE`, and without -f"),
    (stat.S_ISCHR, "a device: only files can be read"),
    (stat.S_ISBLK, "a device: only files can be read"),
    (stat.S_ISSOCK, "a socket: only files can be read"),
)


def kind_of(path: Path) -> int:
    """The mode of a file or a directory that can be read. Raises UsageError for anything else, without opening it."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if _DESCRIPTOR.fullmatch(str(path)) and stat.S_ISFIFO(mode):
        return mode
    for is_kind, what in _NO_FILES:
        if is_kind(mode):
            raise UsageError(f"{shown(str(path))} is {what}")
    return mode


def unreadable(path: Path, error: OSError | ValueError) -> UsageError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no file's name"
    return UsageError(f"{shown(str(path))[:200]} cannot be read: {reason}")


class Opened:
    """A file whose beginning is known and whose rest can still be had. Raises UsageError for what is none."""

    def __init__(self, path: Path) -> None:
        kind_of(path)
        self._path = path
        self._name = shown(str(path))
        try:
            # Not to wait for who writes into a pipe that has taken the file's place since.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.set_blocking(self._descriptor, True)
            self.head = self._upto(_HEAD)
        except OSError as error:
            raise unreadable(path, error) from None

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            os.close(self._descriptor)

    def whole(self) -> bytes:
        """Raises InputTooLong beyond what is read of a text, or of a PDF."""
        limit = MAX_FILE if is_pdf(self.head) else MAX_TEXT
        try:
            raw = self.head + self._upto(limit + 1 - len(self.head))
        except OSError as error:
            raise unreadable(self._path, error) from None
        if is_pdf(self.head) and len(raw) > limit:
            raise InputTooLong(f"{self._name} is more than {limit >> 20} MiB: give the part that matters")
        if not is_pdf(self.head):
            check_size(len(raw), self._name)
        return raw

    def _upto(self, n_bytes: int) -> bytes:
        parts: list[bytes] = []
        while n_bytes > 0 and (part := os.read(self._descriptor, min(n_bytes, 1 << 20))):
            parts.append(part)
            n_bytes -= len(part)
        return b"".join(parts)
