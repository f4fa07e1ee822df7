"""`run` over servers: real ones as processes, strange ones as sockets that say what a test tells them to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM, Golden, Run, golden

from benchmarks import synthetic
from llamacli.errors import UsageError
from llamacli.prompt import Format
from llamacli.remote import address
from llamacli.remote.events import events
from llamacli.server import presence

QUESTION = "Tell me about llama2"
ANSWER = golden()[0].answer
GREEDY = ("--temperature", "0")
ENDLESS = ("--temperature", "2", "--top-k", "0", "--top-p", "1", "--seed", "3", "zyx")


def one_line(stderr: str) -> str:
    """The only line on stderr."""
    assert stderr.startswith("llamacli: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    return stderr.removeprefix("llamacli: ").rstrip("\n")


# -- servers ----------------------------------------------------------------------------------------------------


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str

    def log(self) -> list[dict[str, Any]]:
        """Stop it in order. Returns its log."""
        assert self.process.stderr is not None
        self.process.send_signal(signal.SIGTERM)
        lines = self.process.stderr.readlines()
        assert self.process.wait(20) == 0
        return [json.loads(line) for line in lines]


@contextmanager
def serving(environment: dict[str, str], *options: str) -> Iterator[Server]:
    command = [*PROGRAM, "serve", "--port", "0", *options]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, encoding="utf-8") as process:
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


def clean_environment(home: Path) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMACLI_", "HF_"))}
    return ours | {"LLAMACLI_HOME": str(home), "LLAMACLI_MODEL": "tiny", "LLAMACLI_THREADS": "1"}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that `run` cannot find by itself: it has another home."""
    with serving(clean_environment(tmp_path_factory.mktemp("elsewhere")), "--api-key", "sesame") as server:
        yield server


@pytest.fixture
def keyed(environment: dict[str, str]) -> dict[str, str]:
    environment["LLAMACLI_API_KEY"] = "sesame"
    return environment


@dataclass
class Told:
    """A server that reads each request whole, says the next thing that it was told to, and hangs up."""

    url: str
    says: list[bytes]
    heard: list[bytes] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    stays: bool = False

    def body(self, i: int = 0) -> dict[str, Any]:
        found = json.loads(self.heard[i].partition(b"\r\n\r\n")[2])
        assert isinstance(found, dict)
        return found


Tell = Callable[..., Told]


@pytest.fixture
def tell() -> Iterator[Tell]:
    listeners: list[socket.socket] = []

    def make(*says: bytes, stays: bool = False) -> Told:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        told = Told(f"http://127.0.0.1:{listener.getsockname()[1]}", list(says), stays=stays)
        threading.Thread(target=attend, args=(listener, told), daemon=True).start()
        return told

    yield make
    for listener in listeners:
        listener.close()


def attend(listener: socket.socket, told: Told) -> None:
    for said in told.says:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            told.heard.append(whole_request(connection))
            connection.sendall(said)
            if told.stays:  # until the client goes
                with suppress(OSError):
                    connection.recv(1)
                told.gone.set()


def whole_request(connection: socket.socket) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def reply(body: object, status: str = "200 OK", kind: str = "application/json", **headers: str) -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"Content-Type": kind, "Content-Length": str(len(raw))}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    return (
        f"HTTP/1.1 {status}\r\n".encode() + b"".join(f"{k}: {v}\r\n".encode() for k, v in named.items()) + b"\r\n" + raw
    )


def stream(*data: object, done: bool = True) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n\r\n"
    lines = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in data]
    return head + b"".join(b"data: " + line + b"\n\n" for line in lines + [b"[DONE]"] * done)


END = {"response": "", "finish_reason": "stop", "usage": {"prompt_tokens": 3, "completion_tokens": 2}}

# -- a server elsewhere -----------------------------------------------------------------------------------------


def test_a_server_elsewhere_answers_as_we_do(elsewhere: Server, keyed: dict[str, str], llamacli: Run) -> None:
    for options in ((), ("--no-stream",)):
        done = llamacli(*GREEDY, "--remote", elsewhere.url, *options, QUESTION)
        assert (done.stdout, done.stderr, done.returncode) == (ANSWER + "\n", "", 0)


def test_the_address_may_come_from_the_environment_or_the_file(
    elsewhere: Server, keyed: dict[str, str], llamacli: Run
) -> None:
    keyed["LLAMACLI_REMOTE"] = elsewhere.url + "/v1/getData"
    shown = llamacli("-v", "-n", "3", *GREEDY, QUESTION).stderr
    assert one_line(shown) == f"asking {elsewhere.url} (environment LLAMACLI_REMOTE)"
    del keyed["LLAMACLI_REMOTE"]
    Path(keyed["LLAMACLI_HOME"]).mkdir(exist_ok=True)
    Path(keyed["LLAMACLI_HOME"], "config.toml").write_text(f'remote = "{elsewhere.url}/v1"\nctx_size = 100\n')
    assert llamacli(*GREEDY, "-n", "5", QUESTION).stdout.strip() in ANSWER
    assert "repack" in llamacli("-v", "--local", "-n", "1", QUESTION).stderr


@pytest.mark.parametrize("case", [c for c in golden() if c.messages[-1].content.startswith("```")][:1])
def test_a_piped_document_goes_there_in_its_fence(
    case: Golden, elsewhere: Server, keyed: dict[str, str], llamacli: Run
) -> None:
    _, document, rest = case.messages[-1].content.split("```")
    done = llamacli(*GREEDY, "-n", "128", "--remote", elsewhere.url, rest.strip(), input=document.strip("\n") + "\n")
    assert done.stdout.strip() == case.answer


def test_only_what_the_user_has_chosen_is_asked_for(tell: Tell, llamacli: Run, environment: dict[str, str]) -> None:
    told = tell(stream({"response": "yes"}, END), reply({"response": "yes"}))
    done = llamacli("--remote", told.url + "/llama-2/", "-s", "Be brief.", "Use {stdin}", input="this\n")
    assert (done.stdout, done.returncode) == ("yes\n", 0)
    assert told.heard[0].startswith(b"POST /llama-2/v1/getData HTTP/1.1\r\n")
    assert told.body() == {"prompt": "Use this", "system prompt": "Be brief.", "stream": True}
    environment["LLAMACLI_TOP_P"] = "0.5"
    options = ("--seed", "0", "-n", "9", "--stop", "a", "--stop", "b", "--no-stream", "--temperature", "0")
    llamacli("--remote", told.url + "/getData?v=1", *options, "hi")
    assert told.heard[1].startswith(b"POST /getData?v=1 HTTP/1.1\r\n")
    asked = {"prompt": "hi", "seed": 0, "max_tokens": 9, "stop": ["a", "b"], "temperature": 0, "top_p": 0.5}
    assert told.body(1) == asked


def test_json_says_what_can_be_known(tell: Tell, llamacli: Run) -> None:
    told = tell(stream({"response": "ye"}, {"response": "s"}, END | {"model": "llama-2-70b"}))
    record = json.loads(llamacli("--json", "--remote", told.url, "--seed", "7", "hi").stdout)
    assert (record["answer"], record["finish_reason"], record["device"]) == ("yes", "stop", "remote")
    assert record["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": None}
    assert (record["seed"], record["sampling"]["temperature"]) == (7, None)
    assert record["model"] == {
        "name": "llama-2-70b",
        "path": None,
        "sha256": None,
        "revision": None,
        "template": None,
    }
    assert record["settings"]["remote"] == {"value": told.url, "why": "flag --remote"}
    assert record["timings"]["total_s"] >= record["timings"]["first_token_s"] > 0


@pytest.mark.parametrize(
    "said",
    [
        reply({"status": 200, "content-type": "application/json", "response": "yes\n\n"}),
        reply({"response": "yes", "finish_reason": None, "usage": None}, kind="text/plain"),
        b"HTTP/1.0 200 OK\r\n\r\n" + b'\xef\xbb\xbf{"response": "yes"}',
        stream({"response": "y"}, {"response": "es"}),
        stream({"response": "yes"}, {"finish_reason": "stop"}, done=False),
        stream({"response": "yes"}).replace(b"\n\n", b"\r\n\r\n").replace(b"data: ", b": ping\r\nid: 1\r\ndata:"),
    ],
)
def test_all_ways_to_say_yes_are_understood(said: bytes, tell: Tell, llamacli: Run) -> None:
    done = llamacli("--remote", tell(said).url, "hi")
    assert (done.stdout, done.stderr, done.returncode) == ("yes\n", "", 0)


# -- what goes wrong there --------------------------------------------------------------------------------------


def refused(status: str, **headers: str) -> bytes:
    body = {"code": int(status.split()[0]), "message": "no\nfor \x1b[31m you", "traceId": "t-1"}
    return reply(body, status, **headers)


@pytest.mark.parametrize(
    ("said", "reported"),
    [
        (refused("400 Bad Request"), "answered 400: no for ^[[31m you (trace id t-1)"),
        (refused("401 Unauthorized"), "--api-key or LLAMACLI_API_KEY (trace id t-1)"),
        (refused("500 Internal Server Error"), "answered 500: no"),
        (refused("429 Too Many Requests", Retry_After="60"), "it asks to wait 60 s"),
        (refused("503 Service Unavailable", Retry_After="soon"), "answered 503: no"),
        (refused("503 Service Unavailable", Retry_After="9" * 5000), "answered 503: no"),
        (refused("503 Service Unavailable", Retry_After="\xb2"), "answered 503: no"),
        (
            reply({"error": {"message": "not today"}}, "403 Forbidden", X_Trace_Id="t-2"),
            "403: not today (trace id t-2)",
        ),
        (reply(b"<html>", "502 Bad Gateway", "text/html"), "answered 502: Bad Gateway"),
        (reply(b"<html>", "404 Not Found", "text/html"), "is the address right?"),
        (reply(b"", "204 No Content"), "answered 204"),
        (reply(b"<!DOCTYPE html>", kind="text/html"), "what is not JSON (text/html): is the address right?"),
        (reply(b'{"response": "ha'), "what is not JSON"),
        (reply(b""), "answered with nothing"),
        (reply(b"\xff\xfe"), "what is not JSON"),
        (reply(b"[" * 100_000), "what is not JSON"),
        (reply([1]), "there is no answer"),
        (reply({"response": 7}), "there is no answer"),
        (reply({"code": 500, "message": "broken inside", "traceId": "t-3"}), "(500): broken inside (trace id t-3)"),
        (reply({"response": "yes"})[:-5], "5 bytes are missing"),
        (b"", "it closed the connection"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "what it says is not HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "there is no answer|answered with nothing|not HTTP"),
        (stream(b"{half"), "what is not JSON (an event)"),
        (stream(b"\xff"), "not UTF-8"),
        (stream(done=False), "broke off"),
        (reply(b"", "302 Found", Location="https://elsewhere.example/v1/getData"), "https://elsewhere.example, where"),
        (reply(b"", "302 Found", Location="//[bad"), "nowhere"),
        (reply(b"", "303 See Other", Location="/"), "answered 303"),
    ],
)
def test_a_failing_server_is_one_line_and_exit_code_eight(
    said: bytes, reported: str, tell: Tell, llamacli: Run
) -> None:
    done = llamacli("--remote", tell(said).url, "hi")
    assert (done.returncode, done.stdout) == (8, "")
    assert any(each in one_line(done.stderr) for each in reported.split("|")), done.stderr


@pytest.mark.parametrize(
    ("said", "reported"),
    [
        (stream({"response": "one"}, done=False), "broke off in the middle"),
        (stream({"response": "one"}, {"code": 503, "message": "it died", "traceId": "t"}), "it died (trace id t)"),
        (stream({"response": "one"}, b"oops"), "what is not JSON"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            b'1b\r\ndata: {"response": "one"}\n\n\r\nff\r\ndata',
            "the connection ended before the answer did",
        ),
    ],
)
def test_what_was_written_before_a_failure_stays(said: bytes, reported: str, tell: Tell, llamacli: Run) -> None:
    done = llamacli("--remote", tell(said).url, "hi")
    assert (done.returncode, done.stdout) == (8, "one\n")
    assert reported in one_line(done.stderr)


@pytest.mark.parametrize("said", [b"", stream({"response": "one"}, done=False)])
def test_a_server_that_falls_silent_is_given_up(said: bytes, tell: Tell, llamacli: Run) -> None:
    done = llamacli("--remote", tell(said, stays=True).url, "--remote-timeout", "0.2", "hi")
    assert (done.returncode, done.stdout) == (8, "one\n" if said else "")
    assert "--remote-timeout" in one_line(done.stderr)


def test_nobody_there_is_exit_code_eight(llamacli: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for url, said in ((f"http://127.0.0.1:{port}", "Connection refused"), ("http://no-such-host.invalid", "")):
        done = llamacli("--remote", url, "hi")
        assert (done.returncode, done.stdout) == (8, "")
        assert f"{url} cannot be reached: {said}" in one_line(done.stderr)


def test_a_server_without_tls_is_said_to_be_one(llamacli: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def speak() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(4096)

        threading.Thread(target=speak, daemon=True).start()
        done = llamacli("--remote", f"https://127.0.0.1:{listener.getsockname()[1]}", "hi")
    assert done.returncode == 8 and "TLS failed" in one_line(done.stderr)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_a_certificate_must_be_signed_by_somebody_we_trust(
    llamacli: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def speak() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                with suppress(OSError), context.wrap_socket(connection, server_side=True) as secure:
                    whole_request(secure)
                    secure.sendall(reply({"response": "yes"}))

        threading.Thread(target=speak, daemon=True).start()
        url = f"https://localhost:{listener.getsockname()[1]}"
        refused = llamacli("--remote", url, "hi")
        assert refused.returncode == 8 and "its certificate is not valid" in one_line(refused.stderr)
        trusting = environment | {"SSL_CERT_FILE": str(certificate)}
        assert llamacli("--remote", url, "hi", env=trusting).stdout == "yes\n"


def test_a_server_that_is_busy_for_a_moment_is_asked_once_more_and_not_twice(tell: Tell, llamacli: Run) -> None:
    busy = refused("503 Service Unavailable", Retry_After="0")
    done = llamacli("--remote", tell(busy, reply({"response": "yes"})).url, "hi")
    assert (done.stdout, done.returncode) == ("yes\n", 0)
    assert "is busy (503); asking once more in 0 s" in one_line(done.stderr)
    again = llamacli("-q", "--remote", tell(busy, busy, reply({"response": "yes"})).url, "hi")
    assert again.returncode == 8 and "answered 503" in one_line(again.stderr)


def test_a_redirect_is_followed_on_the_same_host_with_the_question_and_the_key(
    tell: Tell, llamacli: Run, keyed: dict[str, str]
) -> None:
    told = tell(reply(b"", "308 Permanent Redirect", Location="/new/getData"), reply({"response": "yes"}))
    assert llamacli("--remote", told.url, "hi").stdout == "yes\n"
    assert told.heard[1].startswith(b"POST /new/getData ") and b"sesame" in told.heard[1]
    circle = tell(*[reply(b"", "307 Temporary Redirect", Location="/v1/getData")] * 9)
    assert "in circles" in one_line(llamacli("--remote", circle.url, "hi").stderr)


def test_a_key_and_a_question_never_follow_a_redirect_to_another_host(
    tell: Tell, llamacli: Run, keyed: dict[str, str]
) -> None:
    stranger = tell(reply({"response": "thanks"}))
    told = tell(reply(b"", "307 Temporary Redirect", Location=stranger.url + "/v1/getData"))
    done = llamacli("--remote", told.url, "hi")
    assert done.returncode == 8 and stranger.heard == []


def test_a_key_goes_into_a_header_and_into_nothing_else(tell: Tell, llamacli: Run, keyed: dict[str, str]) -> None:
    keyed["LLAMACLI_API_KEY"] = "sesame other"
    echo = reply({"code": 401, "message": "sesame is not valid", "traceId": "t"}, "401 Unauthorized")
    told = tell(echo, reply({"response": "yes"}))
    done = llamacli("-v", "--remote", told.url, "hi")
    assert b"\r\nOcp-Apim-Subscription-Key: sesame\r\n" in told.heard[0] and told.heard[0].count(b"sesame") == 1
    assert "sesame" not in done.stderr + done.stdout and "[key] is not valid" in done.stderr
    llamacli("--remote", told.url, "--api-key", "mine", "hi")
    late = llamacli("--remote", tell(stream({"message": "sesame!"}, done=False)).url, "hi")
    assert late.returncode == 8 and "[key]!" in one_line(late.stderr)
    assert b"Ocp-Apim-Subscription-Key: mine\r\n" in told.heard[1]


def test_a_wrong_key_names_the_flag(elsewhere: Server, llamacli: Run) -> None:
    for options in ((), ("--api-key", "wrong")):
        done = llamacli("--remote", elsewhere.url, *options, "hi")
        assert done.returncode == 8 and "answered 401" in done.stderr and "--api-key" in one_line(done.stderr)


def test_a_proxy_in_the_environment_is_used_and_this_machine_is_reached_without(
    tell: Tell, llamacli: Run, environment: dict[str, str]
) -> None:
    proxy = tell(reply({"response": "by proxy"}))
    environment["http_proxy"] = proxy.url.replace("//", "//me:secret@")
    environment["no_proxy"] = ""
    assert llamacli("--remote", "http://far.invalid:81/x", "hi").stdout == "by proxy\n"
    assert proxy.heard[0].startswith(b"POST http://far.invalid:81/x/v1/getData HTTP/1.1\r\n")
    assert b"\r\nProxy-Authorization: Basic bWU6c2VjcmV0\r\n" in proxy.heard[0]
    assert llamacli("--remote", tell(reply({"response": "direct"})).url, "hi").stdout == "direct\n"


# -- how an answer ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "usage", "code"),
    [
        ((), {"prompt_tokens": 90, "completion_tokens": 10}, 3),
        ((), None, 3),
        (("-n", "10"), {"prompt_tokens": 90, "completion_tokens": 10}, 0),
        (("-n", "20"), {"prompt_tokens": 90, "completion_tokens": 10}, 3),
        (("-n", "20"), None, 0),
    ],
)
def test_an_answer_cut_for_want_of_room_is_exit_code_three(
    options: tuple[str, ...], usage: object, code: int, tell: Tell, llamacli: Run
) -> None:
    said = reply({"response": "and then", "finish_reason": "length", "usage": usage})
    done = llamacli("--remote", tell(said).url, *options, "hi")
    assert (done.stdout, done.returncode) == ("and then\n", code)
    assert ("the answer was cut" in done.stderr) == (code == 3)
    assert ("100 tokens" in done.stderr) == (code == 3 and usage is not None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu-layers", "3", "--threads", "2"], "--gpu-layers, --threads cannot be had of a remote server"),
        (["-m", "tiny"], "--model cannot"),
        (["-c", "100"], "--ctx-size cannot"),
        (["--require-gpu"], "--require-gpu cannot"),
        (["--raw"], "--raw cannot"),
        (["--show-prompt"], "--show-prompt cannot"),
        (["--offline"], "--offline cannot"),
        (["--on-overflow", "head"], "--on-overflow cannot"),
        (["--local"], "contradict"),
        (["--remote", "ftp://x"], "must be an address like"),
        (["--remote", "127.0.0.1:8080"], "must be an address like"),
        (["--remote", "http://"], "must be an address like"),
        (["--remote", "http://x:99999"], "must be an address like"),
        (["--remote", "http://x/\r\nHost:y"], "must be an address like"),
        (["--remote", "http://me:key@x"], "must not hold a user name or a key"),
        (["--remote-timeout", "0"], "--remote-timeout must be"),
        (["--api-key", "a\nb"], "no HTTP header can carry"),
    ],
)
def test_what_cannot_be_had_of_a_remote_server_is_wrong_usage(arguments: list[str], said: str, llamacli: Run) -> None:
    done = llamacli("--remote", "http://127.0.0.1:9", *arguments, "hi")
    assert (done.returncode, done.stdout) == (2, "")
    assert said in one_line(done.stderr)


def test_a_key_without_a_server_is_wrong_usage(llamacli: Run) -> None:
    assert "--remote URL" in one_line(llamacli("--api-key", "k", "hi").stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_hangs_up_and_keeps_what_was_printed(
    number: signal.Signals, tell: Tell, environment: dict[str, str]
) -> None:
    told = tell(stream({"response": "one"}, done=False), stays=True)
    command = [*PROGRAM, "--remote", told.url, "hi"]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        first = os.read(process.stdout.fileno(), 100)
        process.send_signal(number)
        assert process.wait(10) == (130 if number == signal.SIGINT else -number)
        assert first + process.stdout.read() == (b"one\n" if number == signal.SIGINT else b"one")
        assert process.stderr.read() == b""
    assert told.gone.wait(10)


def test_ctrl_c_and_a_closed_pipe_cancel_on_the_server(environment: dict[str, str]) -> None:
    with serving(environment) as server:
        environment = environment | {"LLAMACLI_REMOTE": server.url}
        for number in (signal.SIGINT, None):
            with subprocess.Popen(
                [*PROGRAM, *ENDLESS], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
            ) as process:
                assert process.stdout is not None
                os.read(process.stdout.fileno(), 1)
                if number:
                    process.send_signal(number)
                else:
                    process.stdout.close()
                assert process.wait(10) == (130 if number else -signal.SIGPIPE)
        requests = [line for line in server.log() if line["event"] == "request"]
    assert [line["status"] for line in requests] == [499, 499]


# -- a server on this machine that has the model loaded -----------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, dict[str, str]]]:
    """A server, and an environment in which `run` finds it. It is closed to everybody without a key."""
    environment = clean_environment(tmp_path_factory.mktemp("shared"))
    with serving(environment, "--api-key", "sesame") as server:
        yield server, environment


@pytest.fixture
def beside(shared: tuple[Server, dict[str, str]]) -> Run:
    """Runs the program beside the server. stdin is empty unless `input` is given."""

    def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[Any]:
        if "input" not in options:
            options.setdefault("stdin", subprocess.DEVNULL)
        given: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "env": shared[1], "timeout": 60} | options
        return subprocess.run([*PROGRAM, *arguments], **given)

    return run


def is_attached(done: subprocess.CompletedProcess[str]) -> bool:
    return "answered by the running server" in done.stderr


def one_turn(case: Golden) -> bool:
    return [m.role for m in case.messages if m.role != "system"] == ["user"]


@pytest.mark.parametrize("case", [c for c in golden() if one_turn(c)][:8])
def test_a_greedy_answer_is_the_same_attached_and_computed_here(case: Golden, beside: Run) -> None:
    system = [m.content for m in case.messages if m.role == "system"]
    asked = (*GREEDY, "-n", "128", *(["-s", *system] if system else []))
    text = case.messages[-1].content
    document, rest = text.split("```")[1:] if text.startswith("```") else ("", text)
    given: dict[str, Any] = {"input": document.strip("\n") + "\n"} if document else {}
    attached = beside("-v", *asked, "--", rest.strip(), **given)
    here = beside("-v", "--local", *asked, "--", rest.strip(), **given)
    assert is_attached(attached) and not is_attached(here)
    assert attached.stdout == here.stdout and attached.stdout.strip() == case.answer


def test_a_seed_draws_the_same_attached_and_computed_here(beside: Run) -> None:
    drawn = beside("-v", "-n", "20", *ENDLESS)
    assert is_attached(drawn)
    assert drawn.stdout == beside("--local", "-n", "20", *ENDLESS).stdout != beside("-n", "20", "zyx").stdout


def test_json_says_that_and_why_it_is_attached(beside: Run, shared: tuple[Server, dict[str, str]]) -> None:
    beside(*GREEDY, QUESTION)
    record = json.loads(beside(*GREEDY, "--json", "--seed", "7", QUESTION).stdout)
    here = json.loads(beside(*GREEDY, "--json", "--seed", "7", "--local", QUESTION).stdout)
    assert record.keys() == here.keys() and record["timings"].keys() == here["timings"].keys()
    assert record["settings"]["attached"]["value"] is True
    assert str(shared[0].process.pid) in record["settings"]["attached"]["why"]
    assert "attached" not in here["settings"]
    same = ("answer", "finish_reason", "seed", "sampling", "model", "context_size", "device")
    assert {name: record[name] for name in same} == {name: here[name] for name in same}
    assert record["usage"] == {"prompt_tokens": 14, "completion_tokens": 79, "cached_tokens": 13}


def test_an_answer_is_logged_without_the_servers_address_or_key(
    tell: Tell, llamacli: Run, environment: dict[str, str]
) -> None:
    told = tell(reply({"response": "yes"}))
    assert llamacli("--remote", told.url, "--api-key", "s3cret", "Is it?").stdout == "yes\n"
    raw = b"".join(path.read_bytes() for path in Path(environment["LLAMACLI_HOME"], "data").glob("sessions*"))
    assert b"Is it?" in raw and b"s3cret" not in raw and told.url.encode() not in raw and b"127.0.0.1" not in raw


def loaded_by(arguments: list[str], environment: dict[str, str]) -> set[str]:
    """The modules in a process that ran the program with these arguments. What is logged is logged after the answer."""
    environment = environment | {"LLAMACLI_LOG": "0"}
    code = (
        "import os, sys\n"
        f"sys.argv = {['llamacli', *arguments]!r}\n"
        "os._exit = lambda code: sys.exit(code)\n"
        "import llamacli.__main__ as program\n"
        "try: program.main()\n"
        "finally: print('LOADED', *sys.modules)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, encoding="utf-8", stdin=subprocess.DEVNULL, env=environment, check=True
    )
    return set(done.stdout.rpartition("LOADED")[2].split())


HEAVY = {"llama_cpp", "numpy", "asyncio", "uvicorn", "sqlite3", "huggingface_hub", "llamacli.launch"}


def test_nothing_of_llama_cpp_is_loaded_to_ask_a_server(
    shared: tuple[Server, dict[str, str]], tell: Tell, environment: dict[str, str]
) -> None:
    attached = loaded_by(["-n", "1", "hi"], shared[1])
    assert "llamacli.remote.post" in attached and not attached & HEAVY
    told = tell(reply({"response": "yes"}))
    remote = loaded_by(["--remote", told.url, "hi"], environment)
    assert "llamacli.remote.post" in remote and not remote & (HEAVY | {"llamacli.models.store", "llamacli.gguf"})
    alone = loaded_by(["-n", "1", "--local", "hi"], environment)
    assert "llama_cpp" in alone and not {
        name for name in alone if name.startswith(("http", "llamacli.remote", "llamacli.server"))
    }


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--local"], "--local"),
        (["-c", "512"], "its context holds 1,024 tokens"),
        (["--gpu-layers", "0"], "--gpu-layers 0"),
        (["--threads", "2"], "--threads 2"),
        (["--no-cache"], "--no-cache"),
        (["--cache-size", "0"], "--cache-size 0"),
        (["--raw"], "--raw"),
        (["--show-prompt"], "--show-prompt"),
        (["--on-overflow", "head"], "--on-overflow head"),
    ],
)
def test_what_a_server_would_do_otherwise_is_done_here(options: list[str], why: str, beside: Run) -> None:
    done = beside("-v", "-n", "3", *options, QUESTION)
    assert done.returncode == 0 and not is_attached(done)
    assert f"(tiny): {why}" in done.stderr
    assert is_attached(beside("-v", "-n", "3", "-c", "1024", "--threads", "1", QUESTION))


def test_an_input_that_does_not_fit_is_refused_as_it_is_here(beside: Run) -> None:
    done = beside("Summarise", input="word " * 3000)
    assert (done.returncode, done.stdout) == (4, "")
    assert "--on-overflow" in one_line(done.stderr)
    many_stops = [option for i in range(17) for option in ("--stop", f"{i}zz")]
    allowed = beside(*GREEDY, *many_stops, QUESTION)
    assert (allowed.stdout, allowed.returncode) == (ANSWER + "\n", 0)


def test_an_answer_cut_by_the_context_is_exit_code_three_attached_too(beside: Run) -> None:
    done = beside("-v", *GREEDY, "Repeat: " + "one two three four five six seven eight nine ten " * 60)
    assert is_attached(done) and done.returncode == 3 and "1,024 tokens" in done.stderr


def test_another_model_and_a_file_that_has_changed_are_not_what_the_server_has(
    beside: Run, shared: tuple[Server, dict[str, str]], tmp_path: Path
) -> None:
    from llamacli.models import store

    copy = tmp_path / "tiny-chat.gguf"
    copy.write_bytes(store.bundled().read_bytes())
    assert "it serves another model" in beside("-v", "-n", "1", "-m", str(copy), "hi").stderr
    link = tmp_path / "link.gguf"
    link.symlink_to(store.bundled())
    assert is_attached(beside("-v", "-n", "1", "-m", str(link), "hi"))
    with serving(shared[1], "-m", str(copy)):
        assert is_attached(beside("-v", "-n", "1", "-m", str(copy), "hi"))  # the second of two servers
        os.utime(copy, (1, 1))
        changed = beside("-v", "-n", "1", "-m", str(copy), "hi")
        assert not is_attached(changed) and "the model's file has changed since" in changed.stderr
    assert is_attached(beside("-v", "-n", "1", "hi"))


def has_avx2() -> bool:
    with suppress(OSError):
        return " avx2 " in Path("/proc/cpuinfo").read_text()
    return False


@pytest.mark.skipif(not has_avx2(), reason="needs a CPU for which llama.cpp rewrites K-quants: x86 with AVX2")
def test_weights_that_a_server_has_rewritten_answer_only_what_need_not_be_repeatable(
    environment: dict[str, str], llamacli: Run, tmp_path: Path
) -> None:
    path = tmp_path / "small.gguf"
    synthetic.write(path, synthetic.Shape(n_layer=2, n_embd=256, n_ff=768, n_head=4, n_head_kv=4), "small-chat")
    environment["LLAMACLI_MODEL"] = str(path)
    with serving(environment, "--repack", "on"):
        assert is_attached(llamacli("-v", "-n", "3", "hi"))
        for options in (GREEDY, ("--seed", "1")):
            done = llamacli("-v", "-n", "3", *options, "hi")
            assert done.returncode == 0 and not is_attached(done) and "is to be repeatable" in done.stderr


def test_the_socket_needs_no_key_and_is_its_user_s_alone(shared: tuple[Server, dict[str, str]]) -> None:
    place = Path(shared[1]["LLAMACLI_HOME"], "data", "run")
    path = place / f"{shared[0].process.pid}.sock"
    assert (place.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    assert path.with_suffix(".json").stat().st_mode & 0o777 == 0o600
    for target, status in ((path, b"200"), (shared[0].url, b"401")):
        with socket.socket(socket.AF_UNIX) if isinstance(target, Path) else socket.socket() as connection:
            if isinstance(target, Path):
                connection.connect(str(target))
            else:
                connection.connect(("127.0.0.1", int(target.rpartition(":")[2])))
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert connection.recv(100).split()[1] == status


def test_a_server_at_a_socket_of_its_user_s_choice_still_asks_for_a_key(
    environment: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "s"
    with serving(environment, "--uds", str(path), "--api-key", "k"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 401")


def test_a_server_leaves_nothing_behind_and_what_a_dead_one_left_is_swept_away(
    environment: dict[str, str], llamacli: Run
) -> None:
    place = Path(environment["LLAMACLI_HOME"], "data", "run")
    with serving(environment) as first:
        assert len(list(place.iterdir())) == 2
        first.log()
        assert list(place.iterdir()) == []
    with serving(environment) as second:
        second.process.kill()
        second.process.wait(10)
        assert len(list(place.iterdir())) == 2
        done = llamacli("-v", *GREEDY, QUESTION)
        assert (done.stdout, done.returncode) == (ANSWER + "\n", 0) and not is_attached(done)
        assert list(place.iterdir()) == []


def test_a_note_that_is_none_changes_nothing(environment: dict[str, str], llamacli: Run) -> None:
    place = Path(environment["LLAMACLI_HOME"], "data", "run")
    place.mkdir(parents=True)
    for i, text in enumerate(["", "{", "[]", "null", '{"pid": "x"}', '{"files": 7}', "\0"]):
        (place / f"{i}.json").write_text(text)
    done = llamacli(*GREEDY, QUESTION)
    assert (done.stdout, done.stderr, done.returncode) == (ANSWER + "\n", "", 0)


def announced(home: Path, **differing: Any) -> presence.Presence:
    """A note of a server that serves the tiny model from this process."""
    from llamacli.models import store

    place = presence.prepare(home / "data" / "run")
    facts: dict[str, Any] = {
        "pid": os.getpid(),
        "host": presence.this_machine(),
        "socket": str(place),
        "files": presence.states_of([store.bundled()]),
        "name": "tiny",
        "format": "llama-2",
        "n_limit": 1024,
        "is_whole": True,
        "threads": 1,
        "choices": {"rewritten": (False, "")},
    }
    note = presence.Presence(**facts | differing)
    presence.announce(note)
    return note


@pytest.mark.parametrize(
    ("differing", "why"),
    [
        ({"is_whole": False, "n_limit": 512}, "its context holds 512 tokens"),
        ({"max_tokens": 5}, "it ends answers after 5 tokens"),
        ({"choices": {"rewritten": (True, "")}}, "round otherwise"),
        ({"choices": {}}, "round otherwise"),
        ({"gpu_layers": "all"}, "--gpu-layers auto"),
        ({"host": "another-machine"}, None),
        ({}, "computing here: the running server"),
    ],
)
def test_a_server_that_would_answer_otherwise_or_not_at_all_is_not_waited_for(
    differing: dict[str, Any], why: str | None, environment: dict[str, str], llamacli: Run
) -> None:
    announced(Path(environment["LLAMACLI_HOME"]), **differing)
    done = llamacli("-v", *GREEDY, QUESTION)
    assert (done.stdout, done.returncode) == (ANSWER + "\n", 0)
    assert (why or "") in done.stderr
    assert (why is None) == ("running server" not in done.stderr)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        refused("429 Too Many Requests", Retry_After="1"),
        refused("503 Service Unavailable", Retry_After="2"),
        stream(done=False),
        stream({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, done=False),
    ],
)
def test_a_busy_or_dying_server_costs_nothing_but_a_moment(
    said: bytes, environment: dict[str, str], llamacli: Run
) -> None:
    note = announced(Path(environment["LLAMACLI_HOME"]))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(note.socket)
        listener.listen()
        told = Told("", [said])
        threading.Thread(target=attend, args=(listener, told), daemon=True).start()
        done = llamacli(*GREEDY, "A question:", input=QUESTION + "\n")
        detail = llamacli("-v", "--local", *GREEDY, "A question:", input=QUESTION + "\n")
    assert (done.stdout, done.stderr, done.returncode) == (detail.stdout, "", 0)
    assert told.body()["messages"][0]["content"].endswith("A question:")


def test_a_server_that_dies_in_the_middle_leaves_what_there_is(environment: dict[str, str], llamacli: Run) -> None:
    note = announced(Path(environment["LLAMACLI_HOME"]))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(note.socket)
        listener.listen()
        told = Told("", [stream({"choices": [{"delta": {"content": "Llama"}}]}, done=False)])
        threading.Thread(target=attend, args=(listener, told), daemon=True).start()
        done = llamacli(*GREEDY, QUESTION)
    assert (done.stdout, done.returncode) == ("Llama\n", 8)
    assert "broke off" in one_line(done.stderr)


def test_a_base_model_completes_attached_too_and_says_so(environment: dict[str, str], llamacli: Run) -> None:
    note = announced(Path(environment["LLAMACLI_HOME"]), format=str(Format.COMPLETION))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(note.socket)
        listener.listen()
        told = Told("", [stream({"choices": [{"delta": {"content": "and so on"}, "finish_reason": "stop"}]})])
        threading.Thread(target=attend, args=(listener, told), daemon=True).start()
        done = llamacli(*GREEDY, QUESTION)
    assert (done.stdout, done.returncode) == ("and so on\n", 0)
    assert "tiny is a base model" in one_line(done.stderr)


def test_a_data_directory_too_deep_for_a_socket_is_said_and_serves_all_the_same(
    environment: dict[str, str], tmp_path: Path
) -> None:
    environment["LLAMACLI_HOME"] = str(tmp_path / ("x" * 60) / ("y" * 60))
    with serving(environment, "--grace", "1") as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert not Path(environment["LLAMACLI_HOME"], "data", "run").exists()


# -- small parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown", "target"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080", "/v1/getData"),
        ("http://h/", "http://h", "/v1/getData"),
        ("https://h/v1/", "https://h", "/v1/getData"),
        ("https://h:444/llama-2", "https://h:444", "/llama-2/v1/getData"),
        ("https://h/llama-2/v1/getData", "https://h", "/llama-2/v1/getData"),
        ("http://[::1]:8/x?key=k#f", "http://[::1]:8", "/x/v1/getData?key=k"),
    ],
)
def test_where_a_question_goes(url: str, shown: str, target: str) -> None:
    found = address.of(url)
    assert (found.shown, found.target) == (shown, target)


def test_an_address_with_a_secret_in_it_is_refused_without_repeating_it() -> None:
    with pytest.raises(UsageError) as raised:
        address.of("https://user:secret@h/")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("location", "trusted"),
    [
        ("/x", True),
        ("http://h:80/x", True),
        ("https://h/x", True),
        ("https://h:444/x", False),
        ("http://h:81/x", False),
        ("http://other/x", False),
        ("//other/x", False),
    ],
)
def test_which_redirects_are_followed(location: str, trusted: bool) -> None:
    base = address.of("http://h")
    there = address.redirected(base, location)
    assert there is not None and base.trusts(there) is trusted


def test_no_redirect_gives_up_encryption() -> None:
    base = address.of("https://h")
    there = address.redirected(base, "http://h/x")
    assert there is not None and not base.trusts(there)


def test_events_are_the_same_however_their_bytes_arrive() -> None:
    raw = "\ufeffdata: é\r\ndata:b\r\n\r\n: ping\n\nevent: x\rdata:  c\r\r\ndata: cut".encode()
    expected = ["é\nb", " c"]
    assert list(events([raw])) == expected
    assert list(events(bytes([byte]) for byte in raw)) == expected
