"""The commands of conversations: one at the terminal, and all that were kept.

Parses and calls one function, like app.py, which takes these commands up.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from llamacli.commands import options
from llamacli.commands.options import JsonFlag, Quiet, resolved
from llamacli.config import RULES, directories

app = typer.Typer(rich_markup_mode=None)


@app.command(epilog="Example: printf 'Hello\\nWho made Llama 2?\\n' | llamacli chat -m tiny")
def chat(
    model: options.Model = None,
    system: Annotated[str | None, typer.Option("-s", "--system", help="System prompt; @FILE reads a file.")] = None,
    goes_on: options.GoesOn = False,
    session: options.SessionName = None,
    log: options.Log = None,
    when_full: Annotated[
        str | None,
        typer.Option(
            metavar="ask|drop|summarise", help="What becomes of the oldest turns when the context is full. [ask]"
        ),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Leave answers as they come: no rendered Markdown.")] = False,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repeat_penalty: options.RepeatPenalty = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every answer. [random]")] = None,
    stop: options.Stops = None,
    ctx_size: options.CtxSize = None,
    gpu_layers: options.GpuLayers = None,
    require_gpu: options.RequireGpu = None,
    threads: options.Threads = None,
    kv_type: options.KvType = None,
    draft_model: options.DraftModel = None,
    no_speculation: options.NoSpeculation = None,
    offline: options.Offline = None,
    no_cache: options.NoCache = None,
    cache_size: options.CacheSize = None,
    quiet: options.QuietSetting = None,
    verbose: options.VerboseSetting = None,
) -> int:
    """Converse. Enter sends, /help shows the commands; from a pipe each line is a question."""
    flags = {name: value for name, value in locals().items() if name in RULES}
    from llamacli.commands import chat as command
    from llamacli.commands.question import RunOptions

    wishes = RunOptions(stop=tuple(stop or ()), goes_on=goes_on, session=session)
    return command.run(resolved(flags), wishes, directories(os.environ), is_plain=plain)


logs = typer.Typer(
    help="What was asked and answered: list, search, show, remove.",
    epilog="Example: llamacli logs --search llama",
    rich_markup_mode=None,
    invoke_without_command=True,
)
app.add_typer(logs, name="logs")
Reference = Annotated[str, typer.Argument(metavar="ID|NAME", help="The session's id or name.")]
Yes = Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")]


@logs.callback()
def logs_list(
    context: typer.Context,
    search: Annotated[str | None, typer.Option(metavar="TEXT", help="Those with this text in them.")] = None,
    limit: Annotated[int, typer.Option("-n", "--limit", help="How many sessions at most.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array instead.")] = False,
) -> int:
    """List sessions, the one used last first; show, search and remove them."""
    if context.invoked_subcommand is not None:
        return 0
    from llamacli.commands import logs as command
    from llamacli.commands.terminal import Notices

    return command.show_list(directories(os.environ).sessions, Notices(), limit=limit, text=search, as_json=as_json)


@logs.command("show", epilog='Example: llamacli "Tell me about llama2" -m tiny; llamacli logs show 1')
def logs_show(reference: Reference, as_json: JsonFlag = False) -> int:
    """Show a whole conversation."""
    from llamacli.commands import logs as command

    return command.show(directories(os.environ).sessions, reference, as_json=as_json)


@logs.command("name", epilog="Example: llamacli logs name 1 trip")
def logs_name(
    reference: Reference, name: Annotated[str, typer.Argument(metavar="NAME", help="What it is called from now on.")]
) -> int:
    """Give a session a name, for `--session NAME`."""
    from llamacli.commands import logs as command

    return command.rename(directories(os.environ).sessions, reference, name)


@logs.command("rm", epilog="Example: llamacli logs rm -y 1")
def logs_rm(
    references: Annotated[list[str], typer.Argument(metavar="ID|NAME...", help="Their ids or names.")],
    yes: Yes = False,
    quiet: Quiet = False,
) -> int:
    """Remove sessions, after asking."""
    from llamacli.commands import logs as command
    from llamacli.commands.terminal import Notices

    return command.remove(directories(os.environ).sessions, references, Notices(quiet=quiet), yes=yes)


@logs.command("clear", epilog="Example: llamacli logs clear -y")
def logs_clear(yes: Yes = False, quiet: Quiet = False) -> int:
    """Remove all of them, after asking."""
    from llamacli.commands import logs as command
    from llamacli.commands.terminal import Notices

    return command.clear(directories(os.environ).sessions, Notices(quiet=quiet), yes=yes)
