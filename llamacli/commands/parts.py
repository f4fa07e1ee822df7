"""An answer to a text that is longer than the context, computed here: the parts are asked at once, then combined.

As in local.py, the engine has a thread of its own and this one waits for what comes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from queue import SimpleQueue
from time import perf_counter

from llamacli import launch as launching
from llamacli import machine
from llamacli.commands.deliver import EXIT_CUT, say_it_completes, say_it_was_closed
from llamacli.commands.journal import Outcome, known_as
from llamacli.commands.local import exit_code_of
from llamacli.commands.pace import Pace
from llamacli.commands.question import RunOptions, Texts
from llamacli.commands.remote import SAMPLING
from llamacli.commands.terminal import Notices
from llamacli.engine.llama import open_vocabulary
from llamacli.engine.sequence import Delta, SamplingParams
from llamacli.errors import InputTooLong
from llamacli.launch import Launch, ServeOptions
from llamacli.mapreduce import MapReduce, room_for_joined, worth_together
from llamacli.models import checksum
from llamacli.models.notes import Notes
from llamacli.prompt import Format, Message, PromptBuilder, room_for_answer
from llamacli.schema.form import Form
from llamacli.together import Step, Together


def do_not_fit(launch: Launch, texts: Texts, options: RunOptions) -> bool:
    """Whether the texts have to be read in parts. Raises InputTooLong where they cannot be."""
    vocabulary = open_vocabulary(launch.file.path)
    builder = PromptBuilder(launch.header, vocabulary, raw=options.raw, known=launch.file.format)
    settings, limit = launch.settings, launch.n_limit
    messages = [Message("system", settings.system)] if settings.system else []
    n_tokens = len(builder.build([*messages, Message("user", texts.content)]).tokens)
    is_joined = options.task is not None and options.task.is_joined
    room = room_for_joined(limit) if is_joined else room_for_answer(limit, settings.max_tokens)
    if n_tokens <= limit - room:
        return False
    if texts.document is None or not texts.instruction.replace("{stdin}", "").strip():
        raise InputTooLong(
            f"the prompt is {n_tokens:,} tokens; the context holds {limit:,}, the answer included. --on-overflow "
            "map-reduce reads a text in parts and asks each the same: pipe the text in and say what to do, as in "
            'llamacli --on-overflow map-reduce "Summarise" < text'
        )
    return True


@dataclass(frozen=True, slots=True)
class _Round:
    """So many answers are asked for at once."""

    n: int


@dataclass(frozen=True, slots=True)
class _Counted:
    n_tokens: int


@dataclass(frozen=True, slots=True)
class _Began:
    """The parts are answered, and the last answer begins."""

    n_input: int
    load_seconds: float
    loaded: float  # perf_counter() when the model was there


_Item = _Round | _Counted | _Began | Step | BaseException


@dataclass(slots=True)
class _Job:
    launch: Launch
    params: SamplingParams
    options: RunOptions
    texts: Texts
    form: Form | None
    notices: Notices
    slots: int | None
    out: SimpleQueue[_Item] = field(default_factory=SimpleQueue)
    plan: MapReduce | None = None

    def work(self) -> None:
        """The engine's thread, a daemon: when nobody waits any more it ends with the process."""
        try:
            self._answer()
        except BaseException as error:
            self.out.put(error)

    def _answer(self) -> None:
        launch, texts = self.launch, self.texts
        assert texts.document is not None
        began = perf_counter()
        kv = launch.settings.kv_type
        at_once = self.slots or worth_together(
            launch.header.file_size, launch.header.kv_bytes_per_token(kv, kv), launch.n_limit
        )
        options = ServeOptions(slots=at_once, repack=False, prefixes=1, step_seconds=None)
        engine = launching.serve(launch, options, self.notices.say, usable=machine.memory().usable)
        assert launch.weights is not None
        loaded = perf_counter()
        builder = PromptBuilder(
            launch.header, launch.weights.vocabulary, raw=self.options.raw, known=launch.file.format
        )
        n_input = len(builder.tokenizer.tokenize(texts.document))
        self.plan = MapReduce(
            Together(engine, builder.tokenizer),
            builder,
            texts.instruction,
            launch.settings.system,
            self.params,
            self.form,
            at_once=at_once,
            joins=self.options.task is not None and self.options.task.is_joined and self.form is None,
            begin=lambda n: self.out.put(_Round(n)),
            progress=lambda n_tokens: self.out.put(_Counted(n_tokens)),
        )
        steps = self.plan.answer(texts.document)
        self.out.put(_Began(n_input, loaded - began, loaded))
        for step in steps:
            self.out.put(step)

    def results(self) -> Iterator[_Round | _Counted | _Began | Step]:
        while True:
            item = self.out.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if isinstance(item, Step) and item.delta.finish_reason:
                return


class Parts:
    """Where the answer comes from, for deliver()."""

    def __init__(
        self,
        launch: Launch,
        params: SamplingParams,
        options: RunOptions,
        texts: Texts,
        form: Form | None,
        notices: Notices,
        notes: Notes,
        *,
        started: float,
        slots: int | None = None,
    ) -> None:
        self._job = _Job(launch, params, options, texts, form, notices, slots)
        self._notes = notes
        self._started = started
        self._began: _Began | None = None
        self._end: Step | None = None
        self._first: float | None = None
        self._last: float | None = None

    def pieces(self) -> Iterator[str]:
        threading.Thread(target=self._job.work, name="engine", daemon=True).start()
        notices, pace = self._job.notices, None
        try:
            for item in self._job.results():
                if isinstance(item, _Round):
                    pace = self._next_round(item, pace)
                elif isinstance(item, _Counted) and pace is not None:
                    pace.count(n_tokens=item.n_tokens)
                elif isinstance(item, _Began):
                    if pace is not None:
                        pace.end()
                    self._announce(item, notices)
                elif isinstance(item, Step):
                    self._note(item)
                    yield item.delta.text
        finally:
            if pace is not None:
                pace.end()

    def _next_round(self, item: _Round, before: Pace | None) -> Pace:
        if before is not None:
            before.end()
        what = "parts" if before is None else "answers combined"
        return Pace(what, item.n, self._job.notices, quiet=self._job.launch.settings.quiet)

    def _announce(self, began: _Began, notices: Notices) -> None:
        self._began = began
        job = self._job
        assert job.plan is not None
        told = job.plan.told
        if job.plan.builder.format is Format.COMPLETION:
            say_it_completes(job.launch.file.name, notices)
        rounds = "" if told.n_rounds < 2 else f" in {told.n_rounds} rounds"
        how = "follow one another" if job.plan.joins else f"are combined{rounds}"
        combined = f", whose answers {how}" if told.n_parts > 1 else ""
        cut = f"; {told.n_cut:,} of these answers were cut to fit" if told.n_cut else ""
        parts = "1 part" if told.n_parts == 1 else f"{told.n_parts:,} parts"
        notices.say(
            f"the input is {began.n_input:,} tokens; it was read in {parts}{combined}{cut} (--on-overflow map-reduce)"
        )
        for name, choice in job.launch.choices.items():
            notices.detail(f"{name} = {choice.value} ({choice.why})")

    def _now(self) -> float:
        return perf_counter() - self._started

    def _note(self, step: Step) -> None:
        if step.delta.token is not None:
            self._last = self._now()
            self._first = self._first or self._last
        if step.delta.finish_reason is not None:
            self._end = step

    @property
    def _ending(self) -> Delta:
        assert self._end is not None
        return self._end.delta

    def exit_code(self) -> int:
        job = self._job
        assert self._end is not None and job.plan is not None
        if job.plan.joins and job.plan.told.n_cut:  # which _announce has said
            is_wanted = (job.params.max_tokens or job.launch.n_limit) <= room_for_joined(job.launch.n_limit)
            return 0 if is_wanted else EXIT_CUT
        if self._end.added:
            return say_it_was_closed(self._ending, self._end.added, job.notices)
        return exit_code_of(self._ending, job.launch, job.notices)

    def outcome(self) -> Outcome:
        """The text itself is too long for any conversation: it is not kept."""
        job, end = self._job, self._end and self._end.delta
        n_input = self._began.n_input if self._began else 0
        usage: dict[str, int | None] = {}
        if job.plan is not None:
            told = job.plan.told
            usage = {name: getattr(told, name) for name in ("prompt_tokens", "completion_tokens", "cached_tokens")}
        return Outcome(
            model=known_as(job.launch.file),
            question=f"[a text of {n_input:,} tokens, read in parts]\n\n{job.texts.instruction}",
            finish_reason=end.finish_reason if end else None,
            usage=usage,
            seed=job.params.seed,
        )

    def record(self, answer: str) -> dict[str, object]:
        job, began, end = self._job, self._began, self._ending
        assert job.plan is not None and began is not None and end.finish_reason is not None and end.usage is not None
        told, launch, params = job.plan.told, job.launch, job.params
        times = self._timings(began, end.usage.completion_tokens)  # before the checksum is taken
        return {
            "answer": answer,
            "finish_reason": end.finish_reason.wire,
            "usage": {
                "prompt_tokens": told.prompt_tokens,
                "completion_tokens": told.completion_tokens,
                "cached_tokens": told.cached_tokens,
            },
            "seed": params.seed,
            "sampling": {name: getattr(params, name) for name in SAMPLING},
            "model": {
                "name": launch.file.name,
                "path": str(launch.file.path.resolve()),
                "sha256": launch.file.sha256 or checksum.sha256(launch.file.path, self._notes),
                "revision": launch.file.revision,
                "template": str(job.plan.builder.format),
            },
            "context_size": launch.n_limit,
            "device": launch.device,
            "settings": {name: asdict(choice) for name, choice in launch.choices.items()}
            | {"on_overflow": "map-reduce"},
            "input": {"tokens": began.n_input, "kept": began.n_input, "parts": told.n_parts},
            "speculation": launch.guesses,
            "timings": times,
        }

    def _timings(self, began: _Began, n_tokens: int) -> dict[str, float | None]:
        """In seconds since the program began. The parts are read before the last answer's first token."""
        first, last, total = self._first, self._last, self._now()
        return {
            "load_s": round(began.load_seconds, 4),
            "prefill_s": round((first or total) - (began.loaded - self._started), 4),
            "first_token_s": round(first, 4) if first else None,
            "decode_tokens_per_s": round((n_tokens - 1) / (last - first), 2)
            if first and last and last > first
            else None,
            "total_s": round(total, 4),
        }
