"""Replies that a test has put ready: read from JSON, and given out in their order."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llamacli.engine.sequence import FinishReason
from llamacli.errors import UsageError
from llamacli.server.exchange import JSON, Exchange, event
from llamacli.server.failure import Failure
from llamacli.server.matching import route_of
from llamacli.server.recording import is_header
from llamacli.server.script import Script, pieces_of

_KEYS = (
    *("text", "pieces", "finish_reason", "json", "body", "events", "status", "message", "headers", "content_type"),
    *("retry_after", "route", "when", "times"),
)
_CONTENTS = ("text", "pieces", "json", "body", "events")

FOR_ALL = (None, None)


@dataclass(slots=True)
class Reply:
    """An answer, and the requests that it is for.

    script   what the model is to have said, in whatever shape the client asks for; or else:
    status   with `parts` as body: one part, or those of an event stream
    failure  an error in the shape of the client's API
    when     is found in the request's body
    times    it is given; None: until another one follows
    """

    script: Script | None = None
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    content_type: str = JSON
    parts: tuple[bytes, ...] = ()
    is_stream: bool = False
    failure: Failure | None = None
    route: str | None = None
    when: re.Pattern[str] | None = None
    times: int | None = None

    def fits(self, path: str, text: str) -> bool:
        is_route = self.route is None or route_of(path) == self.route
        return is_route and (self.when is None or self.when.search(text) is not None)

    @property
    def kind(self) -> tuple[str | None, str | None]:
        """Which requests it is for."""
        return self.route, self.when.pattern if self.when else None

    async def answer(self, exchange: Exchange) -> None:
        """Send it. Raises Failure for one that is an error. Not for a script."""
        if self.failure is not None:
            raise self.failure
        if not self.is_stream:
            await exchange.respond(self.status, self.parts[0], self.content_type, self.headers)
            return
        await exchange.start_events(self.status, dict(self.headers))
        for part in self.parts:
            await exchange.events(part)
        await exchange.events(b"", last=True)


class Replies:
    """Those for certain requests go before those for all. Of one kind each is given once, in their order, and the last
    one stays, unless it was to be given a number of times.
    """

    def __init__(self) -> None:
        self._waiting: list[Reply] = []

    def add(self, reply: Reply) -> None:
        self._waiting.append(reply)

    def clear(self) -> None:
        self._waiting.clear()

    def take(self, path: str, raw: bytes) -> Reply | None:
        if not self._waiting:
            return None
        text = raw.decode("utf-8", "replace")
        fitting = [reply for reply in self._waiting if reply.fits(path, text)]
        if not fitting:
            return None
        reply = next((each for each in fitting if each.kind != FOR_ALL), fitting[0])
        is_last = sum(each.kind == reply.kind for each in fitting) == 1
        if reply.times is not None:
            reply.times -= 1
        if reply.times == 0 or (reply.times is None and not is_last):
            self._waiting.remove(reply)
        return reply


def read(value: Mapping[str, Any]) -> Reply:
    """Raises UsageError naming what is wrong."""
    for name in value:
        if name not in _KEYS:
            raise UsageError(f"{name[:50]!r} is unknown in a reply; known are {', '.join(_KEYS)}")
    given = [name for name in _CONTENTS if value.get(name) is not None]
    if len(given) > 1:
        raise UsageError(f"a reply has one of {', '.join(_CONTENTS)}, not {' and '.join(given)}")
    status = value.get("status", 200)
    if isinstance(status, bool) or not isinstance(status, int) or not 200 <= status <= 599:
        raise UsageError("status must be a number between 200 and 599")
    if not given and status < 400:
        raise UsageError(f"a reply needs one of {', '.join(_CONTENTS)}, or a status of 400 or more")
    content_type = value.get("content_type") or JSON
    if not isinstance(content_type, str) or not is_header("content-type", content_type):
        raise UsageError("content_type must be a type such as text/html")
    reply = Reply(status=status, headers=_headers(value.get("headers") or {}), content_type=content_type)
    _contents(reply, value, given[0] if given else "")
    reply.route = route_of(value["route"]) if value.get("route") is not None else None
    reply.when = _pattern(value.get("when"))
    reply.times = value.get("times")
    if reply.times is not None and (isinstance(reply.times, bool) or not isinstance(reply.times, int)):
        raise UsageError("times must be a number")
    if reply.times is not None and reply.times < 1:
        raise UsageError("times must be 1 or more")
    return reply


def _contents(reply: Reply, value: Mapping[str, Any], kind: str) -> None:
    found = value.get(kind)
    if kind in ("text", "pieces"):
        if reply.status != 200:
            raise UsageError(f"a {kind} is what a model says, with status 200: take json or body for another one")
        pieces = pieces_of(found) if isinstance(found, str) else _texts(found, kind)
        reply.script = Script(pieces, _reason(value.get("finish_reason", "stop")))
    elif kind == "json":
        reply.parts = (json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace"),)
    elif kind == "body":
        if not isinstance(found, str):
            raise UsageError("body must be a string")
        reply.parts = (found.encode("utf-8", "replace"),)
    elif kind == "events":
        if not isinstance(found, list) or not found:
            raise UsageError("events must be an array with at least one")
        reply.is_stream = True
        reply.parts = tuple(event(each if isinstance(each, str) else _compact(each)) for each in found)
    else:
        said = value.get("message") or f"a reply with status {reply.status}, as the test has asked for"
        headers = dict(reply.headers)
        retry_after = value.get("retry_after")
        if retry_after is not None and (isinstance(retry_after, bool) or not isinstance(retry_after, int)):
            raise UsageError("retry_after must be a number of seconds")
        if retry_after is not None:
            headers["retry-after"] = str(retry_after)
        reply.failure = Failure(reply.status, str(said), headers=headers)


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _texts(found: object, name: str) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise UsageError(f"{name} must be an array of strings")
    return tuple(found)


def _reason(name: object) -> FinishReason:
    if name not in ("stop", "length"):
        raise UsageError("finish_reason must be stop or length")
    return FinishReason(name)


def _headers(found: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
        raise UsageError("headers must be an object of strings")
    for name, text in found.items():
        if not is_header(name, text):
            raise UsageError(f"headers: {name[:50]!r} is no header")
    return tuple((name.lower(), text) for name, text in found.items())


def _pattern(found: object) -> re.Pattern[str] | None:
    if found is None:
        return None
    try:
        return re.compile(str(found))
    except re.error as error:
        raise UsageError(f"when is no regular expression: {error}") from None
