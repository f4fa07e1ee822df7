"""Writes an answer to stdout as it comes, wherever it is computed: bare, or as one JSON object at its end."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from llamacli.commands import terminal
from llamacli.commands.terminal import Answer, Notices
from llamacli.engine.sequence import Delta, FinishReason
from llamacli.errors import LlamacliError

if TYPE_CHECKING:
    from llamacli.schema.form import Form

EXIT_CUT = 3


class Source(Protocol):
    """Where an answer comes from."""

    def pieces(self) -> Iterator[str]:
        """Its text as it comes, some of it empty. Raises LlamacliError, and may do so after some pieces."""

    def record(self, answer: str) -> dict[str, object]:
        """Everything about the run, for --json. Only after the last piece."""

    def exit_code(self) -> int:
        """0, or 3 for an answer that was cut, which is then said. Only after the last piece. Raises LlamacliError."""


def say_it_completes(model: str, notices: Notices) -> None:
    notices.say(f"{model} is a base model: it continues your text instead of answering it")


def say_it_was_closed(end: Delta, added: str, notices: Notices) -> int:
    """Of an answer that ran out of room and was given the end that its form demands. Returns the exit code."""
    is_cut = end.finish_reason is FinishReason.CONTEXT
    room = "the context" if is_cut else "--max-tokens"
    shown = added if len(added) <= 60 else f"{added[:57]}..."
    notices.say(f"the answer was closed early: {room} has no room for more; {shown} at its end is not the model's")
    return EXIT_CUT if is_cut else 0


def deliver(
    source: Source,
    *,
    as_json: bool,
    stream: bool,
    form: Form | None = None,
    files: Sequence[Mapping[str, object]] = (),
) -> int:
    """Returns the exit code. What was written when something fails stays, and gets its newline.

    form    what the answer is checked against when it is there
    files   what -f has brought, for --json

    Raises SchemaError for an answer that does not have its form.
    """
    answer = Answer()
    parts: list[str] = []
    # Until here Ctrl-C has ended the process at once (see __main__.py); from here on there is something to keep.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for piece in source.pieces():
            parts.append(piece)
            if stream and not as_json and piece:
                answer.write(piece)
    except (KeyboardInterrupt, LlamacliError):
        if not answer.is_empty:
            answer.end()
        raise
    text = "".join(parts)
    if as_json:
        told = source.record(text.rstrip("\n"))
        if files and isinstance(told["input"], dict):
            told["input"]["files"] = list(files)
        record = json.dumps(told, ensure_ascii=False) + "\n"
        # A path that is not UTF-8 comes out in JSON's own escapes.
        terminal.write_all(terminal.STDOUT, record.encode("utf-8", "backslashreplace"))
    else:
        if not stream:
            answer.write(text)
        answer.end()
    code = source.exit_code()
    if form is not None:
        form.check(text)
    return code
