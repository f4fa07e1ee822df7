"""`llamacli serve` for testing clients: the same answer every time, from a recording, from elsewhere; and faults."""

from __future__ import annotations

import json
import os
import select
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import PROGRAM, Run
from raw import eventually
from test_serve import QUESTION, Server, running

from llamacli.remote.post import MAX_BODY
from llamacli.server import recording
from llamacli.server.service import AT_ONCE_BESIDE
from llamacli.testing.api import Llama2Api

SHORT = {"prompt": QUESTION, "max_tokens": 5}
STREAMED = {**SHORT, "stream": True}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": True, "n": 2}
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/getData", SHORT),
    ("/", STREAMED),
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", {"prompt": "Llama 2 is", "max_tokens": 3, "temperature": 1}),
    ("/v1/embeddings", {"input": "a llama"}),
    ("/v1/getData", {"prompt": ""}),
]


def raw(server: Server, path: str, body: dict[str, Any], *headers: str) -> bytes:
    """Every byte that comes back, the borders of chunks among them."""
    host = urlsplit(server.url)
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(data)}", *headers]
    with socket.create_connection((host.hostname or "", host.port or 0), timeout=30) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + data)
        parts = []
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def bodies(answers: Sequence[bytes]) -> list[bytes]:
    return [answer.partition(b"\r\n\r\n")[2] for answer in answers]


def answers_of(server: Server) -> list[bytes]:
    return [raw(server, path, body) for path, body in ASKED]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """A recording, and what its server has answered."""
    place = tmp_path_factory.mktemp("recorded")
    path = place / "talk.jsonl"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMACLI_", "HF_"))}
    environment |= {"LLAMACLI_HOME": str(place / "home"), "LLAMACLI_MODEL": "tiny", "LLAMACLI_THREADS": "1"}
    with running(environment, "--deterministic", "--record", str(path)) as server:
        answers = answers_of(server)
        server.end()
    return path, answers


@pytest.fixture(scope="module")
def replaying(recorded: tuple[Path, list[bytes]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    environment = dict(os.environ) | {"LLAMACLI_HOME": str(tmp_path_factory.mktemp("home"))}
    with running(environment, "--replay", str(recorded[0]), "--allow-simulation") as server:
        yield server


# -- the same bytes ----------------------------------------------------------------------------------------------


def test_a_fresh_server_gives_the_same_bytes_again_whatever_was_asked_beside(
    recorded: tuple[Path, list[bytes]], environment: dict[str, str]
) -> None:
    with running(environment, "--deterministic") as server:
        server.request("GET", "/ready")  # somebody looks, and it does not show
        assert answers_of(server) == recorded[1]
        assert server.request("GET", "/v1/models").json["data"][0]["created"] == 1_700_000_000
        home = Path(environment["LLAMACLI_HOME"])
        assert not list(home.rglob("*.sock")), "no place for a user's own questions"


def test_a_recording_replays_identically_from_another_server(
    recorded: tuple[Path, list[bytes]], replaying: Server
) -> None:
    assert bodies(answers_of(replaying)) == bodies(recorded[1])
    assert replaying.post(SHORT).headers["x-trace-id"] == replaying.post(SHORT).json["traceId"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at /proc")
def test_replay_loads_no_model_and_nothing_native_of_it(replaying: Server) -> None:
    replaying.post(SHORT)
    place = Path(f"/proc/{replaying.process.pid}")
    assert not {name for name in ("libllama", "libggml") if name in (place / "maps").read_text()}
    assert not (place / "task" / str(replaying.process.pid) / "children").read_text(), "no engine's process"


def test_the_order_of_keys_white_space_and_defaults_do_not_matter(replaying: Server) -> None:
    other = (
        b'{ "max_tokens":5.0, "stream": false,\n"temperature": 0, "system": null, "prompt": "Tell me about llama2" }'
    )
    assert replaying.post(other, "/llama-2/v1/getData").text == replaying.post(SHORT).text


def test_the_caller_s_own_trace_id_is_in_a_replayed_answer(replaying: Server) -> None:
    reply = replaying.post(SHORT, x_request_id="mine")
    assert reply.json["traceId"] == reply.headers["x-trace-id"] == "mine"


def test_what_was_not_recorded_names_the_nearest_line(replaying: Server) -> None:
    reply = replaying.post({"prompt": QUESTION + "?", "max_tokens": 5})
    said = "not recorded: no request in talk.jsonl matches; the nearest is line 2, which differs in prompt"
    assert (reply.status, reply.json["message"]) == (404, f"{said} (from character 21 on)")
    chat = replaying.post({"messages": [{"role": "user", "content": "other"}]}, "/v1/chat/completions")
    assert (chat.status, chat.json["error"]["code"]) == (404, "not_recorded")


def test_what_is_nested_deeply_was_not_recorded_either(replaying: Server) -> None:
    for depth in (90, 600):
        deep = b'{"prompt": "hi", "x": ' + b"[" * depth + b"]" * depth + b"}"
        assert replaying.post(deep).json["message"].startswith("not recorded: ")


def test_a_request_that_no_server_would_answer_is_told_so_in_replay_too(replaying: Server) -> None:
    assert "temperature must be a number" in replaying.post({"prompt": "hi", "temperature": "1"}).json["message"]
    assert replaying.post(b"{").status == 400


def test_what_is_asked_again_gets_the_next_recorded_answer_and_the_last_one_stays(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    path = recording_of(tmp_path, ("hi", 429, '{"code": 429}'), ("hi", 200, "first"), ("hi", 200, "second"))
    with running(environment, "--replay", str(path)) as server:
        assert [server.post({"prompt": "hi"}).text for _ in range(4)] == ['{"code": 429}', "first", "second", "second"]
        server.end()
    with running(environment, "--replay", str(path), "--match-on", "prompt") as server:
        assert server.post({"prompt": "hi", "seed": 3}).status == 429
        assert server.request("GET", "/v1/models").json["data"][0]["id"] == "recorded"


def test_what_a_recorded_request_calls_its_model_is_not_told_to_everybody(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    path = tmp_path / "named.jsonl"
    asked = {"path": "/v1/completions", "json": {"model": "m1", "prompt": "hi"}}
    lines = [
        {"format": "llamacli-recording", "version": 1, "model": "recorded"},
        {"request": asked, "response": {"status": 200, "text": "yes"}},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with running(environment, "--replay", str(path)) as server:
        described = server.request("GET", "/openapi.json").json
        assert described["info"]["summary"].startswith(f"{server.request('GET', '/v1/models').json['data'][0]['id']}, ")
        assert "m1" not in json.dumps(described)


def recording_of(place: Path, *said: tuple[str, int, str]) -> Path:
    path = place / "said.jsonl"
    lines = [{"format": "llamacli-recording", "version": 1}]
    for prompt, status, text in said:
        request = {"path": "/v1/getData", "json": {"prompt": prompt}}
        lines.append({"request": request, "response": {"status": status, "text": text, "after": 0.2}})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_model_answers_what_was_not_recorded_if_it_is_asked_to(tmp_path: Path, environment: dict[str, str]) -> None:
    path = recording_of(tmp_path, ("hi", 200, "recorded"))
    options = ["--replay", str(path), "--replay-or-run", "--record", str(path), "--deterministic"]
    with running(environment, *options) as server:
        assert server.post({"prompt": "hi"}).text == "recorded"
        run = server.post(SHORT)
        assert run.json["usage"]["completion_tokens"] == 5
        assert [line.get("source") for line in server.end()] == ["said.jsonl, line 2", None]
    assert [entry.body for entry in recording.read(path).entries] == [b'{"prompt":"hi"}', compact(SHORT)]


def compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def test_replay_takes_its_time_on_request(tmp_path: Path, environment: dict[str, str]) -> None:
    path = recording_of(tmp_path, ("hi", 200, "slow"))
    with running(environment, "--replay", str(path), "--replay-timing") as server:
        started = time.monotonic()
        assert server.post({"prompt": "hi"}).text == "slow"
        assert time.monotonic() - started >= 0.2


def test_keys_are_asked_for_in_replay_too(tmp_path: Path, environment: dict[str, str]) -> None:
    path = recording_of(tmp_path, ("hi", 200, "yes"))
    with running(environment | {"LLAMACLI_API_KEY": "right"}, "--replay", str(path)) as server:
        assert server.post({"prompt": "hi"}).status == 401
        assert server.post({"prompt": "hi"}, Ocp_Apim_Subscription_Key="right").text == "yes"
        lines = server.end()
    assert [(line["status"], line.get("key")) for line in lines] == [(401, None), (200, "command line")]


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_that_has_no_body_is_given_none(status: int, tmp_path: Path, environment: dict[str, str]) -> None:
    """Its client would take the bytes for the answer to its next request."""
    path = recording_of(tmp_path, ("hi", status, "a body"))
    with running(environment, "--replay", str(path)) as server:
        answer = raw(server, "/v1/getData", {"prompt": "hi"}).lower()
    assert answer.startswith(b"http/1.1 %d " % status) and answer.endswith(b"\r\n\r\n")
    assert status == 304 or b"content-length" not in answer


# -- upstream ----------------------------------------------------------------------------------------------------


def test_the_hosted_api_is_recorded_without_its_keys(tmp_path: Path, environment: dict[str, str]) -> None:
    path, key = tmp_path / "hosted.jsonl", "upstream-subscription-key"
    with running(environment | {"LLAMACLI_API_KEY": key}, "--deterministic") as hosted:
        with running(environment, "--upstream", hosted.url, "--record", str(path)) as server:
            sent = {"Ocp_Apim_Subscription_Key": key}
            told = server.post({"prompt": f"say {key}", "max_tokens": 2}, **sent)
            streamed = [
                server.post(STREAMED, **sent),
                server.post(CHAT, "/v1/chat/completions", authorization=f"Bearer {key}"),
            ]
            by_query = server.post(SHORT, f"/v1/getData?subscription-key={key}")
            refused = server.post(SHORT, Ocp_Apim_Subscription_Key="not-the-right-key")
            assert [told.status, by_query.status, refused.status] == [200, 200, 401]
            assert all(reply.events[-1] == "[DONE]" for reply in streamed)
            assert refused.headers["x-trace-id"] == refused.json["traceId"]
            assert {line["source"] for line in server.end()} == {"upstream"}
        hosted.end()
        text = path.read_text()
        assert key not in text and "not-the-right-key" not in text
    with running(environment, "--replay", str(path)) as server:
        replies = [server.post(STREAMED), server.post(CHAT, "/v1/chat/completions")]
        assert [reply.text for reply in replies] == [reply.text for reply in streamed]
        assert [server.post(SHORT).status for _ in range(2)] == [200, 401]


def test_an_upstream_that_is_down_is_502_and_the_recording_stays_valid(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    path = tmp_path / "down.jsonl"
    with running(environment, "--upstream", "http://127.0.0.1:9", "--record", str(path)) as server:
        reply = server.post(SHORT)
        assert (reply.status, set(reply.json)) == (502, {"code", "message", "traceId"})
        assert server.post({"prompt": "hi"}, "/v1/completions").json["error"]["code"] == "bad_gateway"
    assert recording.read(path).entries == ()


def test_an_upstream_that_breaks_off_is_not_recorded(tmp_path: Path, environment: dict[str, str]) -> None:
    path = tmp_path / "broken.jsonl"
    with broken_upstream() as url, running(environment, "--upstream", url, "--record", str(path)) as server:
        reply = server.post(STREAMED)
        first, error = reply.events
        assert json.loads(first) == {"response": "L"}
        assert (json.loads(error)["code"], "broke off" in error) == (502, True)
        server.end()
    assert recording.read(path).entries == ()


@contextmanager
def broken_upstream() -> Iterator[str]:
    """A server that hangs up in the middle of its stream."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def speak() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                event = b'data: {"response": "L"}\n\n'
                connection.sendall(head + b"%x\r\n%s\r\n" % (len(event), event))

        thread = Thread(target=speak)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


@contextmanager
def silent_upstream() -> Iterator[tuple[str, socket.socket]]:
    """A server that hears and says nothing. Its connections are to be taken by the test."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        listener.settimeout(30)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", listener


def asking(server: Server) -> socket.socket:
    """A client that has asked and can go away."""
    host = urlsplit(server.url)
    client = socket.create_connection((host.hostname or "", host.port or 0), timeout=30)
    client.sendall(b'POST /v1/getData HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\n\r\n{"prompt":"hi"}')
    return client


def test_who_goes_away_hangs_up_upstream_too(environment: dict[str, str]) -> None:
    with silent_upstream() as (url, listener), running(environment, "--upstream", url) as server:
        client = asking(server)
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(30)
            assert connection.recv(1 << 16)
            client.close()
            while connection.recv(1 << 16):
                pass  # what was on its way; then the end, long before --remote-timeout


def test_what_an_upstream_is_still_asked_is_counted_when_the_server_goes_down(environment: dict[str, str]) -> None:
    with silent_upstream() as (url, listener), running(environment, "--upstream", url, "--grace", "0.2") as server:
        with asking(server), listener.accept()[0]:
            lines = [line["message"] for line in server.end() if line["event"] == "draining"]
        assert [line.split(";")[0] for line in lines] == ["finishing 1 answers", "1 answers were not finished in time"]


def test_no_more_wait_for_an_upstream_than_it_can_be_asked_for_and_the_queue_holds(environment: dict[str, str]) -> None:
    with silent_upstream() as (url, listener), running(environment, "--upstream", url, "--queue", "1") as server:
        with ExitStack() as open_ones:
            for _ in range(AT_ONCE_BESIDE):
                open_ones.enter_context(asking(server))
                open_ones.enter_context(listener.accept()[0])
            one_too_many = [open_ones.enter_context(asking(server)) for _ in range(2)]
            (refused,), _, _ = select.select(one_too_many, [], [], 30)
            assert refused.recv(1 << 16).startswith(b"HTTP/1.1 429 ")


def test_an_upstream_that_never_comes_to_its_end_is_no_answer(environment: dict[str, str]) -> None:
    with silent_upstream() as (url, listener), running(environment, "--upstream", url) as server:

        def flood() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n")
                for _ in range(2 * MAX_BODY >> 20):
                    connection.sendall(bytes(1 << 20))

        thread = Thread(target=flood)
        thread.start()
        reply = server.post(SHORT)
        thread.join()
        assert (reply.status, "more than 64 MiB" in reply.json["message"]) == (502, True)


def test_a_key_of_this_server_never_goes_upstream(tmp_path: Path, environment: dict[str, str]) -> None:
    with running(environment | {"LLAMACLI_API_KEY": "theirs"}) as hosted:
        ours = environment | {"LLAMACLI_API_KEY": "ours", "LLAMACLI_UPSTREAM_KEY": "theirs"}
        with running(ours, "--upstream", hosted.url) as server:
            assert server.post(SHORT, Ocp_Apim_Subscription_Key="ours").status == 200
        with running(environment | {"LLAMACLI_API_KEY": "theirs"}, "--upstream", hosted.url) as server:
            refused = server.post(SHORT, Ocp_Apim_Subscription_Key="theirs")
            assert (refused.status, "is missing" in refused.json["message"]) == (401, True)


# -- faults ------------------------------------------------------------------------------------------------------


def faulty(server: Server, fault: str, path: str = "/v1/getData", **body: Any) -> tuple[bytes, bytes]:
    """Head and body of an answer to which something has happened."""
    head, _, rest = raw(server, path, {**SHORT, **body}, f"X-Simulate: {fault}").partition(b"\r\n\r\n")
    return head, rest


def test_an_error_on_demand_has_its_api_s_shape_and_says_that_it_is_simulated(replaying: Server) -> None:
    reply = replaying.post(SHORT, X_Simulate="status=429, retry-after=2")
    assert (reply.status, reply.headers["retry-after"]) == (429, "2")
    assert reply.headers["x-simulated"] == "status=429, retry-after=2"
    assert (reply.json["code"], set(reply.json)) == (429, {"code", "message", "traceId"})
    other = replaying.post(CHAT, "/v1/chat/completions", X_Simulate="status=529")
    assert (other.status, set(other.json["error"])) == (529, {"message", "type", "param", "code"})


def test_half_a_body_another_type_and_slow_bytes(replaying: Server) -> None:
    whole = replaying.post(SHORT).text.encode()
    assert faulty(replaying, "malformed")[1] == whole[: len(whole) // 2]
    head, body = faulty(replaying, "content-type=text/html")
    assert b"content-type: text/html" in head and body == whole
    started = time.monotonic()
    assert faulty(replaying, "slow-bytes=1000")[1] == whole
    assert time.monotonic() - started > 0.1


def test_a_stream_is_cut_after_so_many_events_with_nothing_that_looks_like_an_end(replaying: Server) -> None:
    _, body = faulty(replaying, "cut-after=2", stream=True)
    assert body.count(b"data: ") == 2 and not body.endswith(b"0\r\n\r\n")
    head, body = faulty(replaying, "cut-after=0", stream=True)
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and body == b""
    _, body = faulty(replaying, "malformed", stream=True)
    first, *_ = (line for line in body.split(b"\r\n") if line.startswith(b"data: "))
    with pytest.raises(ValueError):
        json.loads(first.removeprefix(b"data: "))


def test_a_connection_is_reset_at_once_or_in_a_stream(replaying: Server) -> None:
    with pytest.raises(ConnectionResetError):
        faulty(replaying, "reset")
    with pytest.raises(ConnectionResetError):
        faulty(replaying, "reset, cut-after=1", stream=True)


def test_delays_come_before_an_answer_and_between_its_events(replaying: Server) -> None:
    started = time.monotonic()
    faulty(replaying, "delay=0.1")
    before = time.monotonic()
    faulty(replaying, "token-rate=20", stream=True)
    assert before - started >= 0.1 and time.monotonic() - before >= 0.1


def test_an_unknown_fault_lists_those_that_are_known(replaying: Server) -> None:
    reply = replaying.post(SHORT, X_Simulate="stattus=429")
    assert reply.status == 400
    assert "'stattus' is unknown; known are status, retry-after, delay" in reply.json["message"]


def test_a_model_s_answer_is_cut_too_and_its_computing_stops(tmp_path: Path, environment: dict[str, str]) -> None:
    path = tmp_path / "faults.jsonl"
    with running(environment, "--allow-simulation", "--record", str(path)) as server:
        _, body = faulty(server, "cut-after=3", ignore_eos=True, max_tokens=900, stream=True)
        assert body.count(b"data: ") == 3
        server.post(SHORT)
        log = [line for line in server.end() if line["event"] == "request"]
    assert [(line["status"], line.get("simulated")) for line in log] == [(200, "cut-after=3"), (200, None)]
    assert log[0]["completion_tokens"] < 800
    assert len(recording.read(path).entries) == 1, "what was simulated is no answer"


def test_without_permission_the_header_means_nothing(tmp_path: Path, environment: dict[str, str]) -> None:
    path = recording_of(tmp_path, ("hi", 200, "yes"))
    with running(environment, "--replay", str(path)) as server:
        reply = server.post({"prompt": "hi"}, X_Simulate="status=500")
        assert reply.text == "yes" and "x-simulated" not in reply.headers
        assert server.request("GET", "/simulation/requests").status == 404


def test_rules_of_a_file_hit_the_clients_and_not_those_who_watch(tmp_path: Path, environment: dict[str, str]) -> None:
    path = recording_of(tmp_path, ("hi", 200, "yes"))
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nsimulate = "status=503, retry-after=1"\nnth = 2\n')
    with running(environment, "--replay", str(path), "--allow-simulation", "--simulate", str(rules)) as server:
        assert server.request("GET", "/health").status == 200
        assert [server.post({"prompt": "hi"}).status for _ in range(3)] == [200, 503, 200]
        assert server.request("DELETE", "/simulation").status == 200
        assert [server.post({"prompt": "hi"}).status for _ in range(2)] == [200, 503], "as at the start"


def test_faults_and_replies_are_for_those_with_a_key(tmp_path: Path, environment: dict[str, str]) -> None:
    path = recording_of(tmp_path)
    with running(environment | {"LLAMACLI_API_KEY": "k"}, "--replay", str(path), "--allow-simulation") as server:
        assert server.request("DELETE", "/simulation").status == 401
        bad = server.request("POST", "/simulation/replies", {"txt": "hi"}, Ocp_Apim_Subscription_Key="k")
        assert (bad.status, "'txt' is unknown in a reply; known are text" in bad.json["message"]) == (400, True)


# -- for any language --------------------------------------------------------------------------------------------


def test_a_ready_file_says_where_and_with_which_key_and_goes_with_the_server(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    ready = tmp_path / "ready.json"
    ready.write_text("left by another")
    path = recording_of(tmp_path, ("hi", 200, "yes"))
    keyed = environment | {"LLAMACLI_API_KEY": "k"}
    command = [*PROGRAM, "serve", "--port", "0", "--ready-file", str(ready), "--replay", str(path), "-q"]
    with subprocess.Popen(command, env=keyed, stderr=subprocess.DEVNULL) as process:
        try:
            while not ready.exists() or not ready.read_text().startswith("{"):
                assert process.poll() is None
                time.sleep(0.01)
            told = json.loads(ready.read_text())
            assert (told["key"], told["model"], told["pid"]) == ("k", "recorded", process.pid)
            assert stat.S_IMODE(ready.stat().st_mode) == 0o600, "it holds a key"
            server = Server(process, told["url"])  # type: ignore[arg-type]
            assert server.post({"prompt": "hi"}, Ocp_Apim_Subscription_Key=told["key"]).text == "yes"
        finally:
            process.terminate()
    assert not [path.name for path in tmp_path.iterdir() if "ready" in path.name]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--replay", "{broken}"], "broken.jsonl, line 2: it breaks off in the middle"),
        (["--replay", "nowhere.jsonl"], "the recording nowhere.jsonl cannot be read: No such file"),
        (["--record", "{broken}"], "broken.jsonl, line 2: it breaks off"),
        (["--simulate", "rules.toml"], "--simulate needs --allow-simulation"),
        (["--replay-or-run"], "--replay-or-run needs --replay"),
        (["--replay", "{broken}", "--record", "x"], "--record beside --replay needs --replay-or-run or --upstream"),
        (["--upstream", "ftp://x"], "--upstream must be an address like"),
        (["--upstream", "http://me:pw@x"], "give the key as LLAMACLI_UPSTREAM_KEY"),
        (["--ready-file", "{place}/no/ready.json"], "no/ready.json cannot be written: No such file"),
        (["--until-eof"], "--until-eof needs a pipe or a socket on standard input"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_two(
    options: list[str], said: str, tmp_path: Path, llamacli: Run
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"format": "llamacli-recording", "version": 1}\n{"request": {"pa')
    given = [option.format(broken=broken, place=tmp_path) for option in options]
    done = llamacli("serve", "--port", "0", *given)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert said in done.stderr


# -- the fixture -------------------------------------------------------------------------------------------------


def test_the_plugin_imports_nothing_until_the_fixture_is_used() -> None:
    code = "import pytest, sys; old = set(sys.modules); import llamacli.testing.plugin; print(*set(sys.modules) - old)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert set(done.stdout.split()) == {"llamacli", "llamacli.testing", "llamacli.testing.plugin"}


HELD = """
import sys, time
from pathlib import Path
from llamacli.testing.process import running
place = Path(sys.argv[1])
with running("none", place, place) as api:
    print(api.url, flush=True)
    time.sleep(600)
"""


def test_a_killed_pytest_takes_its_server_along(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HELD, str(tmp_path)], stdout=subprocess.PIPE, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("http://")
        pid = int(json.loads((tmp_path / "ready.json").read_text())["pid"])
        process.kill()
    eventually(lambda: not Path(f"/proc/{pid}").exists())


def test_the_tiny_model_answers_behind_the_fixture(llama2_api: Llama2Api) -> None:
    first = ask(llama2_api, SHORT)
    llama2_api.reply("a canned answer", times=1)
    assert [ask(llama2_api, SHORT)["response"] for _ in range(2)] == ["a canned answer", first["response"]]
    assert [sent.json for sent in llama2_api.requests] == [SHORT] * 3


def test_a_test_finds_nothing_of_the_one_before(llama2_api: Llama2Api) -> None:
    assert llama2_api.requests == []
    assert ask(llama2_api, SHORT)["traceId"].endswith("-000000000001")


def test_a_test_may_bring_its_own_recording(tmp_path: Path, llama2_api: Llama2Api) -> None:
    llama2_api.replay(recording_of(tmp_path, ("hi", 200, '{"response": "recorded"}')))
    assert ask(llama2_api, {"prompt": "hi"})["response"] == "recorded"
    assert ask(llama2_api, SHORT)["usage"]["completion_tokens"] == 5, "the model knows the rest"
    (tmp_path / "said.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="line 1: this is no recording"):
        llama2_api.replay(tmp_path / "said.jsonl")


def test_a_reply_speaks_for_any_model(llama2_api: Llama2Api) -> None:
    llama2_api.reply("yes")
    body = {"model": "their-model", "messages": [{"role": "user", "content": "hi"}]}
    said = ask(llama2_api, body, "/v1/chat/completions")
    assert (said["model"], said["choices"][0]["message"]["content"]) == ("their-model", "yes")


def test_what_makes_no_sense_is_told_where_the_test_says_it(llama2_api: Llama2Api) -> None:
    with pytest.raises(ValueError, match="a reply needs one of text"):
        llama2_api.reply()
    with pytest.raises(ValueError, match="status must be an integer between 400 and 599"):
        llama2_api.simulate(status=42)


def ask(api: Llama2Api, body: dict[str, Any], path: str = "/v1/getData") -> Any:
    server = Server(None, api.url)  # type: ignore[arg-type]
    return server.post(body, path, Ocp_Apim_Subscription_Key=api.key).json
