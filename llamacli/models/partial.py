"""A file that is not whole yet: its bytes, and a journal of which of them are there.

The journal survives SIGKILL: bytes are written before it says so. It is bound to one content (name, sizes and
checksums), so that parts of two versions of a file are never mixed. Loss of power may leave holes; the checksum
finds them.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Lock

from llamacli.errors import ModelError, ResourceError

_COUNT = struct.Struct("<Q")
_HEADER = 4096  # bytes at the journal's beginning that say what the file is
DISK_FULL = (28, 122, 27)  # ENOSPC, EDQUOT, EFBIG


@dataclass(slots=True)
class Stretch:
    """`done` of the bytes start..end are there, from its start on. One thread writes it."""

    index: int
    start: int
    end: int
    done: int = 0
    is_taken: bool = False

    @property
    def position(self) -> int:
        return self.start + self.done

    @property
    def is_whole(self) -> bool:
        return self.position == self.end


class PartialFile:
    """The bytes of `target` until they are all there.

    identity   what the content is; a partial file of another identity is thrown away
    bounds     where stretches begin that may be written apart from one another; starts with 0, ends with the size

    Raises ResourceError when the disk is full, ModelError when the directory cannot be written.
    """

    def __init__(self, target: Path, identity: str, bounds: Sequence[int]) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".part")
        self._journal_path = target.with_name(target.name + ".part.journal")
        self.size = bounds[-1]
        self.stretches = [Stretch(i, start, end) for i, (start, end) in enumerate(pairwise(bounds))]
        self._header = json.dumps([identity, list(bounds)]).encode()
        self._lock = Lock()
        self._is_closed = False
        try:
            self._open()
        except OSError as error:
            raise cannot_write(target, error) from None

    def _open(self) -> None:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT, 0o666)
        stored = os.pread(self._journal, _HEADER + _COUNT.size * len(self.stretches), 0)
        if len(self._header) > _HEADER:
            raise ModelError(f"{self.target} has too many parts")
        if stored[:_HEADER].rstrip(b"\0") == self._header and len(stored) > _HEADER:
            self._believe(stored[_HEADER:])
        else:
            self.start_over()

    def _believe(self, counts: bytes) -> None:
        """Take over what the journal says is there, as far as the file is that long."""
        length = os.fstat(self._file).st_size
        for stretch, (done,) in zip(self.stretches, _COUNT.iter_unpack(counts), strict=True):
            stretch.done = max(0, min(done, stretch.end - stretch.start, length - stretch.start))

    def start_over(self) -> None:
        """Forget every byte."""
        for stretch in self.stretches:
            stretch.done = 0
        os.ftruncate(self._journal, 0)
        os.ftruncate(self._file, 0)
        os.pwrite(self._journal, self._header.ljust(_HEADER, b"\0") + bytes(_COUNT.size * len(self.stretches)), 0)

    @property
    def done(self) -> int:
        return sum(stretch.done for stretch in self.stretches)

    @property
    def frontier(self) -> int:
        """How many bytes are there from the beginning on without a gap."""
        for stretch in self.stretches:
            if not stretch.is_whole:
                return stretch.position
        return self.size

    @property
    def allocated(self) -> int:
        """Bytes that it takes up on the disk already."""
        return os.fstat(self._file).st_blocks * 512

    def take(self) -> Stretch | None:
        """A stretch that has bytes missing and that nobody works on."""
        with self._lock:
            for stretch in self.stretches:
                if not stretch.is_taken and not stretch.is_whole:
                    stretch.is_taken = True
                    return stretch
        return None

    def give_back(self, stretch: Stretch) -> None:
        with self._lock:
            stretch.is_taken = False

    def write(self, stretch: Stretch, data: bytes) -> None:
        """Add the stretch's next bytes. Raises ResourceError when the disk is full; what there is stays."""
        piece = memoryview(data)
        with self._lock:
            if self._is_closed:
                return  # a thread that nobody waits for any more
            try:
                try:
                    while piece:
                        n = os.pwrite(self._file, piece, stretch.position)
                        stretch.done += n
                        piece = piece[n:]
                finally:  # on a full disk too: there a part of the piece was written
                    os.pwrite(self._journal, _COUNT.pack(stretch.done), _HEADER + _COUNT.size * stretch.index)
            except OSError as error:
                raise cannot_write(self.target, error) from None

    def read_into(self, buffer: memoryview, position: int) -> int:
        return os.preadv(self._file, [buffer], position)

    def finish(self) -> None:
        """Give it its final name: whole, or not at all."""
        try:
            os.fsync(self._file)
            self.path.replace(self.target)
            self._journal_path.unlink()
            _sync_directory(self.target.parent)
        except OSError as error:
            raise cannot_write(self.target, error) from None

    def remove(self) -> None:
        for path in (self.path, self._journal_path):
            with suppress(OSError):
                path.unlink()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            os.close(self._file)
            os.close(self._journal)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cannot_write(target: Path, error: OSError) -> ResourceError | ModelError:
    if error.errno in DISK_FULL:
        return ResourceError(
            f"the disk is full: {target.name} cannot be written to {target.parent}. Free some space and say the same "
            "again; what has come so far is kept"
        )
    return ModelError(f"{target} cannot be written: {error.strerror}. LLAMACLI_HOME chooses another place")
