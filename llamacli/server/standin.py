"""Who answers in the model's place: the way in which a request is put to them."""

from __future__ import annotations

from typing import Protocol

from llamacli.server.exchange import Exchange
from llamacli.server.failure import Failure
from llamacli.server.log import Record
from llamacli.server.trace import given_trace_id

UPSTREAM = "upstream"  # the source of an answer, in the log


class StandIn(Protocol):
    async def answer(self, raw: bytes, exchange: Exchange, record: Record) -> Failure | None:
        """Answer a request with this body. Or else, with nothing sent, return why there is no answer here."""


def take_over_trace_id(trace_id: str, exchange: Exchange, record: Record) -> None:
    """The answer has an id of its own: header and log are to say the same. A caller's id goes before it."""
    if trace_id and given_trace_id(exchange.headers) is None:
        record.trace_id = trace_id
        exchange.extra[:] = [pair for pair in exchange.extra if pair[0] != "x-trace-id"]
        exchange.extra.append(("x-trace-id", trace_id))
