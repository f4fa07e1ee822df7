"""Answers from a recording: the same question gets the same answer, and what was asked again gets the next one."""

from __future__ import annotations

import json
from asyncio import timeout
from collections.abc import Sequence
from dataclasses import dataclass, field

from llamacli.server.exchange import JSON, ClientGone, Exchange
from llamacli.server.failure import Failure
from llamacli.server.log import Record
from llamacli.server.matching import Matcher, Question
from llamacli.server.recording import Chunk, Recorded, Recording
from llamacli.server.standin import take_over_trace_id

MAX_COMPARED = 2000  # recorded requests that are looked through for the nearest
PROMPT_WEIGHT = 3  # fields that a wholly different prompt is worth
# What stands before a trace id in a body, on all routes.
_BEFORE_ID = (b'"traceId":"', b'"traceId": "', b'"id":"chatcmpl-', b'"id":"cmpl-', b'"call_')


@dataclass(slots=True)
class _Asked:
    """The answers to one question in their recorded order. The last one stays."""

    answers: list[Recorded] = field(default_factory=list)
    n_given: int = 0

    def next(self) -> Recorded:
        found = self.answers[min(self.n_given, len(self.answers) - 1)]
        self.n_given += 1
        return found


class Replay:
    """The answers of a recording. Nothing is loaded for it.

    keeps_time   chunks come when they came then; else at once
    """

    def __init__(self, recording: Recording, matcher: Matcher, *, keeps_time: bool = False) -> None:
        self._recording = recording
        self._matcher = matcher
        self._keeps_time = keeps_time
        self._by_key: dict[str | bytes, _Asked] = {}
        for entry in recording.entries:
            key = matcher.key(matcher.question(entry.path, entry.body))
            self._by_key.setdefault(key, _Asked()).answers.append(entry)

    def rewind(self) -> None:
        """Begin anew with the first answer to each question."""
        for asked in self._by_key.values():
            asked.n_given = 0

    async def answer(self, raw: bytes, exchange: Exchange, record: Record) -> Failure | None:
        """A StandIn."""
        question = self._matcher.question(exchange.path, raw)
        asked = self._by_key.get(self._matcher.key(question))
        if asked is None:
            return self._not_recorded(question)
        entry = asked.next()
        record.source = f"{self._recording.name}, line {entry.line}"
        take_over_trace_id(entry.trace_id, exchange, record)
        chunks = _with_id(entry, record.trace_id)
        if entry.is_stream:
            await self._stream(entry, chunks, exchange)
        else:
            await self._pause(chunks[0], exchange)
            headers = [pair for pair in entry.headers if pair[0] != "content-type"]
            kind = dict(entry.headers).get("content-type", JSON)
            await exchange.respond(entry.status, chunks[0].data, kind, headers)
        return None

    async def _stream(self, entry: Recorded, chunks: Sequence[Chunk], exchange: Exchange) -> None:
        await self._pause(chunks[0], exchange)
        await exchange.start_events(entry.status, dict(entry.headers))
        for i, chunk in enumerate(chunks):
            if i:
                await self._pause(chunk, exchange)
            await exchange.events(chunk.data, last=i == len(chunks) - 1)

    async def _pause(self, chunk: Chunk, exchange: Exchange) -> None:
        if not self._keeps_time or not chunk.after:
            return
        try:
            async with timeout(chunk.after):
                await exchange.gone()
        except TimeoutError:
            return
        raise ClientGone

    # -- what was not recorded --

    def _not_recorded(self, question: Question) -> Failure:
        name = self._recording.name
        near = self._nearest(question)
        if near is None:
            said = f"{name} holds no request to {question.route}"
        else:
            entry, other = near
            said = (
                f"no request in {name} matches; the nearest is line {entry.line}, {self._difference(question, other)}"
            )
        return Failure(404, f"not recorded: {said}", code="not_recorded")

    def _nearest(self, question: Question) -> tuple[Recorded, Question] | None:
        """The recorded request whose prompt begins most alike and in which few fields differ."""
        found: tuple[Recorded, Question] | None = None
        best: float | None = None
        for entry in self._recording.entries[:MAX_COMPARED]:
            other = self._matcher.question(entry.path, entry.body)
            if other.route != question.route:
                continue
            distance = len(self._matcher.differing(question, other)) + PROMPT_WEIGHT * _unlikeness(question, other)
            if best is None or distance < best:
                found, best = (entry, other), distance
        return found

    def _difference(self, question: Question, other: Question) -> str:
        """Names the fields that differ, and where prompts part; not what they say, for this goes into the log."""
        names = self._matcher.differing(question, other)
        shown = []
        for name in names[:8]:
            if name in ("prompt", "messages", "input") and question.prompt and other.prompt:
                shown.append(f"{name} (from character {_n_common(question.prompt, other.prompt) + 1} on)")
            else:
                shown.append(name)
        return f"which differs in {', '.join(shown)}"


def _unlikeness(question: Question, other: Question) -> float:
    """Of two prompts, 0-1."""
    longest = max(len(question.prompt), len(other.prompt), 1)
    return 1 - _n_common(question.prompt, other.prompt) / longest


def _n_common(a: str, b: str) -> int:
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def _with_id(entry: Recorded, trace_id: str) -> Sequence[Chunk]:
    """The answer under the id that its caller has chosen."""
    if not entry.trace_id or trace_id == entry.trace_id:
        return entry.chunks
    old, new = (json.dumps(each)[1:-1].encode() for each in (entry.trace_id, trace_id))
    return [Chunk(_replaced(chunk.data, old, new), chunk.after) for chunk in entry.chunks]


def _replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    for before in _BEFORE_ID:
        data = data.replace(before + old, before + new)
    return data
