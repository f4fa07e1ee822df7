"""One process at a time works on a model's file; the others wait and say so."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llamacli.models.partial import cannot_write


@contextmanager
def locked(target: Path, notice: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a file that is about to be written. It ends with the process, however that ends.

    The lock file stays: removing it would let two processes hold locks on two files of one name.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(target.with_name(f".{target.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise cannot_write(target, error) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notice(f"another process is downloading {target.name}: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
