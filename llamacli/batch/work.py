"""Jobs through an engine with all its slots busy, and their answers in the order of the input.

The schedule depends on the jobs alone as long as they are all there, so that a seed repeats it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamacli.batch.lines import Feed
from llamacli.batch.request import Defaults, Job, job
from llamacli.engine.sequence import SamplingParams
from llamacli.errors import LlamacliError
from llamacli.prompt import Format, Message, Prompt, PromptBuilder, fit, room_for_answer
from llamacli.server.answer import Answer
from llamacli.server.ask import Conversation, Source, Text
from llamacli.together import Step, Together

AHEAD = 1000  # answers that wait for an older one to be finished before no more are begun


@dataclass(frozen=True, slots=True)
class Result:
    """The line to write, the tokens of its answers, and why it has failed, if it has."""

    number: int
    line: dict[str, Any]
    n_tokens: int = 0
    problem: str = ""


@dataclass(slots=True)
class _Open:
    """A job whose answers are in the making."""

    job: Job
    answers: list[Answer]
    n_left: int
    added: str = ""


@dataclass(slots=True)
class Work:
    """slots: sequences that the engine computes at once; as many wait behind them. on_overflow: see prompt.fit()."""

    together: Together
    builder: PromptBuilder
    slots: int
    on_overflow: str = "error"
    _open: dict[int, _Open] = field(default_factory=dict)  # by the job's place
    _done: dict[int, Result] = field(default_factory=dict)
    _n_begun: int = 0
    _n_given: int = 0

    def results(self, feed: Feed, defaults: Defaults) -> Iterator[Result]:
        """In the order of the input, each as soon as it and all before it are there."""
        while True:
            self._fill(feed, defaults)
            while self._n_given in self._done:
                yield self._done.pop(self._n_given)
                self._n_given += 1
            if len(self.together):
                for step in self.together.step():
                    self._take(step)
            elif feed.is_over:
                return

    def _fill(self, feed: Feed, defaults: Defaults) -> None:
        while len(self.together) < 2 * self.slots and self._n_begun - self._n_given < AHEAD and not feed.is_over:
            is_idle = not len(self.together) and self._n_given not in self._done
            line = feed.take(wait=is_idle)
            if line is None:
                return
            self._begin(job(line, defaults))

    def _begin(self, job: Job) -> None:
        place = self._n_begun
        self._n_begun += 1
        if job.problem is not None:
            self._done[place] = Result(job.line.number, job.shape.failed(job.problem), problem=str(job.problem))
            return
        try:
            self._ask(place, job)
        except LlamacliError as error:
            # The first answers of a job of which a later one was refused.
            self.together.cancel([(place, i) for i in range(len(self._open.pop(place).answers))])
            found = type(error)(f"line {job.line.number:,}: {error}")
            self._done[place] = Result(job.line.number, job.shape.failed(found), problem=str(found))

    def _ask(self, place: int, job: Job) -> None:
        n = len(job.sources) * len(job.params)
        self._open[place] = _Open(job, [Answer(i) for i in range(n)], n)
        for i, source in enumerate(job.sources):
            prompt = self._encoded(source, job.params[0])
            for k, params in enumerate(job.params):
                self.together.ask((place, i * len(job.params) + k), prompt, params, job.form)

    def _encoded(self, source: Source, params: SamplingParams) -> Prompt:
        if isinstance(source, Text):
            return self.builder.continued(source.text)
        if not isinstance(source, Conversation):
            return Prompt(array("i", source.tokens), Format.COMPLETION)
        return self._fitted(source.messages, params)

    def _fitted(self, messages: Sequence[Message], params: SamplingParams) -> Prompt:
        """The conversation, its last message cut if it must be and may be."""
        if self.on_overflow == "error":
            return self.builder.build(messages)
        limit = self.together.engine.n_limit
        *before, last = messages
        return fit(
            last.content,
            lambda text: self.builder.build([*before, Message(last.role, text)]),
            self.builder.tokenizer,
            room=limit - room_for_answer(limit, params.max_tokens),
            limit=limit,
            policy=self.on_overflow,
        ).prompt

    def _take(self, step: Step) -> None:
        assert step.key is not None
        place, index = step.key
        opened = self._open[place]
        opened.answers[index].add(step.delta)
        if step.delta.finish_reason is None:
            return
        opened.added = opened.added or step.added
        opened.n_left -= 1
        if not opened.n_left:
            del self._open[place]
            self._done[place] = self._result(opened)

    def _result(self, opened: _Open) -> Result:
        found = opened.job.shape.answered(opened.answers, opened.added, self.together.engine.model.piece)
        n_tokens = sum(answer.usage.completion_tokens for answer in opened.answers if answer.usage)
        error = found.get("error")
        return Result(opened.job.line.number, found, n_tokens, str(error["message"]) if error else "")
