"""The engine's process dies under load, and the server's too: everybody is told, nothing hangs, nothing is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from raw import answers, connected, eventually, is_quiet, metric, n_files, post, state_of
from test_serve import ANSWER, ENDLESS, QUESTION, Reply, Server, children, running

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "zyx"}], "ignore_eos": True, "temperature": 2}
LOAD = [
    (ENDLESS, "/v1/getData"),
    (ENDLESS | {"stream": False}, "/v1/getData"),
    (CHAT | {"stream": True}, "/v1/chat/completions"),
    (CHAT, "/v1/chat/completions"),
    (CHAT | {"stream": True, "n": 3}, "/v1/chat/completions"),
    (CHAT | {"n": 3}, "/v1/chat/completions"),
    ({"prompt": ["a", "b"], "ignore_eos": True, "stream": True}, "/v1/completions"),
    ({"input": [[300 + i] * 1000 for i in range(100)]}, "/v1/embeddings"),
]


@pytest.fixture
def server(environment: dict[str, str]) -> Iterator[Server]:
    with running(environment, "-q") as started:
        yield started


def crowd(server: Server) -> tuple[list[threading.Thread], dict[int, Reply]]:
    """Clients with endless questions, each in a thread of its own, and the answers that they get."""
    got: dict[int, Reply] = {}

    def ask(i: int) -> None:
        body, path = LOAD[i]
        with connected(server) as client:
            client.sendall(post(body, f"X-Request-Id: client-{i}", path=path))
            (got[i],) = answers(whole_answer(client))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(LOAD))]
    for thread in threads:
        thread.start()
    return threads, got


def whole_answer(client: socket.socket) -> bytes:
    """A stream must end with its connection. The connection of another answer may stay open."""
    received = b""
    while part := client.recv(1 << 16):
        received += part
        if b"text/event-stream" not in received and received.endswith(b"}"):
            break
    return received


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_all_who_wait_are_told_and_the_service_comes_back_by_itself(number: signal.Signals, server: Server) -> None:
    assert server.post({"prompt": "hi", "max_tokens": 1}).status == 200
    (child,) = children(server.process.pid)
    before = n_files(server.process.pid)
    threads, got = crowd(server)
    eventually(lambda: metric(server, "slots_busy") == 4 and metric(server, "decode_tokens_total") > 100)
    os.kill(child, number)
    eventually(lambda: server.request("GET", "/ready").status == 503)
    refused = server.post({"prompt": "hi"})
    assert refused.status == 503 and int(refused.headers["retry-after"]) >= 1
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "nothing hangs"
    assert sorted(got) == list(range(len(LOAD)))
    for i, reply in got.items():
        assert reply.headers["x-trace-id"] == f"client-{i}"
        assert "[DONE]" not in reply.text
        error = json.loads(reply.events[-1]) if reply.status == 200 else reply.json
        if "error" in error:
            assert error["error"]["type"] == "server_error" and number.name in error["error"]["message"]
        else:
            assert (error["code"], error["traceId"]) == (503, f"client-{i}") and number.name in error["message"]
        assert reply.status == 200 or int(reply.headers["retry-after"]) >= 1
    assert {reply.status for reply in got.values()} == {200, 503}, "those that had begun to stream, and the others"
    eventually(lambda: server.request("GET", "/ready").status == 200)
    assert server.post({"prompt": QUESTION, "temperature": 0}).json["response"] == ANSWER
    (successor,) = children(server.process.pid)
    assert successor != child and state_of(successor) in ("S", "R") and state_of(child) == ""
    assert is_quiet(server) and metric(server, "engine_restarts_total") == 1
    eventually(lambda: n_files(server.process.pid) <= before)


def test_what_happens_to_the_engine_is_in_the_log_as_everything_else(environment: dict[str, str]) -> None:
    with running(environment) as server:
        (child,) = children(server.process.pid)
        os.kill(child, signal.SIGKILL)
        eventually(lambda: server.request("GET", "/ready").status == 503)
        eventually(lambda: server.request("GET", "/ready").status == 200)
        lines = server.end()
    assert any(line["event"] == "error" and "signal SIGKILL" in line["message"] for line in lines)


def test_the_engine_does_not_outlive_a_server_that_is_killed(server: Server) -> None:
    (child,) = children(server.process.pid)
    with connected(server) as client:
        client.sendall(post(ENDLESS))
        client.recv(100)
        server.process.kill()
        server.process.wait()
        eventually(lambda: state_of(child) in ("", "Z"), 3)
    assert not Path(f"/proc/{child}/exe").exists()
