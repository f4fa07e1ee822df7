"""The SQLite file of all conversations: write a turn, find a session, forget it.

Pure storage: what a turn means to a model, or looks like on a terminal, is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import time
from typing import NamedTuple
from unicodedata import normalize

from llamacli.database import Database, Layout, Row
from llamacli.errors import UsageError
from llamacli.sessions.session import Session, Turn, checked_name, packed, unpacked

VERSION = 1
PATIENCE = 2.0  # seconds that a writer waits for another one: whoever asked has the answer, and wants the shell back

# Times are Unix seconds. `folded` is the name as names are compared. `start` is the id of a turn. A turn that was
# replaced (asked again, or in other words) stays and is no part of the conversation any more. `tokens` are int32,
# little-endian.
_TABLES = """
CREATE TABLE sessions (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT, folded TEXT, model TEXT, system TEXT,
    created REAL NOT NULL, updated REAL NOT NULL, start INTEGER NOT NULL, summary TEXT
);
CREATE UNIQUE INDEX session_names ON sessions (folded) WHERE folded IS NOT NULL;
CREATE INDEX last_sessions ON sessions (updated);
CREATE TABLE turns (
    id INTEGER PRIMARY KEY AUTOINCREMENT, session INTEGER NOT NULL, question TEXT NOT NULL, answer TEXT,
    tokens BLOB NOT NULL, model TEXT, asked REAL NOT NULL, answered REAL, finish_reason TEXT,
    prompt_tokens INTEGER, completion_tokens INTEGER, cached_tokens INTEGER, seed INTEGER,
    is_replaced INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX turns_of_sessions ON turns (session, id)
"""
_LAYOUT = Layout(
    version=VERSION,
    application=0x6C6C7331,  # "lls1"
    tables=_TABLES,
    remedy="move it and its -wal and -shm files away (a new one is made by itself), or put a backup in its place",
)
_MOST = 2**63 - 1  # what an integer of SQLite holds
_SESSION = "id, name, model, system, created, updated, start, summary"
_ANSWER = "answer, tokens, model, answered, finish_reason, prompt_tokens, completion_tokens, cached_tokens, seed"


class Listing(NamedTuple):
    """A session among others: how many turns it has, and how it begins. `found` is the text that was looked for."""

    session: Session
    n_turns: int
    first: str | None
    found: str | None = None


class Archive(Database):
    """The open file. Every method raises ResourceError where it cannot do its work; see Database."""

    def __init__(self, path: Path, *, patience: float = PATIENCE) -> None:
        super().__init__(path, _LAYOUT, patience=patience)
        self.read("PRAGMA synchronous = NORMAL")  # a power failure may cost the last turn, but not the file
        self.teach("folded", lambda text: text.casefold() if isinstance(text, str) else "")

    # -- finding --

    def last(self) -> Session | None:
        """The session that was used last."""
        return self._one("ORDER BY updated DESC, id DESC LIMIT 1")

    def named(self, name: str) -> Session | None:
        return self._one("WHERE folded = ?", _folded(name))

    def find(self, reference: str) -> Session:
        """By name or id. Raises UsageError where there is none."""
        text = reference.strip()
        found = self.named(text)
        if found is None and text.isascii() and text.isdecimal() and len(text) < 18:
            found = self._one("WHERE id = ?", int(text))
        if found is None:
            raise UsageError(f"there is no session {text or reference!r}: llamacli logs lists them")
        return found

    def turns(self, session: Session) -> list[Turn]:
        """The conversation, the oldest turn first, without what was replaced."""
        rows = self.read(
            f"SELECT id, question, asked, {_ANSWER} FROM turns WHERE session = ? AND NOT is_replaced ORDER BY id",
            (session.id,),
        )
        return [_turn(row) for row in rows]

    def listed(self, limit: int, text: str | None = None) -> list[Listing]:
        """Sessions, the last one used first; those with a text in them, wherever, upper or lower case."""
        columns = ", ".join(f"s.{name}" for name in _SESSION.split(", "))
        live = "FROM turns t WHERE t.session = s.id AND NOT t.is_replaced"
        shown = f"(SELECT count(*) {live}), (SELECT question {live} ORDER BY id LIMIT 1)"
        query, values = f"SELECT {columns}, {shown}", ()  # type: tuple[str, tuple[object, ...]]
        if text is None:
            query += ", NULL FROM sessions s"
        else:
            needle = text.casefold()
            hit = (
                "SELECT CASE WHEN instr(folded(t.question), ?1) THEN t.question ELSE t.answer END FROM turns t "
                "WHERE t.session = s.id AND (instr(folded(t.question), ?1) OR instr(folded(t.answer), ?1)) "
                "ORDER BY id LIMIT 1"
            )
            others = "instr(folded(s.name), ?1) OR instr(folded(s.system), ?1) OR instr(folded(s.summary), ?1)"
            query += f", ({hit}) AS hit FROM sessions s WHERE hit IS NOT NULL OR {others}"
            values = (needle,)
        rows = self.read(f"{query} ORDER BY s.updated DESC, s.id DESC LIMIT {min(limit, _MOST)}", values)
        return [Listing(_session(row[:8]), *row[8:]) for row in rows]

    # -- writing --

    def add(self, session: Session, turn: Turn) -> tuple[Session, Turn]:
        """Write a turn. A session that is not there yet, or not any more, is made; one with its name is gone on with.

        Returns both with their ids.
        """
        now = time()
        turn = replace(turn, asked=turn.asked or now)
        with self.transaction():
            session = self._written(self._as_left(replace(session, updated=now)))
            values = (session.id, turn.question, turn.asked, *_answer(turn))
            marks = ", ".join("?" * len(values))
            statement = f"INSERT INTO turns (session, question, asked, {_ANSWER}) VALUES ({marks})"
            turn = replace(turn, id=self.insert(statement, _safe(values)))
        return session, turn

    def answer(self, session: Session, turn: Turn) -> tuple[Session, Turn]:
        """Write the answer to a turn that was added without one; as add() does if the turn is not there any more."""
        columns = ", ".join(f"{name} = ?" for name in _ANSWER.split(", "))
        if not self.read("SELECT 1 FROM turns WHERE id = ? AND asked = ?", (turn.id, turn.asked)):
            return self.add(session, replace(turn, id=0))
        with self.transaction():
            self.write(f"UPDATE turns SET {columns} WHERE id = ?", [_safe((*_answer(turn), turn.id))])
            self.write("UPDATE sessions SET updated = ? WHERE id = ?", [(time(), session.id)])
        return session, turn

    def replaced(self, turn: Turn) -> None:
        """The turn is no part of its conversation any more."""
        with self.transaction():
            self.write("UPDATE turns SET is_replaced = 1 WHERE id = ? AND asked = ?", [(turn.id, turn.asked)])

    def keep(self, session: Session, name: str | None = None) -> Session:
        """Write what is known of a session, under a new name if there is one. UsageError for one that another has."""
        with self.transaction():
            if name is None:
                return self._written(self._as_left(session))
            found, other = self._same(session), self.named(checked_name(name))
            if other is not None and other != found:
                raise UsageError(f"there is a session {name!r} already: say another name")
            session = session if found is not None else replace(session, id=0, start=0)
            return self._written(replace(session, name=checked_name(name)))

    def remove(self, session: Session) -> None:
        self._forget("WHERE session = ?", "WHERE id = ?", (session.id,))

    def clear(self) -> int:
        """Remove every session. Returns how many there were."""
        ((n,),) = self.read("SELECT count(*) FROM sessions")
        self._forget("", "", ())
        return int(n)

    def _forget(self, turns: str, sessions: str, values: tuple[object, ...]) -> None:
        self.read("PRAGMA secure_delete = ON")  # what is gone is gone, in the file, too
        with self.transaction():
            self.write(f"DELETE FROM turns {turns}", [values])
            self.write(f"DELETE FROM sessions {sessions}", [values])
        self.read("PRAGMA wal_checkpoint(TRUNCATE)")

    def _as_left(self, session: Session) -> Session:
        """With the name that it has by now; one that is not there any more goes on as the one with its name.

        Only within a transaction: other processes name and remove sessions, too. The file may be another one, where
        the id is another session's.
        """
        found = self._same(session)
        if found is not None:
            return replace(session, name=found.name)
        found = self.named(session.name) if session.name is not None else None
        if found is None:
            return replace(session, id=0, start=0)
        return replace(session, id=found.id, name=found.name, created=found.created, start=found.start)

    def _same(self, session: Session) -> Session | None:
        """As it stands in the file by now."""
        return self._one("WHERE id = ? AND created = ?", session.id, session.created) if session.id else None

    def _written(self, session: Session) -> Session:
        """Only within a transaction."""
        session = replace(session, created=session.created or time())
        folded = _folded(session.name) if session.name is not None else None
        values = _safe(
            (
                *(session.id or None, session.name, session.model, session.system),
                *(session.created, session.updated or time(), session.start, session.summary, folded),
            )
        )
        new = self.insert(
            f"INSERT INTO sessions ({_SESSION}, folded) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (id) DO UPDATE SET name = excluded.name, folded = excluded.folded, "
            "model = excluded.model, system = excluded.system, "
            "updated = max(updated, excluded.updated), start = excluded.start, summary = excluded.summary",
            values,
        )
        return replace(session, id=session.id or new)

    def _one(self, where: str, *values: object) -> Session | None:
        rows = self.read(f"SELECT {_SESSION} FROM sessions {where}", _safe(values))
        return _session(rows[0]) if rows else None


def _folded(name: str) -> str:
    """As names are compared: an accent may be typed as a character of its own, or with its letter."""
    return normalize("NFC", name.strip().casefold())


def _session(row: Row) -> Session:
    return Session(**dict(zip(_SESSION.split(", "), row, strict=True)))


def _turn(row: Row) -> Turn:
    names = ["id", "question", "asked", *_ANSWER.split(", ")]
    values = dict(zip(names, row, strict=True))
    return Turn(**values | {"tokens": unpacked(values["tokens"])})


def _answer(turn: Turn) -> tuple[object, ...]:
    return (
        *(turn.answer, packed(turn.tokens), turn.model, turn.answered, turn.finish_reason),
        *(turn.prompt_tokens, turn.completion_tokens, turn.cached_tokens, turn.seed),
    )


def _safe(values: Sequence[object]) -> tuple[object, ...]:
    """A file's name may hold bytes that are no text; SQLite takes none of them."""
    return tuple(each.encode("utf-8", "replace").decode() if isinstance(each, str) else each for each in values)
