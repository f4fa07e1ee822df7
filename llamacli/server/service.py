"""Answers asks over the engine process: prompts to token ids, who is let in, the stream of what is written.

Knows nothing of HTTP: an API's shape and a connection are its callers' business.
"""

from __future__ import annotations

import asyncio
import os
from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

from llamacli.engine.sequence import MAX_SEED, Delta, SamplingParams
from llamacli.engine.supervisor import Embedded, EngineProcess, Stream
from llamacli.prompt import Format, Prompt
from llamacli.server.answer import Answer
from llamacli.server.ask import Ask, Conversation, Source, Text
from llamacli.server.failure import Failure


@dataclass(slots=True)
class Work:
    """The open streams of one request, with the answers they fill."""

    streams: list[Stream]
    answers: list[Answer]
    prompt_tokens: int
    n_drawn: int = 0
    is_cancelled: bool = False

    def cancel(self) -> None:
        """Stop computing, at once. What waits for pieces is told that there are no more."""
        self.is_cancelled = True
        for stream in self.streams:
            stream.cancel()

    async def pieces(self) -> AsyncIterator[tuple[Answer, Sequence[Delta]]]:
        """What is added to each answer, as it comes. Raises LlamacliError when the engine fails."""
        if len(self.streams) == 1:
            async for new in self.streams[0]:
                yield self._note(self.answers[0], new)
            return
        async for answer, deltas in _merged(self.answers, self.streams):
            yield self._note(answer, deltas)

    def _note(self, answer: Answer, deltas: Sequence[Delta]) -> tuple[Answer, Sequence[Delta]]:
        for delta in deltas:
            answer.add(delta)
            self.n_drawn += delta.token is not None
        return answer, deltas


async def _merged(
    answers: Sequence[Answer], streams: Sequence[Stream]
) -> AsyncIterator[tuple[Answer, Sequence[Delta]]]:
    """The pieces of several streams in the order in which they come."""
    queue: asyncio.Queue[tuple[Answer, Sequence[Delta]] | Answer] = asyncio.Queue(maxsize=4 * len(streams))

    async def pump(answer: Answer, stream: Stream) -> None:
        async for deltas in stream:
            await queue.put((answer, deltas))
        await queue.put(answer)  # its end

    async with asyncio.TaskGroup() as group:
        pumps = [group.create_task(pump(*pair)) for pair in zip(answers, streams, strict=True)]
        n_open = len(pumps)
        while n_open:
            item = await queue.get()
            if isinstance(item, Answer):
                n_open -= 1
            else:
                yield item


@dataclass(slots=True)
class Service:
    """Lets requests in while there is room and hands them to the engine.

    slots   sequences that are computed at once
    queue   sequences that may wait for a slot
    """

    engine: EngineProcess
    slots: int
    queue: int
    is_draining: bool = False
    n_open: int = 0
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
        return Work(streams, [Answer(i) for i in range(n)], sum(len(prompt.tokens) for prompt in prompts))

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

    def _leave(self, n: int, streams: Sequence[Stream]) -> None:
        for stream in streams:
            stream.cancel()
        self.n_open -= n
        if not self.n_open:
            self._closed.set()

    def _admit(self, n: int) -> None:
        if self.is_draining:
            raise Failure(503, "the server is going down: try another one, or later", retry_after=5)
        if self.engine.state == "loading":
            raise Failure(503, "the model is loading: try again in a moment", retry_after=2)
        if self.engine.state != "ready":
            raise Failure(503, f"the engine has failed and does not come back by itself: {self.engine.reason}")
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
                while self.n_open and not self._is_hurried:
                    self._closed.clear()
                    await self._closed.wait()
        except TimeoutError:
            return False
        return not self.n_open

    def hurry(self) -> None:
        """Make drain() return at once."""
        self._is_hurried = True
        self._closed.set()


def _seeded(params: SamplingParams, i: int) -> SamplingParams:
    """Siblings of one request must differ, and each must be repeatable where a seed was given."""
    if params.seed is None:
        return replace(params, seed=int.from_bytes(os.urandom(4), "little") % (MAX_SEED + 1))
    return replace(params, seed=(params.seed + i) % (MAX_SEED + 1)) if i else params
