"""Downloads files so that any interruption costs nothing but time: resumed by Range, hashed on the way, named last.

Knows nothing of the hub: it is given addresses, sizes and checksums.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from llamacli.errors import ModelError
from llamacli.models.partial import PartialFile, Stretch
from llamacli.models.ranges import Interrupted, NoRanges, Reader, Refused, Source, WrongFile

LARGE = 256 << 20  # bytes from which several connections are worth their set-up
N_STRETCHES = 16  # of a large file
N_CONNECTIONS = 4
_BLOCK = 1 << 20
_TICK = 0.1  # seconds between two reports


@dataclass(frozen=True, slots=True)
class Piece:
    """A remote file that is the target, or a part of it. `sha256` in hex; None where nobody knows it."""

    source: Source
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes that are there, of all; and what is in the way at the moment, if anything is."""

    done: int
    total: int
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a bad line is put up with.

    timeout    seconds without a byte after which a connection counts as dead
    attempts   failures in a row, without a single new byte, after which we give up
    """

    timeout: float = 10.0
    attempts: int = 8
    first_delay: float = 1.0
    longest_delay: float = 30.0

    def delay(self, n_failures: int) -> float:
        return min(self.longest_delay, self.first_delay * 2.0 ** (n_failures - 1))


Report = Callable[[Progress], None]


class Damaged(ModelError):
    """What came does not have the checksum that was announced."""


def fetch(
    pieces: Sequence[Piece],
    target: Path,
    report: Report = lambda progress: None,
    *,
    patience: Patience = Patience(),
    n_connections: int = N_CONNECTIONS,
    large: int = LARGE,
) -> str:
    """Download the pieces, one after another, into one file. Returns its sha256.

    large   bytes from which a piece comes over several connections

    The target appears whole and checked, or not at all. What has come stays beside it for the next call, whatever
    ends this one; only bytes that fail their checksum are removed, and fetched once more.

    Raises ModelError, or ResourceError when the disk is full. The caller holds the target's lock.
    """
    try:
        return _attempt(pieces, target, report, patience, n_connections, large)
    except Damaged as error:
        report(Progress(0, sum(piece.source.size for piece in pieces), f"{error}; downloading it once more"))
        return _attempt(pieces, target, report, patience, n_connections, large)


def missing(pieces: Sequence[Piece], target: Path) -> int:
    """Bytes of disk that fetching will still take."""
    with closing(_partial(pieces, target)) as partial:
        return max(0, partial.size - partial.allocated)


def _partial(pieces: Sequence[Piece], target: Path, large: int = LARGE) -> PartialFile:
    identity = "|".join(f"{piece.sha256 or piece.source.url} {piece.source.size}" for piece in pieces)
    ends = list(accumulate(piece.source.size for piece in pieces))
    bounds = {0, *ends}
    for piece, end in zip(pieces, ends, strict=True):
        if piece.source.size >= large:
            step = -(-piece.source.size // N_STRETCHES)
            bounds |= set(range(end - piece.source.size, end, step))
    return PartialFile(target, identity, sorted(bounds))


def _attempt(
    pieces: Sequence[Piece], target: Path, report: Report, patience: Patience, n_connections: int, large: int
) -> str:
    with closing(_partial(pieces, target, large)) as partial:
        digests = _Download(pieces, partial, report, patience).run(n_connections)
        for piece, digest in zip(pieces, digests.pieces, strict=True):
            if piece.sha256 is not None and digest != piece.sha256:
                partial.remove()
                raise Damaged(
                    f"what came for {target.name} is damaged, and has been removed: its sha256 is {digest}, not "
                    f"{piece.sha256}"
                )
        partial.finish()
        return digests.whole


@dataclass(frozen=True, slots=True)
class _Digests:
    whole: str
    pieces: Sequence[str]


@dataclass(slots=True)
class _Download:
    """Threads that fetch stretches, one that hashes behind them, and the caller's that watches."""

    pieces: Sequence[Piece]
    partial: PartialFile
    report: Report
    patience: Patience
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _moved: threading.Event = field(default_factory=threading.Event)
    _n_failures: int = 0  # in a row, without a new byte
    _trouble: str = ""
    _error: BaseException | None = None
    _wants_whole: bool = False

    def run(self, n_connections: int) -> _Digests:
        """Until all bytes are there and hashed. Raises what stopped it."""
        self.report(Progress(self.partial.done, self.partial.size))
        hasher = _Hasher(self.pieces, self.partial)
        workers = [self._fetch_stretches] * min(n_connections, len(self.partial.stretches))
        try:
            with self._running([*workers, lambda: hasher.run(self._moved, self._stop)]):
                self._watch(hasher)
        except NoRanges:
            self._begin_again()
            hasher = _Hasher(self.pieces, self.partial)
            with self._running([self._fetch_whole, lambda: hasher.run(self._moved, self._stop)]):
                self._watch(hasher)
        return hasher.digests()

    def _begin_again(self) -> None:
        self._stop.clear()
        self._error = None
        self.partial.start_over()

    @contextmanager
    def _running(self, works: Sequence[Callable[[], None]]) -> Iterator[None]:
        threads = [threading.Thread(target=self._guarded, args=(work,), daemon=True) for work in works]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._moved.set()
            if not isinstance(sys.exception(), KeyboardInterrupt):  # who wants to leave waits for no dead line
                for thread in threads:
                    thread.join(timeout=self.patience.timeout + 1)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
            self._stop.set()

    def _watch(self, hasher: _Hasher) -> None:
        while not self._stop.is_set() and not hasher.finished.wait(_TICK):
            self.report(Progress(self.partial.done, self.partial.size, self._trouble))
        if self._error is not None:
            raise self._error
        self.report(Progress(self.partial.done, self.partial.size))

    # -- in the threads that fetch --

    def _fetch_stretches(self) -> None:
        reader = Reader(self.patience.timeout)
        while not self._stop.is_set():
            stretch = self.partial.take()
            if stretch is None:
                return
            try:
                while not stretch.is_whole and not self._stop.is_set():
                    self._try(lambda stretch=stretch: self._copy(reader, stretch))  # type: ignore[misc]
            finally:
                self.partial.give_back(stretch)

    def _copy(self, reader: Reader, stretch: Stretch) -> None:
        offset, piece = self._piece_at(stretch.start)
        with reader.open(piece.source, stretch.position - offset, stretch.end - offset) as read:
            while not stretch.is_whole and not self._stop.is_set():
                self._keep(stretch, read())

    def _fetch_whole(self) -> None:
        """From a server that sends whole files only: an interruption costs all that has come of the file."""
        reader = Reader(self.patience.timeout)
        for piece in self.pieces:
            while not self._stop.is_set() and not self._has(piece):
                self._try(lambda piece=piece: self._copy_whole(reader, piece))  # type: ignore[misc]

    def _copy_whole(self, reader: Reader, piece: Piece) -> None:
        stretches = self._stretches_of(piece)
        for stretch in stretches:
            stretch.done = 0
        with reader.open(piece.source, 0, piece.source.size) as read:
            data = b""
            for stretch in stretches:
                while not stretch.is_whole and not self._stop.is_set():
                    data = data or read()
                    room = stretch.end - stretch.position
                    self._keep(stretch, data[:room])
                    data = data[room:]

    def _keep(self, stretch: Stretch, data: bytes) -> None:
        if not data:
            raise Interrupted("the connection was closed")
        self.partial.write(stretch, data[: stretch.end - stretch.position])
        self._n_failures = 0
        self._trouble = ""
        self._moved.set()

    def _try(self, work: Callable[[], None]) -> None:
        """Do it; wait where it fails in a way that may pass."""
        try:
            work()
        except Interrupted as error:
            self._stop.wait(self._wait_for(error))
        except WrongFile as error:
            name = self.partial.target.name
            raise ModelError(
                f"{name} cannot be downloaded: {error}. Is there a login page or a proxy between here and the hub?"
            ) from None
        except Refused as error:
            raise ModelError(f"{self.partial.target.name} cannot be downloaded: the server answers {error}") from None

    def _wait_for(self, error: Interrupted) -> float:
        """Seconds until the next attempt. Raises ModelError when there have been enough."""
        with self._lock:
            self._n_failures += 1
            n = self._n_failures
        if n >= self.patience.attempts:
            raise ModelError(
                f"{self.partial.target.name} cannot be downloaded: {error}, {n} times in a row. "
                f"{_size(self.partial.done)} of {_size(self.partial.size)} are here and kept: the same command resumes"
            )
        delay = self.patience.delay(n) if error.retry_after is None else error.retry_after
        self._trouble = f"{error}; trying again in {delay:.0f} s"
        return delay

    def _piece_at(self, position: int) -> tuple[int, Piece]:
        """The piece that a position lies in, and where it begins."""
        offset = 0
        for piece in self.pieces:
            if position < offset + piece.source.size:
                return offset, piece
            offset += piece.source.size
        raise AssertionError("a position behind the end")

    def _stretches_of(self, piece: Piece) -> list[Stretch]:
        return [stretch for stretch in self.partial.stretches if self._piece_at(stretch.start)[1] is piece]

    def _has(self, piece: Piece) -> bool:
        return all(stretch.is_whole for stretch in self._stretches_of(piece))


class _Hasher:
    """Hashes from the beginning as far as there is no gap, bytes of earlier runs included."""

    def __init__(self, pieces: Sequence[Piece], partial: PartialFile) -> None:
        self._partial = partial
        self._ends = list(accumulate(piece.source.size for piece in pieces))
        self._pieces = [hashlib.sha256() for _ in pieces]
        self._whole = hashlib.sha256() if len(pieces) > 1 else self._pieces[0]
        self.finished = threading.Event()

    def digests(self) -> _Digests:
        return _Digests(self._whole.hexdigest(), [each.hexdigest() for each in self._pieces])

    def run(self, moved: threading.Event, stop: threading.Event) -> None:
        buffer = memoryview(bytearray(_BLOCK))
        position = 0
        for end, digest in zip(self._ends, self._pieces, strict=True):
            while position < end:
                ready = min(self._partial.frontier, end) - position
                if ready <= 0:
                    if stop.is_set():
                        return
                    moved.wait(_TICK)
                    moved.clear()
                    continue
                n = self._partial.read_into(buffer[: min(ready, _BLOCK)], position)
                digest.update(buffer[:n])
                if digest is not self._whole:
                    self._whole.update(buffer[:n])
                position += n
        self.finished.set()


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
