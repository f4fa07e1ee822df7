"""Is a model's file the one that was published? Its sha256, computed once for as long as the file does not change."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from llamacli.errors import ModelError
from llamacli.models.notes import Notes
from llamacli.models.store import ModelFile

SMALL = 64 << 20  # bytes that are hashed again rather than believed: it takes 50 ms
_BLOCK = 1 << 22
_SAMPLE, _N_PLACES = 1 << 20, 64


def digest(path: Path, report: Callable[[int], None] = lambda n_bytes: None) -> str:
    """sha256 in hex, of the file as it is. A second for every gigabyte. `report` gets the bytes of each block."""
    found = hashlib.sha256()
    buffer = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as stream:
        while n := stream.readinto(buffer):
            found.update(buffer[:n])
            report(n)
    return found.hexdigest()


def sample(path: Path) -> bytes:
    """sha256 of a file's first and last MiB and of places between: tells models of one shape apart in milliseconds."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        for offset, length in (
            (0, _SAMPLE),
            *((i * size // _N_PLACES, 4096) for i in range(1, _N_PLACES)),
            (max(0, size - _SAMPLE), _SAMPLE),
        ):
            stream.seek(offset)
            found.update(stream.read(length))
    return found.digest()


def sha256(path: Path, notes: Notes | None) -> str:
    """The file's sha256, remembered from the last time if there are notes of it."""
    known = notes.read(path).get("sha256") if notes else None
    if isinstance(known, str) and len(known) == 64:
        return known
    found = digest(path)
    if notes:
        notes.add(path, sha256=found)
    return found


def check(file: ModelFile, notes: Notes | None) -> None:
    """Raises ModelError when the file's checksum is known and is another one."""
    if file.sha256 is None:
        return
    is_small = file.path.stat().st_size <= SMALL
    found = digest(file.path) if is_small else sha256(file.path, notes)
    if found != file.sha256:
        raise damaged(file, found)


def damaged(file: ModelFile, found: str) -> ModelError:
    remedy = "install llamacli again" if file.is_bundled else f"llamacli rm {file.name}, then pull it again"
    return ModelError(f"{file.path} is damaged: its sha256 is {found}, not {file.sha256}. To mend it: {remedy}")
