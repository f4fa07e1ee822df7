"""An engine that stays: loaded once, in a thread of its own, it answers one prompt after another.

The main thread waits for deltas, so that Ctrl-C is heard in the middle of a native call. Knows nothing of what is said.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import TYPE_CHECKING

from llamacli import launch as launching
from llamacli import stored_prefixes
from llamacli.engine.kv import MIN_STORED
from llamacli.engine.recall import Recall
from llamacli.engine.sequence import Delta, FinishReason, SamplingParams, Usage
from llamacli.launch import Launch
from llamacli.prompt import Prompt, PromptBuilder

if TYPE_CHECKING:
    from llamacli.engine.engine import Engine
    from llamacli.engine.prefixes import Prefixes


class Reply:
    """An answer in the making. get() until a delta has a finish_reason; stop() may come from the thread that waits."""

    def __init__(self, prompt: Prompt, params: SamplingParams) -> None:
        self.prompt = prompt
        self.params = params
        self.is_stopped = Event()
        self.out: SimpleQueue[Delta | BaseException] = SimpleQueue()

    def get(self) -> Delta:
        """The next delta. Raises what has gone wrong in the engine's thread."""
        item = self.out.get()
        if isinstance(item, BaseException):
            raise item
        return item


class Resident:
    """Begins to load at once. Nothing but the loaded model is ready before wait() returns.

    prefixes   the directory of computed prompts: a conversation that is stored there begins at once
    """

    def __init__(self, launch: Launch, notice: Callable[[str], None], prefixes: Path) -> None:
        self.launch = launch
        self.recall = Recall()
        self.is_closed = False
        self._notice = notice
        self._directory = prefixes
        self._builder: PromptBuilder | None = None
        self._failure: BaseException | None = None
        self._loaded = Event()
        self._tasks: SimpleQueue[Reply | Event | None] = SimpleQueue()
        self._prefixes: Prefixes | None = None
        self._engine: Engine | None = None
        self._held = array("i")  # the conversation as it stands in the cache
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        return self._loaded.is_set() and self._failure is None and not self.is_closed

    @property
    def has_failed(self) -> bool:
        """It could not be loaded."""
        return self._failure is not None

    @property
    def limit(self) -> int:
        """Tokens that prompt and answer may take together."""
        return min(self.launch.n_limit, self.launch.max_cells or self.launch.n_limit)

    def wait(self) -> PromptBuilder:
        """Until the model is loaded. Raises what has kept it from that."""
        self._loaded.wait()
        if self._failure is not None:
            raise self._failure
        assert self._builder is not None
        return self._builder

    def piece(self, token: int) -> bytes:
        assert self.launch.weights is not None
        return self.launch.weights.vocabulary.piece(token)

    def ask(self, prompt: Prompt, params: SamplingParams) -> Reply:
        reply = Reply(prompt, params)
        self._tasks.put(reply)
        return reply

    def stop(self, reply: Reply) -> None:
        """End an answer where it is. What is computed of it stays; a last delta says that it was cancelled."""
        reply.is_stopped.set()
        engine = self._engine
        if engine is not None:
            engine.abort()

    def save(self) -> Event:
        """Write the conversation to the disk, for a process that goes on with it. Is set when that is done."""
        done = Event()
        self._tasks.put(done)
        return done

    def close(self, *, waits: bool = True) -> None:
        """Free the model, when what is under way is finished. Nothing of it may be used from now on."""
        self.is_closed = True
        self._tasks.put(None)
        if waits:
            self._thread.join()

    # -- the engine's thread, a daemon: when nobody waits any more it ends with the process --

    def _work(self) -> None:
        try:
            weights = launching.load(self.launch, self._notice)
            self._builder = PromptBuilder(
                self.launch.header, weights.vocabulary, known=self.launch.file.format, recall=self.recall
            )
            self._prefixes = stored_prefixes.of(self.launch, self._directory)
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._loaded.set()
        while (task := self._tasks.get()) is not None:
            if isinstance(task, Event):
                try:
                    self._save()
                finally:
                    task.set()
                continue
            try:
                self._answer(task)
            except BaseException as error:
                task.out.put(error)
        if self._engine is not None:
            self._engine.close()
        weights.close()

    def _answer(self, reply: Reply) -> None:
        engine = self._engine_for(reply.prompt.tokens)
        sequence = engine.add(reply.prompt.tokens, reply.params, trim=reply.prompt.trim)
        is_over = False
        try:
            while not is_over and not reply.is_stopped.is_set():
                for delta in engine.step():
                    is_over = is_over or delta.finish_reason is not None
                    reply.out.put(delta)
        finally:
            engine.cancel(sequence, keep=True)
            self._held = sequence.tokens[:]
        if not is_over:
            usage = Usage(sequence.n_prompt, sequence.n_generated, sequence.n_cached)
            reply.out.put(Delta(sequence.id, "", None, None, FinishReason.CANCELLED, usage))

    def _engine_for(self, tokens: array[int]) -> Engine:
        """One with room for this prompt: it grows by itself, but takes over only what it has room for."""
        engine, n = self._engine, len(tokens)
        if engine is not None and n > engine.model.n_cells and engine.kv.best_cached(tokens)[1] < MIN_STORED:
            engine.close()
            engine = self._engine = None
        if engine is None:
            n_expected = max(n, min(launching.MAX_BATCH, self.limit - 1))  # later prompts may be longer than the first
            engine = self._engine = launching.start(self.launch, n_expected, self._prefixes)
        return engine

    def _save(self) -> None:
        if self._prefixes is None or self._engine is None:
            return
        self._prefixes.owe_answer(self._held, self._engine.kv)
        for _ in self._prefixes.save(self._engine.kv, self._engine.model):
            pass
