"""What the user asks: an instruction, a document, a system prompt; and how the answer is to be drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llamacli.commands import terminal
from llamacli.commands.terminal import Notices
from llamacli.config import Resolved, Settings, flag_name
from llamacli.engine.sequence import SamplingParams
from llamacli.errors import UsageError

if TYPE_CHECKING:
    from llamacli.documents.document import Document
    from llamacli.presets.preset import Task
    from llamacli.schema.form import Form

MAX_SYSTEM = 1 << 20  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What `run` wants beside the settings. `api_key` is a remote server's; repr never shows it."""

    prompt: str | None = None
    files: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    raw: bool = False
    as_json: bool = False
    stream: bool = True
    show_prompt: bool = False
    api_key: str | None = field(default=None, repr=False)
    schema: str | None = None
    json_object: bool = False
    choices: str | None = None
    task: Task | None = None  # of a preset; the prompt is then what is said beside it
    session: str | None = None  # its name
    goes_on: bool = False  # with the last session

    @property
    def has_session(self) -> bool:
        return self.session is not None or self.goes_on

    @property
    def has_form(self) -> bool:
        return self.schema is not None or self.json_object or self.choices is not None


@dataclass(frozen=True, slots=True)
class Texts:
    """What the user said: an instruction, and a document if there is something beside it.

    files   what -f has brought, for --json
    """

    instruction: str
    document: str | None = None
    files: tuple[Mapping[str, object], ...] = ()

    @property
    def content(self) -> str:
        if self.document is None:
            return self.instruction
        from llamacli.prompt import with_document

        return with_document(self.document, self.instruction)


def check(settings: Settings, options: RunOptions, reads_stdin: bool) -> None:
    """What can be refused before anything is read or loaded."""
    if options.task is not None and options.task.needs_text:
        if options.prompt is None and not reads_stdin and not options.files:
            raise _no_text(options.task)
    elif options.prompt is None and not reads_stdin and not options.files and options.task is None:
        raise UsageError('nothing to answer: llamacli "your question", or pipe a text into it; --help says more')
    if options.prompt is not None and options.prompt != "-" and not options.prompt.strip():
        raise UsageError("the prompt is empty")
    if settings.system and options.raw:
        raise UsageError("--raw and a system prompt contradict each other: write it into the prompt")
    _check_session(settings, options)
    if settings.quiet and settings.verbose:
        raise UsageError("--quiet and --verbose contradict each other")
    if any("\ud800" <= character <= "\udfff" for text in options.stop for character in text):
        raise UsageError("--stop must be text in UTF-8")
    if options.files:
        from llamacli.documents import reading

        reading.check(options.files, is_offline=settings.offline)
        if options.prompt == reading.STDIN in options.files:
            raise UsageError("- as the prompt and -f - contradict each other: standard input is one or the other")


_PLACE = "{stdin}"  # of the document, in an instruction; see prompt.with_document


def _check_session(settings: Settings, options: RunOptions) -> None:
    if options.session is not None and options.goes_on:
        raise UsageError("--session and --continue contradict each other: which one is it?")
    if options.has_session and options.raw:
        raise UsageError("--raw sends the prompt as it is: there is no place for the turns of a session")
    if options.has_session and settings.on_overflow == "map-reduce":
        raise UsageError("--on-overflow map-reduce reads a text in parts, and not in a session: leave one of them out")


# What a server elsewhere is not told, or does not do.
_ONLY_HERE = (
    *("model", "ctx_size", "gpu_layers", "require_gpu", "threads", "kv_type", "on_overflow", "offline", "no_cache"),
    *("cache_size", "draft_model", "no_speculation"),
)
_RUN_FLAGS: Mapping[str, Callable[[RunOptions], bool]] = {
    "--raw": lambda options: options.raw,
    "--show-prompt": lambda options: options.show_prompt,
    "--continue": lambda options: options.goes_on,
    "--session": lambda options: options.session is not None,
}
_STRENGTH = {"default": 0, "file": 1, "environment": 2, "flag": 3}


def asks_remote(resolved: Resolved, options: RunOptions) -> bool:
    """Whether a server elsewhere is to answer. Raises UsageError for flags that mean nothing then."""
    settings, sources = resolved.settings, resolved.sources
    if settings.remote is not None and settings.local:
        remote, local = (_STRENGTH[sources[name].kind] for name in ("remote", "local"))
        if remote == local:
            raise UsageError(f"{sources['remote']} and {sources['local']} contradict each other: leave one out")
        is_remote = remote > local
    else:
        is_remote = settings.remote is not None
    if not is_remote:
        if options.api_key is not None:
            raise UsageError("--api-key is for a server: say --remote URL, too")
        return False
    idle = [flag_name(name) for name in _ONLY_HERE if sources[name].kind == "flag"]
    idle += [flag for flag, is_given in _RUN_FLAGS.items() if is_given(options)]
    if idle:
        raise UsageError(
            f"{', '.join(idle)} cannot be had of a remote server ({sources['remote']}): leave it out, or say --local"
        )
    return True


def check_machine(settings: Settings) -> None:
    """What contradicts itself when the answer is computed here."""
    if settings.require_gpu and settings.gpu_layers == "0":
        raise UsageError("--require-gpu and --gpu-layers 0 contradict each other")
    if settings.ctx_size and settings.max_tokens and settings.max_tokens >= settings.ctx_size:
        raise UsageError(
            f"--max-tokens {settings.max_tokens:,} leaves no room for a prompt in --ctx-size {settings.ctx_size:,}"
        )


def system_prompt(value: str | None) -> str | None:
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


def sampling(settings: Settings, options: RunOptions) -> SamplingParams:
    """What the sampler is to do. The seed is None unless the user has chosen one."""
    return SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        repeat_penalty=settings.repeat_penalty,
        seed=settings.seed,
        stop=options.stop,
        max_tokens=settings.max_tokens,
    )


def form(options: RunOptions) -> Form | None:
    """The form that the answer must have. Raises UsageError."""
    if not options.has_form:
        return None
    if options.stop:
        raise UsageError("--stop might cut an answer that must have a form: leave it out")
    from llamacli.schema.form import wanted

    return wanted(options.schema, is_object=options.json_object, choices=options.choices)


def read_texts(options: RunOptions, reads_stdin: bool, notices: Notices) -> Texts:
    """All that there is to read. Raises UsageError, InputTooLong and, of a web page, RemoteError."""
    documents = _documents(options, notices)
    is_taken = "-" in options.files
    piped = terminal.read_stdin(notices) if reads_stdin and not is_taken else ""
    argument = None if options.prompt == "-" else options.prompt
    if argument is not None:
        argument = terminal.decoded(argument.encode("utf-8", "surrogateescape"), "the prompt", notices)
    if options.prompt == "-" and not piped.strip():
        raise UsageError("the prompt is empty: nothing came on standard input")
    if options.task is not None:
        argument, piped = _tasked(options.task, argument, piped, bool(documents), notices)
    if argument is None:
        return _without_argument(documents, piped)
    return _with_argument(argument, documents, piped)


def _documents(options: RunOptions, notices: Notices) -> list[Document]:
    if not options.files:
        return []
    from llamacli.documents.reading import Reading

    return Reading(notices, lambda: terminal.read_stdin(notices)).documents(options.files)


def _without_argument(documents: Sequence[Document], piped: str) -> Texts:
    """stdin says what to do with the files; if there is only one of both, that is the prompt."""
    if not documents:
        if not piped.strip():
            raise UsageError("the prompt is empty: nothing came on standard input")
        return Texts(piped)
    instruction, document = (piped, _joined(documents)) if piped.strip() else (_joined(documents), None)
    return Texts(_without_place(instruction), document, _told(documents))


def _with_argument(argument: str, documents: Sequence[Document], piped: str) -> Texts:
    """The files, then stdin as one more document.

    What is in files is asked about again sooner than what comes through a pipe: it stands in front, where what a model
    has computed of it can be used again.
    """
    if _PLACE in argument and not piped:
        raise UsageError(f"the prompt says {_PLACE}, but nothing came on standard input")
    if not documents:
        return Texts(argument, piped or None)
    if _PLACE in argument:
        return Texts(_without_place(argument.replace(_PLACE, piped)), _joined(documents), _told(documents))
    if piped.strip():
        from llamacli.documents.document import Document

        documents = [*documents, Document("standard input", piped, "stdin")]
    return Texts(argument, _joined(documents), _told(documents))


def _joined(documents: Sequence[Document]) -> str:
    from llamacli.documents.document import joined

    return joined(documents)


def _told(documents: Sequence[Document]) -> tuple[Mapping[str, object], ...]:
    return tuple(each.told for each in documents)


def _without_place(text: str) -> str:
    from llamacli.prompt import without_place

    return without_place(text)


def _tasked(task: Task, argument: str | None, piped: str, has_files: bool, notices: Notices) -> tuple[str, str]:
    """What a preset says to do, and the text that came through the pipe.

    An argument is one more thing to mind; or the text itself, where one is needed and there is no other.
    """
    if task.note is not None:
        notices.detail(task.note)
    if task.needs_text and not has_files and not piped.strip():
        if argument is None:
            raise _no_text(task)
        if terminal.stdin_is_pipe():
            notices.say("nothing came on standard input: the argument is taken for the text")
        return task.instruction, argument
    return f"{task.instruction}\n{argument}" if argument else task.instruction, piped


def _no_text(task: Task) -> UsageError:
    return UsageError(
        f"@{task.name} needs a text: pipe one in, name a file with -f, or say it, as in llamacli @{task.name} TEXT"
    )
