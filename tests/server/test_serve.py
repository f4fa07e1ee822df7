"""`llamacli serve` as its clients meet it: a real process, the Llama 2 API over a real socket, the openai package."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from conftest import PROGRAM, Run, golden

QUESTION = "Tell me about llama2"
ANSWER = golden()[0].answer
PATHS = ["/v1/getData", "/llama-2/v1/getData", "/"]


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def events(self) -> list[str]:
        return [line.removeprefix("data: ") for line in self.text.split("\n\n") if line]


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    log: list[str] = field(default_factory=list)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        host = urlsplit(self.url)
        connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=30)
        raw = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, raw, {"Content-Type": "application/json"} | named)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        reply = Reply(response.status, found, response.read().decode())
        connection.close()
        return reply

    def post(self, body: Any, path: str = "/v1/getData", **headers: str) -> Reply:
        return self.request("POST", path, body, **headers)

    def end(self) -> list[dict[str, Any]]:
        """Stop it in order. Returns its log."""
        assert self.process.stderr is not None
        self.process.send_signal(signal.SIGTERM)
        lines = self.process.stderr.readlines()
        assert self.process.wait(20) == 0
        return [json.loads(line) for line in lines]


def running(environment: dict[str, str], *options: str, stdin: int | None = None) -> AbstractContextManager[Server]:
    return started([*PROGRAM, "serve", "--port", "0", *options], environment, stdin)


@contextmanager
def started(command: list[str], environment: dict[str, str], stdin: int | None = None) -> Iterator[Server]:
    with subprocess.Popen(command, env=environment, stdin=stdin, stderr=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                event = json.loads(line)
                if event["event"] == "ready":
                    break
            else:
                raise AssertionError(f"exit code {process.wait(10)}")
            yield Server(process, event["message"].rpartition(" ")[2])
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMACLI_", "HF_"))}
    home = str(tmp_path_factory.mktemp("home"))
    with running(ours | {"LLAMACLI_HOME": home, "LLAMACLI_MODEL": "tiny", "LLAMACLI_THREADS": "1"}) as ready:
        yield ready


def test_with_v_the_log_says_what_was_chosen_and_why(environment: dict[str, str]) -> None:
    command = [*PROGRAM, "serve", "--port", "0", "-v"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stderr is not None
        events = []
        for line in process.stderr:
            events.append(json.loads(line))
            if events[-1]["event"] == "ready":
                process.terminate()
    chosen = [event["message"] for event in events if event["event"] == "choice"]
    assert any(line.startswith("tuned = False (nothing was measured; llamacli tune -m tiny") for line in chosen)
    assert any(line.startswith("repack = True (a server loads once") for line in chosen)


def test_quiet_and_verbose_contradict_each_other(llamacli: Run) -> None:
    done = llamacli("serve", "-q", "-v")
    assert done.returncode == 2 and "contradict each other" in done.stderr


# -- the Llama 2 API ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_prompt_is_answered_at_every_address(path: str, server: Server) -> None:
    reply = server.post({"prompt": QUESTION, "temperature": 0}, path)
    assert reply.status == 200
    trace = reply.headers["x-trace-id"]
    assert reply.json == {
        "status": 200,
        "content-type": "application/json",
        "response": ANSWER,
        "model": "tiny",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 14, "completion_tokens": 79, "total_tokens": 93},
        "traceId": trace,
    }


@pytest.mark.parametrize("name", ["system prompt", "system_prompt", "system"])
def test_a_system_prompt_has_three_spellings(name: str, server: Server) -> None:
    case = next(c for c in golden() if c.messages[0].role == "system" and len(c.messages) == 2)
    system, user = (message.content for message in case.messages)
    asked = {"prompt": user, name: system, "temperature": 0, "max_tokens": 20}
    assert case.answer.startswith(server.post(asked).json["response"])


def test_a_stream_is_the_same_answer_in_pieces(server: Server) -> None:
    reply = server.post({"prompt": QUESTION, "temperature": 0, "stream": True})
    assert reply.headers["content-type"] == "text/event-stream"
    *pieces, done = reply.events
    assert done == "[DONE]"
    values = [json.loads(piece) for piece in pieces]
    assert "".join(value["response"] for value in values) == ANSWER
    assert values[-1]["finish_reason"] == "stop" and values[-1]["usage"]["completion_tokens"] == 79
    assert all("finish_reason" not in value for value in values[:-1])


def test_fields_that_mean_nothing_are_named_and_null_is_absent(server: Server) -> None:
    reply = server.post({"prompt": "hi", "max_tokens": 1, "colour": 1, "size": None, "temperature": None})
    assert reply.json["ignored"] == ["colour", "size"] and reply.json["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "body is empty"),
        (b"{", "not JSON"),
        (b"[1]", "must be a JSON object, not an array"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": NaN}', "NaN"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "hi", "seed": ' + b"9" * 5000 + b"}", "an integer of 5,000 characters"),
        ({}, "prompt is missing"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": 7}, "prompt must be a string, not 7"),
        ({"prompt": "hi", "temperature": True}, "temperature must be a number between 0 and 2, not true"),
        ({"prompt": "hi", "temperature": "1"}, 'temperature must be a number between 0 and 2, not "1"'),
        ({"prompt": "hi", "temperature": 2.1}, "between 0 and 2, not 2.1"),
        ({"prompt": "hi", "max_tokens": 0}, "max_tokens must be 1 or more"),
        ({"prompt": "hi", "max_tokens": 5.0}, "max_tokens must be an integer"),
        ({"prompt": "hi", "seed": -1}, "seed must be between 0 and 4294967294"),
        ({"prompt": "hi", "stop": [""]}, "empty string"),
        ({"prompt": "hi", "stream": 1}, "stream must be true or false"),
        ({"prompt": "hi", "system": "a", "system_prompt": "b"}, "given twice"),
        ({"prompt": "hi", "response_format": {"type": "xml"}}, "response_format.type must be"),
        ({"prompt": "hi", "response_format": {"type": "json_schema"}}, "json_schema must be an object"),
        ({"prompt": "la " * 2000}, "the context holds 1,024"),
    ],
)
def test_a_bad_request_says_what_is_wrong(body: Any, said: str, server: Server) -> None:
    reply = server.post(body)
    assert (reply.status, set(reply.json)) == (400, {"code", "message", "traceId"})
    assert reply.json["code"] == 400 and said in reply.json["message"]


def test_a_byte_order_mark_and_duplicate_keys_are_taken(server: Server) -> None:
    assert server.post(b'\xef\xbb\xbf{"prompt": 1, "prompt": "hi", "max_tokens": 1}').status == 200


def test_other_addresses_and_methods_are_told_in_the_shape_of_their_api(server: Server) -> None:
    assert set(server.request("GET", "/nowhere").json) == {"code", "message", "traceId"}
    assert server.request("GET", "/v1/nowhere").json["error"]["code"] == "not_found"
    wrong = server.request("GET", "/v1/getData")
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
    assert server.request("DELETE", "/v1/models").json["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}, "ab" * 16),
        ({"X_Request_Id": "my-id"}, "my-id"),
        ({"traceparent": f"00-{'0' * 32}-{'cd' * 8}-01", "X_Request_Id": "mine"}, "mine"),
    ],
)
def test_the_caller_s_own_trace_id_is_taken_over(headers: dict[str, str], expected: str, server: Server) -> None:
    reply = server.post({}, **headers)
    assert reply.json["traceId"] == reply.headers["x-trace-id"] == expected


def test_a_body_that_is_too_large_is_refused_chunked_or_not(environment: dict[str, str]) -> None:
    with running(environment, "--max-body", "100") as small:
        assert small.post({"prompt": "x" * 200}).status == 413
        host = urlsplit(small.url)
        connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=10)
        connection.request("POST", "/", iter([b"x" * 60, b"x" * 60]), encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()


# -- OpenAI's ----------------------------------------------------------------------------------------------------


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_the_openai_client_chats(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": QUESTION}], temperature=0, n=2, logprobs=True
    )
    assert [choice.message.content for choice in done.choices] == [ANSWER, ANSWER]
    assert done.usage is not None and (done.usage.prompt_tokens, done.usage.completion_tokens) == (14, 158)
    logprobs = done.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 79


def test_the_openai_client_streams_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ANSWER and chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 93
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"


def test_the_next_turn_of_a_conversation_reuses_the_last(client: openai.OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": QUESTION}]
    first = client.chat.completions.create(model="tiny", messages=turns, temperature=0)
    turns += [first.choices[0].message.model_dump(include={"role", "content"}), {"role": "user", "content": "Go on"}]
    second = client.chat.completions.create(model="tiny", messages=turns, temperature=0, max_tokens=3)
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) > 80


def test_the_openai_client_completes(client: openai.OpenAI) -> None:
    done = client.completions.create(
        model="tiny", prompt=["Llama 2 is", "Meta"], temperature=0, max_tokens=4, logprobs=1
    )
    assert [choice.index for choice in done.choices] == [0, 1] and all(choice.text for choice in done.choices)
    assert done.choices[0].logprobs is not None and len(done.choices[0].logprobs.tokens or []) == 4


def test_parts_of_a_character_are_told_apart_and_where_they_stand(client: openai.OpenAI) -> None:
    held = {"type": "json_schema", "json_schema": {"schema": {"enum": ["🦙 it is"]}}}
    done = client.completions.create(model="tiny", prompt="hi", logprobs=20, extra_body={"response_format": held})
    text, logprobs = done.choices[0].text, done.choices[0].logprobs
    assert json.loads(text) == "🦙 it is" and logprobs is not None
    tokens, offsets = logprobs.tokens or [], logprobs.text_offset or []
    assert [each for each in tokens if each.startswith("bytes:")] == [
        *(r"bytes:\xf0", r"bytes:\x9f", r"bytes:\xa6", r"bytes:\x99")
    ]
    after = tokens.index(r"bytes:\x99") + 1
    assert all(text[at:].startswith(token) for token, at in zip(tokens[after:], offsets[after:], strict=True))
    assert all(len(each) == 20 for each in logprobs.top_logprobs or [])


def test_as_many_answers_as_are_wanted_are_the_best_of_themselves(client: openai.OpenAI) -> None:
    done = client.completions.create(model="tiny", prompt="hi", n=2, best_of=2, max_tokens=1)
    assert len(done.choices) == 2
    for best_of in (1, 3):
        with pytest.raises(openai.BadRequestError, match="ask for n answers and choose"):
            client.completions.create(model="tiny", prompt="hi", n=2, best_of=best_of, max_tokens=1)


def test_json_objects_parse(client: openai.OpenAI) -> None:
    for seed in range(3):
        done = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Describe Llama 2"}],
            response_format={"type": "json_object"},
            temperature=1.0,
            seed=seed,
            max_tokens=300,
        )
        if done.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(done.choices[0].message.content or ""), dict)


def test_models_are_listed_and_an_unknown_one_is_not_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.completions.create(model="gpt-4", prompt="hi")


def test_what_is_not_supported_is_refused_by_name_and_what_has_no_effect_is_taken(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not supported: functions"):
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            functions=[{"name": "f"}],
        )
    done = client.completions.create(model="tiny", prompt="hi", max_tokens=1, user="me")
    assert done.choices[0].finish_reason == "length"


# -- who may call ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}])
def test_a_page_from_elsewhere_may_not_call(headers: dict[str, str], server: Server) -> None:
    reply = server.post({"prompt": "hi"}, **headers)
    assert reply.status == 403 and "access-control-allow-origin" not in reply.headers


def test_a_page_on_this_machine_may(server: Server) -> None:
    asked = server.request(
        "OPTIONS", "/v1/getData", Origin="http://localhost:3000", Access_Control_Request_Method="POST"
    )
    assert asked.status == 204 and "ocp-apim-subscription-key" in asked.headers["access-control-allow-headers"]
    assert asked.text == "" and not {"content-length", "transfer-encoding"} & asked.headers.keys()
    reply = server.post({"prompt": "hi", "max_tokens": 1}, Origin="http://localhost:3000")
    assert reply.status == 200 and reply.headers["access-control-allow-origin"] == "http://localhost:3000"


def test_keys_close_the_server_and_open_it_again(environment: dict[str, str], llamacli: Run) -> None:
    with running(environment, "-q") as closed:
        assert closed.post({"prompt": "hi", "max_tokens": 1}).status == 200
        key = llamacli("keys", "create", "--name", "me", "--rpm", "2").stdout.strip()
        wait_for(lambda: closed.post({"prompt": "hi", "max_tokens": 1}).status == 401)
        refused = closed.post({"prompt": "hi"}, Ocp_Apim_Subscription_Key="wrong")
        assert refused.status == 401 and set(refused.json) == {"code", "message", "traceId"}
        asked = {"prompt": "hi", "max_tokens": 1}
        assert closed.post(asked, Ocp_Apim_Subscription_Key=key).status == 200
        assert closed.post(asked, Authorization=f"Bearer {key}").status == 200
        third = closed.post(asked, f"/v1/getData?subscription-key={key}")
        assert third.status == 429 and int(third.headers["retry-after"]) > 0
        assert closed.request("GET", "/health").status == 200
        llamacli("keys", "revoke", "me")
        wait_for(lambda: closed.post(asked, Ocp_Apim_Subscription_Key=key).status == 401)
        closed.end()
    used = json.loads(llamacli("usage", "--json").stdout)
    assert any(line.get("completion_tokens") == 2 for line in (used if isinstance(used, list) else used["usage"]))


def wait_for(happens: Any) -> None:
    ends = time.monotonic() + 5
    while not happens():
        assert time.monotonic() < ends
        time.sleep(0.1)


# -- operations --------------------------------------------------------------------------------------------------


def test_health_ready_and_metrics(server: Server) -> None:
    assert server.request("GET", "/health").json == {"status": "ok"}
    assert server.request("GET", "/ready").json == {"status": "ready"}
    text = server.request("GET", "/metrics").text
    for name in ("slots_busy", "queue_depth", "requests_total", "prompt_tokens_total", "completion_tokens_total"):
        assert f"\nllamacli_{name}" in text
    for name in ("kv_cells_used", "prefix_hit_tokens_total", "time_to_first_token_seconds", "inter_token_seconds"):
        assert f"\nllamacli_{name}" in text


def test_the_log_has_every_request_and_no_prompt(environment: dict[str, str]) -> None:
    with running(environment) as logging:
        reply = logging.post({"prompt": "a secret", "max_tokens": 1}, X_Request_Id="find-me")
        assert reply.status == 200
        lines = logging.end()
    (line,) = [line for line in lines if line["event"] == "request"]
    assert (line["trace_id"], line["status"], line["completion_tokens"]) == ("find-me", 200, 1)
    assert "secret" not in json.dumps(lines)


ENDLESS = {"prompt": "zyx", "temperature": 2, "top_k": 0, "top_p": 1, "ignore_eos": True, "stream": True}


def begun(server: Server) -> socket.socket:
    """A stream whose first event has come."""
    host = urlsplit(server.url)
    connection = socket.create_connection((host.hostname or "", host.port or 0), timeout=20)
    body = json.dumps(ENDLESS).encode()
    connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    received = b""
    while b"data: " not in received:
        received += connection.recv(4096)
    return connection


def busy(server: Server) -> float:
    text = server.request("GET", "/metrics").text
    return float(text.rpartition("\nllamacli_slots_busy ")[2].split("\n")[0])


def test_a_client_that_goes_away_stops_costing_at_once(server: Server) -> None:
    begun(server).close()
    wait_for(lambda: busy(server) == 0)


def test_sigterm_lets_an_answer_finish_and_nobody_in(environment: dict[str, str]) -> None:
    with running(environment) as draining:
        with begun(draining) as connection:
            draining.process.send_signal(signal.SIGTERM)
            wait_for(lambda: draining.request("GET", "/ready").status == 503)
            refused = draining.post({"prompt": "hi"})
            assert refused.status == 503 and "retry-after" in refused.headers
            received = b""
            while part := connection.recv(65536):
                received += part
        assert b"[DONE]" in received
        assert draining.process.wait(20) == 0


def test_an_engine_that_dies_is_replaced_and_nothing_hangs(environment: dict[str, str]) -> None:
    with running(environment) as shaken:
        (child,) = children(shaken.process.pid)
        with begun(shaken) as connection:
            os.kill(child, signal.SIGKILL)
            received = b""
            while part := connection.recv(65536):
                received += part
                if b'"code"' in received:
                    break
        assert b"[DONE]" not in received and b'"code":' in received.replace(b'"code": ', b'"code":')
        wait_for(lambda: shaken.request("GET", "/ready").status == 200)
        assert shaken.post({"prompt": QUESTION, "temperature": 0}).json["response"] == ANSWER


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    if not found.exists():
        pytest.skip("needs /proc")
    return [int(each) for each in found.read_text().split()]


def test_more_than_may_wait_is_refused(environment: dict[str, str]) -> None:
    with running(environment, "--slots", "1", "--queue", "0") as narrow:
        never = narrow.post({"prompt": "hi", "n": 2}, "/v1/completions")
        assert never.status == 400 and "more than the 1 that this server takes" in never.json["error"]["message"]
        with begun(narrow):
            refused = narrow.post({"prompt": "hi"})
            assert refused.status == 429 and int(refused.headers["retry-after"]) >= 1


def test_a_unix_socket_serves_too(environment: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "s"
    with running(environment, "--uds", str(path)) as local:
        assert path.stat().st_mode & 0o777 == 0o600
        # A proxy in front of it may pass on whatever name it goes by, and the pages of that name.
        for named in (b"localhost", b"llama.example.org", b"llama.example.org\r\nOrigin: https://llama.example.org"):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(path))
                connection.sendall(b"GET /ready HTTP/1.1\r\nHost: " + named + b"\r\nConnection: close\r\n\r\n")
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
        local.end()
    assert not path.exists()


def test_what_cannot_be_served_is_one_line_before_anything_is_loaded(llamacli: Run, server: Server) -> None:
    port = str(urlsplit(server.url).port)
    cases = [
        (["--port", port], 2, "cannot listen at"),
        (["--port", "70000"], 2, "--port must be"),
        (["--slots", "0"], 2, "--slots must be"),
        (["--host", "0.0.0.0"], 2, "there is no key"),
        (["-m", "/no/such.gguf"], 5, "does not exist"),
        (["-m", "7b-chat", "--offline"], 5, "llamacli pull 7b-chat"),
        (["--no-auth", "--api-key", "x"], 2, "contradict"),
        (["--grace", "nan"], 2, "--grace must be"),
        (["--cors-origin", "app.example"], 2, "like https://app.example"),
        (["--cors-origin", "https://app.example/"], 2, "as browsers send it"),
        (["--cors-origin", "http://app.example:80"], 2, "as browsers send it"),
    ]
    for options, code, said in cases:
        done = llamacli("serve", *options)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert said in done.stderr and done.stderr.count("\n") == 1
