"""One process that sends short requests to the Llama 2 API over connections that stay open: how many a second."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from time import perf_counter
from urllib.parse import urlsplit

Check = Callable[[int, dict[str, object]], bool]  # of the question's number and the answer


def rate(url: str, prompts: Sequence[str], check: Check, *, n_requests: int, n_connections: int) -> float:
    """Requests a second. Each connection asks all prompts in turn. Raises SystemExit for an answer that is wrong."""
    host = urlsplit(url)
    bodies = [json.dumps({"prompt": prompt, "max_tokens": 1}).encode() for prompt in prompts]
    head = b"POST /v1/getData HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    requests = [head % len(body) + body for body in bodies]
    per_connection = n_requests // n_connections

    async def all_of_them() -> float:
        started = perf_counter()
        clients = (_ask(host.hostname, host.port, requests, check, per_connection) for _ in range(n_connections))
        await asyncio.gather(*clients)
        return n_connections * per_connection / (perf_counter() - started)

    return asyncio.run(all_of_them())


async def _ask(host: str | None, port: int | None, requests: Sequence[bytes], check: Check, n: int) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    for i in range(n):
        number = i % len(requests)
        writer.write(requests[number])
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        told = json.loads(await reader.readexactly(length))
        if not check(number, told):
            raise SystemExit(f"a wrong answer: {told}")
    writer.close()
