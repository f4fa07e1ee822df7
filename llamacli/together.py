"""Many answers at once from one engine: each prompt with a key, its deltas under that key, its form kept.

No threads of its own: whoever owns the engine calls step().
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from llamacli.engine.engine import Engine
from llamacli.engine.sequence import Delta, SamplingParams, Sequence
from llamacli.prompt import Prompt, Tokenizer
from llamacli.schema.form import Form
from llamacli.schema.holding import Holder

Key = tuple[int, int] | None


class Step(NamedTuple):
    """What was added to one answer. `added`, in the last delta, is what closed it and is not the model's."""

    key: Key
    delta: Delta
    added: str = ""


@dataclass(frozen=True, slots=True)
class _Asked:
    key: Key
    sequence: Sequence
    holder: Holder | None


class Together:
    """Answers in the making. Keys are the caller's; no two of those that are in the making may be the same."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self._tokenizer = tokenizer
        self._asked: dict[int, _Asked] = {}  # by sequence id

    def __len__(self) -> int:
        return len(self._asked)

    def ask(self, key: Key, prompt: Prompt, params: SamplingParams, form: Form | None = None) -> None:
        """Queue a prompt. With a form, `params` need no grammar.

        Raises UsageError, and InputTooLong where no answer fits.
        """
        holder = None
        engine = self.engine
        if form is not None and len(prompt.tokens) < engine.n_limit:
            n_room = engine.n_limit - len(prompt.tokens)
            holder = Holder(form, self._tokenizer, n_room=n_room, longest=params.max_tokens)
        if form is not None:
            params = replace(params, grammar=form.grammar.text)
        # A form allows the space with which a model likes to begin, also where the prompt is only continued.
        sequence = engine.add(prompt.tokens, params, trim=prompt.trim or form is not None)
        self._asked[sequence.id] = _Asked(key, sequence, holder)

    def step(self) -> list[Step]:
        """Run one batch. Returns what it added to each answer."""
        steps = []
        for delta in self.engine.step():
            asked = self._asked.get(delta.sequence_id)
            if asked is None:  # its form has closed it already, and this is what the model would have gone on with
                continue
            added = ""
            if asked.holder is not None:
                delta = asked.holder.feed(delta, asked.sequence)
                added = asked.holder.added
            if delta.finish_reason is not None:
                del self._asked[asked.sequence.id]
                self.engine.cancel(asked.sequence, keep=True)  # does nothing where the engine has ended it itself
            steps.append(Step(asked.key, delta, added))
        return steps

    def answer(self, prompt: Prompt, params: SamplingParams, form: Form | None = None) -> Iterator[Step]:
        """One answer alone. Closing the iterator cancels it."""
        self.ask(None, prompt, params, form)
        try:
            while self._asked:
                yield from self.step()
        finally:
            self.cancel()

    def cancel(self, keys: Collection[Key] | None = None) -> None:
        """Forget some answers that are in the making, or all."""
        for asked in list(self._asked.values()):
            if keys is None or asked.key in keys:
                del self._asked[asked.sequence.id]
                self.engine.cancel(asked.sequence)
