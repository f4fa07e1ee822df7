"""`serve` for testing clients: from its flags to who answers in the model's place, what fails, what is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llamacli.config import Settings
from llamacli.engine.sequence import SamplingParams
from llamacli.errors import UsageError
from llamacli.server import matching, recording, rules
from llamacli.server.log import Log
from llamacli.server.matching import Matcher
from llamacli.server.recorder import Recorder
from llamacli.server.recording import Recording
from llamacli.server.rehearsal import Rehearsal
from llamacli.server.replay import Replay
from llamacli.server.rules import Rules
from llamacli.server.stage import Stage
from llamacli.server.standin import StandIn
from llamacli.server.trace import Counted, Drawn

if TYPE_CHECKING:
    from llamacli.server.accounts import Accounts
    from llamacli.server.upstream import Upstream

SEED = 0  # of a deterministic server whose settings name none


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a server for tests is asked for.

    match_on       fields of a request; empty: all of them
    keeps_time     replayed chunks come when they came
    upstream_key   for the upstream server; None: what the client sends
    simulate       a file of rules
    """

    is_deterministic: bool = False
    record: Path | None = None
    replay: Path | None = None
    runs_too: bool = False
    keeps_time: bool = False
    match_on: tuple[str, ...] = ()
    upstream: str | None = None
    upstream_key: str | None = None
    allows_simulation: bool = False
    simulate: Path | None = None

    def __post_init__(self) -> None:
        if self.simulate is not None and not self.allows_simulation:
            raise UsageError("--simulate needs --allow-simulation beside it")
        if self.replay is None:
            for option, is_given in (("--replay-or-run", self.runs_too), ("--replay-timing", self.keeps_time)):
                if is_given:
                    raise UsageError(f"{option} needs --replay FILE")
            if self.match_on and not self.allows_simulation:
                raise UsageError("--match-on needs --replay FILE")
        elif self.record is not None and not self.runs_too and self.upstream is None:
            raise UsageError(
                "--record beside --replay needs --replay-or-run or --upstream: what is replayed is not new"
            )

    @property
    def is_on(self) -> bool:
        """Whether the answers may be others than a user's own `run` should be given."""
        return self != Wishes()

    @property
    def needs_model(self) -> bool:
        return self.upstream is None and (self.replay is None or self.runs_too)

    def defaults(self, usual: SamplingParams) -> SamplingParams:
        """Sampling where a request says nothing."""
        if not self.is_deterministic:
            return usual
        return replace(usual, temperature=0.0, seed=SEED if usual.seed is None else usual.seed)


@dataclass(slots=True)
class Rehearsing:
    """A rehearsal put together, and the names that its server goes by."""

    rehearsal: Rehearsal
    model: str
    names: frozenset[str]
    upstream: Upstream | None = None

    def keep_keys_of(self, accounts: Accounts | None) -> None:
        """What opens this server is not for another one."""
        if self.upstream is not None and accounts is not None:
            ring = accounts.ring
            self.upstream.is_ours = lambda key: ring.check(key) is not None

    def close(self) -> None:
        if self.rehearsal.recorder is not None:
            self.rehearsal.recorder.close()


def prepared(wishes: Wishes, settings: Settings, defaults: SamplingParams, keys: Sequence[str], log: Log) -> Rehearsing:
    """Read what has to be read. Raises UsageError for a file that is not as it should be."""
    match_on = matching.chosen(wishes.match_on)
    recorded = recording.read(wishes.replay) if wishes.replay is not None else None
    fixed = rules.read(wishes.simulate) if wishes.simulate is not None else Rules()
    upstream = _upstream(wishes, settings)
    model, names = settings.model, _names(recorded)
    if not wishes.needs_model:
        model = upstream.shown if upstream is not None else recorded.model if recorded is not None else model
    replays = [Replay(recorded, Matcher(recorded.defaults, match_on), keeps_time=wishes.keeps_time)] if recorded else []
    standins: list[StandIn] = [*replays, *([upstream] if upstream is not None else [])]
    stage = Stage(fixed, match_on, keeps_time=wishes.keeps_time) if wishes.allows_simulation else None
    origin = Counted() if wishes.is_deterministic else Drawn()
    if stage is not None:
        stage.on_reset += [each.rewind for each in (*replays, origin)]
    rehearsal = Rehearsal(
        origin=origin,
        standins=standins,
        recorder=_recorder(wishes, model, defaults, log),
        stage=stage,
        secrets=[*keys, *([wishes.upstream_key] if wishes.upstream_key else [])],
    )
    return Rehearsing(rehearsal, model, names | {model}, upstream)


def _recorder(wishes: Wishes, model: str, defaults: SamplingParams, log: Log) -> Recorder | None:
    if wishes.record is None:
        return None
    known = {} if wishes.upstream is not None else _told(defaults)  # what another server assumes is its own affair
    return Recorder(wishes.record, model=model, defaults=known, report=lambda line: log.event("recording", line))


def _told(defaults: SamplingParams) -> dict[str, object]:
    values = {name: getattr(defaults, name) for name in matching.SAMPLING}
    return {name: value for name, value in values.items() if value is not None}


def _upstream(wishes: Wishes, settings: Settings) -> Upstream | None:
    if wishes.upstream is None:
        return None
    from llamacli.server.upstream import Upstream

    return Upstream(wishes.upstream, wishes.upstream_key, settings.remote_timeout)


def _names(recorded: Recording | None) -> frozenset[str]:
    """The models that recorded requests have asked for."""
    matcher = Matcher({})
    found: set[str] = set()
    for entry in recorded.entries if recorded is not None else ():
        fields = matcher.question(entry.path, entry.body).fields or {}
        if isinstance(name := fields.get("model"), str):
            found.add(name)
    return frozenset(found)
