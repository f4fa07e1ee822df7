"""One question to a text that is longer than the context: asked of each of its parts, the answers combined into one.

Combined as often as it takes for them to fit; everything but the last answer is kept to a fixed length, so that four of
them at least always fit together. Or sewn together as they are, where an answer is as long as its text: a translation.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from llamacli import splitting
from llamacli.engine.sequence import MAX_SEED, Delta, FinishReason, SamplingParams, Usage
from llamacli.errors import EngineError
from llamacli.prompt import Message, Prompt, PromptBuilder, room_for_answer, with_document
from llamacli.schema.form import Form
from llamacli.together import Step, Together

TOGETHER = 4  # answers that fit into one prompt, at least
MOST = 8
LEAST = 16  # tokens of an answer that is worth combining
OVERLAP = 16  # parts of which one is repeated in the next
COMBINE = (
    "The text was too long to be read at once. In its place stand the answers for its parts, in their order. "
    "Make one answer of them, for the whole text, to this: "
)


def worth_together(weights: int, cell: int, n_cells: int) -> int:
    """How many long sequences are computed together in the shortest time, MOST at most.

    weights, cell   bytes of the model, and of one cell of its KV cache
    n_cells         of each sequence

    In a unified cache attention looks at the cells of all of them for each: k together read the weights once for k
    tokens, and k times k as many cells. The time for each token, weights / k + k * cells, is least at the root of the
    quotient. Counted and not measured, so that a seed repeats an answer.
    """
    return min(MOST, max(1, math.isqrt(weights // max(1, cell * n_cells))))


def room_for_joined(limit: int) -> int:
    """Tokens for an answer that may well be longer than its part: other languages take more tokens for each word."""
    return limit * 2 // 3


def sewn(document: str, parts: Sequence[str], answers: Sequence[str]) -> str:
    """The answers, with as much space between two as there was between their parts: a paragraph, a line or a word."""
    text, end = "", 0
    for part, answer in zip(parts, answers, strict=True):
        start = document.index(part, end)
        gap = document[len(document[:end].rstrip()) : start]
        between = "\n\n" if gap.count("\n") > 1 else "\n" if "\n" in gap else " " if gap else ""
        text += (between if text else "") + answer
        end = start + len(part)
    return text


@dataclass(slots=True)
class Told:
    """What has become of it so far: the tokens are those of all prompts and answers together."""

    n_parts: int = 0
    n_rounds: int = 0  # of combining
    n_cut: int = 0  # answers for parts that came to the end of their room
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(slots=True)
class MapReduce:
    """One question and what it takes to ask it.

    at_once    parts that are computed together
    joins      the answers follow one another, as the parts do
    begin      told of how many answers there will be in a round
    progress   told of each of them, with its tokens
    """

    together: Together
    builder: PromptBuilder
    instruction: str
    system: str | None
    params: SamplingParams
    form: Form | None = None
    at_once: int = 1
    joins: bool = False
    begin: Callable[[int], None] = lambda n: None
    progress: Callable[[int], None] = lambda n_tokens: None
    told: Told = field(default_factory=Told)

    def answer(self, document: str) -> Iterator[Step]:
        """The steps of the last answer. Raises InputTooLong, UsageError."""
        limit = self.together.engine.n_limit
        if self.joins:
            return self._joined(document, limit)
        last = room_for_answer(limit, self.params.max_tokens)
        overhead = len(self._combining([""]).tokens)
        between = min(max(last, LEAST), (limit - last - overhead) // TOGETHER)
        if between < LEAST:
            raise splitting.no_room(limit - last)
        answers = self._parts(document, limit - between)
        self.told.n_parts = len(answers)
        if len(answers) == 1:
            return self._last(self._build(answers[0], self.instruction))
        answers = self._asked([self._build(part, self.instruction) for part in answers], between)
        while True:
            answers = [answer for answer in answers if answer] or ["(no answer)"]
            self.told.n_rounds += 1
            if self._fits(answers, limit - last):
                return self._last(self._combining(answers))
            groups = self._groups(answers, limit - between)
            answers = self._asked([self._combining(group) for group in groups], between)

    def _parts(self, document: str, room: int) -> list[str]:
        tokenizer = self.builder.tokenizer
        return splitting.split(
            document,
            lambda text: len(tokenizer.tokenize(text)),
            lambda part: len(self._build(part, self.instruction).tokens),
            room=room,
            overlap=0 if self.joins else room // OVERLAP,
        )

    def _joined(self, document: str, limit: int) -> Iterator[Step]:
        """One step with all answers, when all are there."""
        longest = room_for_joined(limit)
        parts = self._parts(document, limit - longest)
        self.told.n_parts = len(parts)
        if len(parts) == 1:
            return self._last(self._build(parts[0], self.instruction))
        longest = min(longest, self.params.max_tokens or longest)
        answers = self._asked([self._build(part, self.instruction) for part in parts], longest)
        told = self.told
        usage = Usage(told.prompt_tokens, told.completion_tokens, told.cached_tokens)
        reason = FinishReason.LENGTH if told.n_cut else FinishReason.STOP
        return iter([Step(None, Delta(0, sewn(document, parts, answers), None, None, reason, usage))])

    def _build(self, document: str, instruction: str) -> Prompt:
        messages = [Message("system", self.system)] if self.system else []
        return self.builder.build([*messages, Message("user", with_document(document, instruction))])

    def _combining(self, answers: Sequence[str]) -> Prompt:
        return self._build("\n\n".join(answers), COMBINE + self.instruction)

    def _fits(self, answers: Sequence[str], room: int) -> bool:
        return len(self._combining(answers).tokens) <= room

    def _groups(self, answers: Sequence[str], room: int) -> list[list[str]]:
        """Neighbours, as many as fit together; two at least, or it would not come to an end."""
        groups: list[list[str]] = []
        for answer in answers:
            if groups and (len(groups[-1]) < 2 or self._fits([*groups[-1], answer], room)):
                groups[-1].append(answer)
            else:
                groups.append([answer])
        return groups

    def _asked(self, prompts: Sequence[Prompt], longest: int) -> list[str]:
        """The answers to prompts, several of which are computed at once."""
        self.begin(len(prompts))
        texts = [""] * len(prompts)
        waiting = deque(enumerate(prompts))
        while waiting or len(self.together):
            while waiting and len(self.together) < self.at_once:
                i, prompt = waiting.popleft()
                assert self.params.seed is not None
                params = replace(self.params, max_tokens=longest, seed=(self.params.seed + i) % (MAX_SEED + 1))
                self.together.ask((self.told.n_rounds, i), prompt, params)
            for key, delta, _ in self.together.step():
                assert key is not None
                texts[key[1]] += delta.text
                if delta.finish_reason is not None:
                    self._note(Step(key, delta))
        return [text.strip() for text in texts]

    def _note(self, step: Step) -> None:
        delta, told = step.delta, self.told
        if delta.finish_reason is FinishReason.FAILED:
            raise EngineError("llama.cpp failed in the middle of a part; please report this with `llamacli doctor`")
        assert delta.usage is not None
        told.n_cut += delta.finish_reason in (FinishReason.LENGTH, FinishReason.CONTEXT)
        self._count(step)
        self.together.engine.kv.clear()  # a part that is answered would only be in the way of attention
        self.progress(delta.usage.completion_tokens)

    def _count(self, step: Step) -> None:
        usage = step.delta.usage
        assert usage is not None
        self.told.prompt_tokens += usage.prompt_tokens
        self.told.completion_tokens += usage.completion_tokens
        self.told.cached_tokens += usage.cached_tokens

    def _last(self, prompt: Prompt) -> Iterator[Step]:
        for step in self.together.answer(prompt, self.params, self.form):
            if step.delta.usage is not None:
                self._count(step)
            yield step
