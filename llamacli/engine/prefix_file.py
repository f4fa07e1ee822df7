"""One KV prefix in a file: what it belongs to, its tokens, the logits after them, and its cells in pieces.

Bytes in, bytes out: knows neither llama.cpp nor the directory around it. In this order, little-endian:

    head      magic, format, fingerprint, base, and how long the rest is (see _HEAD)
    label     UTF-8, for people
    tokens    int32[n_tokens]: the whole prefix
    table     for each piece its length and its CRC-32
    logits    float32[n_vocab] after the last token, or nothing
    CRC-32    of all that stands before it
    pieces    the cells of positions `start` to n_tokens, PIECE positions each

The positions before `start` are another file's, the base's: so what two prompts share is on the disk once. No byte
is outside of a checksum, and a file that is longer or shorter than its head says is damaged. It is never synced:
what a power failure leaves of it is damaged, too.
"""

from __future__ import annotations

import os
import stat
import struct
from array import array
from contextlib import suppress
from dataclasses import dataclass
from mmap import ACCESS_COPY, MADV_DONTNEED, PAGESIZE, mmap
from pathlib import Path
from zlib import crc32

FORMAT = 1
PIECE = 64  # positions; 32 MiB for Llama 2 7B in f16
NO_BASE = bytes(16)
MAX_TOKENS = 1 << 24  # no context is that long

_MAGIC = b"llamapfx"
_HEAD = struct.Struct("<8sI32s16sIIIIId")  # ..., n_tokens, start, n_pieces, n_vocab, bytes of the label, created
_ROW = struct.Struct("<QI")
_CRC = struct.Struct("<I")


class Damaged(Exception):
    """The file is not what it was when it was written, or was never a prefix."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path.name}: {what}")
        self.path = path


@dataclass(frozen=True, slots=True, kw_only=True)
class Title:
    """What a file says of itself.

    fingerprint   32 bytes: the model, the library and the number format that its cells belong to
    base          key of the prefix whose cells come before `start`; NO_BASE where `start` is 0
    created       Unix seconds
    """

    fingerprint: bytes
    tokens: array[int]
    start: int = 0
    base: bytes = NO_BASE
    label: str = ""
    created: float = 0.0

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The positions of each piece, half-open."""
        n = len(self.tokens)
        return [(first, min(first + PIECE, n)) for first in range(self.start, n, PIECE)]


class PrefixFile:
    """A prefix to be read: mapped, its title and its logits checked, its pieces not yet.

    Raises Damaged, or OSError where there is no file that may be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = _mapped(path)
        self._view = memoryview(self._map)
        self._places: list[tuple[int, int, int]] = []  # offset, length and CRC of each piece
        self.title, self.logits = self._index()

    @property
    def n_bytes(self) -> int:
        return len(self._view)

    def piece(self, i: int) -> memoryview:
        """The cells of a piece: of use only once is_whole() has said so. Lives as long as the view is held."""
        offset, length, _ = self._places[i]
        return self._view[offset : offset + length]

    def is_whole(self, i: int) -> bool:
        return crc32(self.piece(i)) == self._places[i][2]

    def forget(self, i: int) -> None:
        """Give back the memory that a piece was mapped to: all that is left of it is on the disk."""
        offset, length, _ = self._places[i]
        first, last = -(-offset // PAGESIZE) * PAGESIZE, (offset + length) // PAGESIZE * PAGESIZE
        if last > first:
            self._map.madvise(MADV_DONTNEED, first, last - first)

    def _index(self) -> tuple[Title, bytes | None]:
        if self.n_bytes < _HEAD.size + _CRC.size:
            raise Damaged(self.path, "too short")
        magic, form, fingerprint, base, n_tokens, start, n_pieces, n_vocab, n_label, created = _HEAD.unpack_from(
            self._view
        )
        if magic != _MAGIC or form != FORMAT:
            raise Damaged(self.path, f"not in format {FORMAT}")
        if not 0 < n_tokens <= MAX_TOKENS or start > n_tokens:
            raise Damaged(self.path, "impossible lengths")
        ends = _ends(n_label, n_tokens, n_pieces, n_vocab)
        if self.n_bytes < ends[-1] + _CRC.size or _CRC.unpack_from(self._view, ends[-1]) != (
            crc32(self._view[: ends[-1]]),
        ):
            raise Damaged(self.path, "its head does not match its checksum")
        label, tokens, table, logits = (bytes(self._view[a:b]) for a, b in zip((_HEAD.size, *ends), ends, strict=False))
        title = Title(
            fingerprint=fingerprint,
            tokens=array("i", tokens),
            start=start,
            base=base,
            label=label.decode("utf-8", "replace"),
            created=created,
        )
        offset = ends[-1] + _CRC.size
        for length, checksum in _ROW.iter_unpack(table):
            self._places.append((offset, length, checksum))
            offset += length
        if offset != self.n_bytes or n_pieces != len(title.spans):
            raise Damaged(self.path, "its length is another one")
        return title, logits or None


class Draft:
    """A prefix that is being written, under a name that nobody looks for until it is whole. Raises OSError."""

    def __init__(self, path: Path, title: Title, logits: bytes | None) -> None:
        self._path = path
        self._title = title
        self._logits = logits or b""
        self._label = title.label.encode("utf-8", "replace")
        self._table = bytearray()
        self._draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
        self._handle = os.open(self._draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        ends = _ends(len(self._label), len(title.tokens), len(title.spans), len(self._logits) // 4)
        self._end = ends[-1] + _CRC.size

    @property
    def n_bytes(self) -> int:
        """So far."""
        return self._end

    def add(self, piece: bytes | memoryview) -> None:
        """The next piece: the cells of the next of the title's spans."""
        view = memoryview(piece).cast("B")
        _write(self._handle, view, self._end)
        self._end += len(view)
        self._table += _ROW.pack(len(view), crc32(view))

    def finish(self) -> None:
        """Write what stands before the pieces, and give the file its name."""
        title = self._title
        n_pieces = len(self._table) // _ROW.size
        assert n_pieces == len(title.spans)
        head = _HEAD.pack(
            _MAGIC,
            FORMAT,
            title.fingerprint,
            title.base,
            len(title.tokens),
            title.start,
            n_pieces,
            len(self._logits) // 4,
            len(self._label),
            title.created,
        )
        index = b"".join((head, self._label, title.tokens.tobytes(), self._table, self._logits))
        _write(self._handle, memoryview(index + _CRC.pack(crc32(index))), 0)
        self._close()
        self._draft.replace(self._path)

    def discard(self) -> None:
        self._close()
        with suppress(OSError):
            self._draft.unlink()

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _ends(n_label: int, n_tokens: int, n_pieces: int, n_vocab: int) -> tuple[int, int, int, int]:
    """Where label, tokens, table and logits end."""
    label = _HEAD.size + n_label
    tokens = label + 4 * n_tokens
    table = tokens + _ROW.size * n_pieces
    return label, tokens, table, table + 4 * n_vocab


def _mapped(path: Path) -> mmap:
    """The whole file, copied on write: llama.cpp's bindings want an address, and get none of what is read-only."""
    # A pipe of this name would make open() wait for a writer.
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise PermissionError(f"{path} is no file of this user's")
        if not found.st_size:
            raise Damaged(path, "empty")
        return mmap(handle, 0, access=ACCESS_COPY)
    finally:
        os.close(handle)


def _write(handle: int, view: memoryview, offset: int) -> None:
    while view:
        n = os.pwrite(handle, view[: 1 << 23], offset)
        view, offset = view[n:], offset + n
