"""An engine in a process of its own: started, watched, started again when it dies. For asyncio.

This side never loads llama.cpp, so nothing native can end it. How it is used:

    engine = EngineProcess(recipe)              # launch.serving() makes the recipe of a model
    facts = await engine.start()                # raises what the loading raised: ModelError, ResourceError ...
    prompt = await engine.encode([Message("user", "hi")])
    stream = engine.submit(prompt.tokens, SamplingParams(max_tokens=32), trim=prompt.trim)
    async for deltas in stream:                 # all that came since the last time, one Delta or many
        ...
    await engine.stop(grace=30)
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal

from llamacli.engine.life import EXIT_SECONDS, Life
from llamacli.engine.protocol import (
    Ask,
    ModelFacts,
    Recipe,
    Tell,
    error_named,
    packed_params,
    unpacked_delta,
)
from llamacli.engine.sequence import Delta, FinishReason, Load, SamplingParams
from llamacli.errors import EngineCrashed, LlamacliError, ResourceError
from llamacli.prompt import Format, Message, Prompt

State = Literal["loading", "ready", "draining", "failed"]

PAUSE_AT = 256  # deltas that nobody has read: the sequence is paused until somebody does
STALL_SECONDS = 60.0  # a paused stream that is not read for so long is cancelled
MAX_STREAMS = 4096  # open at once; a server's queue is shorter
MAX_FUTILE_LIVES = 3  # processes in a row that died before they were ready or had finished an answer
BACKOFF_SECONDS = (0.0, 0.25, 1.0, 4.0, 15.0)  # before the next start, by the deaths in a row before it
FUTILE_SECONDS = 60.0  # a process that lived longer did not die of its start

log = logging.getLogger(__name__)


class Stream:
    """The deltas of one answer, in handfuls: `async for deltas in stream`.

    Ends by itself after the delta with a finish_reason, and at once after cancel(). Raises what the engine raised
    for the request (UsageError, InputTooLong), or EngineCrashed when the process dies. While nobody reads, at most a
    few hundred deltas are kept: the sequence is paused, its slot given to others, and after STALL_SECONDS the stream
    ends with FinishReason.CANCELLED.

    has_begun   something of it has been computed; from the beginning where no other sequence is in its way
    """

    __slots__ = ("_deltas", "_error", "_is_over", "_owner", "_paused_at", "_waiter", "has_begun", "id")

    def __init__(self, owner: EngineProcess, id: int, *, has_begun: bool) -> None:
        self.id = id
        self.has_begun = has_begun
        self._owner = owner
        self._deltas: list[Delta] = []
        self._error: LlamacliError | None = None
        self._is_over = False
        self._paused_at: float | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> AsyncIterator[list[Delta]]:
        return self

    async def __anext__(self) -> list[Delta]:
        while not self._deltas:
            if self._error is not None:
                raise self._error
            if self._is_over:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        deltas, self._deltas = self._deltas, []
        if self._paused_at is not None:
            self._paused_at = None
            if not self._is_over:
                self._owner._resume(self)
        return deltas

    def cancel(self) -> None:
        """Stop the answer, at any stage; nothing more will come. Does nothing if it has ended already."""
        if not self._is_over:
            self._is_over = True
            self._deltas.clear()
            self._owner._cancel(self)
            self._wake()

    def _take(self, delta: Delta) -> None:
        self.has_begun |= delta.finish_reason is not FinishReason.CANCELLED  # which may be all that it gets
        self._deltas.append(delta)
        if delta.finish_reason is not None:
            self._is_over = True
        elif len(self._deltas) >= PAUSE_AT and self._paused_at is None:
            self._paused_at = monotonic()
            self._owner._pause(self)
        self._wake()

    def _fail(self, error: LlamacliError) -> None:
        self._error = error
        self._is_over = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _NoProcess(ResourceError):
    """Not even a process: no file descriptor, no memory for it. That has nothing to do with the model, and passes."""


@dataclass(frozen=True, slots=True)
class Stats:
    """load: of this engine and, for its counts of tokens, of those before it. `restarts`: of the process."""

    load: Load
    restarts: int


@dataclass(frozen=True, slots=True)
class Embedded:
    """vectors: float32 in little endian, each of length 1. n_tokens: of all texts."""

    vectors: list[bytes]
    n_tokens: int


class EngineProcess:
    """An engine in a supervised child process.

    state      "loading": start() has not returned, or the process has died and the next one is being started;
               "ready"; "draining": stop() was called; "failed": it will not come back, see `reason`
    facts      of the model; None before the first start has succeeded
    reason     why it has died last; empty if it never has

    recipe     how the child makes its engine
    notice     takes lines for the user while a model loads
    All methods belong to one event loop, and the loop's thread must live as long as the child (Linux ends a child
    together with the thread that started it).
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        notice: Callable[[str], None] = log.info,
        stall_seconds: float = STALL_SECONDS,
        backoff_seconds: Sequence[float] = BACKOFF_SECONDS,
    ) -> None:
        self.recipe = recipe
        self.state: State = "loading"
        self.facts: ModelFacts | None = None
        self.reason = ""
        self._notice = notice
        self._stall_seconds = stall_seconds
        self._backoff = backoff_seconds
        self._life: Life | None = None
        self._streams: dict[int, Stream] = {}
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._last_id = 0
        self._pieces: dict[int, bytes] = {}
        self._load = Load()
        self._past = Load()  # token counts of the processes before this one
        self._n_restarts = 0
        self._n_futile = 0
        self._emptied: asyncio.Event = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> EngineProcess:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop(0)

    @property
    def pid(self) -> int | None:
        """Of the child; None while there is none."""
        return self._life.pid if self._life is not None else None

    @property
    def stats(self) -> Stats:
        now, past = self._load, self._past
        load = Load(now[0], now[1], now[2], *(a + b for a, b in zip(now[3:], past[3:], strict=True)))
        return Stats(load, self._n_restarts)

    def piece(self, token: int) -> bytes:
        """The bytes of a token that some delta's logprobs have named."""
        return self._pieces[token]

    async def start(self) -> ModelFacts:
        """Start the child and wait until its model is loaded.

        Raises the LlamacliError that the loading raised, or EngineCrashed when the process died of it.
        """
        try:
            facts = await self._begin()
        except LlamacliError as error:
            self.state, self.reason = "failed", str(error)
            raise
        self._tend(self._cancel_the_stalled())
        return facts

    async def encode(self, asked: str | Sequence[Message]) -> Prompt:
        """The prompt of a conversation, or of a text that is to be continued as it is.

        Takes about 0.1 ms, also while a batch computes. Raises UsageError for a conversation that this model cannot
        be given, InputTooLong for one that leaves no room for an answer, EngineCrashed.
        """
        life = self._ready_life()
        self._last_id += 1
        number = self._last_id
        answer: asyncio.Future[Prompt] = asyncio.get_running_loop().create_future()
        self._questions[number] = answer
        told = asked if isinstance(asked, str) else [(each.role, each.content) for each in asked]
        life.say((Ask.ENCODE, number, told))
        try:
            return await answer
        finally:
            self._questions.pop(number, None)

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, *, trim: bool = False, is_stored: bool = True
    ) -> Stream:
        """Queue a prompt; its answer comes out of the stream. What is wrong with it is raised there.

        Raises EngineCrashed unless the state is "ready", ResourceError when far too many streams are open.
        """
        life = self._ready_life()
        if len(self._streams) >= MAX_STREAMS:
            raise ResourceError(f"{MAX_STREAMS:,} answers are being waited for already: try again later")
        self._last_id += 1
        is_first = self.facts is not None and len(self._streams) < self.facts.slots
        stream = self._streams[self._last_id] = Stream(self, self._last_id, has_begun=is_first)
        tokens = prompt if isinstance(prompt, array) else array("i", prompt)
        life.say((Ask.ADD, stream.id, tokens.tobytes(), packed_params(params), trim, is_stored))
        return stream

    async def embed(self, texts: Sequence[str | Sequence[int]]) -> Embedded:
        """Vectors of texts, or of token ids. Cancelling it stops the work.

        Raises UsageError or InputTooLong for what cannot be embedded, ResourceError, EngineCrashed.
        """
        life = self._ready_life()
        self._last_id += 1
        number = self._last_id
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._questions[number] = answer
        told = [text if isinstance(text, str) else array("i", text).tobytes() for text in texts]
        life.say((Ask.EMBED, number, told))
        try:
            vectors, n_tokens = await answer
        except asyncio.CancelledError:
            life.say((Ask.CANCEL, number))
            raise
        finally:
            self._questions.pop(number, None)
        return Embedded(vectors, n_tokens)

    async def stop(self, grace: float) -> None:
        """Let nobody in, wait up to `grace` seconds for the open streams, cancel the others, end the child."""
        was_failed = self.state == "failed"
        self.state = "draining"
        if grace > 0 and self._life is not None and not was_failed:
            with suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    await self._until_no_stream_is_open()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._give_up_streams()
        if self._life is not None:
            life, self._life = self._life, None
            await life.end(EXIT_SECONDS)

    # -- one life of the child --

    def _ready_life(self) -> Life:
        if self.state == "ready" and self._life is not None:
            return self._life
        if self.state == "failed":
            raise EngineCrashed(f"the engine has failed and does not come back by itself: {self.reason}")
        if self.state == "draining":
            raise EngineCrashed("the server is going down")
        raise EngineCrashed("the engine is not ready: its model is being loaded")

    async def _begin(self) -> ModelFacts:
        life = self._life = Life(self._hear)
        try:
            await life.begin(self.recipe)
        except OSError as error:
            self._life = None
            await life.end(EXIT_SECONDS)
            raise _NoProcess(f"no process can be started for the engine: {error.strerror or error}") from None
        try:
            self.facts = await life.ready
        except LlamacliError as error:
            self._life = None
            if isinstance(error, EngineCrashed):
                error = EngineCrashed(f"{error}: {await life.autopsy()}")
            await life.end(EXIT_SECONDS)
            raise error from None
        if self.state == "loading":
            self.state = "ready"
        self._tend(self._watch(life))
        return self.facts

    async def _watch(self, life: Life) -> None:
        """When this child dies: tell everybody who waits for it, and start the next one."""
        began, n_answers = monotonic(), life.n_answers
        await asyncio.shield(life.ended)
        self.state = "loading" if self.state == "ready" else self.state
        reason = await life.autopsy()
        self._bury(life, reason)
        is_futile = life.n_answers == n_answers and monotonic() - began < FUTILE_SECONDS
        # A process that was ready is followed by another one, however often: what it died of may have been one request.
        self._n_futile = min(self._n_futile + 1, MAX_FUTILE_LIVES - 1) if is_futile else 0
        if self.state == "loading":
            await self._begin_again()

    def _bury(self, life: Life, reason: str) -> None:
        self.reason = f"the engine's process has died ({reason})"
        log.error("%s", self.reason)
        self._life = None
        self._past = self.stats.load
        self._load = Load()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream._fail(EngineCrashed(f"{self.reason}; another one is being started: try again"))
        self._fail_questions()
        self._emptied.set()

    async def _begin_again(self) -> None:
        n_tries = self._n_futile
        while self._n_futile < MAX_FUTILE_LIVES:
            await asyncio.sleep(self._backoff[min(n_tries, len(self._backoff) - 1)])
            n_tries += 1
            self._n_restarts += 1
            try:
                await self._begin()
            except LlamacliError as error:
                self.reason = str(error)
                self._n_futile += not isinstance(error, _NoProcess)
            else:
                return
        self.state = "failed"
        log.error("the engine is not started again after %d futile attempts: %s", self._n_futile, self.reason)

    def _fail_questions(self) -> None:
        for question in self._questions.values():
            if not question.done():
                question.set_exception(EngineCrashed(self.reason or "the server is going down"))

    def _give_up_streams(self) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream._take(Delta(stream.id, "", finish_reason=FinishReason.CANCELLED))
        self._fail_questions()

    async def _until_no_stream_is_open(self) -> None:
        while self._streams:
            self._emptied.clear()
            await self._emptied.wait()

    def _tend(self, work: Any) -> None:
        """Run something beside; stop() cancels it."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tended)

    def _tended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:  # a bug; nobody else would hear of it
            log.error("the engine is not watched any more", exc_info=error)
            if self.state == "loading":
                self.state, self.reason = "failed", f"{type(error).__name__}: {error}"

    # -- what the child says --

    def _hear(self, life: Life, message: tuple[Any, ...]) -> None:
        tell, *rest = message
        if tell == Tell.STEP:
            self._step(life, *rest)
        elif tell == Tell.ENCODED:
            number, tokens, name, trim = rest
            self._reply(number, Prompt(array("i", tokens), Format(name), trim))
        elif tell == Tell.NOT_ENCODED:
            number, name, said = rest
            self._reply(number, error_named(name, said))
        elif tell == Tell.EMBEDDED:
            number, vectors, n_tokens = rest
            self._reply(number, (vectors, n_tokens))
        elif tell == Tell.NOTICE:
            self._notice(rest[0])

    def _step(
        self,
        life: Life,
        deltas: list[tuple[Any, ...]],
        pieces: dict[int, bytes],
        refusals: list[tuple[int, str, str]],
        load: tuple[int, ...],
        begun: list[int],
    ) -> None:
        self._load = Load(*load)
        if pieces:
            self._pieces |= pieces
        streams = self._streams
        for request in begun:
            if request in streams:
                streams[request].has_begun = True
        for values in deltas:
            stream = streams.get(values[0])
            if stream is not None:  # else it was cancelled while this was on its way
                delta = unpacked_delta(values)
                stream._take(delta)
                if delta.finish_reason is not None:
                    life.n_answers += 1
                    self._close(stream)
        for request, name, said in refusals:
            stream = streams.get(request)
            if stream is not None:
                stream._fail(error_named(name, said))
                self._close(stream)

    def _reply(self, number: int, answer: object) -> None:
        question = self._questions.get(number)
        if question is None or question.done():
            return
        if isinstance(answer, LlamacliError):
            question.set_exception(answer)
        else:
            question.set_result(answer)

    # -- what streams say --

    def _close(self, stream: Stream) -> None:
        self._streams.pop(stream.id, None)
        if not self._streams:
            self._emptied.set()

    def _cancel(self, stream: Stream) -> None:
        if stream.id in self._streams:
            self._say(Ask.CANCEL, stream)
            self._close(stream)

    def _pause(self, stream: Stream) -> None:
        self._say(Ask.PAUSE, stream)

    def _resume(self, stream: Stream) -> None:
        self._say(Ask.RESUME, stream)

    def _say(self, ask: int, stream: Stream) -> None:
        if self._life is not None:
            self._life.say((ask, stream.id))

    async def _cancel_the_stalled(self) -> None:
        """Nobody has read these for so long that nobody will."""
        while True:
            await asyncio.sleep(self._stall_seconds / 4)
            latest = monotonic() - self._stall_seconds
            for stream in list(self._streams.values()):
                if stream._paused_at is not None and stream._paused_at < latest:
                    self._cancel(stream)
                    stream._take(Delta(stream.id, "", finish_reason=FinishReason.CANCELLED))
