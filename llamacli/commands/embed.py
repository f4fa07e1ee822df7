"""Texts as vectors: one from the command line or stdin, or one from each line of stdin."""

from __future__ import annotations

import json
import signal
import threading
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from llamacli import launch as launching
from llamacli.commands import question, terminal
from llamacli.commands.obtain import models_in, obtain
from llamacli.commands.terminal import Notices
from llamacli.config import Directories, Settings
from llamacli.errors import InputTooLong, UsageError
from llamacli.launch import Launch
from llamacli.models.notes import Notes
from llamacli.prompt import LONGEST_PIECE, PromptBuilder


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What is wanted beside the settings.

    text      None or "-" is stdin
    lines     a vector for each line of it
    is_unit   vectors of length 1
    """

    text: str | None
    lines: bool = False
    is_unit: bool = True
    as_json: bool = False


def run(settings: Settings, wishes: Wishes, places: Directories) -> int:
    """Print a JSON array of numbers for each text, on a line of its own. Returns the exit code.

    Raises UsageError for an empty text, InputTooLong for one that is longer than a vector is made of.
    """
    if settings.quiet and settings.verbose:
        raise UsageError("--quiet and --verbose contradict each other")
    question.check_machine(settings)
    notices = Notices(quiet=settings.quiet, verbose=settings.verbose)
    texts = _texts(wishes, notices)
    for i, text in enumerate(texts):  # before a model is downloaded for nothing
        if not text.strip():
            raise UsageError(f"{_name(wishes, i)} is empty: there is nothing to make a vector of")
    notes = Notes(places.cache)
    file = obtain(settings, models_in(places), notes, notices)
    work = _Work(launching.prepare(settings, file, notices.say, notes), texts, wishes, notices)
    vectors = []
    for vector in work.vectors():
        numbers = array("f", vector).tolist()
        if wishes.as_json:
            vectors.append(numbers)
        else:
            _print(numbers)
    if wishes.as_json:
        _print(
            {
                "model": file.name,
                "dimensions": len(vectors[0]),
                "normalized": wishes.is_unit,
                "embeddings": vectors,
                "usage": {"prompt_tokens": work.n_tokens, "total_tokens": work.n_tokens},
            }
        )
    return 0


def _texts(wishes: Wishes, notices: Notices) -> list[str]:
    if wishes.text is not None and wishes.text != "-":
        if wishes.lines:
            raise UsageError("--lines is for text on stdin: pipe it in, and leave the argument out")
        return [terminal.decoded(wishes.text.encode("utf-8", "surrogateescape"), "the text", notices)]
    if not terminal.stdin_has_text(asked_for=wishes.text == "-"):
        raise UsageError('nothing to embed: llamacli embed "your text", or pipe a text into it')
    text = terminal.read_stdin(notices)
    return [line.removesuffix("\r") for line in text.split("\n")] if wishes.lines else [text]


def _name(wishes: Wishes, i: int) -> str:
    return f"line {i + 1:,}" if wishes.lines else "the text"


def _print(value: object) -> None:
    terminal.write_all(terminal.STDOUT, json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    terminal.write_all(terminal.STDOUT, b"\n")


class _Work:
    """The vectors come out of a thread of its own, so that Ctrl-C is heard in the middle of a step."""

    def __init__(self, launch: Launch, texts: Sequence[str], wishes: Wishes, notices: Notices) -> None:
        self._launch, self._texts, self._wishes, self._notices = launch, texts, wishes, notices
        self._out: SimpleQueue[Any] = SimpleQueue()  # bytes; None at the end; or an exception
        self.n_tokens = 0

    def vectors(self) -> Iterator[bytes]:
        """float32[dimensions] of each text."""
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=self._compute, name="engine", daemon=True).start()
        while (item := self._out.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def _compute(self) -> None:
        try:
            embedder = launching.embedder(self._launch, self._notices.say)
            tokens = self._tokens(embedder.limit)
            embedder.check(tokens, self._name)
            self.n_tokens = sum(map(len, tokens))
            for name, choice in self._launch.choices.items():
                self._notices.detail(f"{name} = {choice.value} ({choice.why})")
            for vector in embedder.vectors(tokens, is_unit=self._wishes.is_unit):
                if vector is not None:
                    self._out.put(vector)
            self._out.put(None)
        except BaseException as error:
            self._out.put(error)

    def _tokens(self, limit: int) -> list[array[int]]:
        assert self._launch.weights is not None
        builder = PromptBuilder(self._launch.header, self._launch.weights.vocabulary, known=self._launch.file.format)
        for i, text in enumerate(self._texts):
            if len(text) > limit * LONGEST_PIECE:
                raise InputTooLong(f"{self._name(i)} is far longer than the {limit:,} tokens an embedding is made of")
        return [builder.continued(text).tokens for text in self._texts]

    def _name(self, i: int) -> str:
        return _name(self._wishes, i)
