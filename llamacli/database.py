"""An SQLite file of ours: opened, laid out, guarded. The only room that knows sqlite3.

Knows nothing of what is in it. Several processes may hold the file open at once: it is in WAL mode, where readers never
wait and writers wait for each other.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from llamacli.errors import LlamacliError, ResourceError, UsageError

PATIENCE = 5.0  # seconds that a writer waits for another one

Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """What a file of ours holds.

    version       of the tables
    application   tells our files from those of other programs (https://www.sqlite.org/fileformat.html, offset 68)
    tables        statements that create them, with ";" between
    remedy        what to do about a file that is damaged; follows "FILE is damaged: "
    """

    version: int
    application: int
    tables: str
    remedy: str


class Database:
    """The open file. May be used from any thread, by one at a time.

    Every method raises ResourceError when the file cannot be read or written, is damaged, or stays locked by another
    process for longer than its patience.
    """

    def __init__(self, path: Path, layout: Layout, *, patience: float = PATIENCE) -> None:
        """Opens the file; creates it, and its directory, for the user alone. UsageError for a newer layout.

        patience   seconds that a writer waits for another one
        """
        self.path = path
        self._layout = layout
        self._patience = patience
        with self._translated():
            _create(path)
            # Transactions are ours to begin: the module would begin them later than they must.
            self._connection = sqlite3.connect(path, timeout=patience, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
                self._identity = _identity(path)
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        with self._translated():
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, query: str, values: Sequence[object] = ()) -> list[Row]:
        with self._translated():
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What is written in the block is kept if it ends well, and undone if it raises."""
        with self._step("BEGIN IMMEDIATE"):
            yield

    def write(self, statement: str, rows: Sequence[Sequence[object]]) -> None:
        """Once for each row. Only within a transaction."""
        assert self._connection.in_transaction
        with self._translated():
            self._connection.executemany(statement, rows)

    def insert(self, statement: str, values: Sequence[object]) -> int:
        """One row; returns its id. Only within a transaction."""
        assert self._connection.in_transaction
        with self._translated():
            return self._connection.execute(statement, values).lastrowid or 0

    def teach(self, name: str, function: Callable[[Any], str]) -> None:
        """Let queries call a function of one value by this name."""
        self._connection.create_function(name, 1, function, deterministic=True)

    def wait_at_most(self, seconds: float) -> None:
        """How long the next transactions wait for another writer, in place of what was said at first."""
        with self._translated():
            self._connection.execute(f"PRAGMA busy_timeout = {round(1000 * seconds)}")

    def change_count(self) -> int:
        """A number that differs after another connection has written. Costs microseconds."""
        with self._translated():
            (count,) = self._connection.execute("PRAGMA data_version").fetchone()
            return int(count)

    def is_in_place(self) -> bool:
        """Whether the path still leads to the open file; a removed or replaced one would stay as it was for ever."""
        try:
            return _identity(self.path) == self._identity
        except OSError:
            return False

    def _prepare(self) -> None:
        with self._step("BEGIN"):
            if self._is_laid_out():
                return
        self._use_wal()
        with self._step("BEGIN IMMEDIATE"):
            if not self._is_laid_out():  # another process may have been quicker
                self._lay_out()

    @contextmanager
    def _step(self, begin: str) -> Iterator[None]:
        with self._translated():
            self._connection.execute(begin)
        try:
            yield
            with self._translated():
                self._connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # SQLite has rolled back by itself after some errors
                self._connection.execute("ROLLBACK")
            raise

    def _use_wal(self) -> None:
        # Going over to WAL needs the file for oneself, and SQLite fails at once instead of waiting its timeout.
        deadline = time.monotonic() + self._patience
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _is_laid_out(self) -> bool:
        """False for a file that is still empty. Within a transaction, or it could see half of another's work."""
        version, application, n_tables = (
            self._connection.execute(query).fetchone()[0]
            for query in ("PRAGMA user_version", "PRAGMA application_id", "SELECT count(*) FROM sqlite_master")
        )
        if (version, application, n_tables) == (0, 0, 0):
            return False
        if application != self._layout.application:
            raise ResourceError(f"{self.path} is a database of another program: move it away and try again")
        if version > self._layout.version:
            known = self._layout.version
            raise UsageError(
                f"{self.path} has layout {version}, this llamacli knows up to {known}: install a newer llamacli"
            )
        return True

    def _lay_out(self) -> None:
        for statement in self._layout.tables.split(";"):
            self._connection.execute(statement)
        self._connection.execute(f"PRAGMA application_id = {self._layout.application}")
        self._connection.execute(f"PRAGMA user_version = {self._layout.version}")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            known = _translation(_code(error), self.path, self._layout.remedy)
            if known is None:
                raise
            raise known from error
        except OSError as error:
            raise _unwritable(self.path, error.strerror or type(error).__name__) from error


def _create(path: Path) -> None:
    """An empty file for the user alone, if there is none.

    The -wal and -shm files beside it take over its permissions. An existing file must not be opened here: closing it
    would drop the locks that SQLite holds on it in this process (https://www.sqlite.org/howtocorrupt.html, 2.2).
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))


def _identity(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_dev, state.st_ino


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code (https://www.sqlite.org/rescode.html), 0 for an error of the module's own."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _translation(code: int, path: Path, remedy: str) -> LlamacliError | None:
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL):
        return ResourceError(f"{path} stays locked by another process: end that one, or try again later")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return ResourceError(f"{path} is damaged: {remedy}")
    if code == sqlite3.SQLITE_FULL:
        return ResourceError(f"{path} cannot be written: the disk is full; make room and try again")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return _unwritable(path, "it is read-only")
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOLFS):
        return _unwritable(path, "it or its directory cannot be opened")
    if code == sqlite3.SQLITE_IOERR:  # a full disk too, where it is not the file itself that finds no room
        return _unwritable(path, "the disk is full or has failed")
    return None


def _unwritable(path: Path, reason: str) -> ResourceError:
    return ResourceError(f"{path} cannot be written: {reason}; let LLAMACLI_HOME name a directory of your own")
