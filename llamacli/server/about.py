"""What a server tells of itself to everybody: where it is called, its model, its limits, whether it asks for a key."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llamacli.engine.sequence import SamplingParams
from llamacli.engine.supervisor import State
from llamacli.server.exchange import Exchange

# Whatever else a Host says would end up in code that people copy.
_HOST = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:\d{1,5})?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """url        as the caller knows the server, without a slash at its end
    needs_key  a request without a key is refused
    is_local   it can be called from this machine alone
    defaults   sampling where a request says nothing
    max_body   bytes
    simulates  a test can say what is answered, under /simulation
    slots      answers that are computed at once; `queue` more may wait
    context    tokens that prompt and answer may have together; None as long as the model has not been loaded
    format     how prompts are made of messages: a prompt.Format
    """

    url: str
    model: str
    needs_key: bool
    is_local: bool
    defaults: SamplingParams
    max_body: int
    slots: int
    queue: int
    state: State
    simulates: bool = False
    context: int | None = None
    format: str | None = None
    device: str | None = None

    @property
    def host(self) -> str:
        return self.url.partition("://")[2]


def url_of(exchange: Exchange) -> str:
    """How whoever sent this request calls the server.

    A proxy in front of it may speak https where we hear http, and go by another name. It is believed: what it says is
    shown, no more.
    """
    host = _first(exchange.headers.get("x-forwarded-host", "")) or exchange.headers.get("host", "")
    if not _HOST.fullmatch(host):
        host = f"localhost:{exchange.port}" if exchange.port else "localhost"
    forwarded = _first(exchange.headers.get("x-forwarded-proto", "")).lower()
    scheme = forwarded if forwarded in ("http", "https") else exchange.scheme
    return f"{scheme}://{host}"


def _first(values: str) -> str:
    """What the outermost of several proxies has said."""
    return values.partition(",")[0].strip()
