"""The SQLite file in which keys and usage are kept. Knows nothing of what a key is.

Several processes (servers, the command line) may hold it open at once. See database.py.
"""

from __future__ import annotations

from pathlib import Path

from llamacli.database import PATIENCE, Database, Layout, Row

__all__ = ["FILENAME", "PATIENCE", "VERSION", "Ledger", "Row"]

FILENAME = "ledger.sqlite3"
VERSION = 1

# Times are Unix seconds, days are "2024-12-31" in UTC. `folded` is the name as names are compared.
# `key` in usage is a key's id, or a word that is no id for requests without a key of ours.
_TABLES = """
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

_LAYOUT = Layout(
    version=VERSION,
    application=0x6C6C6B31,  # "llk1"
    tables=_TABLES,
    remedy="stop all servers, then put a backup in its place, or remove it with its -wal and -shm files "
    "and make new keys",
)


class Ledger(Database):
    """The open file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _LAYOUT)
