"""A chat at a terminal: prompt-toolkit edits the lines, and is known nowhere else; answers stream between them."""

from __future__ import annotations

import os
import signal
import sys
import termios
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import TextWrapper
from types import FrameType
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.application import Application
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.output.color_depth import ColorDepth
from prompt_toolkit.styles import Style

from llamacli.commands import terminal
from llamacli.commands.face import Said, ctrl_c_stops
from llamacli.commands.rendering import Setting
from llamacli.commands.resident import Reply, Resident
from llamacli.commands.slash import COMMANDS, is_open
from llamacli.commands.terminal import Answer, Notices, harmless

PROMPT = "> "


class AtTerminal:
    """A Face.

    history   file of what was typed; None: it is forgotten at the end
    status    what stands below the line that is edited
    sets      answers are set as Markdown once they are there
    """

    is_asked = True

    def __init__(self, history: Path | None, status: Callable[[], str], notices: Notices, *, sets: bool) -> None:
        self._keyboard = _Keyboard()
        self._status = status
        self._notices = notices
        self._to_stdout = os.isatty(terminal.STDOUT)
        self._sets = sets and self._to_stdout and not is_dumb()
        self._session: PromptSession[str] = PromptSession(
            history=_history(history),
            multiline=True,
            key_bindings=_bindings(),
            completer=_Commands(),
            complete_while_typing=False,
            enable_suspend=True,
            prompt_continuation=lambda width, line, wrapped: "" if wrapped else ". ".rjust(width),
            bottom_toolbar=self._toolbar,
            refresh_interval=0.5,  # a model may still be loading
            style=Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack"}),
            color_depth=ColorDepth.DEPTH_1_BIT if os.environ.get("NO_COLOR") else None,
            # A dumb terminal gets prompt-toolkit's own way with such, unless it is given an output.
            output=None if is_dumb() else create_output(stdout=sys.stdout if self._to_stdout else sys.stderr),
        )

    def read(self, prefilled: str = "") -> str | None:
        while True:
            try:
                with _ctrl_c_is_a_key(self._session.app) as begin:
                    text = self._session.prompt(PROMPT, default=prefilled, handle_sigint=False, pre_run=begin)
            except KeyboardInterrupt:  # clears the line, as in a shell
                if prefilled:
                    return ""
                continue
            except EOFError:
                return None
            if text.strip():
                return terminal.decoded(text.encode("utf-8", "surrogateescape"), "what was typed", self._notices)

    def answer(self, reply: Reply, resident: Resident) -> Said:
        said = Said()
        out = Setting(self._write, _window, sets=self._sets) if self._to_stdout else None
        bare = Answer()
        with ctrl_c_stops(reply, resident):
            while said.end is None:
                delta = reply.get()
                said.add(delta)
                if delta.text:
                    out.feed(delta.text) if out else bare.write(delta.text)
            out.end() if out else bare.end()
        if out:
            self._write("\n")
        return said

    def choose(self, question: str, choices: str) -> str:
        session: PromptSession[str] = PromptSession(output=None if is_dumb() else self._session.app.output)
        self.show(question)
        while True:
            try:
                with _ctrl_c_is_a_key(session.app) as begin:
                    chosen = session.prompt(f"[{'/'.join(choices)}] ", handle_sigint=False, pre_run=begin)
                chosen = chosen.strip().lower()[:1]
            except (KeyboardInterrupt, EOFError):
                return choices[-1]
            if chosen and chosen in choices:
                return chosen

    def show(self, text: str) -> None:
        where = sys.stdout if self._to_stdout else sys.stderr
        fold = TextWrapper(
            max(1, _window().columns - 1), replace_whitespace=False, drop_whitespace=True, break_on_hyphens=False
        )
        lines = (line for each in harmless(text).split("\n") for line in fold.wrap(each) or [""])
        where.write("\n".join(lines) + "\n")
        where.flush()

    def close(self) -> None:
        self._keyboard.restore()

    def _toolbar(self) -> FormattedText:
        return FormattedText([("", harmless(self._status()))])

    def _write(self, text: str) -> None:
        terminal.write_all(terminal.STDOUT, text.encode("utf-8", "replace"))


@contextmanager
def _ctrl_c_is_a_key(app: Application[str]) -> Iterator[Callable[[], None]]:
    """While a line is edited. As a signal it comes just before that, or just after: then it is raised at the end.

    Yields what is to be called when the editing begins. Raised at once the signal would break what it meets.
    """
    came: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def hear(number: int, _: FrameType | None) -> None:
        came.append(number)
        if app.is_running and app.loop is not None:  # from elsewhere: kill -INT
            app.loop.call_soon_threadsafe(end)

    def end() -> None:
        if app.is_running and not app.is_done:
            app.exit(exception=KeyboardInterrupt())

    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, hear)
    try:
        yield came.clear
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


class _Commands(Completer):
    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if text.startswith("/") and " " not in text and "\n" not in text:
            for name, (_, says) in COMMANDS.items():
                if name.startswith(text[1:]):
                    yield Completion(f"/{name}", start_position=-len(text), display_meta=says)


def is_dumb() -> bool:
    """A terminal that knows no control sequences."""
    return os.environ.get("TERM", "").lower() in ("", "dumb", "unknown")


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


class _Kept(FileHistory):
    """A disk that is full, or a directory that may not be written, must not end a chat."""

    def load_history_strings(self) -> Iterable[str]:
        with suppress(OSError):
            yield from super().load_history_strings()

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def _history(path: Path | None) -> History:
    if path is None:
        return InMemoryHistory()
    with suppress(OSError):  # readable by nobody else, from the beginning
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    return _Kept(str(path))


def _window() -> os.terminal_size:
    try:
        found = os.get_terminal_size(terminal.STDOUT)
    except OSError:
        found = os.terminal_size((0, 0))
    return found if found.columns and found.lines else os.terminal_size((80, 24))


class _Keyboard:
    """What is typed while an answer comes is not shown in the middle of it: it waits for the next line.

    Whoever has the terminal while this program is stopped finds it as it was. Nothing happens where stdin is no
    terminal.
    """

    def __init__(self) -> None:
        self._found: list[Any] | None = None
        with suppress(termios.error):
            self._found = termios.tcgetattr(terminal.STDIN)
            quiet = termios.tcgetattr(terminal.STDIN)
            quiet[0] &= ~termios.ICRNL
            quiet[3] &= ~(termios.ECHO | termios.ICANON)
            termios.tcsetattr(terminal.STDIN, termios.TCSADRAIN, quiet)
            if signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
                signal.signal(signal.SIGTSTP, self._stop)

    def restore(self) -> None:
        # In the background the terminal is another's, and who sets it is stopped.
        if self._found is not None and _is_in_front():
            with suppress(termios.error):
                termios.tcsetattr(terminal.STDIN, termios.TCSADRAIN, self._found)

    def _stop(self, number: int, _: FrameType | None) -> None:
        """Ctrl-Z. Returns when the program goes on."""
        with suppress(termios.error):
            ours = termios.tcgetattr(terminal.STDIN)
            self.restore()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            signal.signal(number, self._stop)
            termios.tcsetattr(terminal.STDIN, termios.TCSADRAIN, ours)


def _is_in_front() -> bool:
    with suppress(OSError):
        return os.tcgetpgrp(terminal.STDIN) == os.getpgrp()
    return False
