"""An answer computed here: the engine in a thread of its own, while the main thread waits for its deltas.

So Ctrl-C is heard in the middle of a native call, and the model loads while stdin is still being read.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from time import perf_counter
from typing import TYPE_CHECKING

from llamacli import launch as launching
from llamacli import stored_prefixes
from llamacli.commands import terminal
from llamacli.commands.deliver import EXIT_CUT, say_it_completes, say_it_was_closed
from llamacli.commands.journal import Outcome, known_as
from llamacli.commands.question import RunOptions, Texts
from llamacli.commands.terminal import Notices
from llamacli.engine.kv import MIN_STORED
from llamacli.engine.recall import Recall
from llamacli.engine.sequence import Delta, FinishReason, SamplingParams
from llamacli.errors import EngineError, InputTooLong
from llamacli.launch import Launch
from llamacli.models import checksum
from llamacli.models.notes import Notes
from llamacli.prompt import Fitted, Format, Message, Prompt, PromptBuilder, fit, room_for_answer, with_document

if TYPE_CHECKING:
    from llamacli.conversation import Conversation
    from llamacli.engine.engine import Engine
    from llamacli.engine.prefixes import Prefixes
    from llamacli.schema.form import Form
    from llamacli.sessions.session import Session, Turn


@dataclass(frozen=True, slots=True)
class Earlier:
    """The session that a prompt goes on with, and its turns as far as the model is to see them.

    grows   the answer will belong to it
    """

    session: Session
    turns: Sequence[Turn]
    grows: bool = True


CHOICE = 8  # tokens of an answer that is one of some texts, about


@dataclass(frozen=True, slots=True)
class _Started:
    """The prompt is built and the engine is about to read it. See Outcome for `n_dropped`."""

    fitted: Fitted
    n_dropped: int
    shown: str
    load_seconds: float


@dataclass(frozen=True, slots=True)
class _Stored:
    """What there was to write has been written."""

    n_prompts: int


@dataclass(slots=True)
class _Job:
    """One prompt on its way through the engine's thread.

    The main thread puts the texts in when it has them, and takes out a _Started, then deltas; or an exception.
    """

    launch: Launch
    params: SamplingParams
    options: RunOptions
    notices: Notices
    notes: Notes
    prefixes: Path  # the directory of stored ones
    form: Form | None = None
    earlier: Earlier | None = None
    answered: array[int] = field(default_factory=lambda: array("i"))  # tokens of the answer so far
    added: str = ""  # what closed an answer that has a form, and is not the model's
    delivered: Event = field(default_factory=Event)  # the answer has been written: there is time for the disk
    texts: SimpleQueue[Texts] = field(default_factory=SimpleQueue)
    out: SimpleQueue[_Started | Delta | _Stored | BaseException] = field(default_factory=SimpleQueue)

    def work(self) -> None:
        """The engine's thread. A daemon: when nobody waits any more it ends with the process."""
        try:
            self._generate()
        except BaseException as error:
            self.out.put(error)

    def _generate(self) -> None:
        began = perf_counter()
        weights = launching.load(self.launch, self.notices.say)
        load_seconds = perf_counter() - began
        recall = Recall()
        builder = PromptBuilder(
            self.launch.header,
            weights.vocabulary,
            raw=self.options.raw,
            known=self.launch.file.format,
            recall=recall,
        )
        conversation = None if self.earlier is None else _conversation(self.earlier, builder, recall, self.launch)
        texts, n_dropped = self.texts.get(), 0
        if conversation is not None and self.launch.settings.on_overflow == "tail":
            n_dropped = _drop(conversation, texts, self.launch)
        fitted = _fitted(texts, builder, self.launch, conversation)
        prompt = fitted.prompt
        began = perf_counter()
        n_answer = CHOICE if self.form is not None and self.form.choices else None
        launching.settle(self.launch, len(prompt.tokens), n_answer, lambda rewritten: self._held(prompt, rewritten))
        prefixes = self._prefixes(prompt)
        engine = launching.start(self.launch, len(prompt.tokens), prefixes)
        load_seconds += perf_counter() - began
        shown = builder.shown(prompt) if self.options.show_prompt else ""
        self.out.put(_Started(fitted, n_dropped, shown, load_seconds))
        if self.form is not None:
            self._generate_formed(engine, builder, prompt, self.form)
        else:
            for delta in engine.generate(prompt.tokens, self.params, trim=prompt.trim):
                self._tell(delta)
        self.delivered.wait()
        if prefixes is not None:
            if self.earlier is not None and self.earlier.grows:
                prefixes.owe_answer(prompt.tokens + self.answered, engine.kv)
            for _ in prefixes.save(engine.kv, engine.model):
                pass
        self.out.put(_Stored(0 if prefixes is None else prefixes.n_stored))

    def _held(self, prompt: Prompt, is_rewritten: bool) -> int:
        return stored_prefixes.held(self.launch, prompt.tokens, self.prefixes, is_rewritten=is_rewritten)

    def _generate_formed(self, engine: Engine, builder: PromptBuilder, prompt: Prompt, form: Form) -> None:
        from llamacli.together import Together

        for step in Together(engine, builder.tokenizer).answer(prompt, self.params, form):
            self.added = step.added
            self._tell(step.delta)

    def _tell(self, delta: Delta) -> None:
        if delta.token is not None:
            self.answered.append(delta.token)
        self.out.put(delta)

    def _prefixes(self, prompt: Prompt) -> Prefixes | None:
        """Of a session the answer is kept, too, so that the next turn has only itself to read."""
        if self.earlier is None:
            return stored_prefixes.expecting(self.launch, prompt.tokens, self.prefixes)
        prefixes = stored_prefixes.of(self.launch, self.prefixes)
        if prefixes is not None:
            prefixes.expect(prompt.tokens)
        return prefixes

    def results(self) -> Iterator[_Started | Delta]:
        while True:
            item = self.out.get()
            if isinstance(item, BaseException):
                raise item
            assert not isinstance(item, _Stored)
            yield item
            if isinstance(item, Delta) and item.finish_reason:
                return

    def stored(self) -> int:
        """Let the engine's thread write what it has computed to the disk, and wait. Returns how many it wrote."""
        self.delivered.set()
        item = self.out.get()
        if isinstance(item, BaseException):
            raise item
        assert isinstance(item, _Stored)
        return item.n_prompts


@dataclass(slots=True)
class _Run:
    """What has come out so far, and when, in seconds since the program began."""

    started: float
    start: _Started | None = None
    end: Delta | None = None
    prefill_began: float = 0.0
    first_token: float | None = None
    last_token: float | None = None

    def now(self) -> float:
        return perf_counter() - self.started

    def note(self, item: _Started | Delta) -> None:
        if isinstance(item, _Started):
            self.start, self.prefill_began = item, self.now()
            return
        if item.token is not None:
            self.last_token = self.now()
            self.first_token = self.first_token or self.last_token
        if item.finish_reason:
            self.end = item


class Local:
    """Begins to load at once; the texts may come later."""

    def __init__(
        self,
        launch: Launch,
        params: SamplingParams,
        options: RunOptions,
        notices: Notices,
        notes: Notes,
        prefixes: Path,
        form: Form | None = None,
        earlier: Earlier | None = None,
        *,
        started: float,
    ) -> None:
        self._job = _Job(launch, params, options, notices, notes, prefixes, form, earlier)
        self._texts: Texts | None = None
        self._progress = _Run(started)
        threading.Thread(target=self._job.work, name="engine", daemon=True).start()
        from llamacli.engine import engine  # noqa: F401  (what that thread needs next, while it maps the weights)

    def ask(self, texts: Texts) -> None:
        self._texts = texts
        self._job.texts.put(texts)

    def pieces(self) -> Iterator[str]:
        for item in self._job.results():
            self._progress.note(item)
            if isinstance(item, _Started):
                _announce(item, self._job)
            else:
                yield item.text
        end = self._progress.end
        if end is not None and end.usage is not None and end.usage.cached_tokens:
            usage = end.usage
            self._job.notices.detail(
                f"{usage.cached_tokens:,} of the prompt's {usage.prompt_tokens:,} tokens came from the disk"
            )

    def record(self, answer: str) -> dict[str, object]:
        return _record(self._job, self._progress, answer)

    def outcome(self) -> Outcome:
        start, end, job = self._progress.start, self._progress.end, self._job
        texts = self._texts
        if start is None or texts is None:
            return Outcome()
        document = texts.document is not None
        return Outcome(
            model=known_as(job.launch.file),
            question=with_document(start.fitted.text, texts.instruction) if document else start.fitted.text,
            tokens=job.answered[:],
            finish_reason=str(end.finish_reason) if end is not None else None,
            usage=asdict(end.usage) if end is not None and end.usage is not None else {},
            seed=job.params.seed,
            n_dropped=start.n_dropped,
        )

    def exit_code(self) -> int:
        assert self._progress.end is not None
        if self._job.added:
            return say_it_was_closed(self._progress.end, self._job.added, self._job.notices)
        return exit_code_of(self._progress.end, self._job.launch, self._job.notices)

    def store(self) -> None:
        """Keep the computed prompt on the disk for the next time. Who reads our answer need not wait for it."""
        job = self._job
        assert self._progress.start is not None
        n_tokens, what = len(self._progress.start.fitted.prompt.tokens), "prompt"
        if job.earlier is not None and job.earlier.grows:
            n_tokens, what = n_tokens + len(job.answered), "conversation"
        if n_tokens < MIN_STORED:
            return
        terminal.end_stdout()
        if job.stored():
            job.notices.detail(f"stored the {n_tokens:,} tokens of the {what}: llamacli cache show")


def _conversation(earlier: Earlier, builder: PromptBuilder, recall: Recall, launch: Launch) -> Conversation:
    from llamacli.conversation import Conversation, Exchange

    assert launch.weights is not None
    return Conversation(
        builder,
        recall,
        launch.weights.vocabulary.piece,
        [Exchange(turn.question, turn.answer or "", turn.tokens) for turn in earlier.turns],
        system=launch.settings.system,
        summary=earlier.session.summary,
    )


def _drop(conversation: Conversation, texts: Texts, launch: Launch) -> int:
    """Leave out the oldest turns if the prompt does not fit. Returns how many."""
    limit = launch.n_limit
    n = conversation.n_to_drop(texts.content, limit - room_for_answer(limit, launch.settings.max_tokens), limit)
    conversation.forget(n)
    return n


def _fitted(texts: Texts, builder: PromptBuilder, launch: Launch, conversation: Conversation | None) -> Fitted:
    """The prompt, cut if it must be and may be: the document where there is one, else the prompt itself."""
    settings = launch.settings

    def build(text: str) -> Prompt:
        content = text if texts.document is None else with_document(text, texts.instruction)
        if conversation is not None:
            return conversation.prompt(content)
        messages = [Message("user", content)]
        if settings.system:
            messages.insert(0, Message("system", settings.system))
        return builder.build(messages)

    limit = launch.n_limit
    for_answer = room_for_answer(limit, settings.max_tokens)
    text = texts.instruction if texts.document is None else texts.document
    try:
        return fit(text, build, builder.tokenizer, room=limit - for_answer, limit=limit, policy=settings.on_overflow)
    except InputTooLong as error:
        if conversation is None or not conversation.exchanges:
            raise
        raise _no_longer_fits(error, conversation) from None


def _no_longer_fits(error: InputTooLong, conversation: Conversation) -> InputTooLong:
    n_turns = len(conversation.exchanges)
    turns = "earlier turn takes" if n_turns == 1 else f"{n_turns} earlier turns take"
    n_earlier = conversation.n_tokens
    return InputTooLong(
        f"{str(error).split('.')[0]}; the session's {turns} {n_earlier:,} tokens. --on-overflow tail leaves out "
        "the oldest turns; or begin a new session"
    )


def exit_code_of(end: Delta, launch: Launch, notices: Notices) -> int:
    if end.finish_reason is FinishReason.FAILED:
        raise EngineError("llama.cpp failed in the middle of the answer; please report this with `llamacli doctor`")
    if end.finish_reason is FinishReason.CONTEXT:
        assert end.usage is not None
        held = end.usage.prompt_tokens + end.usage.completion_tokens
        less = "" if held >= launch.n_limit else ", which is all that memory allows"
        notices.say(
            f"the answer was cut: prompt and answer have filled the context of {held:,} tokens{less}. "
            "Shorten the input, or ask for less"
        )
        return EXIT_CUT
    return 0


def _announce(start: _Started, job: _Job) -> None:
    """What the user should know before the answer: on stderr."""
    launch, fitted, notices = job.launch, start.fitted, job.notices
    if start.shown:
        ids = " ".join(map(str, fitted.prompt.tokens))
        terminal.print_block(f"{start.shown}\n{ids}\n")
    if fitted.prompt.format is Format.COMPLETION:
        say_it_completes(launch.file.name, notices)
    if fitted.n_kept < fitted.n_input:
        notices.say(
            f"the input is {fitted.n_input:,} tokens; {fitted.n_kept:,} were kept "
            f"(--on-overflow {launch.settings.on_overflow})"
        )
    if start.n_dropped and job.earlier is not None:
        turns = "oldest turn is" if start.n_dropped == 1 else f"{start.n_dropped} oldest turns are"
        notices.say(
            f"the session's {turns} left out from now on, of {len(job.earlier.turns)}: they did not all fit "
            f"(--on-overflow {launch.settings.on_overflow})"
        )
    notices.detail(f"{launch.file.path}: {launch.header.quantization}, {fitted.prompt.format} prompt, {launch.device}")
    for name, choice in launch.choices.items():
        notices.detail(f"{name} = {choice.value} ({choice.why})")


def _record(job: _Job, progress: _Run, answer: str) -> dict[str, object]:
    """The object that --json prints."""
    launch, params, settings = job.launch, job.params, job.launch.settings
    start, end = progress.start, progress.end
    assert start is not None and end is not None and end.usage is not None and end.finish_reason is not None
    fitted = start.fitted
    timings = _timings(progress, start)  # before the checksum is taken, which may take seconds
    return {
        "answer": answer,
        "finish_reason": end.finish_reason.wire,
        "usage": asdict(end.usage),
        "seed": params.seed,
        "sampling": {
            name: getattr(params, name) for name in ("temperature", "top_p", "top_k", "min_p", "repeat_penalty")
        },
        "model": {
            "name": launch.file.name,
            "path": str(launch.file.path.resolve()),
            "sha256": launch.file.sha256 or checksum.sha256(launch.file.path, job.notes),
            "revision": launch.file.revision,
            "template": str(fitted.prompt.format),
        },
        "context_size": min(launch.n_limit, launch.max_cells),
        "device": launch.device,
        "settings": {name: asdict(choice) for name, choice in launch.choices.items()}
        | {"on_overflow": settings.on_overflow},
        "input": {"tokens": fitted.n_input, "kept": fitted.n_kept, "parts": 1},
        "speculation": launch.guesses,
        "timings": timings,
    }


def _timings(progress: _Run, start: _Started) -> dict[str, float | None]:
    """Seconds since the program began, or of one phase."""
    first, last = progress.first_token, progress.last_token
    assert progress.end is not None and progress.end.usage is not None
    n_after_first = progress.end.usage.completion_tokens - 1
    total = progress.now()
    return {
        "load_s": round(start.load_seconds, 4),
        "prefill_s": round((first or total) - progress.prefill_began, 4),
        "first_token_s": round(first, 4) if first else None,
        "decode_tokens_per_s": round(n_after_first / (last - first), 2) if first and last and last > first else None,
        "total_s": round(total, 4),
    }
