"""What a test tells the server over HTTP, and what it hears of its client: /simulation, only where it is allowed.

GET    /simulation/requests    {"requests": [...]}: what clients have sent since the last reset
POST   /simulation/replies     a reply to put ready (replies.py)
POST   /simulation/rules       a rule for faults (rules.py)
POST   /simulation/recording   a recording to answer from (recording.py)
DELETE /simulation             everything as it was at the start
"""

from __future__ import annotations

import base64
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llamacli.errors import UsageError
from llamacli.server import recording, replies, rules, simulation
from llamacli.server.exchange import Exchange
from llamacli.server.failure import Failure
from llamacli.server.fields import kind_of
from llamacli.server.matching import Matcher
from llamacli.server.replay import Replay
from llamacli.server.rules import Rules
from llamacli.server.simulation import Fault

PREFIX = "/simulation"
ROUTES = {
    f"{PREFIX}/requests": "GET",
    f"{PREFIX}/replies": "POST",
    f"{PREFIX}/rules": "POST",
    f"{PREFIX}/recording": "POST",
    PREFIX: "DELETE",
}
MAX_KEPT = 10_000  # requests that are remembered
MAX_KEPT_BYTES = 64 << 20  # of their bodies and headers: no key is asked for before a request is heard
_UNHEARD = ("/health", "/ready", "/metrics")  # whoever watches over the server is no client


@dataclass(slots=True)
class Sent:
    """A request as its client has sent it. `status` is that of its answer; 0 while there is none."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    status: int = 0

    def shown(self) -> dict[str, Any]:
        shown: dict[str, Any] = {name: getattr(self, name) for name in ("method", "path", "query", "headers", "status")}
        return shown | {"body": base64.b64encode(self.body).decode()}

    @property
    def size(self) -> int:
        """In bytes, about."""
        texts = (self.method, self.path, *self.query, *self.query.values(), *self.headers, *self.headers.values())
        return len(self.body) + sum(map(len, texts))


class Stage:
    """Rules, replies and recordings that a test has put ready, and what its client has sent.

    fixed      rules of a file
    match_on   fields by which the requests of an added recording are told apart; None: all
    """

    def __init__(self, fixed: Rules, match_on: frozenset[str] | None = None, *, keeps_time: bool = False) -> None:
        self.rules = fixed
        self.replies = replies.Replies()
        self.recordings: list[Replay] = []
        self.on_reset: list[Callable[[], None]] = []
        self._match_on = match_on
        self._keeps_time = keeps_time
        self._heard: deque[Sent] = deque()
        self._n_bytes = 0  # of what was heard

    def hear(self, exchange: Exchange, raw: bytes) -> Sent | None:
        """Remember a request; the oldest are forgotten for it. None for one that is no client's."""
        if exchange.path in ROUTES or exchange.path in _UNHEARD:
            return None
        sent = Sent(exchange.method, exchange.path, exchange.query, dict(exchange.headers), raw)
        self._heard.append(sent)
        self._n_bytes += sent.size
        while len(self._heard) > MAX_KEPT or self._n_bytes > MAX_KEPT_BYTES:
            self._n_bytes -= self._heard.popleft().size
        return sent

    def fault(self, exchange: Exchange, raw: bytes, *, is_work: bool) -> Fault | None:
        """What is to befall this request: as its own header says, or else a rule. Raises Failure 400."""
        if exchange.path in ROUTES:
            return None
        by_rule = self.rules.fault(exchange.path, raw, is_work=is_work)
        asked = exchange.headers.get(simulation.HEADER)
        if asked is None:
            return by_rule
        try:
            return simulation.parse(asked)
        except UsageError as error:
            raise Failure(400, f"{simulation.HEADER}: {error}", code="unknown_simulation") from None

    def obey(self, exchange: Exchange, raw: bytes) -> dict[str, Any]:
        """Do what a request to one of ROUTES asks. Raises Failure 400."""
        path = exchange.path.removeprefix(f"{PREFIX}/")
        if path == "requests":
            return {"requests": [sent.shown() for sent in self._heard]}
        try:
            if path == "recording":
                found = recording.parse(raw, "the recording")
                matcher = Matcher(found.defaults, self._match_on)
                self.recordings.append(Replay(found, matcher, keeps_time=self._keeps_time))
            elif path == "replies":
                self.replies.add(replies.read(_object(raw)))
            elif path == "rules":
                self.rules.add(rules.rule_of(_object(raw)))
            else:
                self._reset()
        except UsageError as error:
            raise Failure(400, str(error)) from None
        return {"status": "ok"}

    def _reset(self) -> None:
        self.rules.rewind()
        self.replies.clear()
        self.recordings.clear()
        self._heard.clear()
        self._n_bytes = 0
        for act in self.on_reset:
            act()


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise UsageError("the body is not JSON") from None
    if not isinstance(value, dict):
        raise UsageError(f"the body must be a JSON object, not {kind_of(value)}")
    return value
