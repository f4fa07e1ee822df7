"""Clients that go away, at any moment and in any manner, and clients that stay and do not read: neither may cost."""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from raw import answers, connected, eventually, get, is_quiet, metric, n_files, post, resident, until_closed
from test_serve import ANSWER, ENDLESS, QUESTION, Server, children, running

GREEDY = {"prompt": QUESTION, "temperature": 0}
MANY = 16 * 1000  # tokens: seconds of work for the tiny model
# As many prompts as may be sent at once, of which none shares its beginning with another.
LONG_PROMPTS = {"prompt": [[1, 300 + i] + [1000 + i] * 998 for i in range(16)], "max_tokens": 1}
LONG_ANSWERS = {"prompt": "zyx", "n": 16, "temperature": 2, "top_k": 0, "top_p": 1, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    import os

    ours = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMACLI_", "HF_"))}
    ours |= {"LLAMACLI_HOME": str(tmp_path_factory.mktemp("home")), "LLAMACLI_MODEL": "tiny", "LLAMACLI_THREADS": "1"}
    with running(ours, "--reading-timeout", "2") as started:
        yield started


def hang_up(client: socket.socket, manner: str) -> None:
    """In order, or with a reset as a process that is killed with data unread does."""
    if manner == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def n_refused_or_gone(server: Server) -> int:
    text = server.request("GET", "/metrics").text
    return sum(int(float(line.split()[-1])) for line in text.splitlines() if 'status="499"' in line)


@pytest.mark.parametrize("manner", ["close", "reset"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_who_leaves_while_its_prompt_is_read_stops_costing(stream: bool, manner: str, server: Server) -> None:
    before = metric(server, "prefill_tokens_total")
    client = connected(server)
    client.sendall(post(LONG_PROMPTS | {"stream": stream}, path="/v1/completions"))
    eventually(lambda: metric(server, "slots_busy") > 0)
    hang_up(client, manner)
    eventually(lambda: is_quiet(server))
    computed = metric(server, "prefill_tokens_total") - before
    assert computed < 0.7 * MANY
    time.sleep(0.1)
    assert metric(server, "prefill_tokens_total") - before == computed


@pytest.mark.parametrize("manner", ["close", "reset"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_who_leaves_while_its_answer_is_written_stops_costing(stream: bool, manner: str, server: Server) -> None:
    before = metric(server, "decode_tokens_total")
    client = connected(server)
    client.sendall(post(LONG_ANSWERS | {"stream": stream}, path="/v1/completions"))
    eventually(lambda: metric(server, "decode_tokens_total") - before > 20)
    hang_up(client, manner)
    eventually(lambda: is_quiet(server))
    computed = metric(server, "decode_tokens_total") - before
    assert computed < 0.7 * MANY
    time.sleep(0.1)
    assert metric(server, "decode_tokens_total") - before == computed


@pytest.mark.parametrize("manner", ["close", "reset"])
def test_who_leaves_with_more_requests_in_the_pipe_stops_costing(manner: str, server: Server) -> None:
    """The server does not read on while an answer is written, and must hear of it all the same."""
    before = metric(server, "decode_tokens_total")
    client = connected(server)
    asked = post(LONG_ANSWERS, path="/v1/completions")
    client.sendall(asked * 3 + get("/health") * 100)
    eventually(lambda: metric(server, "decode_tokens_total") - before > 20)
    hang_up(client, manner)
    eventually(lambda: is_quiet(server))
    time.sleep(0.1)
    assert is_quiet(server), "nobody has asked the next question in the pipe"
    assert metric(server, "decode_tokens_total") - before < 0.7 * MANY


def test_who_leaves_the_queue_is_charged_for_nothing(server: Server) -> None:
    before = metric(server, "prompt_tokens_total")
    with connected(server) as busy:
        busy.sendall(post(LONG_ANSWERS | {"stream": True}, path="/v1/completions"))
        eventually(lambda: metric(server, "queue_depth") == 12)  # beside four that are computed
        waiting = connected(server)
        waiting.sendall(post({"prompt": "one of many words " * 50}, path="/v1/completions"))
        eventually(lambda: metric(server, "queue_depth") == 13)
        n_gone = n_refused_or_gone(server)
        waiting.close()
        eventually(lambda: n_refused_or_gone(server) == n_gone + 1)
        assert metric(server, "prompt_tokens_total") == before
    eventually(lambda: is_quiet(server))
    eventually(lambda: metric(server, "prompt_tokens_total") > before)  # who leaves later is


def test_an_old_client_that_leaves_is_noticed_too(server: Server) -> None:
    """HTTP/1.0 knows no interim answers that could be sent to see whether somebody is there."""
    before = metric(server, "decode_tokens_total")
    with connected(server) as client:
        client.sendall(post(LONG_ANSWERS, path="/v1/completions", version="1.0"))
        eventually(lambda: metric(server, "decode_tokens_total") - before > 20)
    eventually(lambda: is_quiet(server))
    assert metric(server, "decode_tokens_total") - before < 0.7 * MANY


def test_a_thousand_clients_that_vanish_at_any_moment_leave_nothing_behind(server: Server) -> None:
    (child,) = children(server.process.pid)
    chance = random.Random(4)
    requests = [
        post(ENDLESS),
        post(GREEDY),
        post(LONG_PROMPTS, path="/v1/completions"),
        post({"messages": [{"role": "user", "content": "hi"}], "stream": True, "n": 2}, path="/v1/chat/completions"),
        post({"input": ["some text"] * 20}, path="/v1/embeddings"),
        get("/metrics") * 5,
        post(GREEDY) * 3,
    ]
    eventually(lambda: is_quiet(server))
    before = n_files(server.process.pid), n_files(child)
    there: list[socket.socket] = []
    for _ in range(1000):
        client = connected(server)
        request = chance.choice(requests)
        client.sendall(request if chance.random() < 0.7 else request[: chance.randrange(len(request))])
        there.append(client)
        if len(there) > 40:
            leaving = there.pop(chance.randrange(len(there)))
            manner = chance.choice(["close", "reset", "half", "read"])
            if manner == "half":
                leaving.shutdown(socket.SHUT_WR)
            elif manner == "read":
                leaving.settimeout(0.005)
                with suppress(OSError):
                    leaving.recv(chance.randrange(1, 4000))
            hang_up(leaving, manner)
    for client in there:
        client.close()
    eventually(lambda: is_quiet(server))
    assert metric(server, "kv_cells_used") <= 4 * 1024
    eventually(lambda: n_files(server.process.pid) <= before[0] and n_files(child) <= before[1])
    assert metric(server, "engine_restarts_total") == 0
    assert server.post(GREEDY).json["response"] == ANSWER


def test_who_does_not_read_is_paused_and_hung_up_on_while_others_go_on(server: Server) -> None:
    """With its log probabilities an answer is megabytes long: more than the system keeps for a client."""
    (child,) = children(server.process.pid)
    wanted: dict[str, Any] = {"messages": [{"role": "user", "content": "zyx"}], "logprobs": True, "top_logprobs": 20}
    asked = LONG_ANSWERS | wanted | {"stream": True, "n": 1}
    del asked["prompt"]
    eventually(lambda: is_quiet(server))
    before = n_files(server.process.pid)
    memory = resident(server.process.pid), resident(child)
    gone = n_refused_or_gone(server)
    with connected(server) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(post(asked, path="/v1/chat/completions"))
        slow.recv(100)
        # It is paused, and its slot is free.
        eventually(lambda: metric(server, "slots_busy") == 0 and metric(server, "queue_depth") > 0)
        assert n_refused_or_gone(server) == gone
        for _ in range(3):
            assert server.post(GREEDY).json["response"] == ANSWER
        grown = resident(server.process.pid) - memory[0], resident(child) - memory[1]
        assert max(grown) < 64 << 20, grown
        eventually(lambda: is_quiet(server))
        eventually(lambda: n_files(server.process.pid) <= before)
        assert n_refused_or_gone(server) == gone + 1
        with pytest.raises(ConnectionResetError):
            until_closed(slow)


def test_answers_that_nobody_takes_are_not_kept_for_ever(server: Server) -> None:
    """Small ones too, of a client that only ever asks."""
    before = n_files(server.process.pid)
    with connected(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        flood = memoryview(get("/metrics") * 10_000)
        with suppress(BlockingIOError):
            while flood:
                flood = flood[client.send(flood) :]
        eventually(lambda: n_files(server.process.pid) <= before)
    assert server.request("GET", "/health").status == 200


def test_a_reader_that_is_slow_gets_all_of_it(server: Server) -> None:
    """However long it takes, as long as it takes something."""
    asked = {"input": [[300, i] for i in range(800)]}
    with connected(server) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        slow.sendall(post(asked, "Connection: close", path="/v1/embeddings"))
        received = bytearray(slow.recv(1 << 16))
        size = int(received.partition(b"content-length: ")[2].split()[0])
        began = time.monotonic()
        while part := slow.recv(1 << 16):
            received += part
            time.sleep(3 * len(part) / size)
        assert time.monotonic() - began > 2.5, "longer than the reading timeout"
    assert len(answers(bytes(received))[0].json["data"]) == 800
