"""Answers that a test has written, said in the model's place: a text as the stream that an engine would give."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from llamacli.engine.sequence import Delta, FinishReason, Usage
from llamacli.engine.supervisor import Embedded
from llamacli.server.answer import Answer
from llamacli.server.ask import Ask, Conversation, Source, Text
from llamacli.server.failure import Failure
from llamacli.server.service import Work

_WORD = re.compile(r"\s*\S+|\s+$")


def pieces_of(text: str) -> tuple[str, ...]:
    """A text as the events of a stream carry it: a word at a time."""
    return tuple(_WORD.findall(text)) or (text,)


@dataclass(frozen=True, slots=True)
class Script:
    """Opens every ask with the same answer. A piece counts as a token, and so does a word of the prompt."""

    pieces: tuple[str, ...]
    finish_reason: FinishReason = FinishReason.STOP

    @property
    def is_draining(self) -> bool:
        return False  # it is said whole, however late

    async def open(self, ask: Ask) -> Work:
        n = len(ask.sources) * ask.n
        counts = [_n_words(source) for source in ask.sources for _ in range(ask.n)]
        streams = [_Said(self._deltas(i, count)) for i, count in enumerate(counts)]
        return Work(streams, [Answer(i) for i in range(n)], sum(counts[:: ask.n]), is_in_order=True)

    def close(self, work: Work) -> None:
        pass

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> Embedded:
        raise Failure(500, "a text is no answer to a request for embeddings: reply with json")

    def _deltas(self, i: int, n_prompt: int) -> list[Delta]:
        spoken = [Delta(i, piece, token=0) for piece in self.pieces]
        usage = Usage(n_prompt, len(self.pieces), 0)
        return [*spoken, Delta(i, "", finish_reason=self.finish_reason, usage=usage)]


class _Said:
    has_begun = True

    def __init__(self, deltas: list[Delta]) -> None:
        self._deltas = deltas

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        while self._deltas:
            yield [self._deltas.pop(0)]

    def cancel(self) -> None:
        self._deltas.clear()


def _n_words(source: Source) -> int:
    if isinstance(source, Conversation):
        return sum(len(message.content.split()) for message in source.messages)
    return len(source.text.split()) if isinstance(source, Text) else len(source.tokens)
