"""The scripted model as an engine in a process of its own, which dies or dawdles when a prompt tells it to."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from array import array
from collections.abc import Callable
from pathlib import Path

from scripted import ScriptedModel

from llamacli.engine.engine import Engine
from llamacli.engine.model import Aborted
from llamacli.engine.protocol import ModelFacts, Recipe
from llamacli.engine.sequence import Chunk, Logprobs
from llamacli.engine.worker import Workshop
from llamacli.errors import ResourceError, UsageError
from llamacli.prompt import Format, Message, Prompt

KILLED, SEGFAULT, ABORT, EXCEPTION = 240, 241, 242, 243  # a prompt with one of these ends the process when it is run


class DeadlyModel(ScriptedModel):
    """Takes `row_seconds` for every row, like a slow machine."""

    def __init__(self, row_seconds: float, *, n_cells: int, n_slots: int, n_batch: int) -> None:
        super().__init__(n_cells=n_cells, n_slots=n_slots, n_batch=n_batch)
        self._row_seconds = row_seconds
        self._aborted = threading.Event()

    def run(self, chunks: list[Chunk]) -> list[int]:
        for sequence, *_ in chunks:
            for token in sequence.tokens[: sequence.n_prompt]:
                if token in FAULTS:
                    FAULTS[token]()
        if self._row_seconds and self._aborted.wait(self._row_seconds * sum(chunk.n for chunk in chunks)):
            self._aborted.clear()
            raise Aborted
        self.batches.clear()  # they would fill the memory of a process that runs for long
        return super().run(chunks)

    def abort(self) -> None:
        self._aborted.set()

    def logprobs(self, row: int, token: int, n_top: int) -> Logprobs:
        return Logprobs(token, -0.5, ())


def _raise() -> None:
    raise ZeroDivisionError("told to")


FAULTS: dict[int, Callable[[], object]] = {
    KILLED: lambda: os.kill(os.getpid(), signal.SIGKILL),
    SEGFAULT: lambda: ctypes.string_at(0),
    ABORT: os.abort,
    EXCEPTION: _raise,
}


def workshop(
    notice: Callable[[str], None],
    *,
    slots: int = 4,
    n_cells: int = 4096,
    n_batch: int = 512,
    n_limit: int = 1024,
    row_seconds: float = 0.0,
    fault: str = "",
    once: str = "",
) -> Workshop:
    """fault   what goes wrong while it loads, from the second time on where `once` is a file that remembers"""
    notice(f"{slots} slots")
    if once and not Path(once).exists():
        Path(once).touch()
    elif fault == "resource":
        raise ResourceError("8.0 GiB are needed, 4.0 GiB can be used here")
    elif fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "exception":
        raise ZeroDivisionError("told to")
    model = DeadlyModel(row_seconds, n_cells=n_cells, n_slots=slots + 4, n_batch=n_batch)
    engine = Engine(model, n_limit=n_limit, step_seconds=None, max_running=slots)
    facts = ModelFacts(
        name="scripted", path="", n_vocab=256, n_limit=n_limit, n_cells=n_cells, slots=slots, format="llama-2"
    )
    return Workshop(engine, encode, facts)


def encode(question: str | list[Message]) -> Prompt:
    text = question if isinstance(question, str) else question[-1].content
    if not text.isascii():
        raise UsageError("the prompt must be ASCII here")
    return Prompt(array("i", list(text.encode())), Format.LLAMA2, trim=False)


def recipe(**options: object) -> Recipe:
    return Recipe("scripted_workshop:workshop", options, (str(Path(__file__).parent),))
