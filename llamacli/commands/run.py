"""One answer: the prompt in, the answer on stdout as it is written.

The engine works in a thread of its own and the main thread waits for its deltas, so that Ctrl-C is heard in the
middle of a native call. The model loads while stdin is still being read.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter

from llamacli import launch as launching
from llamacli.commands import terminal
from llamacli.commands.obtain import models_in, obtain
from llamacli.commands.terminal import Answer, Notices
from llamacli.config import Directories, Settings
from llamacli.engine.sampling import draw_seed
from llamacli.engine.sequence import Delta, FinishReason, SamplingParams
from llamacli.errors import EngineError, UsageError
from llamacli.launch import Launch
from llamacli.models import checksum
from llamacli.models.notes import Notes
from llamacli.prompt import Fitted, Format, Message, Prompt, PromptBuilder, fit, with_document

EXIT_CUT = 3
MAX_SYSTEM = 1 << 20  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What `run` wants beside the settings."""

    prompt: str | None = None
    stop: tuple[str, ...] = ()
    raw: bool = False
    as_json: bool = False
    stream: bool = True
    show_prompt: bool = False


@dataclass(frozen=True, slots=True)
class _Texts:
    """What the user said: an instruction, and a document if both an argument and stdin were given."""

    instruction: str
    document: str | None = None


@dataclass(frozen=True, slots=True)
class _Started:
    """The prompt is built and the engine is about to read it."""

    fitted: Fitted
    shown: str
    load_seconds: float


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
    texts: SimpleQueue[_Texts] = field(default_factory=SimpleQueue)
    out: SimpleQueue[_Started | Delta | BaseException] = field(default_factory=SimpleQueue)

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
        builder = PromptBuilder(
            self.launch.header, weights.vocabulary, raw=self.options.raw, known=self.launch.file.format
        )
        fitted = _fitted(self.texts.get(), builder, self.launch)
        prompt = fitted.prompt
        began = perf_counter()
        engine = launching.start(self.launch, len(prompt.tokens))
        load_seconds += perf_counter() - began
        shown = builder.shown(prompt) if self.options.show_prompt else ""
        self.out.put(_Started(fitted, shown, load_seconds))
        for delta in engine.generate(prompt.tokens, self.params, trim=prompt.trim):
            self.out.put(delta)

    def results(self) -> Iterator[_Started | Delta]:
        while True:
            item = self.out.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if isinstance(item, Delta) and item.finish_reason:
                return


@dataclass(slots=True)
class _Run:
    """What has come out so far, and when, in seconds since the program began."""

    started: float
    text: list[str] = field(default_factory=list)
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
        self.text.append(item.text)
        if item.token is not None:
            self.last_token = self.now()
            self.first_token = self.first_token or self.last_token
        if item.finish_reason:
            self.end = item


def run(settings: Settings, options: RunOptions, places: Directories, *, started: float) -> int:
    """Answer one prompt. Returns the exit code.

    started   perf_counter() when the program began

    Raises LlamacliError for everything that can be expected to go wrong.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # stderr may go before stdout; terminal.write_all minds stdout
    notices = Notices(quiet=settings.quiet, verbose=settings.verbose)
    reads_stdin = terminal.stdin_has_text(asked_for=options.prompt == "-")
    _check(settings, options, reads_stdin)
    settings = replace(settings, system=_system(settings.system))
    notes = Notes(places.cache)
    file = obtain(settings, models_in(places), notes, notices)
    launch = launching.prepare(settings, file, notices.say, notes)
    job = _Job(launch, _sampling(settings, options), options, notices, notes)
    threading.Thread(target=job.work, name="engine", daemon=True).start()
    job.texts.put(_read_texts(options.prompt, reads_stdin, notices))
    return _answer(job, _Run(started))


def _check(settings: Settings, options: RunOptions, reads_stdin: bool) -> None:
    """What can be refused before anything is read or loaded."""
    if options.prompt is None and not reads_stdin:
        raise UsageError('nothing to answer: llamacli "your question", or pipe a text into it; --help says more')
    if options.prompt is not None and options.prompt != "-" and not options.prompt.strip():
        raise UsageError("the prompt is empty")
    if settings.system and options.raw:
        raise UsageError("--raw and a system prompt contradict each other: write it into the prompt")
    if settings.quiet and settings.verbose:
        raise UsageError("--quiet and --verbose contradict each other")
    if settings.require_gpu and settings.gpu_layers == "0":
        raise UsageError("--require-gpu and --gpu-layers 0 contradict each other")
    if settings.ctx_size and settings.max_tokens and settings.max_tokens >= settings.ctx_size:
        raise UsageError(
            f"--max-tokens {settings.max_tokens:,} leaves no room for a prompt in --ctx-size {settings.ctx_size:,}"
        )


def _system(value: str | None) -> str | None:
    """The system prompt itself, read from a file if it was given as @FILE."""
    if not value or not value.startswith("@"):
        return value or None
    if value == "@":
        raise UsageError("the system prompt @ names no file: say @FILE")
    try:
        with Path(value[1:]).expanduser().open("rb") as file:
            raw = file.read(MAX_SYSTEM + 1)
    except OSError as error:
        raise UsageError(f"the system prompt cannot be read from {value[1:200]}: {error.strerror}") from None
    except RuntimeError:
        raise UsageError(f"the system prompt cannot be read from {value[1:200]}: there is no such user") from None
    if len(raw) > MAX_SYSTEM:
        raise UsageError(f"the system prompt in {value[1:200]} is longer than {MAX_SYSTEM >> 10} KiB")
    try:
        return raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UsageError(f"the system prompt in {value[1:200]} is not UTF-8 text") from None


def _sampling(settings: Settings, options: RunOptions) -> SamplingParams:
    return SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        repeat_penalty=settings.repeat_penalty,
        seed=draw_seed() if settings.seed is None else settings.seed,
        stop=options.stop,
        max_tokens=settings.max_tokens,
    )


def _read_texts(argument: str | None, reads_stdin: bool, notices: Notices) -> _Texts:
    piped = terminal.read_stdin(notices) if reads_stdin else ""
    if argument is None or argument == "-":
        if not piped.strip():
            raise UsageError("the prompt is empty: nothing came on standard input")
        return _Texts(piped)
    instruction = terminal.decoded(argument.encode("utf-8", "surrogateescape"), "the prompt", notices)
    if "{stdin}" in instruction and not piped:
        raise UsageError("the prompt says {stdin}, but nothing came on standard input")
    return _Texts(instruction, piped or None)


def _fitted(texts: _Texts, builder: PromptBuilder, launch: Launch) -> Fitted:
    """The prompt, cut if it must be and may be: the document where there is one, else the prompt itself."""
    settings = launch.settings

    def build(text: str) -> Prompt:
        content = text if texts.document is None else with_document(text, texts.instruction)
        messages = [Message("user", content)]
        if settings.system:
            messages.insert(0, Message("system", settings.system))
        return builder.build(messages)

    limit = launch.n_limit
    # An answer of unknown length gets a quarter of the context, a known one what it asked for, half at most.
    for_answer = min(settings.max_tokens, limit // 2) if settings.max_tokens else limit // 4
    text = texts.instruction if texts.document is None else texts.document
    return fit(text, build, builder.tokenizer, room=limit - for_answer, limit=limit, policy=settings.on_overflow)


def _answer(job: _Job, progress: _Run) -> int:
    """Write what the engine says as it comes. Returns the exit code."""
    options, notices = job.options, job.notices
    streams = options.stream and not options.as_json
    answer = Answer()
    # Until here Ctrl-C has ended the process at once (see __main__.py); from here on there is something to keep.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for item in job.results():
            progress.note(item)
            if isinstance(item, _Started):
                _announce(item, job)
            elif streams and item.text:
                answer.write(item.text)
    except KeyboardInterrupt:
        if not answer.is_empty:
            answer.end()
        raise
    text = "".join(progress.text)
    if options.as_json:
        record = json.dumps(_record(job, progress), ensure_ascii=False) + "\n"
        # A path that is not UTF-8 comes out in JSON's own escapes.
        terminal.write_all(terminal.STDOUT, record.encode("utf-8", "backslashreplace"))
    else:
        if not streams:
            answer.write(text)
        answer.end()
    assert progress.end is not None
    return _exit_code(progress.end, job.launch, notices)


def _exit_code(end: Delta, launch: Launch, notices: Notices) -> int:
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
        notices.say(f"{launch.file.name} is a base model: it continues your text instead of answering it")
    if fitted.n_kept < fitted.n_input:
        notices.say(
            f"the input is {fitted.n_input:,} tokens; {fitted.n_kept:,} were kept "
            f"(--on-overflow {launch.settings.on_overflow})"
        )
    notices.detail(f"{launch.file.path}: {launch.header.quantization}, {fitted.prompt.format} prompt, {launch.device}")
    for name, choice in launch.choices.items():
        notices.detail(f"{name} = {choice.value} ({choice.why})")


def _record(job: _Job, progress: _Run) -> dict[str, object]:
    """The object that --json prints."""
    launch, params, settings = job.launch, job.params, job.launch.settings
    start, end = progress.start, progress.end
    assert start is not None and end is not None and end.usage is not None and end.finish_reason is not None
    fitted = start.fitted
    timings = _timings(progress, start)  # before the checksum is taken, which may take seconds
    return {
        "answer": "".join(progress.text).rstrip("\n"),
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
