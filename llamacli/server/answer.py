"""What an API's answers look like, as the loop that produces them sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llamacli.engine.sequence import Delta, FinishReason, Logprobs, Usage


@dataclass(slots=True)
class Answer:
    """One of the answers to a request, as far as it has come."""

    index: int
    parts: list[str] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def add(self, delta: Delta) -> None:
        self.parts.append(delta.text)
        if delta.logprobs is not None:
            self.logprobs.append(delta.logprobs)
        if delta.finish_reason is not None:
            self.finish_reason, self.usage = delta.finish_reason, delta.usage


class Shape(Protocol):
    """Writes answers in the form of one API. Events come in their wire form and may be empty."""

    def whole(self, answers: Sequence[Answer]) -> bytes:
        """The body of an answer that is not streamed."""

    def opening(self) -> bytes:
        """Events before all others."""

    def piece(self, answer: Answer, deltas: Sequence[Delta]) -> bytes:
        """Events for what was added to one answer."""

    def closing(self, answers: Sequence[Answer]) -> bytes:
        """Events after all others."""


def total(answers: Sequence[Answer], n: int) -> Usage:
    """What a request has used. A prompt that is answered `n` times counts once."""
    used = [answer.usage for answer in answers if answer.usage]
    firsts = used[::n]
    return Usage(
        sum(each.prompt_tokens for each in firsts),
        sum(each.completion_tokens for each in used),
        sum(each.cached_tokens for each in firsts),
    )


def wire(reason: FinishReason | None) -> str | None:
    """The word for it on the wire. A grammar with nothing more to say has come to its end."""
    if reason is None:
        return None
    return "stop" if reason is FinishReason.DEAD_END else reason.wire
