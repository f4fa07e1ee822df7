"""Where an engine would be, in a server that answers from a recording, from a script or from another server alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from llamacli.engine.protocol import ModelFacts
from llamacli.engine.sequence import Load, SamplingParams
from llamacli.engine.supervisor import Embedded, State, Stats, Stream
from llamacli.prompt import Message, Prompt
from llamacli.server.failure import Failure


class NoModel(Failure):
    """A sound request that nobody is there to answer."""

    def __init__(self) -> None:
        super().__init__(404, "no model is loaded, and nobody else has an answer to this request", code="not_recorded")


class NoEngine:
    """An engine that is ready at once and knows nothing."""

    state: State = "ready"
    reason = ""
    facts: ModelFacts | None = None

    @property
    def stats(self) -> Stats:
        return Stats(Load(), 0)

    async def start(self) -> None:
        pass

    async def stop(self, grace: float) -> None:
        pass

    async def encode(self, asked: str | Sequence[Message]) -> Prompt:
        raise NoModel

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, *, trim: bool = False, is_stored: bool = True
    ) -> Stream:
        raise NoModel

    async def embed(self, texts: Sequence[str | Sequence[int]]) -> Embedded:
        raise NoModel

    def piece(self, token: int) -> NoReturn:
        raise NoModel
