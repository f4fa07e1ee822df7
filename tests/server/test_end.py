"""How the server ends while it still has something to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from conftest import PROGRAM
from test_serve import ENDLESS, Reply, begun, running, started, wait_for


def test_an_answer_that_outlasts_the_grace_period_ends_with_an_error(environment: dict[str, str]) -> None:
    with running(environment, "--grace", "0.1") as ending, begun(ending) as connection:
        ending.process.send_signal(signal.SIGTERM)
        received = b""
        while part := connection.recv(65536):
            received += part
        assert ending.process.wait(20) == 0
    assert b"[DONE]" not in received
    error = json.loads(received.rpartition(b"data: ")[2].partition(b"\n")[0])
    assert error["code"] == 503 and "went down" in error["message"]


def test_a_second_signal_stops_at_once_and_says_so_to_who_waits(environment: dict[str, str]) -> None:
    replies: list[Reply] = []
    with running(environment, "--grace", "60") as ending:
        asked = threading.Thread(target=lambda: replies.append(ending.post(ENDLESS | {"stream": False})))
        asked.start()
        wait_for(lambda: "llamacli_slots_busy 1" in ending.request("GET", "/metrics").text)
        ending.process.send_signal(signal.SIGINT)
        wait_for(lambda: ending.request("GET", "/ready").status == 503)
        ending.process.send_signal(signal.SIGINT)
        assert ending.process.wait(20) == 0
        asked.join(10)
    (reply,) = replies
    assert reply.status == 503 and int(reply.headers["retry-after"]) > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_idle_server_ends_at_once(environment: dict[str, str], number: signal.Signals, tmp_path: Path) -> None:
    ready_file = tmp_path / "ready.json"
    with running(environment, "--ready-file", str(ready_file)) as ending:
        wait_for(ready_file.exists)
        ending.process.send_signal(number)
        assert ending.process.wait(20) == 0
    assert not ready_file.exists()


def test_a_terminal_that_closes_twice_lets_answers_finish(environment: dict[str, str]) -> None:
    with running(environment) as ending, begun(ending) as connection:
        for _ in range(2):
            ending.process.send_signal(signal.SIGHUP)
            wait_for(lambda: ending.request("GET", "/ready").status == 503)
        received = b""
        while part := connection.recv(65536):
            received += part
        assert b"data: [DONE]" in received
        assert ending.process.wait(20) == 0


def test_under_nohup_a_server_stays_when_the_terminal_goes(environment: dict[str, str]) -> None:
    nohup = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh"]
    with started([*nohup, *PROGRAM, "serve", "--port", "0"], environment) as staying:
        staying.process.send_signal(signal.SIGHUP)
        assert staying.post({"prompt": "hi", "max_tokens": 1}).status == 200
        staying.end()


def test_a_server_may_end_with_the_program_that_holds_its_stdin(environment: dict[str, str]) -> None:
    """In order, as with a signal: what is being written is finished. What comes through the pipe means nothing."""
    ours, theirs = os.pipe()
    try:
        with running(environment, "--until-eof", "--grace", "0.1", stdin=ours) as ending, begun(ending) as connection:
            os.write(theirs, b"anything\n")
            assert ending.request("GET", "/ready").status == 200
            os.close(theirs)
            received = b""
            while part := connection.recv(65536):
                received += part
            assert ending.process.wait(20) == 0
    finally:
        os.close(ours)
    assert json.loads(received.rpartition(b"data: ")[2].partition(b"\n")[0])["code"] == 503


def test_a_server_whose_stdin_ends_before_its_model_is_loaded_ends(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [*PROGRAM, "serve", "-m", "tiny", "--port", "0", "--until-eof"],
        env=environment,
        input=b"",
        stderr=subprocess.PIPE,
        timeout=20,
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr
