"""The Typer application, and the one door through which every error leaves.

Parses, builds the settings, calls one function, reports. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from llamacli import __version__
from llamacli.commands import app_chat, app_serve, app_stored, options
from llamacli.commands.options import CacheSize, JsonFlag, KvType, Model, NoCache, resolved
from llamacli.config import directories
from llamacli.errors import LlamacliError, ResourceError

if TYPE_CHECKING:
    from llamacli.commands.presets import Asked

COMMANDS = (
    *("run", "chat", "logs", "batch", "serve", "pull", "list", "show", "rm", "verify"),
    *("keys", "usage", "cache", "presets", "embed", "tokenize", "config", "tune", "bench", "doctor"),
)
STARTED_OBJECTS = 50_000  # more than an answer makes until its first word
TOP_OPTIONS = ("--help", "-h", "--version", "--install-completion", "--show-completion")


class _InOrder(typer.core.TyperGroup):
    """Lists the commands as COMMANDS does, whichever file they come from."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name in COMMANDS if name in self.commands]


app = typer.Typer(
    name="llamacli",
    cls=_InOrder,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=False,
)


class _State:
    started = 0.0
    preset: Asked | None = None


def door(started: float) -> None:
    """Run the program and leave it. An expected error is one line; any other shows its traceback."""
    from llamacli.commands import terminal

    _State.started = started
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `llamacli --help | head -1` ends as it would for grep
    if os.getpid() == 1:  # a container's first process is deaf to signals that it has no handler for
        signal.signal(signal.SIGTERM, lambda number, _: leave(128 + number))
    code = 1
    try:
        if "_LLAMACLI_COMPLETE" in os.environ:
            _complete_as_run(os.environ)
        terminal.complete_standard_streams()
        arguments = route(sys.argv[1:])
        leave_only(arguments[0])
        if arguments[0] == "run":
            gc.set_threshold(STARTED_OBJECTS, *gc.get_threshold()[1:])
        gc.enable()
        code = app(args=arguments, prog_name="llamacli", standalone_mode=False) or 0
    except LlamacliError as error:
        terminal.print_line(str(error), sys.stderr)
        code = error.exit_code
    except typer.TyperException as error:
        terminal.print_line(f"{error.format_message()}{_hint(sys.argv[1:])} (llamacli --help)", sys.stderr)
        code = error.exit_code
    except typer.Abort:
        code = 130
    except Exception as error:
        code = _unexpected(error)
    leave(code)


def _hint(arguments: list[str]) -> str:
    """What most likely went wrong where a shell has made several names of `-f *.md`."""
    for option, name in zip(arguments, arguments[2:], strict=False):
        if option in ("-f", "--file") and os.path.lexists(name):
            return "; -f takes one name: repeat it, or name the directory"
    return ""


def _unexpected(error: Exception) -> int:
    """Say what went wrong outside the errors we know: a disk that is full, or else a bug. Returns the exit code."""
    from llamacli.commands import terminal

    if isinstance(error, OSError) and error.errno in terminal.DISK_FULL:
        terminal.print_line(f"standard output cannot be written: {error.strerror}", sys.stderr)
        return ResourceError.exit_code
    import traceback

    traceback.print_exception(error)
    return 1


def leave(code: int) -> None:
    """End the process without waiting for the engine's thread: it may be in the middle of a native call."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(code)


def route(arguments: list[str]) -> list[str]:
    """Make `llamacli PROMPT` mean `llamacli run PROMPT`, and take a preset out of it."""
    first = arguments[0] if arguments else ""
    if first != "run" and (first in COMMANDS or first in TOP_OPTIONS):
        return arguments
    rest = arguments[1:] if first == "run" else arguments
    if any(each.startswith("@") for each in rest):
        from llamacli.commands import presets

        _State.preset, rest = presets.asked(rest, _takes_value(), directories(os.environ).presets)
    return ["run", *rest]


def _takes_value() -> dict[str, bool]:
    """Every option of `run`, and whether a value follows it."""
    group: Any = typer.main.get_command(app)
    found = [each for each in group.commands["run"].params if each.param_type_name == "option"]
    return {name: not each.is_flag for each in found for name in each.opts}


def leave_only(name: str) -> None:
    """Forget the other commands, when it is known which one is called: to build the parsers of all takes 25 ms."""
    if "_LLAMACLI_COMPLETE" in os.environ or name in ("--help", "-h"):
        return
    for group in (app, app_chat.app, app_serve.app, app_stored.app):
        group.registered_commands = [
            each for each in group.registered_commands if name in (each.name, getattr(each.callback, "__name__", None))
        ]
    for group in (app_chat.app, app_stored.app):
        group.registered_groups = [each for each in group.registered_groups if each.name == name]


def _complete_as_run(environ: MutableMapping[str, str]) -> None:
    """Let the shell complete `llamacli --tem` as it would `llamacli run --tem`."""
    for variable in ("COMP_WORDS", "_TYPER_COMPLETE_ARGS"):  # bash; zsh and fish
        words = environ.get(variable, "").split(maxsplit=1)
        if (
            len(words) == 2
            and words[1].startswith("-")
            and not any(o.startswith(words[1].strip()) for o in TOP_OPTIONS)
        ):
            environ[variable] = f"{words[0]} run {words[1]}"
            if variable == "COMP_WORDS" and environ.get("COMP_CWORD", "").isdigit():
                environ["COMP_CWORD"] = str(int(environ["COMP_CWORD"]) + 1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"llamacli {__version__}")
        raise typer.Exit


@app.callback(epilog='Example: git diff | llamacli "Write a commit message"')
def callback(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Llama 2 on your own machine. `llamacli PROMPT` is the same as `llamacli run PROMPT`."""


@app.command(epilog='Example: llamacli run -m tiny "Tell me about llama2"')
def run(
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt. With text on stdin: what to do with it. - reads the prompt from stdin."),
    ] = None,
    file: options.Files = None,
    model: Model = None,
    system: Annotated[str | None, typer.Option("-s", "--system", help="System prompt; @FILE reads a file.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("-n", "--max-tokens", help="The longest answer, in tokens. [the context's rest]")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Randomness, 0-2; 0 takes the likeliest token. [0.6]")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens of this total probability. [0.9]")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many likeliest tokens; 0 is all. [40]")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Leave out what is less likely than this share of the likeliest. [0]")
    ] = None,
    repeat_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages repetition. [1]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the random choices; 0 is one too. [random]")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text. Repeatable.")] = None,
    ctx_size: Annotated[
        int | None, typer.Option("-c", "--ctx-size", help="Tokens in the context. [the model's]")
    ] = None,
    gpu_layers: Annotated[str | None, typer.Option(metavar="auto|all|N", help="Layers on the GPU. [auto]")] = None,
    require_gpu: Annotated[bool | None, typer.Option("--require-gpu", help="Fail rather than run on the CPU.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [one for each core we may use]")] = None,
    kv_type: KvType = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="No chat template; special tokens in the text are obeyed.")
    ] = False,
    on_overflow: Annotated[
        str | None,
        typer.Option(
            metavar="error|head|tail|middle|map-reduce",
            help="What to keep of an input that does not fit; map-reduce reads all of it in parts. [error]",
        ),
    ] = None,
    schema: options.Schema = None,
    json_object: options.JsonObject = False,
    choices: options.Choices = None,
    goes_on: options.GoesOn = False,
    session: options.SessionName = None,
    log: options.Log = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object about the run instead.")] = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print the answer when it is complete.")] = False,
    show_prompt: Annotated[
        bool, typer.Option("--show-prompt", help="Show the prompt's text and ids on stderr.")
    ] = False,
    remote: Annotated[str | None, typer.Option(metavar="URL", help="Ask this server instead of a model here.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="The key for that server; better in LLAMACLI_API_KEY, where ps does not show it.")
    ] = None,
    remote_timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="How long that server may say nothing. [600]")
    ] = None,
    local: Annotated[
        bool | None, typer.Option("--local", help="Compute here, even if a server has the model loaded.")
    ] = None,
    offline: Annotated[bool | None, typer.Option("--offline", help="Never use the network.")] = None,
    draft_model: options.DraftModel = None,
    no_speculation: options.NoSpeculation = None,
    no_cache: NoCache = None,
    cache_size: CacheSize = None,
    quiet: Annotated[bool | None, typer.Option("-q", "--quiet", help="Nothing on stderr but errors.")] = None,
    verbose: Annotated[bool | None, typer.Option("-v", "--verbose", help="Say what was chosen, and why.")] = None,
) -> int:
    """Answer one prompt: an argument, a text on stdin, or both. `@NAME` is a preset: `llamacli presets`."""
    flags = {name: value for name, value in locals().items() if name in _SETTINGS}
    from llamacli.commands import run as command
    from llamacli.commands.question import RunOptions

    wishes = RunOptions(
        prompt=prompt,
        files=tuple(file or ()),
        stop=tuple(stop or ()),
        raw=raw,
        as_json=as_json,
        stream=not no_stream,
        show_prompt=show_prompt,
        api_key=api_key,
        schema=schema,
        json_object=json_object,
        choices=choices,
        goes_on=goes_on,
        session=session,
    )
    preset = _State.preset
    if preset is not None:
        wishes = preset.wishes(wishes)
    chosen = resolved(flags, None if preset is None else preset.defaults)
    return command.run(chosen, wishes, directories(os.environ), started=_State.started)


@app.command(epilog="""Example: echo '{"prompt": "Tell me about llama2"}' | llamacli batch -m tiny -""")
def batch(
    source: Annotated[str, typer.Argument(metavar="IN", help="JSONL, or CSV by its name; - is stdin.")],
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="OUT", help="Where the answers go, a line each; - is stdout.")
    ] = "-",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an output that is there.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write an output that is there anew.")] = False,
    template: Annotated[
        str | None, typer.Option(help="The prompt, with a line's fields or columns in braces: 'Classify: {text}'.")
    ] = None,
    format: Annotated[str | None, typer.Option(metavar="jsonl|csv", help="What IN is. [by its name]")] = None,
    model: Model = None,
    system: Annotated[
        str | None, typer.Option("-s", "--system", help="System prompt of lines without one; @FILE reads a file.")
    ] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repeat_penalty: options.RepeatPenalty = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every answer. [random]")] = None,
    stop: options.Stops = None,
    schema: options.Schema = None,
    json_object: options.JsonObject = False,
    choices: options.Choices = None,
    on_overflow: Annotated[
        str | None,
        typer.Option(metavar="error|head|tail|middle", help="What to keep of a prompt that does not fit. [error]"),
    ] = None,
    slots: Annotated[int, typer.Option(help="Answers that are computed at once.")] = 16,
    ctx_size: options.CtxSize = None,
    gpu_layers: options.GpuLayers = None,
    require_gpu: options.RequireGpu = None,
    threads: options.Threads = None,
    kv_type: KvType = None,
    draft_model: options.DraftModel = None,
    no_speculation: options.NoSpeculation = None,
    offline: options.Offline = None,
    quiet: options.QuietSetting = None,
    verbose: options.VerboseSetting = None,
) -> int:
    """Answer a file of prompts, all slots busy. Exit code 9 when some lines have failed."""
    flags = {name: value for name, value in locals().items() if name in _SETTINGS}
    from llamacli.commands import batch as command
    from llamacli.commands.question import RunOptions

    wishes = command.Wishes(
        source=source,
        output=output,
        resume=resume,
        force=force,
        template=template,
        format=format,
        slots=slots,
        run=RunOptions(stop=tuple(stop or ()), schema=schema, json_object=json_object, choices=choices),
    )
    return command.run(resolved(flags).settings, wishes, directories(os.environ))


@app.command(epilog="Example: llamacli config")
def config(as_json: JsonFlag = False) -> None:
    """Show every setting and where it comes from."""
    from llamacli.commands import config as command

    command.show(resolved({}), directories(os.environ), as_json, sys.stdout)


@app.command(epilog='Example: llamacli tokenize -m tiny "Tell me about llama2"')
def tokenize(
    text: Annotated[str | None, typer.Argument(help="The text; without it, or with -, stdin is read.")] = None,
    model: Model = None,
    count: Annotated[bool, typer.Option("--count", help="Print only how many tokens there are.")] = False,
    as_json: JsonFlag = False,
) -> int:
    """Split a text into the model's tokens: one id and its piece on each line."""
    from llamacli.commands import tokenize as command

    return command.run(
        resolved({"model": model}).settings, text, directories(os.environ), count_only=count, as_json=as_json
    )


@app.command(epilog='Example: llamacli embed -m tiny "Tell me about llama2"')
def embed(
    text: Annotated[str | None, typer.Argument(help="The text; without it, or with -, stdin is read.")] = None,
    lines: Annotated[bool, typer.Option("--lines", help="A vector for each line of stdin.")] = False,
    normalize: Annotated[
        bool, typer.Option("--normalize/--no-normalize", help="Vectors of length 1, or as they are computed.")
    ] = True,
    model: Model = None,
    gpu_layers: options.GpuLayers = None,
    require_gpu: options.RequireGpu = None,
    threads: options.Threads = None,
    as_json: JsonFlag = False,
    offline: options.Offline = None,
    quiet: options.QuietSetting = None,
    verbose: options.VerboseSetting = None,
) -> int:
    """Turn a text into a vector: one JSON array of numbers on a line. Llama 2 was not trained for it."""
    flags = {name: value for name, value in locals().items() if name in _SETTINGS}
    from llamacli.commands import embed as command

    wishes = command.Wishes(text=text, lines=lines, is_unit=normalize, as_json=as_json)
    return command.run(resolved(flags).settings, wishes, directories(os.environ))


@app.command(epilog="Example: llamacli bench -m tiny --time 2")
def bench(
    model: Model = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="llama_cpp.Llama and, where found, llama.cpp's tools beside ours.")
    ] = False,
    seconds: Annotated[
        float,
        typer.Option("--time", metavar="SECONDS", help="About how long our own side may take; 0 is no limit."),
    ] = 60.0,
    prompt: Annotated[int | None, typer.Option(metavar="N", help="Tokens to be read. [512, or fewer]")] = None,
    depths: Annotated[
        str | None, typer.Option(metavar="N,N", help="Tokens before those written. [1024,3000 as time allows]")
    ] = None,
    streams: Annotated[str | None, typer.Option(metavar="N,N", help="Answers at once. [1,2,4,8]")] = None,
    repack: Annotated[
        str, typer.Option(metavar="on|off", help="With weights rewritten for this CPU, or as they are in the file.")
    ] = "off",
    gpu_layers: options.GpuLayers = None,
    require_gpu: options.RequireGpu = None,
    threads: options.Threads = None,
    kv_type: KvType = None,
    as_json: JsonFlag = False,
    offline: options.Offline = None,
    quiet: options.QuietSetting = None,
    verbose: options.VerboseSetting = None,
) -> int:
    """Measure how fast a model is here: load, first token, prefill, decode by length, parallel streams."""
    flags = {name: value for name, value in locals().items() if name in _SETTINGS}
    from llamacli.commands import bench as command

    wishes = command.Wishes(command.wanted(prompt, depths, streams, seconds, repack), compare, as_json)
    return command.run(resolved(flags).settings, wishes, directories(os.environ))


@app.command(epilog="Example: llamacli doctor")
def doctor(as_json: JsonFlag = False) -> int:
    """Check this machine and this installation; say what is wrong and how to mend it."""
    from llamacli.commands import doctor as command

    return command.run(os.environ, as_json=as_json)


app.add_typer(app_chat.app)
app.add_typer(app_serve.app)
app.add_typer(app_stored.app)


def _settings_names() -> frozenset[str]:
    from llamacli.config import RULES

    return frozenset(RULES)


_SETTINGS = _settings_names()
