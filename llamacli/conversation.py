"""A conversation as a model sees it: turns become a prompt, token for token as the answers were written.

Knows nothing of where turns are kept, nor of who reads the answers.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llamacli.engine.recall import Lesson, Recall, spelling
from llamacli.errors import UsageError
from llamacli.prompt import Message, Prompt, PromptBuilder

ROOM_AFTER_DROPPING = 2  # what is kept then takes this part of the context: the next turns need no dropping again


class Exchange(NamedTuple):
    """A question and its answer. `tokens` are those that the answer was written with, if they are known."""

    question: str
    answer: str
    tokens: array[int]


class Conversation:
    """What has been said so far to one model.

    builder   of its prompts, with this very recall
    piece     the bytes of one of its tokens
    summary   of what was said before the first exchange
    """

    def __init__(
        self,
        builder: PromptBuilder,
        recall: Recall,
        piece: Callable[[int], bytes],
        exchanges: Sequence[Exchange] = (),
        *,
        system: str | None = None,
        summary: str | None = None,
    ) -> None:
        self.builder = builder
        self.exchanges = list(exchanges)
        self.system = system
        self.summary = summary
        self._recall = recall
        self._piece = piece
        self._lessons: list[Lesson] = []  # of the first exchanges
        self._is_taught = False  # the recall knows all of them, in this place

    def prompt(self, question: str) -> Prompt:
        """What the model is to read for a next answer. Raises UsageError where it has no place for earlier turns."""
        self._teach()
        return self.builder.build([*self._messages(len(self.exchanges)), Message("user", question)])

    @property
    def n_tokens(self) -> int:
        """What the last prompt and its answer took."""
        if not self.exchanges:
            return 0
        self._teach()
        last = self.exchanges[-1]
        prompt = self.builder.build([*self._messages(len(self.exchanges) - 1), Message("user", last.question)])
        written = self._spelt(last)
        return len(prompt.tokens) + len(self.builder.tokenizer.tokenize(last.answer) if written is None else written)

    def before(self) -> list[Message]:
        """What stands before the first exchange."""
        return self._messages(0)

    def add(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)
        self._is_taught = False

    def drop_last(self) -> Exchange:
        del self._lessons[len(self.exchanges) - 1 :]
        return self.exchanges.pop()

    def forget(self, n: int, summary: str | None = None) -> None:
        """Leave out the oldest exchanges. What is left stands behind other tokens now."""
        del self.exchanges[:n], self._lessons[:n]
        self.summary = summary or self.summary
        self._is_taught = False

    def change_system(self, system: str | None) -> None:
        self.system = system
        self._is_taught = False

    def n_to_drop(self, question: str, room: int, limit: int) -> int:
        """How many of the oldest exchanges must go for a prompt within `room` tokens; 0 if it fits as it is.

        More than would do, so that not every turn begins anew: what stays takes half of the context, or is nothing.
        """
        if not self.exchanges or len(self.prompt(question).tokens) <= room:
            return 0
        goal = min(room, limit // ROOM_AFTER_DROPPING)

        def fits(n: int) -> bool:
            left = self._messages(len(self.exchanges), start=n)
            return len(self.builder.build([*left, Message("user", question)]).tokens) <= goal

        return bisect_left(range(len(self.exchanges)), True, lo=1, key=fits)

    def _messages(self, end: int, start: int = 0) -> list[Message]:
        """The system prompt, and the exchanges from `start` up to `end`."""
        parts = [self.system, self.summary and f"What was said before, in short: {self.summary}"]
        system = "\n\n".join(part for part in parts if part)
        messages = [Message("system", system)] if system else []
        for exchange in self.exchanges[start:end]:
            messages += [Message("user", exchange.question), Message("assistant", exchange.answer)]
        return messages

    def _teach(self) -> None:
        """Tell the recall how each answer was written."""
        if self._is_taught:
            return
        self._lessons += [(each.answer, self._spelt(each)) for each in self.exchanges[len(self._lessons) :]]
        with self._recall.learning(self._lessons):
            self.builder.build([*self._messages(len(self.exchanges)), Message("user", "?")])
        self._is_taught = True

    def _spelt(self, exchange: Exchange) -> array[int] | None:
        """The answer's tokens, if they are this text in this model's vocabulary: another model may have said it."""
        try:
            return spelling(exchange.answer, exchange.tokens, self._piece)
        except UsageError:  # a token that this vocabulary does not have
            return None
