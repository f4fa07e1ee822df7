"""Keeps a chat while it goes on: each question before its answer, each answer when it is there.

What cannot be written is said once and tried again with the next turn: a chat never ends for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from llamacli.commands.terminal import Notices
from llamacli.errors import LlamacliError
from llamacli.sessions.archive import PATIENCE, Archive
from llamacli.sessions.session import Session, Turn

T = TypeVar("T")
SHORT_PATIENCE = 0.1  # seconds


class Minutes:
    """Of one session at a time.

    writes   whether anything is written; what is not is remembered, and begin_writing() makes up for it
    """

    def __init__(self, path: Path, notices: Notices, session: Session, *, writes: bool) -> None:
        self.session = session
        self._path = path
        self._notices = notices
        self._writes = self._writes_always = writes
        self._unwritten: list[Turn] = []
        self._ids: dict[float, int] = {}  # of turns, by the time they were asked
        self._said = ""

    def id_of(self, turn: Turn) -> int:
        """0 while it is not written."""
        return turn.id or self._ids.get(turn.asked, 0)

    def asked(self, question: str, model: str) -> Turn:
        """A turn without an answer. A process that is killed now loses the answer and not the question."""
        turn = Turn(question=question, model=model, asked=time.time())
        if not self._writes:
            return turn
        return self._try(lambda archive: self._add(archive, turn), turn)

    def answered(self, turn: Turn) -> None:
        if not turn.id:
            self._unwritten.append(turn)  # its question could not be written, either
        if self._writes:
            self._try(lambda archive: self._answer(archive, turn), None)

    def withdrawn(self, turn: Turn) -> None:
        """The turn is no part of the conversation any more."""
        written = self.id_of(turn)
        if not written:
            self._unwritten = [other for other in self._unwritten if other.asked != turn.asked]
        elif self._writes:
            self._try(lambda archive: archive.replaced(written), None)

    def change(self, **changes: Any) -> None:
        """What is known of the session. Written with its first turn, if there is none so far."""
        self.session = replace(self.session, **changes)
        if self.session.id and self._writes:
            self._try(self._keep, None)

    def begin_writing(self, name: str | None) -> None:
        """From now on, under this name. Raises LlamacliError where it cannot be kept."""
        with Archive(self._path) as archive:
            self.session = archive.keep(replace(self.session, name=name or self.session.name))
            self._writes = True
            self._make_up(archive)

    def turn_to(self, session: Session) -> None:
        """Keep another session from now on."""
        self.session = session
        self._writes = self._writes_always
        self._unwritten = []

    def open(self) -> Archive:
        return Archive(self._path)

    def _add(self, archive: Archive, turn: Turn) -> Turn:
        self._make_up(archive)
        return self._added(archive, turn)

    def _added(self, archive: Archive, turn: Turn) -> Turn:
        self.session, turn = archive.add(self.session, turn)
        self._ids[turn.asked] = turn.id
        return turn

    def _answer(self, archive: Archive, turn: Turn) -> None:
        self._make_up(archive)
        if turn.id:
            archive.answer(self.session, turn)

    def _keep(self, archive: Archive) -> None:
        self.session = archive.keep(self.session)

    def _make_up(self, archive: Archive) -> None:
        while self._unwritten:
            self._added(archive, self._unwritten[0])
            del self._unwritten[0]

    def _try(self, write: Callable[[Archive], T], otherwise: T) -> T:
        try:
            # While it cannot be had, nobody waits for it again and again.
            with Archive(self._path, patience=SHORT_PATIENCE if self._said else PATIENCE) as archive:
                done = write(archive)
        except LlamacliError as error:
            if str(error) != self._said:
                self._said = str(error)
                self._notices.say(f"this is not kept, and tried again with the next turn: {error}")
            return otherwise
        self._said = ""
        return done
