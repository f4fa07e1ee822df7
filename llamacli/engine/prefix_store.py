"""KV prefixes on disk: which of them a prompt begins with, how much room they may take, who has to go.

Bytes in, bytes out: knows nothing of llama.cpp. Whatever is wrong with a file, or with the directory, is a miss and
never an error: then the prompt is computed. A file's name is the model's fingerprint, the first tokens' and the whole
prefix's hash, its time is that of its last use. Processes need not know of each other: a file appears whole, and one
that is removed stays readable for who has it open.
"""

from __future__ import annotations

import os
import shutil
import stat
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from llamacli.engine.kv import MIN_STORED, common_prefix
from llamacli.engine.prefix_file import NO_BASE, Damaged, Draft, PrefixFile, Title

LARGEST = 4_000_000_000  # bytes that the store takes if nothing else is said,
SHARE = 0.05  # or this part of the disk that is free, if that is less
SUFFIX, DRAFT_SUFFIX = ".kv", ".draft"
MAX_CHAIN = 8  # files that one prefix is put together from
MAX_CANDIDATES = 64  # files with the same beginning that are looked into
STALE_SECONDS = 3600.0  # a draft that nobody has touched for so long has lost its writer


class Piece(NamedTuple):
    """Cells to be taken over: positions `start` to `end`, of which those from `keep` on are not of use."""

    start: int
    end: int
    keep: int
    state: memoryview


class Found:
    """What is stored of a prompt: its first `length` tokens, and the logits after them if that is all of it.

    key      names the file with the last of its cells, on which another one may build
    is_all   that file holds this prompt and nothing else
    """

    def __init__(
        self, links: list[tuple[PrefixFile, int]], key: bytes, logits: bytes | None, *, is_all: bool = False
    ) -> None:
        self.key = key
        self.logits = logits
        self.is_all = is_all
        self.length = links[-1][1]
        self.n_files = len(links)
        self.paths = [file.path for file, _ in links]
        self._wanted = [
            (file, i, Piece(start, end, min(end, keep), file.piece(i)))
            for file, keep in links
            for i, (start, end) in enumerate(file.title.spans)
            if start < keep
        ]
        self._checked: SimpleQueue[bool] = SimpleQueue()
        self._checker: threading.Thread | None = None

    @property
    def n_cells(self) -> int:
        """Cells that are needed to take it over: the last piece may hold some more than are of use."""
        return max((piece.end for _, _, piece in self._wanted), default=0)

    def begin(self) -> None:
        """Start to compare checksums in a thread: it takes 0.25 s for each GB, and the disk may be slow."""
        if self._checker is None:
            self._checker = threading.Thread(target=self._check, name="checksums", daemon=True)
            self._checker.start()

    def pieces(self) -> Iterator[Piece]:
        """Each of them once it is known to be whole; until the next one is asked for. Raises Damaged."""
        self.begin()
        for file, i, piece in self._wanted:
            if not self._checked.get():
                raise Damaged(file.path, "its cells do not match their checksum")
            yield piece
            file.forget(i)

    def _check(self) -> None:
        for file, i, _ in self._wanted:
            self._checked.put(file.is_whole(i))


class Entry(NamedTuple):
    """A file of the store, for people. What cannot be read of it is None."""

    path: Path
    n_bytes: int
    last_used: float  # Unix seconds
    title: Title | None


class PrefixStore:
    """The prefixes of one model among all that are in a directory.

    fingerprint   32 bytes; files with another one are not for us
    budget        bytes that all files of the directory may take; None: 4 GB, or 5 % of the free disk if that is less
    label         the model's name, for `llamacli cache show`
    """

    def __init__(self, directory: Path, fingerprint: bytes, *, budget: int | None = None, label: str = "") -> None:
        self._directory = directory
        self._fingerprint = fingerprint
        self._budget = budget
        self._label = label

    def find(self, tokens: array[int]) -> Found | None:
        """The stored prefix that has most of these tokens: MIN_STORED or more."""
        files: list[tuple[int, bool, PrefixFile]] = []
        for path in self._candidates(tokens):
            file = self._opened(path)
            if file is None:
                continue
            n = common_prefix(tokens, file.title.tokens)
            is_all = n == len(tokens) == len(file.title.tokens)
            if n >= MIN_STORED and (n > file.title.start or is_all):
                files.append((n, is_all, file))
        files.sort(key=lambda each: (each[0], each[1], -len(each[2].title.tokens)), reverse=True)
        for n, is_all, file in files:
            links = self._chain(file, n)
            if links is not None:
                self._use(links)
                return Found(links, self._key(file.title.tokens), file.logits if is_all else None, is_all=is_all)
        return None

    def draft(
        self, tokens: array[int], logits: bytes | None, base: Found | None, start: int, n_bytes: int
    ) -> Draft | None:
        """A file to be filled with the cells of these tokens from `start` on. None where there is no room for it.

        base      holds the cells before `start`
        n_bytes   about how large it will be
        """
        kept = frozenset(base.paths if base else ())
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if stat.S_IMODE(self._directory.stat().st_mode) != 0o700:
                self._directory.chmod(0o700)
            if not self._make_room(n_bytes, kept):
                return None
            title = Title(
                fingerprint=self._fingerprint,
                tokens=tokens,
                start=start,
                base=base.key if base else NO_BASE,
                label=self._label,
                created=time.time(),
            )
            return Draft(self._path(tokens, self._key(tokens)), title, logits)
        except OSError:
            return None

    def discard(self, path: Path) -> None:
        """Remove what is of no use."""
        with suppress(OSError):
            path.unlink()

    # -- names --

    def _key(self, tokens: array[int]) -> bytes:
        return blake2b(tokens.tobytes(), digest_size=16, key=self._fingerprint).digest()

    def _stem(self, tokens: array[int]) -> str:
        """How the names of all files begin that share the first tokens."""
        head = blake2b(tokens[:MIN_STORED].tobytes(), digest_size=8).hexdigest()
        return f"{self._fingerprint[:8].hex()}-{head}-"

    def _path(self, tokens: array[int], key: bytes) -> Path:
        return self._directory / f"{self._stem(tokens)}{key.hex()}{SUFFIX}"

    # -- finding --

    def _candidates(self, tokens: array[int]) -> list[Path]:
        stem = self._stem(tokens)
        try:
            names = [name for name in os.listdir(self._directory) if name.startswith(stem)]  # noqa: PTH208
        except OSError:
            return []
        paths = [self._directory / name for name in names if name.endswith(SUFFIX)]
        return sorted(paths, key=_last_used, reverse=True)[:MAX_CANDIDATES]

    def _opened(self, path: Path) -> PrefixFile | None:
        """None for what cannot be read. What is damaged is removed."""
        try:
            file = PrefixFile(path)
        except OSError:
            return None
        except Damaged:
            self.discard(path)
            return None
        return file if file.title.fingerprint == self._fingerprint else None

    def _chain(self, file: PrefixFile, n: int) -> list[tuple[PrefixFile, int]] | None:
        """The files that hold the first `n` tokens of this one, first to last, with the position each is used up to."""
        links = [(file, n)]
        while (start := links[0][0].title.start) > 0:
            title = links[0][0].title
            base = self._opened(self._path(title.tokens, title.base))
            is_base = base is not None and base.title.start < start
            if base is None or not is_base or common_prefix(base.title.tokens, title.tokens) < start:
                self.discard(links[0][0].path)  # its base has gone: nobody can use it any more
                return None
            links.insert(0, (base, start))
            if len(links) > MAX_CHAIN:
                return None
        return links

    def _use(self, links: list[tuple[PrefixFile, int]]) -> None:
        """They have been used now; a base later than what builds on it, which so is the first to go."""
        now = time.time()
        for i, (file, _) in enumerate(reversed(links)):
            with suppress(OSError):
                os.utime(file.path, (now + i / 100, now + i / 100))

    # -- room --

    def _make_room(self, n_bytes: int, kept: frozenset[Path]) -> bool:
        """Remove what was used longest ago until there is room for so much more. `kept` stays."""
        files = _files(self._directory)
        n_used = sum(size for _, size, _ in files)
        n_kept = sum(size for path, size, _ in files if path in kept)
        free = shutil.disk_usage(self._directory).free
        budget = min(_budget(self._budget, free + n_used), free + n_used)
        if n_bytes + n_kept > budget:
            return False
        files.sort(key=lambda each: each[2])
        for path, size, _ in files:
            if n_used + n_bytes <= budget:
                break
            if path not in kept:
                path.unlink(missing_ok=True)
                n_used -= size
        return n_used + n_bytes <= budget


def entries(directory: Path) -> list[Entry]:
    """All files of a store, the last one used first."""
    found = []
    for path, size, last_used in _files(directory):
        title = None
        if path.suffix == SUFFIX:
            with suppress(OSError, Damaged):
                title = PrefixFile(path).title
            found.append(Entry(path, size, last_used, title))
    return sorted(found, key=lambda entry: entry.last_used, reverse=True)


def budget_of(directory: Path, wanted: int | None) -> int:
    """Bytes that a store may take there. See PrefixStore."""
    if wanted is not None:
        return wanted
    place = next((each for each in (directory, *directory.parents) if each.exists()), Path("/"))
    return _budget(None, shutil.disk_usage(place).free + sum(size for _, size, _ in _files(directory)))


def _budget(wanted: int | None, n_free: int) -> int:
    """n_free   bytes of the disk, those of the store among them"""
    return min(LARGEST, int(SHARE * n_free)) if wanted is None else wanted


def clear(directory: Path) -> tuple[int, int]:
    """Remove every prefix, and what is left of drafts. Returns how many files, and their bytes. Raises OSError."""
    files = _files(directory)
    for path, _, _ in files:
        path.unlink(missing_ok=True)
    return len(files), sum(size for _, size, _ in files)


def _files(directory: Path) -> list[tuple[Path, int, float]]:
    """(path, bytes, time of last use) of each prefix and of each draft. A draft without a writer is removed."""
    found = []
    latest = time.time() - STALE_SECONDS
    with suppress(OSError), os.scandir(directory) as places:
        for place in places:
            with suppress(OSError):
                if not place.name.endswith((SUFFIX, DRAFT_SUFFIX)) or not place.is_file(follow_symlinks=False):
                    continue
                state = place.stat(follow_symlinks=False)
                if place.name.endswith(DRAFT_SUFFIX) and state.st_mtime < latest:
                    Path(place.path).unlink()
                else:
                    found.append((Path(place.path), state.st_size, state.st_mtime))
    return found


def _last_used(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0
