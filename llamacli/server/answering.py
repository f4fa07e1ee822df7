"""Carries an answer from the engine to a client, whole or as events, and stops the engine when the client goes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Protocol

from llamacli.engine.sequence import Delta, FinishReason
from llamacli.engine.supervisor import Embedded
from llamacli.errors import EngineError
from llamacli.server.answer import Shape
from llamacli.server.ask import Ask
from llamacli.server.exchange import ClientGone, Exchange
from llamacli.server.failure import Failure
from llamacli.server.log import Record
from llamacli.server.metrics import Metrics
from llamacli.server.service import Work

_UNFINISHED = (FinishReason.CANCELLED, FinishReason.FAILED)


class Opens(Protocol):
    """Lets asks in: a Service, or a script in its place."""

    @property
    def is_draining(self) -> bool: ...

    async def open(self, ask: Ask) -> Work: ...

    def close(self, work: Work) -> None: ...

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> Embedded: ...


@dataclass(slots=True)
class Answering:
    service: Opens
    metrics: Metrics

    async def answer(self, exchange: Exchange, record: Record, ask: Ask, shape: Shape) -> None:
        """Raises Failure or LlamacliError when it cannot be answered, ClientGone when nobody is there to be told."""
        started = perf_counter()
        if exchange.forbids_storing:
            ask = replace(ask, is_stored=False)
        work = await self.service.open(ask)
        watcher = asyncio.ensure_future(exchange.gone())
        watcher.add_done_callback(lambda _: work.cancel())
        try:
            if ask.stream:
                await self._stream(exchange, work, shape, started)
            else:
                await self._whole(exchange, work, shape, started)
        finally:
            record.prompt_tokens = work.prompt_tokens if work.has_begun else 0
            record.completion_tokens = work.n_drawn
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
            self.service.close(work)

    async def embed(self, exchange: Exchange, record: Record, inputs: Sequence[str | Sequence[int]]) -> Embedded:
        """Raises Failure or LlamacliError when it cannot be done, ClientGone when nobody waits for it any more."""
        work = asyncio.ensure_future(self.service.embed(inputs))
        watcher = asyncio.ensure_future(exchange.gone())
        try:
            await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientGone
            record.prompt_tokens = work.result().n_tokens
            return work.result()
        finally:
            for task in (work, watcher):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    async def _whole(self, exchange: Exchange, work: Work, shape: Shape, started: float) -> None:
        clock = _Clock(self.metrics, started)
        async with aclosing(work.pieces()) as pieces:
            async for _, deltas in pieces:
                clock.note(deltas)
        self._check(work)
        await exchange.respond(200, shape.whole(work.answers))

    async def _stream(self, exchange: Exchange, work: Work, shape: Shape, started: float) -> None:
        """The status goes out with the first piece, so that a request that fails before gets its proper error."""
        clock = _Clock(self.metrics, started)
        async with aclosing(work.pieces()) as pieces:
            async for answer, deltas in pieces:
                clock.note(deltas)
                if deltas[-1].finish_reason in _UNFINISHED:
                    break
                if exchange.status is None:
                    await exchange.start_events()
                    events = shape.opening() + shape.piece(answer, deltas)
                else:
                    events = shape.piece(answer, deltas)
                if events:
                    await exchange.events(events)
        self._check(work)
        await exchange.events(shape.closing(work.answers), last=True)

    def _check(self, work: Work) -> None:
        """That there is an answer, and somebody who waits for it."""
        if work.is_cancelled:
            raise ClientGone
        if all(answer.finish_reason not in (*_UNFINISHED, None) for answer in work.answers):
            return
        if self.service.is_draining:
            raise Failure(503, "the server went down before the answer was complete: ask again", retry_after=5)
        raise EngineError("llama.cpp could not compute the answer: try again; the server's log may tell why")


class _Clock:
    """Measures what a client waits for: the first token, and then each next one."""

    def __init__(self, metrics: Metrics, started: float) -> None:
        self._metrics = metrics
        self._last = started
        self._is_first = True

    def note(self, deltas: Sequence[Delta]) -> None:
        n_tokens = sum(delta.token is not None for delta in deltas)
        if not n_tokens:
            return
        now = perf_counter()
        passed, self._last = now - self._last, now
        if self._is_first:
            self._is_first = False
            self._metrics.time_to_first_token.observe(passed)
            return
        for _ in range(n_tokens):
            self._metrics.inter_token.observe(passed / n_tokens)
