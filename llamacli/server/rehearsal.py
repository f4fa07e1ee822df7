"""What is different in a server that clients are tested against: who answers, what goes wrong, what is written down.

The route, the key, the origin, the metrics and the log are those of every server.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from llamacli.server import simulation
from llamacli.server.absent import NoModel
from llamacli.server.access import presented_keys
from llamacli.server.answering import Opens
from llamacli.server.exchange import Exchange
from llamacli.server.failure import Failure
from llamacli.server.log import Record
from llamacli.server.recorder import Recorder, Tape
from llamacli.server.stage import Sent, Stage
from llamacli.server.standin import UPSTREAM, StandIn
from llamacli.server.trace import Counted, Drawn

# Failures from here on are the server's own state (a full queue, a model that is loading): no answers to a question.
FIRST_UNRECORDED = 429

Run = Callable[[Opens | None], Awaitable[None]]  # the route's own handler, over the engine or over a script


@dataclass(slots=True)
class Rehearsal:
    """standins   are asked before the model
    stage      what a test says and hears; None where no simulation is allowed
    secrets    of the server itself, that no recording may hold
    """

    origin: Counted | Drawn = field(default_factory=Drawn)
    standins: Sequence[StandIn] = ()
    recorder: Recorder | None = None
    stage: Stage | None = None
    secrets: Sequence[str] = ()

    @property
    def is_idle(self) -> bool:
        """Nothing is different, unless that ids are counted."""
        return not self.standins and self.recorder is None and self.stage is None

    def hear(self, exchange: Exchange, raw: bytes) -> Sent | None:
        return self.stage.hear(exchange, raw) if self.stage else None

    def listen(self, exchange: Exchange) -> Tape | None:
        """To what will be sent. None where nothing is recorded."""
        if self.recorder is None:
            return None
        tape = Tape()
        exchange.send_through(tape.send_to)
        return tape

    def keep(self, tape: Tape, exchange: Exchange, record: Record, raw: bytes) -> None:
        """Record an answer, if it is one: whole, true, and not from a recording already."""
        is_true = record.source in ("", UPSTREAM) and not record.simulated
        is_ours = bool(record.error) and record.status >= FIRST_UNRECORDED
        if self.recorder is None or not tape.is_whole or not is_true or is_ours:
            return
        secrets = [*self.secrets, *presented_keys(exchange.headers, exchange.query)]
        self.recorder.add(tape.recorded(exchange.path, raw, record.trace_id), secrets)

    async def befall(self, exchange: Exchange, record: Record, raw: bytes, *, is_work: bool) -> None:
        """Let a fault happen, if one is due. Raises what simulation.befall() raises, Failure 400 for a strange one."""
        fault = self.stage.fault(exchange, raw, is_work=is_work) if self.stage else None
        if fault is not None:
            record.simulated = fault.shown
            await simulation.befall(fault, exchange)

    async def answer(self, exchange: Exchange, record: Record, raw: bytes, run: Run) -> None:
        """By a reply that was put ready, or a stand-in, or else the model. Raises what these raise."""
        reply = self.stage.replies.take(exchange.path, raw) if self.stage else None
        if reply is not None:
            record.source = "reply"
            await (reply.answer(exchange) if reply.script is None else run(reply.script))
            return
        refusal: Failure | None = None
        for each in (*(self.stage.recordings if self.stage else ()), *self.standins):
            refusal = await each.answer(raw, exchange, record)
            if refusal is None:
                return
        try:
            await run(None)
        except NoModel:
            if refusal is not None:
                raise refusal from None
            raise
