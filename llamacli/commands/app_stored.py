"""The commands for what lies on this machine: models, presets, keys and their use, computed prompts, measured rates.

Parses and calls one function, like app.py, which takes these commands up.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from llamacli.commands import options
from llamacli.commands.options import JsonArrayFlag, JsonFlag, ModelName, Quiet, model_names, resolved
from llamacli.config import directories
from llamacli.errors import UsageError

if TYPE_CHECKING:
    from llamacli.commands.terminal import Notices

app = typer.Typer(rich_markup_mode=None)


@app.command(epilog="Example: llamacli pull tiny")
def pull(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="7b-chat, 13b-chat:Q5_K_M, ORG/REPO:QUANT, ...", autocompletion=model_names
        ),
    ],
    quiet: Quiet = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="More on stderr.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Only look whether it is here.")] = False,
) -> int:
    """Download a model, or go on with a download, and print the path of the file."""
    from llamacli.commands import models as command

    is_offline = bool(resolved({"offline": offline or None}).settings.offline)
    return command.pull(model, directories(os.environ), quiet=quiet, verbose=verbose, offline=is_offline)


@app.command("list", epilog="Example: llamacli list --catalog")
def list_models(
    catalog: Annotated[bool, typer.Option("--catalog", help="The models that can be pulled by name.")] = False,
    as_json: JsonFlag = False,
) -> int:
    """List the models on this machine, or those that can be pulled."""
    from llamacli.commands import models as command

    show = command.show_catalog if catalog else command.show_list
    return show(directories(os.environ), as_json=as_json)


@app.command(epilog="Example: llamacli show 7b-chat")
def show(model: ModelName, as_json: JsonFlag = False) -> int:
    """Show what a model is: size, context, prompt format, licence, memory by context size."""
    from llamacli.commands import models as command

    return command.show(model, directories(os.environ), as_json=as_json)


@app.command(epilog="Example: llamacli rm -y 7b-chat || echo nothing to remove")
def rm(
    model: ModelName,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    quiet: Quiet = False,
) -> int:
    """Remove a model from this machine."""
    from llamacli.commands import models as command

    return command.remove(model, directories(os.environ), yes=yes, quiet=quiet)


@app.command(epilog="Example: llamacli verify tiny")
def verify(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="All of them without.", autocompletion=model_names)
    ] = None,
    as_json: JsonFlag = False,
    quiet: Quiet = False,
) -> int:
    """Read models again and compare their checksums; exit code 5 when one is damaged."""
    from llamacli.commands import models as command

    return command.verify(model, directories(os.environ), as_json=as_json, quiet=quiet)


@app.command("presets", epilog="Example: llamacli presets")
def list_presets(as_json: JsonArrayFlag = False) -> None:
    """List the prompts that have a name; `llamacli @NAME --help` shows one."""
    from llamacli.commands import presets as command

    command.show_list(directories(os.environ).presets, as_json=as_json)


keys = typer.Typer(
    help="Subscription keys of the server: create, list, revoke.",
    epilog="Example: llamacli keys create --name laptop --rpm 60",
    rich_markup_mode=None,
)
app.add_typer(keys, name="keys")


def _notices(*, quiet: bool = False) -> Notices:
    from llamacli.commands.terminal import Notices

    return Notices(quiet=quiet or resolved({}).settings.quiet)


@keys.command("create", epilog="Example: llamacli keys create --name laptop --rpm 60 --tokens-per-day 100000")
def keys_create(
    name: Annotated[str, typer.Option(help="Whose or what for; any name that no key in force has.")],
    rpm: Annotated[int | None, typer.Option(help="Requests in any 60 seconds. [no limit]")] = None,
    tokens_per_day: Annotated[
        int | None, typer.Option(help="Tokens in a UTC day, prompts and answers together. [no limit]")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Print a new key, this once: it is stored as a hash."""
    from llamacli.commands import keys as command

    data = directories(os.environ).data
    command.create(data, _notices(), name=name, rpm=rpm, tokens_per_day=tokens_per_day, as_json=as_json)


@keys.command("list", epilog="Example: llamacli keys list --json")
def keys_list(as_json: JsonArrayFlag = False) -> None:
    """Show all keys, revoked ones too; never their text."""
    from llamacli.commands import keys as command

    command.show(directories(os.environ).data, _notices(), as_json=as_json)


@keys.command("revoke", epilog="Example: llamacli keys revoke laptop")
def keys_revoke(reference: Annotated[str, typer.Argument(metavar="NAME|ID", help="The key's name or id.")]) -> None:
    """End a key. A running server refuses it within 2 seconds."""
    from llamacli.commands import keys as command

    command.revoke(directories(os.environ).data, _notices(), reference)


@app.command(epilog="Example: llamacli usage --days 7 --json")
def usage(
    key: Annotated[
        str | None, typer.Option(metavar="NAME|ID", help="Only this key; - is requests without one.")
    ] = None,
    days: Annotated[int, typer.Option(help="How many UTC days, today included.")] = 30,
    as_json: JsonArrayFlag = False,
) -> None:
    """Show what each key has used, by day: requests, those that failed, tokens."""
    from llamacli.commands import keys as command

    command.usage(directories(os.environ).data, _notices(), reference=key, n_days=days, as_json=as_json)


cache = typer.Typer(
    help="Computed prefixes of prompts on disk: show, clear.",
    epilog="Example: llamacli cache show",
    rich_markup_mode=None,
)
app.add_typer(cache, name="cache")


@cache.command("show", epilog="Example: llamacli cache show --json")
def cache_show(as_json: JsonFlag = False) -> None:
    """Show what is kept: model, tokens, size, last use; never the text."""
    from llamacli.commands import cache as command

    command.show(resolved({}).settings, directories(os.environ).prefixes, as_json=as_json)


@cache.command("clear", epilog="Example: llamacli cache clear")
def cache_clear(quiet: Quiet = False) -> None:
    """Remove all of it."""
    from llamacli.commands import cache as command

    command.clear(directories(os.environ).prefixes, _notices(quiet=quiet))


@app.command(epilog="Example: llamacli tune -m tiny")
def tune(
    model: options.Model = None,
    show: Annotated[bool, typer.Option("--show", help="Print what was measured, and what is chosen by it.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Forget it: of all models, or of the one named.")] = False,
    kv_type: options.KvType = None,
    gpu_layers: options.GpuLayers = None,
    as_json: JsonFlag = False,
    offline: options.Offline = None,
    quiet: options.QuietSetting = None,
    verbose: options.VerboseSetting = None,
) -> int:
    """Measure this machine with a model, in about a minute; run, batch and serve choose by it from then on."""
    from llamacli.commands import tune as command

    flags = {"model": model, "kv_type": kv_type, "gpu_layers": gpu_layers, "offline": offline}
    settings = resolved({**flags, "quiet": quiet, "verbose": verbose}).settings
    places = directories(os.environ)
    if show and clear:
        raise UsageError("--show and --clear contradict each other")
    if clear:
        return command.clear(settings, places, of_all=model is None)
    return (command.show if show else command.run)(settings, places, as_json=as_json)
