"""The file that a batch writes: never over another one, never doubled, and gone on with after any interruption.

What is there is what is done: each line is written when it and all before it are answered. A line that was cut off
by a crash is taken away. Two batches never write one file.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamacli.errors import UsageError

_HEAD = b'{"id": '  # how every line of ours begins


@dataclass(slots=True)
class Output:
    """An open file, to be written to at its end.

    done       the ids of the lines that are there
    n_failed   those of them that tell of an error
    end        in bytes: what is behind it goes away with the first line; None where nothing does
    """

    descriptor: int
    done: tuple[Any, ...] = ()
    n_failed: int = 0
    end: int | None = None


def opened(path: Path, *, resume: bool, force: bool) -> Output:
    """Raises UsageError where the file may not be written, or cannot be gone on with."""
    if resume and force:
        raise UsageError("--resume and --force contradict each other: go on with the output, or write it anew")
    is_file = _is_file_or_absent(path)
    if resume and not is_file:
        raise UsageError(f"{path} is no file: --resume has nothing to go on with")
    try:
        # Not to be read where it is a pipe: we would never learn that its reader has gone.
        access = os.O_RDWR if is_file else os.O_WRONLY
        descriptor = os.open(path, access | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UsageError(f"the output cannot be written to {str(path)[:200]}: {error.strerror}") from None
    if not is_file:
        return Output(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"another llamacli batch is writing {path}: wait for it, or name another output") from None
    size = os.fstat(descriptor).st_size
    if size and not (resume or force):
        raise UsageError(f"{path} exists: --resume goes on with it, --force writes it anew")
    if force:
        return Output(descriptor, end=0)
    return _resumed(descriptor, path)


def _is_file_or_absent(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True  # what is wrong with it shows when it is opened


def begin(output: Output) -> None:
    """Take away what is not to stay. Not before it is certain that the file is the one that is meant."""
    if output.end is not None:
        os.ftruncate(output.descriptor, output.end)
        os.lseek(output.descriptor, output.end, os.SEEK_SET)


def _resumed(descriptor: int, path: Path) -> Output:
    ids: list[Any] = []
    n_failed = end = 0
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        for raw in file:
            found = _written(raw)
            if found is None:
                if file.read(1) or not _is_cut_off(raw):
                    raise UsageError(
                        f"line {len(ids) + 1:,} of {path} is none that a batch has written: --force writes it anew"
                    )
                break
            ids.append(found["custom_id"] if "custom_id" in found else found["id"])
            n_failed += has_failed(found)
            end += len(raw)
    return Output(descriptor, tuple(ids), n_failed, end)


def _written(raw: bytes) -> dict[str, Any] | None:
    """A whole line of ours."""
    try:
        found = json.loads(raw) if raw.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and "id" in found else None


def _is_cut_off(raw: bytes) -> bool:
    """Whether it is the beginning of a line of ours, and then nothing, or the zeros that a power failure leaves."""
    begun = raw.rstrip(b"\0")
    return len(begun) < len(raw) or (not raw.endswith(b"\n") and begun[: len(_HEAD)] == _HEAD[: len(begun)])


def has_failed(line: dict[str, Any]) -> bool:
    response = line.get("response")
    is_refused = isinstance(response, dict) and response.get("status_code") != 200
    return line.get("error") is not None or is_refused
