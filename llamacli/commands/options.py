"""Options and arguments that several commands have, as Typer reads them, and the settings that come of them.

Nothing heavy is imported to define them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated

import typer

from llamacli.config import Resolved, directories, resolve


def resolved(flags: dict[str, object], preset: tuple[str, Mapping[str, object]] | None = None) -> Resolved:
    """The settings under these flags, this preset (name, defaults), this environment and this machine's config file."""
    return resolve(flags, os.environ, directories(os.environ).config_file, preset)


def model_names(incomplete: str) -> list[str]:
    from llamacli.models import store
    from llamacli.models.catalog import catalog

    found: set[str] = set()
    with suppress(OSError):  # a directory that may not be read has no names to offer
        places = store.Places(directories(os.environ).models, store.hub_cache(os.environ))
        found = {file.name for file in store.on_this_machine(places)}
    return sorted(name for name in {*found, *catalog().names} if name.startswith(incomplete))


Model = Annotated[
    str | None,
    typer.Option(
        "-m", "--model", help="A model's name, or a path to a .gguf file. [7b-chat]", autocompletion=model_names
    ),
]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A model's name.", autocompletion=model_names)]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Nothing on stderr but errors.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
JsonArrayFlag = Annotated[bool, typer.Option("--json", help="Print a JSON array instead.")]
# Of sampling, briefly: `run --help` explains them.
MaxTokens = Annotated[
    int | None, typer.Option("-n", "--max-tokens", help="The longest answer, in tokens. [the context's rest]")
]
Temperature = Annotated[float | None, typer.Option(help="Randomness, 0-2; 0 takes the likeliest token. [0.6]")]
TopP = Annotated[float | None, typer.Option(help="As with run. [0.9]")]
TopK = Annotated[int | None, typer.Option(help="As with run. [40]")]
MinP = Annotated[float | None, typer.Option(help="As with run. [0]")]
RepeatPenalty = Annotated[float | None, typer.Option(help="As with run. [1]")]
Stops = Annotated[list[str] | None, typer.Option("--stop", help="End answers before this text. Repeatable.")]
Files = Annotated[
    list[str] | None,
    typer.Option(
        "-f",
        "--file",
        metavar="PATH|URL",
        help="Text, HTML, a PDF, a directory or a web page to ask about. Repeatable.",
    ),
]
# Of the form of answers.
Schema = Annotated[
    str | None,
    typer.Option(help="Answer in JSON of this schema: a file, JSON, or short as in 'name, age int, tags[]'."),
]
JsonObject = Annotated[bool, typer.Option("--json-object", help="Answer with any JSON object.")]
Choices = Annotated[str | None, typer.Option(metavar="A,B,C", help="Answer with exactly one of these.")]
# Of conversations.
GoesOn = Annotated[bool, typer.Option("--continue", help="Go on with the last session.")]
SessionName = Annotated[
    str | None, typer.Option("--session", metavar="NAME", help="Go on with this session, or begin it.")
]
Log = Annotated[bool | None, typer.Option("--log/--no-log", help="Keep question and answer. [yes: llamacli logs]")]
# Of the machine.
CtxSize = Annotated[int | None, typer.Option("-c", "--ctx-size", help="Tokens in the context. [the model's]")]
GpuLayers = Annotated[str | None, typer.Option(metavar="auto|all|N", help="Layers on the GPU. [auto]")]
RequireGpu = Annotated[bool | None, typer.Option("--require-gpu", help="Fail rather than run on the CPU.")]
KvType = Annotated[
    str | None, typer.Option(metavar="f16|q8_0", help="The computed context: q8_0 takes half the memory. [f16]")
]
DraftModel = Annotated[
    str | None,
    typer.Option(help="A smaller model of the same vocabulary that writes ahead.", autocompletion=model_names),
]
NoSpeculation = Annotated[bool | None, typer.Option("--no-speculation", help="Compute no guessed tokens.")]
NoCache = Annotated[bool | None, typer.Option("--no-cache", help="Neither read nor write computed prefixes.")]
CacheSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="What they may take on disk; 0 keeps none. [4GB, or 5 % of what is free]"),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads. [one for each core we may use]")]
Offline = Annotated[bool | None, typer.Option("--offline", help="Never use the network.")]
QuietSetting = Annotated[bool | None, typer.Option("-q", "--quiet", help="Nothing on stderr but errors.")]
VerboseSetting = Annotated[bool | None, typer.Option("-v", "--verbose", help="Say what was chosen, and why.")]
