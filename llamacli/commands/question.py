"""What the user asks: an instruction, a document, a system prompt; and how the answer is to be drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llamacli.commands import terminal
from llamacli.commands.terminal import Notices
from llamacli.config import Resolved, Settings, flag_name
from llamacli.engine.sequence import SamplingParams
from llamacli.errors import UsageError

if TYPE_CHECKING:
    from llamacli.schema.form import Form

MAX_SYSTEM = 1 << 20  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What `run` wants beside the settings. `api_key` is a remote server's; repr never shows it."""

    prompt: str | None = None
    stop: tuple[str, ...] = ()
    raw: bool = False
    as_json: bool = False
    stream: bool = True
    show_prompt: bool = False
    api_key: str | None = field(default=None, repr=False)
    schema: str | None = None
    json_object: bool = False
    choices: str | None = None
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
    """What the user said: an instruction, and a document if both an argument and stdin were given."""

    instruction: str
    document: str | None = None

    @property
    def content(self) -> str:
        if self.document is None:
            return self.instruction
        from llamacli.prompt import with_document

        return with_document(self.document, self.instruction)


def check(settings: Settings, options: RunOptions, reads_stdin: bool) -> None:
    """What can be refused before anything is read or loaded."""
    if options.prompt is None and not reads_stdin:
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
    "cache_size",
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


def read_texts(argument: str | None, reads_stdin: bool, notices: Notices) -> Texts:
    piped = terminal.read_stdin(notices) if reads_stdin else ""
    if argument is None or argument == "-":
        if not piped.strip():
            raise UsageError("the prompt is empty: nothing came on standard input")
        return Texts(piped)
    instruction = terminal.decoded(argument.encode("utf-8", "surrogateescape"), "the prompt", notices)
    if "{stdin}" in instruction and not piped:
        raise UsageError("the prompt says {stdin}, but nothing came on standard input")
    return Texts(instruction, piped or None)
