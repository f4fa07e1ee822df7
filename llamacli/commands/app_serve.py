"""The command of the server, with all that it takes.

Parses and calls one function, like app.py, which takes this command up.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from llamacli.commands import options, testing_options
from llamacli.commands.options import resolved
from llamacli.config import RULES, directories

app = typer.Typer(rich_markup_mode=None)


@app.command(epilog="Example: llamacli serve -m tiny --port 0 & sleep 3; kill $!; wait $!")
def serve(
    model: options.Model = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen at; 0 is any that is free.")] = 8080,
    uds: Annotated[str | None, typer.Option(metavar="PATH", help="Listen at a Unix socket instead.")] = None,
    slots: Annotated[int, typer.Option(help="Answers that are computed at once.")] = 4,
    queue: Annotated[int, typer.Option(help="Requests that may wait for a slot; more get status 429.")] = 64,
    ctx_size: Annotated[
        int | None, typer.Option("-c", "--ctx-size", help="Tokens of the longest conversation. [the model's]")
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar="LLAMACLI_API_KEY", help="A key that clients must send. Repeatable.")
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Ask nobody for a key.")] = False,
    cors_origin: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Web pages from here may call; * is any. Repeatable.")
    ] = None,
    max_body: Annotated[int, typer.Option(help="The largest request, in bytes.")] = 10 << 20,
    grace: Annotated[float, typer.Option(help="Seconds for open answers when the server is to end.")] = 30.0,
    headers_timeout: Annotated[float, typer.Option(help="Seconds for the headers of a request.")] = 15.0,
    body_timeout: Annotated[float, typer.Option(help="Seconds for the body of a request.")] = 30.0,
    reading_timeout: Annotated[float, typer.Option(help="Seconds for a client that does not read its answer.")] = 60.0,
    gpu_layers: Annotated[str | None, typer.Option(metavar="auto|all|N", help="Layers on the GPU. [auto]")] = None,
    require_gpu: Annotated[bool | None, typer.Option("--require-gpu", help="Fail rather than run on the CPU.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [one for each core we may use]")] = None,
    repack: Annotated[str, typer.Option(metavar="auto|on|off", help="Rewrite the weights for this CPU.")] = "auto",
    kv_type: options.KvType = None,
    draft_model: options.DraftModel = None,
    no_speculation: options.NoSpeculation = None,
    no_cache: options.NoCache = None,
    cache_size: options.CacheSize = None,
    offline: Annotated[bool | None, typer.Option("--offline", help="Never use the network.")] = None,
    quiet: Annotated[bool | None, typer.Option("-q", "--quiet", help="No access log.")] = None,
    verbose: options.VerboseSetting = None,
    ready_file: testing_options.ReadyFile = None,
    until_eof: testing_options.UntilEof = False,
    deterministic: testing_options.Deterministic = False,
    record: testing_options.Record = None,
    replay: testing_options.Replay = None,
    replay_or_run: testing_options.ReplayOrRun = False,
    replay_timing: testing_options.ReplayTiming = False,
    match_on: testing_options.MatchOn = None,
    upstream: testing_options.Upstream = None,
    upstream_key: testing_options.UpstreamKey = None,
    remote_timeout: testing_options.UpstreamTimeout = None,
    allow_simulation: testing_options.AllowSimulation = False,
    simulate: testing_options.Simulate = None,
) -> int:
    """Serve the Llama 2 API and the OpenAI API over HTTP."""
    flags = {name: value for name, value in locals().items() if name in RULES}
    from llamacli.commands import rehearsal
    from llamacli.commands import serve as command
    from llamacli.server.connection import Patience

    testing = rehearsal.Wishes(
        is_deterministic=deterministic,
        record=Path(record) if record else None,
        replay=Path(replay) if replay else None,
        runs_too=replay_or_run,
        keeps_time=replay_timing,
        match_on=tuple(match_on or ()),
        upstream=upstream,
        upstream_key=upstream_key or None,
        allows_simulation=allow_simulation,
        simulate=Path(simulate) if simulate else None,
    )
    wishes = command.Wishes(
        host=host,
        port=port,
        uds=Path(uds) if uds else None,
        slots=slots,
        queue=queue,
        api_keys=tuple(api_key or ()),
        no_auth=no_auth,
        cors_origins=tuple(cors_origin or ()),
        max_body=max_body,
        grace=grace,
        repack=repack,
        patience=Patience(headers=headers_timeout, body=body_timeout, reading=reading_timeout),
        ready_file=Path(ready_file) if ready_file else None,
        until_eof=until_eof,
        testing=testing,
    )
    return command.run(resolved(flags).settings, wishes, directories(os.environ))
