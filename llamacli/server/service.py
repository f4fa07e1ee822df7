"""Answers asks over the engine process: prompts to token ids, who is let in, the stream of what is written.

Knows nothing of HTTP: an API's shape and a connection are its callers' business.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from llamacli.engine.protocol import ModelFacts
from llamacli.engine.sequence import MAX_SEED, Delta, SamplingParams
from llamacli.engine.supervisor import Embedded, State, Stats, Stream
from llamacli.prompt import Format, Message, Prompt
from llamacli.server.answer import Answer
from llamacli.server.ask import Ask, Conversation, Source, Text
from llamacli.server.failure import Failure

AT_ONCE_BESIDE = 64  # requests that something else than the engine may be answering; --queue may wait besides


class Engine(Protocol):
    """What answers are computed with: a supervisor.EngineProcess, or what stands in its place."""

    @property
    def state(self) -> State: ...

    @property
    def reason(self) -> str: ...

    @property
    def facts(self) -> ModelFacts | None: ...

    @property
    def stats(self) -> Stats: ...

    async def encode(self, asked: str | Sequence[Message]) -> Prompt: ...

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, *, trim: bool = False, is_stored: bool = True
    ) -> Stream: ...

    async def embed(self, texts: Sequence[str | Sequence[int]]) -> Embedded: ...


class Pieces(Protocol):
    """The deltas of one answer as they come: a supervisor.Stream, or a script."""

    @property
    def has_begun(self) -> bool: ...

    def __aiter__(self) -> AsyncIterator[list[Delta]]: ...

    def cancel(self) -> None: ...


@dataclass(slots=True)
class Work:
    """The open streams of one request, with the answers they fill.

    is_in_order   one answer comes after the other and one token after the other, however they arrive
    """

    streams: Sequence[Pieces]
    answers: list[Answer]
    prompt_tokens: int
    is_in_order: bool = False
    n_drawn: int = 0
    is_cancelled: bool = False

    @property
    def has_begun(self) -> bool:
        """Whether anything has been computed of it."""
        return any(stream.has_begun for stream in self.streams)

    def cancel(self) -> None:
        """Stop computing, at once. What waits for pieces is told that there are no more."""
        self.is_cancelled = True
        for stream in self.streams:
            stream.cancel()

    async def pieces(self) -> AsyncGenerator[tuple[Answer, Sequence[Delta]], None]:
        """What is added to each answer, as it comes. Raises LlamacliError when the engine fails."""
        if self.is_in_order:
            for answer, stream in zip(self.answers, self.streams, strict=True):
                async for new in stream:
                    for delta in new:
                        yield self._note(answer, (delta,))
            return
        if len(self.streams) == 1:
            async for new in self.streams[0]:
                yield self._note(self.answers[0], new)
            return
        async with aclosing(_merged(self.answers, self.streams)) as merged:
            async for answer, deltas in merged:
                yield self._note(answer, deltas)

    def _note(self, answer: Answer, deltas: Sequence[Delta]) -> tuple[Answer, Sequence[Delta]]:
        for delta in deltas:
            answer.add(delta)
            self.n_drawn += delta.token is not None
        return answer, deltas


async def _merged(
    answers: Sequence[Answer], streams: Sequence[Pieces]
) -> AsyncGenerator[tuple[Answer, Sequence[Delta]], None]:
    """The pieces of several streams in the order in which they come."""
    queue: asyncio.Queue[tuple[Answer, Sequence[Delta]] | Exception | None] = asyncio.Queue(4 * len(streams))

    async def pump(answer: Answer, stream: Pieces) -> None:
        end: Exception | None = None
        try:
            async for deltas in stream:
                await queue.put((answer, deltas))
        except Exception as error:  # raised by the reader instead, who would wait for ever
            end = error
        await queue.put(end)

    # No task group: it would raise a group of errors, and cancel whoever reads this in the middle of something else.
    pumps = [asyncio.ensure_future(pump(*pair)) for pair in zip(answers, streams, strict=True)]
    try:
        n_open = len(pumps)
        while n_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                n_open -= 1
            else:
                yield item
    finally:
        for each in pumps:
            each.cancel()


@dataclass(slots=True)
class Service:
    """Lets requests in while there is room and hands them to the engine.

    slots   sequences that are computed at once
    queue   sequences that may wait for a slot
    is_in_order   of all work
    n_beside   requests that something else than the engine answers
    """

    engine: Engine
    slots: int
    queue: int
    is_draining: bool = False
    is_in_order: bool = False
    n_open: int = 0
    n_beside: int = 0
    _is_hurried: bool = False
    _closed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_ready(self) -> bool:
        return not self.is_draining and self.engine.state == "ready"

    async def open(self, ask: Ask) -> Work:
        """Begin with an ask. Its owner must close() it. Raises Failure or LlamacliError when it is not let in."""
        n = len(ask.sources) * ask.n
        self._admit(n)
        self.n_open += n
        streams: list[Stream] = []
        try:
            prompts = [await self._encoded(source) for source in ask.sources]
            for prompt in prompts:
                for i in range(ask.n):
                    params = _seeded(ask.params, i)
                    streams.append(self.engine.submit(prompt.tokens, params, trim=prompt.trim, is_stored=ask.is_stored))
        except BaseException:
            self._leave(n, streams)
            raise
        n_tokens = sum(len(prompt.tokens) for prompt in prompts)
        return Work(streams, [Answer(i) for i in range(n)], n_tokens, self.is_in_order)

    async def _encoded(self, source: Source) -> Prompt:
        if isinstance(source, Conversation):
            return await self.engine.encode(source.messages)
        if isinstance(source, Text):
            return await self.engine.encode(source.text)
        return Prompt(array("i", source.tokens), Format.COMPLETION)

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> Embedded:
        """Raises Failure or LlamacliError. Cancelling it stops the work."""
        self._admit(1)
        self.n_open += 1
        try:
            return await self.engine.embed(inputs)
        finally:
            self._leave(1, ())

    def close(self, work: Work) -> None:
        """The request is over, whole or not."""
        self._leave(len(work.answers), work.streams)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """A request that is not, or not yet, the engine's: drain() waits for it.

        Raises Failure 503 while draining, 429 for one too many.
        """
        self._refuse_while_draining()
        most = max(self.slots, AT_ONCE_BESIDE) + self.queue
        if self.n_beside >= most:
            raise Failure(
                429, f"{most} requests are open already, as many as may be (--queue): try again later", retry_after=1
            )
        self.n_beside += 1
        try:
            yield
        finally:
            self.n_beside -= 1
            self._leave(0, ())

    def _leave(self, n: int, streams: Sequence[Pieces]) -> None:
        for stream in streams:
            stream.cancel()
        self.n_open -= n
        if not self.n_unfinished:
            self._closed.set()

    @property
    def n_unfinished(self) -> int:
        """Where requests are counted beside the engine, those it has are among them."""
        return max(self.n_open, self.n_beside)

    def _refuse_while_draining(self) -> None:
        if self.is_draining:
            raise Failure(503, "the server is going down: try another one, or later", retry_after=5)

    def _admit(self, n: int) -> None:
        self._refuse_while_draining()
        if self.engine.state == "loading":
            raise Failure(503, "the model is loading: try again in a moment", retry_after=2)
        if self.engine.state != "ready":
            raise Failure(503, f"the engine has failed and does not come back by itself: {self.engine.reason}")
        if n > self.slots + self.queue:
            raise Failure(
                400, f"{n} answers at once are more than the {self.slots + self.queue} that this server takes"
            )
        if self.n_open + n > self.slots + self.queue:
            n_waiting = max(0, self.n_open - self.slots)
            raise Failure(
                429,
                f"{n_waiting} requests are waiting already, of {self.queue} that may (--queue): try again later",
                retry_after=1 + n_waiting / max(1, self.slots),
            )

    async def drain(self, seconds: float) -> bool:
        """Let nobody in and wait for what is open. False when that takes longer, or hurry() is called."""
        self.is_draining = True
        try:
            async with asyncio.timeout(seconds):
                while self.n_unfinished and not self._is_hurried:
                    self._closed.clear()
                    await self._closed.wait()
        except TimeoutError:
            return False
        return not self.n_unfinished

    def hurry(self) -> None:
        """Make drain() return at once."""
        self._is_hurried = True
        self._closed.set()


def _seeded(params: SamplingParams, i: int) -> SamplingParams:
    """Siblings of one request must differ, and each must be repeatable where a seed was given.

    Without one the engine draws one for each, and knows that nobody relies on it.
    """
    return replace(params, seed=(params.seed + i) % (MAX_SEED + 1)) if params.seed is not None and i else params
