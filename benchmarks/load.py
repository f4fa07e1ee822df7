"""Clients of a server that streams completions as OpenAI's API does: when their tokens come.

Plain sockets and little parsing, so that measuring takes few cycles from what is measured. Knows nothing of what
serves.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter

TIMEOUT = 600.0  # seconds without an answer: the benchmark has failed


class Unanswered(Exception):
    """A server that did not do what it was asked for."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt without a template, and the tokens to be written after it.

    banned   tokens that are not to be drawn
    """

    prompt: str
    n_tokens: int
    banned: Sequence[int] = ()


@dataclass(slots=True)
class Heard:
    """One streamed answer. `times` has a moment (perf_counter) for each event that brought text."""

    sent: float
    times: list[float] = field(default_factory=list)
    ended: float = 0.0
    n_tokens: int = 0

    @property
    def first(self) -> float:
        """Seconds until the first token."""
        return self.times[0] - self.sent

    @property
    def per_token(self) -> float:
        """Seconds from one token to the next, on average."""
        return (self.times[-1] - self.times[0]) / (self.n_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.times)]


async def stream(port: int, ask: Ask) -> Heard:
    """Ask, and listen until the end. Raises Unanswered."""
    body = {
        "prompt": ask.prompt,
        "max_tokens": ask.n_tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        **({"logit_bias": dict.fromkeys(map(str, ask.banned), -100)} if ask.banned else {}),
    }
    raw = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    heard = Heard(perf_counter())
    writer.write(head.encode() + raw)
    try:
        async with asyncio.timeout(TIMEOUT):
            await _listen(reader, heard, ask)
    finally:
        writer.close()
    heard.ended = perf_counter()
    return heard


async def _listen(reader: asyncio.StreamReader, heard: Heard, ask: Ask) -> None:
    status = await reader.readline()
    if b" 200 " not in status:
        raise Unanswered(f"the server answered {status!r}: {(await reader.read())[:500]!r}")
    is_whole = False
    async for line in reader:
        if not line.startswith(b'data: {"') and not line.startswith(b"data: {'"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise Unanswered(f"the server failed: {event}")
        for choice in event["choices"]:
            if choice.get("text"):
                heard.times.append(perf_counter())
            is_whole = is_whole or choice.get("finish_reason") == "length"
    # A token may bring half a character and so no text: the reason for the end tells that all were drawn.
    heard.n_tokens = ask.n_tokens if is_whole else len(heard.times)
    if len(heard.times) < 2:
        raise Unanswered(f"an answer of {len(heard.times)} tokens cannot be measured")


@dataclass(frozen=True, slots=True)
class Crowd:
    """What several clients have heard."""

    answers: Sequence[Heard]

    @property
    def tokens_per_second(self) -> float:
        """From the first request to the end of the last answer."""
        started = min(answer.sent for answer in self.answers)
        ended = max(answer.ended for answer in self.answers)
        return sum(answer.n_tokens for answer in self.answers) / (ended - started)


def crowd(port: int, asks_of_clients: Sequence[Sequence[Ask]]) -> Crowd:
    """Clients that ask at the same time, each the next thing as soon as it has its answer."""

    async def client(asks: Sequence[Ask]) -> list[Heard]:
        return [await stream(port, ask) for ask in asks]

    async def all_of_them() -> list[list[Heard]]:
        return await asyncio.gather(*(client(asks) for asks in asks_of_clients))

    return Crowd([answer for answers in asyncio.run(all_of_them()) for answer in answers])


def interrupted(port: int, streams: Sequence[Ask], late: Ask) -> tuple[Crowd, Heard]:
    """Streams, into which another request comes when all of them have begun: (the streams, the late one)."""

    async def both() -> tuple[list[Heard], Heard]:
        running = [asyncio.ensure_future(stream(port, ask)) for ask in streams]
        await asyncio.sleep(0.5)
        heard = await stream(port, late)
        return await asyncio.gather(*running), heard

    answers, heard = asyncio.run(both())
    return Crowd(answers), heard
