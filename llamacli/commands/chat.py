"""`llamacli chat`: a conversation at a terminal, or with a pipe."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from llamacli.commands import question as asking
from llamacli.commands import slash, terminal
from llamacli.commands.face import Face, Pipe
from llamacli.commands.journal import Journal, known_as
from llamacli.commands.logs import shown_turn, titles
from llamacli.commands.minutes import Minutes
from llamacli.commands.obtain import models_in, obtain
from llamacli.commands.question import RunOptions
from llamacli.commands.talk import Talk
from llamacli.commands.terminal import Notices
from llamacli.config import Directories, Resolved
from llamacli.errors import LlamacliError, UsageError
from llamacli.models.notes import Notes
from llamacli.sessions.session import Session

HISTORY = "chat_history"  # in the data directory
_LISTED = 10


def run(resolved: Resolved, options: RunOptions, places: Directories, *, is_plain: bool) -> int:
    """Converse until the end of what is typed. Returns the exit code. Raises LlamacliError."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    settings = resolved.settings
    if settings.quiet and settings.verbose:
        raise UsageError("--quiet and --verbose contradict each other")
    asking.check_machine(settings)
    notices = Notices(quiet=settings.quiet, verbose=settings.verbose)
    if settings.remote is not None and not settings.local:
        notices.say(f"chat computes here: {resolved.sources['remote']} is for run")
    journal = Journal(resolved, options, places, notices)
    settings = replace(settings, system=asking.system_prompt(settings.system))
    settings = journal.settings(settings)
    notes = Notes(places.cache)
    file = obtain(settings, models_in(places), notes, notices)
    journal.meet(file)
    session = replace(journal.session or Session(), model=known_as(file), system=settings.system)
    minutes = Minutes(places.sessions, notices, session, writes=journal.writes)
    talks: list[Talk] = []
    history = places.data / HISTORY if journal.writes else None
    face = _face(history, notices, lambda: talks[0].status() if talks else "", is_plain=is_plain)
    try:
        _prepare_signals(face)
        talk = Talk(settings, options, file, face, minutes, notices, notes, places)
        talks.append(talk)
        unanswered = [journal.unanswered] if journal.unanswered else []
        talk.take_up(session, [*journal.turns, *unanswered])
        return Chat(talk, face, notices, is_quiet=settings.quiet).go_on()
    finally:
        face.close()


def _prepare_signals(face: Face) -> None:
    """Ctrl-C is heard; what ends the program leaves the terminal as it was, a closed stdout included."""
    terminal.before_dying(face.close)

    def end(number: int, _: FrameType | None) -> None:
        terminal.die_of(signal.Signals(number))

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _face(history: Path | None, notices: Notices, status: Callable[[], str], *, is_plain: bool) -> Face:
    if not os.isatty(terminal.STDIN):
        return Pipe(notices)
    if not os.isatty(terminal.STDOUT) and not os.isatty(sys.stderr.fileno()):
        raise UsageError("chat needs a terminal to show what you type: neither stdout nor stderr is one")
    from llamacli.commands.editor import AtTerminal

    return AtTerminal(history, status, notices, sets=not is_plain)


class Chat:
    """Reads what is typed and does it."""

    def __init__(self, talk: Talk, face: Face, notices: Notices, *, is_quiet: bool) -> None:
        self._talk = talk
        self._face = face
        self._notices = notices
        self._is_quiet = is_quiet
        self._commands: dict[str, Callable[[str], None]] = {
            "system": self._system,
            "model": self._model,
            "file": self._file,
            "retry": lambda _: talk.again(),
            "edit": self._edit,
            "save": self._save,
            "load": self._load,
            "tokens": lambda _: face.show(talk.counts()),
            "clear": self._clear,
            "help": lambda _: face.show(slash.help_text()),
        }

    def go_on(self) -> int:
        """Returns the exit code. Raises LlamacliError: from a pipe the first one ends it, at a terminal it is said."""
        self._greet()
        while True:
            try:
                text = self._face.read()
                if text is None or not self._do(text):
                    break
            except KeyboardInterrupt:
                if not self._face.is_asked:
                    raise
                self._notices.say("stopped")
            except LlamacliError as error:
                if not self._face.is_asked or self._talk.is_hopeless:
                    raise
                terminal.print_line(str(error), sys.stderr)
        with suppress(KeyboardInterrupt):
            if not os.isatty(terminal.STDOUT):
                terminal.end_stdout()
            self._talk.leave()
        return self._talk.exit_code

    def _do(self, text: str) -> bool:
        """A question or a command. False when that was to leave."""
        command = slash.command(text)
        if command is None:
            self._talk.ask(slash.question(text))
        elif command.name == "quit":
            return False
        else:
            self._commands[command.name](command.argument)
        return True

    def _greet(self) -> None:
        talk, face = self._talk, self._face
        if not face.is_asked or self._is_quiet:
            return
        self._notices.say(f"{talk.file.name}. /help shows what can be typed, Ctrl-D leaves")
        if talk.turns:
            n = len(talk.turns)
            said = f"session {talk.minutes.session.reference} goes on after {n} {'turn' if n == 1 else 'turns'}:"
            face.show("\n".join([said, "", shown_turn(talk.turns[-1]), ""]))
        if talk.unanswered is not None:
            face.show(f"> {talk.unanswered.question}\n[no answer: /retry asks again]\n")

    def _system(self, text: str) -> None:
        if text:
            self._talk.change_system(None if text == "-" else asking.system_prompt(text))
        self._face.show(self._talk.settings.system or "there is no system prompt")

    def _model(self, name: str) -> None:
        if name:
            self._talk.change_model(name)
        else:
            self._face.show(f"{self._talk.file.name}: {self._talk.file.path}")

    def _file(self, words: str) -> None:
        path, question = slash.path_and_rest(words)
        said = self._talk.attach(path)
        if question:
            self._talk.ask(question)
        else:
            self._face.show(said)

    def _edit(self, text: str) -> None:
        if not self._talk.last_question:
            raise UsageError("nothing was asked so far")
        if not text and not self._face.is_asked:
            raise UsageError("/edit TEXT: what is to be asked instead?")
        text = text or slash.question(self._face.read(self._talk.last_question) or "")
        if text:
            self._talk.again(text)

    def _save(self, name: str) -> None:
        minutes = self._talk.minutes
        minutes.begin_writing(name or None)
        self._face.show(f"kept as {minutes.session.reference}: /load {minutes.session.reference} goes on with it")

    def _load(self, reference: str) -> None:
        with self._talk.minutes.open() as archive:
            if not reference:
                self._face.show(titles(archive.listed(_LISTED)))
                return
            session = archive.find(reference)
            turns = archive.turns(session)
        self._talk.turn_to(session, turns)
        self._greet()

    def _clear(self, _: str) -> None:
        self._talk.clear()
        self._face.show("a new conversation")
