"""The API page: what a browser gets at GET /, and its code samples run exactly as they stand on it."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from alone import environment_at
from conftest import Run
from test_serve import Reply, Server, running, wait_for

from llamacli.server import ask
from llamacli.server.description import PROBLEMS
from llamacli.server.samples import KEY, LANGUAGES

ASKED = {"prompt": "Tell me about llama2", "system prompt": "You are a Llama 2 expert", "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(environment_at(tmp_path_factory.mktemp("home"))) as started:
        yield started


@pytest.fixture(scope="module")
def answer(server: Server) -> str:
    """What every sample is to be told."""
    return str(server.post(ASKED).json["response"])


def samples_on(page: str) -> dict[str, str]:
    """The code samples by name, as whoever copies them gets them."""
    found = re.findall(r'<code id="sample-([a-z-]+)">(.*?)</code>', page, re.DOTALL)
    return {name: html.unescape(text) for name, text in found}


# -- the page itself ---------------------------------------------------------------------------------------------


def test_a_browser_gets_the_page_and_nothing_from_elsewhere(server: Server) -> None:
    page = server.request("GET", "/")
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    loaded = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert loaded and not [each for each in loaded if re.match(r"[a-z]+:|//", each)]
    for each in {*loaded} - {"openapi.json"}:
        asset = server.request("GET", f"/{each}")
        assert asset.status == 200
        assert asset.headers["content-type"].split(";")[0] in ("text/css", "text/javascript", "image/svg+xml")
        assert not re.search(r"@import|url\(|https?://(?!www\.w3\.org/)", asset.text)


def test_the_browser_is_told_to_run_nothing_else(server: Server) -> None:
    for path in ("/", "/page/page.js"):
        headers = server.request("GET", path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    assert not re.search(r"<script(?![^>]*src=)|<style|\son[a-z]+=|\sstyle=", server.request("GET", "/").text)


def test_head_has_the_headers_alone_and_post_is_still_the_api(server: Server) -> None:
    head = server.request("HEAD", "/")
    assert (head.status, head.text) == (200, "") and int(head.headers["content-length"]) > 10_000
    assert server.post({}, "/").json["message"].startswith("prompt is missing")
    wrong = server.request("PUT", "/")
    assert (wrong.status, wrong.headers["allow"]) == (405, "GET, POST")


def test_the_page_tells_the_fields_and_errors_of_the_server_it_came_from(server: Server) -> None:
    text = server.request("GET", "/").text
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    rows = {re.sub(r"<[^>]+>", "", row[0]): row[1:] for row in cells}
    low, high = ask.TEMPERATURE
    assert rows["temperature"][:3] == ["number", f"{low} to {high}", "0.6"]
    assert rows["prompt required"][:2] == ["string", "not empty"]
    assert {str(status) for status in PROBLEMS} <= set(rows)
    assert {"POST /v1/getData", "POST /v1/chat/completions", "GET /metrics"} <= set(rows)
    assert "1,024 tokens" in text and "<dd>tiny</dd>" in text


def url_on(reply: Reply) -> str:
    found = re.search(r'<code id="address">(.*?)/v1/getData</code>', reply.text)
    assert found
    return html.unescape(found[1])


def test_the_page_has_the_url_that_the_browser_used(server: Server) -> None:
    assert url_on(server.request("GET", "/")) == server.url
    assert url_on(server.request("GET", "/", Host="localhost:9")) == "http://localhost:9"
    assert url_on(server.request("GET", "/", Host="[::1]:9", X_Forwarded_Proto="https")) == "https://[::1]:9"
    proxied = {"X_Forwarded_Proto": "https, http", "X_Forwarded_Host": "llama.example.org"}
    assert url_on(server.request("GET", "/", **proxied)) == "https://llama.example.org"


def test_a_host_that_is_none_does_not_reach_the_code_that_people_copy(environment: dict[str, str]) -> None:
    with running(environment, "--host", "0.0.0.0", "--no-auth", "-q") as public:
        port = urlsplit(public.url).port or 0
        assert url_on(request_at(port, "llama.example:1")) == "http://llama.example:1"
        for host in ("a'b", '"><script>', "$(id)", "x y", "a/b", ""):
            reply = request_at(port, host)
            assert url_on(reply) == f"http://localhost:{port}" and "<script>" not in reply.text


def request_at(port: int, host: str) -> Reply:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return parsed(received(connection))


def received(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def parsed(raw: bytes) -> Reply:
    """An answer that is not chunked."""
    head, _, body = raw.decode().partition("\r\n\r\n")
    first, *lines = head.split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return Reply(int(first.split()[1]), headers, body)


def test_a_key_is_asked_for_in_the_samples_only_where_one_is_needed(
    environment: dict[str, str], llamacli: Run, server: Server, tmp_path: Path
) -> None:
    assert KEY not in "".join(samples_on(server.request("GET", "/").text).values())
    key = llamacli("keys", "create", "--name", "me").stdout.strip()
    with running(environment, "-q") as closed:
        wait_for(lambda: closed.post({"prompt": "hi", "max_tokens": 1}).status == 401)
        page = closed.request("GET", "/")
        assert page.status == 200 and "This server asks for a key." in page.text
        codes = samples_on(page.text)
        assert all(code.count(KEY) == 1 for code in codes.values())
        refused = run("python", codes["python"], tmp_path)
        assert refused.returncode == 1 and refused.stderr.startswith("401: the subscription key is not valid")
        expected = closed.post(ASKED, Ocp_Apim_Subscription_Key=key).json["response"]
        assert run("python", codes["python"].replace(KEY, key), tmp_path).stdout == f"{expected}\n"


def test_a_model_given_by_its_path_does_not_show_where_it_lies(environment: dict[str, str], tmp_path: Path) -> None:
    model = tmp_path / "it's & <mine>.gguf"
    model.symlink_to(bundled())
    with running(environment, "-m", str(model), "-q") as local:
        page = local.request("GET", "/").text
        assert str(tmp_path) not in page and "it&#x27;s &amp; &lt;mine&gt;" in page
        done = run("openai-curl", samples_on(page)["openai-curl"], tmp_path)
        assert "choices" in json.loads(done.stdout)


def bundled() -> Path:
    from llamacli.models import store

    return store.bundled()


# -- the samples -------------------------------------------------------------------------------------------------

# language → (file, how it is run, the program that this needs)
PROGRAMS = {
    "curl": ("sample.sh", ["sh", "sample.sh"], "curl"),
    "python": ("sample.py", [sys.executable, "-I", "sample.py"], sys.executable),
    "javascript": ("sample.mjs", ["node", "sample.mjs"], "node"),
    "java": ("Sample.java", ["java", "-XX:TieredStopAtLevel=1", "Sample.java"], "java"),
    "php": ("sample.php", ["php", "sample.php"], "php"),
}


def run(name: str, code: str, place: Path) -> subprocess.CompletedProcess[str]:
    language = name.removesuffix("-stream").removeprefix("openai-")
    filename, command, program = PROGRAMS[language]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    (place / filename).write_text(code, "utf-8")
    environment = os.environ | {"no_proxy": "*", "NO_PROXY": "*"}
    return subprocess.run(
        command,
        cwd=place,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


@pytest.fixture(scope="module")
def codes(server: Server) -> dict[str, str]:
    return samples_on(server.request("GET", "/").text)


def test_every_language_has_a_whole_and_a_streamed_sample(codes: dict[str, str]) -> None:
    assert list(LANGUAGES) == [*PROGRAMS, "http"]
    both = [f"{name}{kind}" for name in LANGUAGES for kind in ("", "-stream")]
    assert sorted(codes) == sorted([*both, "openai-curl", "openai-python"])


@pytest.mark.parametrize("name", ["python", "javascript", "php", "python-stream", "javascript-stream", "php-stream"])
def test_a_sample_prints_the_answer(name: str, codes: dict[str, str], answer: str, tmp_path: Path) -> None:
    done = run(name, codes[name], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{answer}\n", "")


@pytest.mark.parametrize("name", ["curl", "java"])
def test_a_sample_prints_the_answer_as_json(name: str, codes: dict[str, str], answer: str, tmp_path: Path) -> None:
    done = run(name, codes[name], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["response"] == answer


@pytest.mark.parametrize("name", ["curl-stream", "java-stream"])
def test_a_sample_prints_the_events(name: str, codes: dict[str, str], answer: str, tmp_path: Path) -> None:
    done = run(name, codes[name], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert text_of(done.stdout) == answer


def text_of(events: str) -> str:
    """The answer in a stream of events. It must have come to its end."""
    *pieces, last = [line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data: ")]
    assert last == "[DONE]" and len(pieces) > 2
    return "".join(json.loads(piece)["response"] for piece in pieces)


@pytest.mark.parametrize("name", ["http", "http-stream"])
def test_the_raw_request_is_answered(name: str, codes: dict[str, str], answer: str, server: Server) -> None:
    host = urlsplit(server.url)
    with socket.create_connection((host.hostname or "", host.port or 0), timeout=60) as connection:
        connection.sendall("\r\n".join(codes[name].split("\n")).encode())
        raw = received(connection)
    assert raw.startswith(b"HTTP/1.1 200 OK\r\n")
    told = parsed(raw)
    assert answer == (text_of(told.text) if name == "http-stream" else told.json["response"])


def test_the_openai_samples_print_the_answer(codes: dict[str, str], answer: str, tmp_path: Path) -> None:
    done = run("openai-python", codes["openai-python"], tmp_path)
    assert (done.stdout, done.stderr) == (f"{answer}\n", "")
    told = json.loads(run("openai-curl", codes["openai-curl"], tmp_path).stdout)
    assert told["choices"][0]["message"]["content"] == answer


@pytest.mark.parametrize("name", ["python", "python-stream", "javascript", "javascript-stream", "php", "php-stream"])
def test_a_sample_says_what_is_wrong_when_it_is_refused(name: str, codes: dict[str, str], tmp_path: Path) -> None:
    done = run(name, codes[name].replace("Tell me about llama2", " "), tmp_path)
    assert done.returncode != 0 and done.stdout == ""
    assert "400: prompt is empty: say what the model should answer (" in done.stderr
