"""The SQLite file in which keys and usage are kept: opened, laid out, guarded. The only room that knows sqlite3.

Knows nothing of what a key is. Several processes (servers, the command line) may hold the file open at once: it is in
WAL mode, where readers never wait and writers wait for each other.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llamacli.errors import LlamacliError, ResourceError, UsageError

FILENAME = "ledger.sqlite3"
VERSION = 1
_APPLICATION = 0x6C6C6B31  # "llk1" in the file's header (https://www.sqlite.org/fileformat.html, offset 68)
PATIENCE = 5.0  # seconds that a writer waits for another one

# Times are Unix seconds, days are "2024-12-31" in UTC. `folded` is the name as names are compared.
# `key` in usage is a key's id, or a word that is no id for requests without a key of ours.
_LAYOUT = """
CREATE TABLE keys (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, folded TEXT NOT NULL, digest BLOB NOT NULL,
    rpm INTEGER, tokens_per_day INTEGER, created REAL NOT NULL, revoked REAL
) WITHOUT ROWID;
CREATE UNIQUE INDEX names_in_force ON keys (folded) WHERE revoked IS NULL;
CREATE TABLE usage (
    day TEXT NOT NULL, key TEXT NOT NULL, requests INTEGER NOT NULL, errors INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, last_used REAL NOT NULL,
    PRIMARY KEY (day, key)
) WITHOUT ROWID
"""

Row = tuple[Any, ...]


class Ledger:
    """The open file. May be used from any thread, by one at a time.

    Every method raises ResourceError when the file cannot be read or written, is damaged, or stays locked by another
    process for longer than PATIENCE.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file; creates it, and its directory, for the user alone. UsageError for a newer layout."""
        self.path = path
        with _translated(path):
            _create(path)
            # Transactions are ours to begin: the module would begin them later than they must.
            self._connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
                self._identity = _identity(path)
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        with _translated(self.path):
            self._connection.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, query: str, values: Sequence[object] = ()) -> list[Row]:
        with _translated(self.path):
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What is written in the block is kept if it ends well, and undone if it raises."""
        with self._step("BEGIN IMMEDIATE"):
            yield

    def write(self, statement: str, rows: Sequence[Sequence[object]]) -> None:
        """Once for each row. Only within a transaction."""
        assert self._connection.in_transaction
        with _translated(self.path):
            self._connection.executemany(statement, rows)

    def wait_at_most(self, seconds: float) -> None:
        """How long the next transactions wait for another writer, in place of PATIENCE."""
        with _translated(self.path):
            self._connection.execute(f"PRAGMA busy_timeout = {round(1000 * seconds)}")

    def change_count(self) -> int:
        """A number that differs after another connection has written. Costs microseconds."""
        with _translated(self.path):
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
        with _translated(self.path):
            self._connection.execute(begin)
        try:
            yield
            with _translated(self.path):
                self._connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # SQLite has rolled back by itself after some errors
                self._connection.execute("ROLLBACK")
            raise

    def _use_wal(self) -> None:
        # Going over to WAL needs the file for oneself, and SQLite fails at once instead of waiting its timeout.
        deadline = time.monotonic() + PATIENCE
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
        if application != _APPLICATION:
            raise ResourceError(f"{self.path} is a database of another program: move it away and try again")
        if version > VERSION:
            raise UsageError(
                f"{self.path} has layout {version}, this llamacli knows up to {VERSION}: install a newer llamacli"
            )
        return True

    def _lay_out(self) -> None:
        for statement in _LAYOUT.split(";"):
            self._connection.execute(statement)
        self._connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        self._connection.execute(f"PRAGMA user_version = {VERSION}")


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


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        known = _translation(_code(error), path)
        if known is None:
            raise
        raise known from error
    except OSError as error:
        raise _unwritable(path, error.strerror or type(error).__name__) from error


def _translation(code: int, path: Path) -> LlamacliError | None:
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL):
        return ResourceError(f"{path} stays locked by another process: end that one, or try again later")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return ResourceError(
            f"{path} is damaged: stop all servers, then put a backup in its place, or remove it "
            "with its -wal and -shm files and make new keys"
        )
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
