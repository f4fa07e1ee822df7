"""Mixed load for long, with clients that leave: memory, cells, slots and file descriptors stay where they are.

LLAMACLI_SOAK_MINUTES says for how long; 30 without it. `pytest -m slow -s tests/server/test_soak.py` shows the figures.
"""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import Any

import pytest
from raw import connected, eventually, is_quiet, metric, n_files, post, resident
from test_serve import ANSWER, QUESTION, Server, children, running

MINUTES = float(os.environ.get("LLAMACLI_SOAK_MINUTES", "30"))
N_CLIENTS = 10
MIB = 1 << 20
WORDS = ["llama", "model", "Meta", "weights", "tokens", "Paris", "context", "open", "7B", "train", "chat", "human"]


@dataclass(frozen=True)
class Look:
    """What the server holds: bytes of both processes, file descriptors of both, cells."""

    server: int
    engine: int
    server_files: int
    engine_files: int
    cells: int


def request(chance: random.Random) -> tuple[dict[str, Any], str]:
    text = " ".join(chance.choices(WORDS, k=chance.choice([3, 10, 40, 200, 600])))
    few, stream = chance.choice([1, 20, 80, 200]), chance.random() < 0.5
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": few, "stream": stream}
    kinds: list[tuple[dict[str, Any], str]] = [
        ({"prompt": text, "max_tokens": few, "stream": stream, "seed": chance.randrange(1000)}, "/v1/getData"),
        ({"prompt": text, "system": "Be brief. " * 20, "ignore_eos": True, "max_tokens": few}, "/v1/getData"),
        (chat | {"n": chance.choice([1, 2, 4])}, "/v1/chat/completions"),
        (chat | {"logprobs": True, "top_logprobs": 5}, "/v1/chat/completions"),
        (chat | {"response_format": {"type": "json_object"}, "temperature": 1.2}, "/v1/chat/completions"),
        ({"prompt": [text, text[:20]], "max_tokens": few, "stop": ["a", "the "]}, "/v1/completions"),
        ({"prompt": [chance.randrange(300, 3000) for _ in range(1030)]}, "/v1/completions"),
        ({"input": [text, text[:50]]}, "/v1/embeddings"),
        ({"prompt": text, "temperature": 3}, "/v1/getData"),
    ]
    return chance.choice(kinds)


def ask(server: Server, chance: random.Random) -> str:
    """One client with one request. Some leave before it is sent, some before it is answered, some read all."""
    body, path = request(chance)
    raw = post(body, "Connection: close", path=path)
    patience = chance.choice([0, 0.005, 0.05, 0.5, None, None, None, None])
    with connected(server, timeout=60) as client:
        if patience == 0:
            client.sendall(raw[: chance.randrange(len(raw))])
            return "left early"
        client.sendall(raw)
        client.settimeout(patience or 60)
        status = b""
        try:
            while part := client.recv(1 << 16):
                status = status or part[9:12]
        except TimeoutError:
            assert patience, "a request was not answered in a minute"
            return "left"
    return status.decode()


@pytest.mark.slow
def test_nothing_grows_under_mixed_load(environment: dict[str, str]) -> None:
    counts: Counter[str] = Counter()
    ends = time.monotonic() + 60 * MINUTES
    with running(environment, "-q", "--slots", "4", "--queue", "40") as server:
        (child,) = children(server.process.pid)

        def client(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() < ends:
                try:
                    counts[ask(server, chance)] += 1
                except Exception as error:
                    counts[repr(error)] += 1

        threads = [threading.Thread(target=client, args=(i,)) for i in range(N_CLIENTS)]
        for thread in threads:
            thread.start()
        looks = []
        while time.monotonic() < ends:
            time.sleep(min(5, 3 * MINUTES))
            with suppress(OSError):
                looks.append(look(server, child))
        for thread in threads:
            thread.join(90)
        eventually(lambda: is_quiet(server))
        last = look(server, child)
        assert server.post({"prompt": QUESTION, "temperature": 0}).json["response"] == ANSWER
        assert metric(server, "engine_restarts_total") == 0
        assert children(server.process.pid) == [child]
    report(looks, last, counts)
    assert set(counts) <= {"200", "400", "429", "left", "left early"}, counts
    assert counts["200"] > len(looks) and counts["left"] > len(looks)
    settled = looks[len(looks) // 4 :]  # the first quarter is for warming up
    early, late = settled[: len(settled) // 3], settled[-(len(settled) // 3) :]
    assert middle(late, "server") - middle(early, "server") < 8 * MIB
    assert middle(late, "engine") - middle(early, "engine") < 8 * MIB
    assert max(each.cells for each in looks) <= 4 * 1024
    assert last.server_files <= min(each.server_files for each in settled) + 1  # the one that we look through
    assert last.engine_files == looks[0].engine_files


def look(server: Server, child: int) -> Look:
    pid = server.process.pid
    cells = int(metric(server, "kv_cells_used"))
    return Look(resident(pid), resident(child), n_files(pid), n_files(child), cells)


def middle(looks: list[Look], name: str) -> float:
    return float(statistics.median(getattr(each, name) for each in looks))


def report(looks: list[Look], last: Look, counts: Counter[str]) -> None:
    print(f"\n{sum(counts.values()):,} requests: {dict(counts.most_common())}")
    print("server MiB, engine MiB, their file descriptors, cells")
    for each in [*looks[:: max(1, len(looks) // 20)], last]:
        server, engine, *rest = astuple(each)
        print(f"{server / MIB:10.1f} {engine / MIB:10.1f}", *(f"{number:6}" for number in rest))
