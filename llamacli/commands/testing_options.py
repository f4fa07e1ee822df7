"""The options of `serve` that are there for testing clients, with their help."""

from __future__ import annotations

from typing import Annotated

import typer

ReadyFile = Annotated[
    str | None, typer.Option(metavar="FILE", help="Write URL and key here, as JSON, when requests can come.")
]
UntilEof = Annotated[
    bool, typer.Option("--until-eof", help="End when stdin does: the program that holds its other end is gone.")
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="The same requests get the same bytes, one answer at a time.")
]
Record = Annotated[str | None, typer.Option(metavar="FILE", help="Add requests and answers to this recording.")]
Replay = Annotated[str | None, typer.Option(metavar="FILE", help="Answer from this recording; no model is loaded.")]
ReplayOrRun = Annotated[bool, typer.Option("--replay-or-run", help="Load the model, for what was not recorded.")]
ReplayTiming = Annotated[bool, typer.Option("--replay-timing", help="Take as long as when it was recorded.")]
MatchOn = Annotated[
    list[str] | None,
    typer.Option(metavar="FIELD,...", help="Fields by which recorded requests are found. [all] Repeatable."),
]
Upstream = Annotated[str | None, typer.Option(metavar="URL", help="Let this server answer, in place of a model.")]
UpstreamKey = Annotated[
    str | None, typer.Option(envvar="LLAMACLI_UPSTREAM_KEY", help="The key for it. [the client's own]")
]
UpstreamTimeout = Annotated[
    float | None, typer.Option("--remote-timeout", metavar="SECONDS", help="How long it may say nothing. [600]")
]
AllowSimulation = Annotated[
    bool, typer.Option("--allow-simulation", help="Let X-Simulate and /simulation make faults.")
]
Simulate = Annotated[
    str | None, typer.Option(metavar="FILE", help="Rules for faults, in TOML; with --allow-simulation.")
]
