"""`serve` over its own end: what was computed for one server is there for the next."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from conftest import golden
from test_serve import Server, running

from llamacli.launch import MIN_SERVED

LONG = max(golden(), key=lambda case: sum(len(message.content) for message in case.messages)).messages
MORE = " and so on" * 60  # a server keeps long prompts only
CHAT = "/v1/chat/completions"


def asked(server: Server, *, seed: int = 0, **headers: str) -> tuple[str, int]:
    """The answer, and how many tokens of the prompt were there already."""
    messages = [{"role": message.role, "content": message.content + MORE + "." * seed} for message in LONG]
    body: dict[str, Any] = {"messages": messages, "temperature": 0, "max_tokens": 12}
    reply = server.post(body, CHAT, **headers)
    assert reply.status == 200, reply.text
    usage = reply.json["usage"]
    assert usage["prompt_tokens"] > MIN_SERVED
    return reply.json["choices"][0]["message"]["content"], usage["prompt_tokens_details"]["cached_tokens"]


def prefixes(environment: dict[str, str]) -> Path:
    return Path(environment["LLAMACLI_HOME"], "cache", "prefixes")


def test_a_restarted_server_goes_on_where_the_one_before_was(environment: dict[str, str]) -> None:
    with running(environment) as server:
        answer, n_cached = asked(server)
        assert n_cached == 0
        server.end()  # at once: the prompt is on its way to the disk
    with running(environment) as server:
        again, n_cached = asked(server)
        assert again == answer and n_cached > MIN_SERVED
        asked(server, seed=1)
        deadline = time.monotonic() + 20
        while len(list(prefixes(environment).glob("*.kv"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)  # nobody waits, so it writes
        server.process.kill()
    with running(environment) as server:
        assert asked(server, seed=1)[1] > MIN_SERVED


def test_no_store_and_no_cache_leave_nothing_on_the_disk(environment: dict[str, str]) -> None:
    with running(environment) as server:
        answer, _ = asked(server, Cache_Control="no-cache, No-Store")
        server.end()
    assert not prefixes(environment).exists()
    with running(environment, "--no-cache") as server:
        assert asked(server) == (answer, 0)
        server.end()
    assert not prefixes(environment).exists()
    with running(environment) as server:
        asked(server, Cache_Control="no-cache")  # as clients of the hosted API send it: that is something else
        server.end()
    assert len(list(prefixes(environment).iterdir())) == 1
    with running(environment) as server:
        assert asked(server, Cache_Control="no-store") == (answer, 0), "nor is anything read"
