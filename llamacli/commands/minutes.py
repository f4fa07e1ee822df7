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
        self._unwritten: list[Turn] = []  # answered, the oldest first
        self._withdrawn: list[Turn] = []  # those that are still part of the conversation in the file
        self._ids: dict[float, int] = {}  # of turns, by the time they were asked
        self._last_dropped = 0.0  # when the turn was asked behind which the conversation begins, if it has no id yet
        self._said = ""

    def id_of(self, turn: Turn) -> int:
        """0 while it is not written."""
        return self._ids.get(turn.asked, turn.id)

    def asked(self, question: str, model: str) -> Turn:
        """A turn without an answer. A process that is killed now loses the answer and not the question."""
        turn = Turn(question=question, model=model, asked=time.time())
        if not self._writes:
            return turn
        return self._try(lambda archive: self._add(archive, turn), turn)

    def answered(self, turn: Turn) -> None:
        self._unwritten.append(turn)
        self._catch_up()

    def withdrawn(self, turn: Turn) -> None:
        """The turn is no part of the conversation any more."""
        self._unwritten = [other for other in self._unwritten if other.asked != turn.asked]
        if written := self.id_of(turn):
            self._withdrawn.append(replace(turn, id=written))
            self._catch_up()

    def begins_behind(self, turn: Turn, summary: str | None) -> None:
        """This turn and those before it had no room in the context any more."""
        written = self.id_of(turn)
        self._last_dropped = 0.0 if written else turn.asked
        self.change(start=written + 1 if written else self.session.start, summary=summary)

    def change(self, **changes: Any) -> None:
        """What is known of the session. Written with its first turn, if there is none so far."""
        self.session = replace(self.session, **changes)
        if self.session.id and self._writes:
            self._try(self._keep, None)

    def begin_writing(self, name: str | None) -> None:
        """From now on, under this name. Raises LlamacliError where it cannot be kept."""
        with Archive(self._path) as archive:
            self.session = archive.keep(self.session, name)
            self._writes = True
            self._make_up(archive)

    def end(self) -> None:
        """The conversation ends: what could not be written so far is tried once more, and said if it is lost."""
        self._catch_up()
        if self._writes and self._unwritten:
            n = len(self._unwritten)
            self._notices.say(f"the last {'answer is' if n == 1 else f'{n} answers are'} not kept")
        self._unwritten, self._withdrawn = [], []

    def turn_to(self, session: Session) -> None:
        """Keep another session from now on."""
        self.end()
        self.session = session
        self._writes = self._writes_always

    def open(self) -> Archive:
        return Archive(self._path)

    def _add(self, archive: Archive, turn: Turn) -> Turn:
        self._make_up(archive)
        return self._written(archive, turn)

    def _written(self, archive: Archive, turn: Turn) -> Turn:
        self.session, turn = (archive.answer if turn.id else archive.add)(self.session, turn)
        self._ids[turn.asked] = turn.id
        if turn.asked == self._last_dropped:
            self.session = replace(self.session, start=turn.id + 1)
        return turn

    def _keep(self, archive: Archive) -> None:
        self.session = archive.keep(self.session)

    def _make_up(self, archive: Archive) -> None:
        while self._unwritten:
            self._written(archive, self._unwritten[0])
            del self._unwritten[0]
        while self._withdrawn:
            archive.replaced(self._withdrawn[0])
            del self._withdrawn[0]

    def _catch_up(self) -> None:
        if self._writes and (self._unwritten or self._withdrawn):
            self._try(self._make_up, None)

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
