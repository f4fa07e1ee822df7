"""Keeps an answer to its form and its budget: as long as the model writes, what is needed to close it stays reserved.

Knows nothing of where the answer goes.
"""

from __future__ import annotations

from llamacli.engine.sequence import Delta, FinishReason, Sequence, Usage
from llamacli.errors import InputTooLong, UsageError
from llamacli.prompt import Tokenizer
from llamacli.schema.closing import State
from llamacli.schema.form import Form

_ENDS = (FinishReason.STOP, FinishReason.DEAD_END, FinishReason.LENGTH, FinishReason.CONTEXT)


class Holder:
    """One answer on its way.

    n_room   tokens that the context has left for it
    longest  tokens that it may have; None: as many as there is room for

    Raises UsageError or InputTooLong where not even the shortest answer of its form fits.
    """

    def __init__(self, form: Form, tokenizer: Tokenizer, *, n_room: int, longest: int | None) -> None:
        self._form = form
        self._closing = form.closing
        self._tokenizer = tokenizer
        self._state = self._closing.start
        self._budget = n_room if longest is None else min(n_room, longest)
        self._reason = FinishReason.CONTEXT if longest is None or n_room < longest else FinishReason.LENGTH
        self._n = 0
        self.added = ""  # what closes the answer and is not the model's
        self._check_shortest(n_room)

    def _check_shortest(self, n_room: int) -> None:
        if self._fits(self._state):
            return
        n_least = len(self._tokenizer.tokenize(self._closing.ending(self._state)))
        if self._budget < n_room:
            raise UsageError(
                f"--max-tokens {self._budget:,} is too few for {self._form.source}: its shortest answer has "
                f"{n_least:,} tokens"
            )
        raise InputTooLong(
            f"the context has room for an answer of {n_room:,} tokens; the shortest one for {self._form.source} has "
            f"{n_least:,}. Shorten the input"
        )

    def feed(self, delta: Delta, sequence: Sequence) -> Delta:
        """What is to be shown in this delta's place. If it has a finish_reason, the sequence is over."""
        self._n += delta.token is not None
        state, n_legal = self._closing.after(self._state, delta.text)
        if delta.finish_reason is None:
            # What the detokenizer still holds back counts as a token and not yet as a text: it may be dropped.
            if n_legal == len(delta.text) and self._fits(state):
                self._state = state
                return delta
            return self._closed("", sequence, self._reason)
        if delta.finish_reason not in _ENDS:
            return delta
        self._state = state
        has_ended = delta.finish_reason in (FinishReason.STOP, FinishReason.DEAD_END)
        if self._closing.is_over(state) or (has_ended and self._closing.is_whole(state)):
            return delta._replace(text=delta.text[:n_legal], finish_reason=FinishReason.STOP)
        return self._closed(delta.text[:n_legal], sequence, self._reason if has_ended else delta.finish_reason)

    def _fits(self, state: State) -> bool:
        """Whether what closes the answer fits into what is left of its budget."""
        n_left = self._budget - self._n
        if self._closing.cost(state) < n_left:
            return True
        return len(self._tokenizer.tokenize(self._closing.ending(state))) <= n_left

    def _closed(self, text: str, sequence: Sequence, reason: FinishReason) -> Delta:
        self.added = self._closing.ending(self._state)
        usage = Usage(sequence.n_prompt, self._n, sequence.n_cached)  # a step may have written beyond this token
        return Delta(sequence.id, text + self.added, None, None, reason, usage)
