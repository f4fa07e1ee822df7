"""The log of `run`: the session that a prompt goes on with, and the answer that is written to it afterwards.

Nothing of the database is imported before the answer is there, unless a session is asked for. What goes wrong after
the answer is one line on stderr: the answer is never lost for it.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from llamacli.commands import terminal
from llamacli.commands.deliver import Source
from llamacli.commands.question import RunOptions, Texts
from llamacli.commands.terminal import Notices
from llamacli.config import Directories, Resolved, Settings
from llamacli.errors import LlamacliError, ModelError, UsageError

if TYPE_CHECKING:
    from llamacli.models.store import ModelFile
    from llamacli.sessions.session import Session, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What there is to know of an answer beside its text. `finish_reason` is None for one that has no end.

    question    what the model was asked; None: what the user has said
    n_dropped   of the session's turns, the oldest that were left out
    """

    model: str | None = None
    question: str | None = None
    tokens: array[int] = field(default_factory=lambda: array("i"))
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)  # prompt_tokens, completion_tokens, cached_tokens
    seed: int | None = None
    n_dropped: int = 0


class Answering(Source, Protocol):
    """A source that knows what has become of its answer."""

    def outcome(self) -> Outcome: ...


class Heard:
    """A source whose text is remembered while it is delivered."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._parts).strip("\n")

    def pieces(self) -> Iterator[str]:
        for piece in self._source.pieces():
            self._parts.append(piece)
            yield piece

    def record(self, answer: str) -> dict[str, object]:
        return self._source.record(answer)

    def exit_code(self) -> int:
        return self._source.exit_code()


def known_as(file: ModelFile) -> str:
    """What finds a model again, from any directory."""
    return str(file.path.resolve()) if file.home == "path" else file.name


def in_context(session: Session, turns: Sequence[Turn]) -> list[Turn]:
    """Those that the model is to see."""
    return [turn for turn in turns if turn.answer is not None and turn.id >= session.start]


def say_who_goes_on(session: Session, file: ModelFile, turns: Sequence[Turn], notices: Notices) -> None:
    """If it is another model."""
    if session.model not in (None, known_as(file)) and turns:
        notices.say(f"session {session.reference}: {file.name} goes on with what {session.model} has begun")


class Journal:
    """Of one run.

    session   that goes on; None for a conversation of one turn
    turns     the ones before, as far as the model is to see them
    writes    whether anything is kept

    Raises UsageError and ResourceError for a session that is asked for and cannot be read.
    """

    def __init__(self, resolved: Resolved, options: RunOptions, places: Directories, notices: Notices) -> None:
        self._path = places.sessions
        self._notices = notices
        self._sources = resolved.sources
        self._asked = time.time()
        self.session: Session | None = None
        self.turns: list[Turn] = []
        self.unanswered: Turn | None = None  # the last question, if it was left without an answer
        self.writes = resolved.settings.log
        if options.has_session:
            # A session that is asked for is written to, whatever the config file says of other answers.
            self.writes = self.writes or resolved.sources["log"].kind != "flag"
            self._open(options)

    def _open(self, options: RunOptions) -> None:
        from llamacli.sessions.archive import Archive
        from llamacli.sessions.session import Session, checked_name

        with Archive(self._path) as archive:
            if options.session is None:
                found = archive.last()
                if found is None:
                    raise UsageError("there is no session to go on with: leave --continue out, and begin one")
            elif options.session.strip().isdecimal():
                found = archive.find(options.session)
            else:
                found = archive.named(checked_name(options.session))
            if found is None:
                assert options.session is not None
                if not self.writes:
                    raise UsageError(f"there is no session {options.session!r}, and --no-log forbids to begin it")
                found = Session(name=checked_name(options.session))
            turns = archive.turns(found) if found.id else []
        self.session = found
        self.turns = in_context(found, turns)
        self.unanswered = turns[-1] if turns and turns[-1].answer is None else None

    def settings(self, settings: Settings) -> Settings:
        """With the session's model and system prompt, where the command line names no others."""
        session = self.session
        if session is None or not session.id:
            return settings
        if session.model is not None and self._sources["model"].kind != "flag":
            settings = replace(settings, model=session.model)
        if self._sources["system"].kind != "flag":
            settings = replace(settings, system=session.system)
        elif settings.system != session.system and self.turns:
            self._notices.say(f"session {session.reference}: the system prompt is another one from now on")
        return settings

    def meet(self, file: ModelFile) -> None:
        """Say so if it is another model that goes on. Raises ModelError where the session's own is gone."""
        if self.session is not None:
            if self.session.model == known_as(file) and not file.path.exists():
                raise ModelError(
                    f"session {self.session.reference} needs {file.path}, which does not exist any more: put it back, "
                    "or name another model with -m"
                )
            say_who_goes_on(self.session, file, self.turns, self._notices)

    def write(self, heard: Heard, told: Answering, texts: Texts, system: str | None, *, is_over: bool) -> None:
        """Write the answer down, as far as there is one. Who reads stdout need not wait for it.

        is_over   False when something has ended it early
        """
        outcome = told.outcome()
        if not self.writes or not (heard.text or outcome.finish_reason):
            return
        terminal.end_stdout()
        try:
            with suppress(KeyboardInterrupt):  # the answer is there, and only its place in the log is lost
                self._write(heard.text, outcome, texts, system, is_over=is_over)
        except LlamacliError as error:
            self._notices.say(f"this answer was not logged: {error} (--no-log, or log = false, logs nothing)")

    def _write(self, text: str, outcome: Outcome, texts: Texts, system: str | None, *, is_over: bool) -> None:
        from llamacli.sessions.archive import Archive
        from llamacli.sessions.session import Session, Turn

        session = self.session or Session()
        if outcome.n_dropped:
            # The oldest turn that was kept; if none was, the session begins with the one that is written now.
            left = self.turns[outcome.n_dropped :]
            session = replace(session, start=left[0].id if left else self.turns[-1].id + 1)
        session = replace(session, model=outcome.model or session.model, system=system)
        turn = Turn(
            question=outcome.question or texts.content,
            answer=text,
            tokens=outcome.tokens,
            model=outcome.model,
            asked=self._asked,
            answered=time.time(),
            finish_reason=(outcome.finish_reason if is_over else None) or "cancelled",
            seed=outcome.seed,
            **outcome.usage,
        )
        with Archive(self._path) as archive:
            session, _ = archive.add(session, turn)
        if self.session is not None:
            self._notices.detail(f"logged in session {session.reference}: llamacli logs show {session.id}")
