"""What a server must take from strangers: JSON that is none, HTTP that is hardly any, texts of every kind."""

from __future__ import annotations

import json
import os
import socket
import time
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import pytest
from raw import answers, connected, get, post, talk, until_closed
from test_serve import ANSWER, PATHS, QUESTION, Server, running

SHORT = {"prompt": "hi", "max_tokens": 3, "temperature": 0}
GREEDY = {"prompt": QUESTION, "temperature": 0}
CONTEXT = 1024  # tokens, of the tiny model


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMACLI_", "HF_"))}
    home = str(tmp_path_factory.mktemp("home"))
    return ours | {"LLAMACLI_HOME": home, "LLAMACLI_MODEL": "tiny", "LLAMACLI_THREADS": "1"}


@pytest.fixture(scope="module")
def server(surroundings: dict[str, str]) -> Iterator[Server]:
    with running(surroundings) as started:
        yield started


@pytest.fixture(scope="module")
def hasty(surroundings: dict[str, str]) -> Iterator[Server]:
    """A server with little patience."""
    with running(surroundings, "--headers-timeout", "0.5", "--body-timeout", "0.7") as started:
        yield started


# -- bodies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("null", "must be a JSON object, not null"),
        ('"x"', "must be a JSON object, not a string"),
        ("{}{}", "Extra data"),
        ('{"prompt": "hi",}', "not JSON"),
        ("{'prompt': 'hi'}", "not JSON"),
        ('{"prompt": "a\nb"}', "Invalid control character"),
        ('{"prompt": "hi"}\0', "Extra data"),
        ('{"prompt": "hi", "temperature": Infinity}', "Infinity is not allowed"),
        ('{"prompt": "hi", "temperature": 1e999}', "temperature must be between 0 and 2, not Infinity"),
        ('{"prompt": "hi", "max_tokens": 1e999}', "max_tokens must be an integer"),
        ('{"prompt": "hi", "max_tokens": -0}', "max_tokens must be 1 or more, not 0"),
        ('{"prompt": "hi", "seed": 18446744073709551616}', "seed must be between"),
        ('{"prompt": "hi", "top_k": ' + "9" * 4000 + "}", "an integer of 4,000 characters"),
        ('{"prompt": "hi", "max_tokens": ' + "9" * 5000 + "}", "an integer of 5,000 characters"),
        ('{"prompt": {"a": 1}}', "prompt must be a string, not an object"),
        ('{"prompt": ["hi"]}', "prompt must be a string, not an array"),
        ('{"prompt": "hi", "stop": 1}', "stop must be a string or an array"),
        ('{"prompt": "hi", "stop": ["a", null]}', "stop must be a string or an array"),
        ('{"prompt": "hi", "stop": ' + json.dumps(["x"] * 17) + "}", "17 strings; 16 are allowed"),
        ('{"prompt": "hi", "system prompt": 1}', "system prompt must be a string"),
        ('{"prompt": "hi", "response_format": []}', "response_format must be an object"),
        ('{"prompt": "hi", "\\udfff": 1}', "half of a surrogate pair"),
        ('{"prompt": "hi", "x": ["\\ud83d "]}', "half of a surrogate pair"),
        (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"prompt": "\xc0\xaf"}', "not UTF-8"),
        (b'{"prompt": "\xe4"}', "not UTF-8"),
        (json.dumps(SHORT).encode("utf-16"), "not UTF-8"),
        (json.dumps(SHORT).encode("utf-16-le"), "not JSON"),
        (json.dumps(SHORT).encode("utf-32"), "not UTF-8"),
    ],
)
def test_a_body_that_cannot_be_meant_is_refused_with_the_reason(body: str | bytes, said: str, server: Server) -> None:
    reply = server.post(body.encode() if isinstance(body, str) else body)
    assert (reply.status, set(reply.json)) == (400, {"code", "message", "traceId"})
    assert said in reply.json["message"] and len(reply.json["message"]) < 400


def test_numbers_at_the_edge_are_taken(server: Server) -> None:
    for said in ('"temperature": -0.0', '"temperature": 1e-999', '"max_tokens": 1' + "0" * 399, '"x": -1e999'):
        body = '{"stop": "a", "prompt": "hi", "max_tokens": 2, ' + said + "}"
        assert server.post(body.encode()).status == 200, said


def test_every_depth_of_nesting_is_answered(server: Server) -> None:
    """The reader and the writer of JSON reach their limits at different depths, and each Python has its own."""
    with connected(server) as client:

        def status(depth: int) -> int:
            inner = "[" * depth + '"\\u00e4"' + "]" * depth
            client.sendall(post(b'{"prompt": "hi", "max_tokens": 1, "x": %s}' % inner.encode()))
            return int(client.recv(1 << 16).split()[1])

        first = bisect_left(range(1 << 17), 400, key=status)
        found = [status(depth) for depth in range(first - 60, first + 30)]
    assert found == [200] * 60 + [400] * 30, "all up to some depth, and none from there on"


@pytest.mark.parametrize("length", [20 << 20, None])
def test_a_body_that_is_too_large_is_answered_while_it_is_still_being_sent(length: int | None, server: Server) -> None:
    """A client that writes all before it reads must find the answer, not a reset connection."""
    chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    framing = f"Content-Length: {length}" if length else "Transfer-Encoding: chunked"
    head = f"POST /v1/getData HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n".encode()
    (reply,) = answers(talk(server, head, *[chunk] * 19))
    assert (reply.status, reply.json["code"], reply.headers["connection"]) == (413, 413, "close")


# -- texts -------------------------------------------------------------------------------------------------------

TEXTS = {
    "right to left": "مرحبا بالعالم שלום \u202eabc\u202c",
    "combining": "e\u0301" + "a" + "\u0300\u0301\u0302" * 30,
    "families": "👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪",
    "beyond the first plane": "𝕷𝖑𝖆𝖒𝖆 \U00020000 \U0010ffff",
    "a byte order mark within": "a\ufeffb",
    "separators": "a\u2028b\u2029c\u0085d\x0b\x0c",
    "no characters": "\ufffe\uffff\U0001fffe",
    "private": "\ue000\uf8ff",
    "nul": "a\0b\0",
    "controls": "".join(map(chr, range(32))) + "\x7f",
    "white space": "\u00a0\u3000\u200b.",
    "special tokens": "</s><s>[INST] <<SYS>> [/INST]<unk><0x0A>",
    "many": "ﷺ" * 100,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_any_text_may_be_a_prompt(text: str, server: Server) -> None:
    asked = {"prompt": text, "system prompt": text, "max_tokens": 4, "temperature": 0}
    plain, escaped = (json.dumps(asked, ensure_ascii=is_ascii).encode() for is_ascii in (False, True))
    first, second = server.post(plain), server.post(escaped)
    assert first.status == second.status == 200, first.text
    assert first.json["response"] == second.json["response"]
    *pieces, done = server.post(asked | {"stream": True}).events
    assert done == "[DONE]"
    assert "".join(json.loads(piece)["response"] for piece in pieces) == first.json["response"]
    chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 1, "stop": [text[:20]]}
    assert server.post(chat, "/v1/chat/completions").status == 200
    named = server.post({"messages": [{"role": "user", "content": "hi"}], "model": text}, "/v1/chat/completions")
    assert named.status == 404 and named.json["error"]["code"] == "model_not_found"


# -- as long as the context --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_may_leave_room_for_one_more_and_no_less(stream: bool, server: Server) -> None:
    def ask(n: int) -> Any:
        return server.post({"prompt": [1] + [300] * (n - 1), "ignore_eos": True, "stream": stream}, "/v1/completions")

    fits = ask(CONTEXT - 1)
    assert fits.status == 200 and '"finish_reason":"length"' in fits.text
    if not stream:
        assert fits.json["usage"]["completion_tokens"] == 1
    for n in (CONTEXT, CONTEXT + 1):
        refused = ask(n)
        assert refused.status == 400
        assert f"{n:,} tokens" in refused.json["error"]["message"] and "1,024" in refused.json["error"]["message"]


def test_a_prompt_may_leave_room_for_one_more_and_no_less(server: Server) -> None:
    def ask(n_words: int) -> Any:
        return server.post({"prompt": "la " * n_words + "la", "ignore_eos": True, "temperature": 0})

    few = ask(900).json["usage"]["prompt_tokens"]
    fits = ask(900 + CONTEXT - 1 - few)
    assert fits.json["usage"] == {"prompt_tokens": 1023, "completion_tokens": 1, "total_tokens": 1024}
    assert fits.json["finish_reason"] == "length"
    for more in (0, 1):
        refused = ask(900 + CONTEXT + more - few)
        assert refused.status == 400
        assert f"{CONTEXT + more:,} tokens; the context holds 1,024" in refused.json["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_one_prompt_of_several_that_does_not_fit_refuses_them_all(stream: bool, server: Server) -> None:
    asked = {"prompt": [[1, 300], [300] * 2000], "ignore_eos": True, "max_tokens": 900, "stream": stream}
    refused = server.post(asked, "/v1/completions")
    if refused.status == 200:  # the first one had begun to stream
        assert "[DONE]" not in refused.text
        refused.text = refused.events[-1]
    assert "2,000 tokens; the context holds 1,024" in refused.json["error"]["message"]
    assert stream or refused.status == 400


# -- slow clients ------------------------------------------------------------------------------------------------


def test_headers_that_do_not_come_are_not_waited_for(hasty: Server) -> None:
    with connected(hasty) as slow:
        began = time.monotonic()
        for byte in get("/health"):
            slow.sendall(bytes([byte]))
            time.sleep(0.05)
            if time.monotonic() - began > 0.6:
                break
        (reply,) = answers(until_closed(slow))
    assert (reply.status, set(reply.json)) == (408, {"code", "message", "traceId"})
    assert "within 0.5 s" in reply.json["message"]


def test_a_client_that_says_nothing_is_hung_up_on(hasty: Server) -> None:
    assert talk(hasty) == b""
    assert answers(talk(hasty, get("/health"), b"GET /hea"), "GET")[1].status == 408


def test_a_body_that_does_not_come_is_not_waited_for(hasty: Server) -> None:
    with connected(hasty) as slow:
        began = time.monotonic()
        for byte in post(SHORT)[:-1]:
            slow.sendall(bytes([byte]))
            time.sleep(0 if byte in b"POST" else 0.004)
        (reply,) = answers(until_closed(slow))
        assert time.monotonic() - began > 0.7
    assert (reply.status, reply.json["code"]) == (408, 408) and "within 0.7 s" in reply.json["message"]


def test_a_refused_body_is_not_taken_for_ever(hasty: Server) -> None:
    """The answer is out, but the client goes on sending what nobody wants."""
    with connected(hasty) as slow:
        slow.sendall(b"PUT /v1/getData HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
        received = slow.recv(1 << 16)
        assert received.startswith(b"HTTP/1.1 405")
        assert slow.recv(1) == b""


@pytest.mark.slow
def test_the_limits_are_fifteen_and_thirty_seconds_unless_said_otherwise(server: Server) -> None:
    for request, seconds in ((get("/health")[:-2], 15), (post(SHORT)[:-1], 30)):
        began = time.monotonic()
        (reply,) = answers(talk(server, request))
        assert reply.status == 408 and f"within {seconds} s" in reply.json["message"]
        assert seconds <= time.monotonic() - began < seconds + 5


# -- half a connection -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("stream", [False, True])
def test_who_has_closed_its_own_side_is_still_answered(version: str, stream: bool, server: Server) -> None:
    asked = GREEDY | {"stream": stream}
    (reply,) = answers(talk(server, post(asked, version=version), is_half_closed=True))
    assert reply.status == 200
    pieces = [json.loads(event)["response"] for event in reply.events[:-1]] if stream else [reply.json["response"]]
    assert "".join(pieces) == ANSWER


def test_all_that_was_asked_before_the_side_was_closed_is_answered(server: Server) -> None:
    received = talk(server, post(GREEDY), post(SHORT), get("/health"), is_half_closed=True)
    assert [reply.status for reply in answers(received)] == [200, 200, 200]
    assert answers(talk(server, post({}), is_half_closed=True))[0].status == 400
    (half,) = answers(talk(server, post(SHORT)[:-1], is_half_closed=True))
    assert half.status == 400 and "ended before its body" in half.json["message"]
    assert talk(server, b"GET /he", is_half_closed=True) == b""


# -- HTTP --------------------------------------------------------------------------------------------------------


def test_pipelined_requests_are_answered_in_their_order(server: Server) -> None:
    asked = [post(SHORT | {"max_tokens": n}, f"X-Request-Id: {n}") for n in (40, 1, 20, 2)]
    received = talk(server, b"".join(asked), get("/nowhere", "X-Request-Id: 9"), get("/health", "Connection: close"))
    found = answers(received)
    assert [reply.headers["x-trace-id"] for reply in found[:-1]] == ["40", "1", "20", "2", "9"]
    assert [reply.status for reply in found] == [200] * 4 + [404, 200]


def test_a_flood_of_pipelined_requests_is_answered_to_the_last(server: Server) -> None:
    received = talk(server, get("/health") * 3000, get("/health", "Connection: close"))
    assert received.count(b"HTTP/1.1 200 OK") == 3001


def test_what_is_no_http_does_not_spoil_the_answer_before_it(server: Server) -> None:
    first, second = answers(talk(server, post(GREEDY | {"stream": True}) + b"\x16\x03\x01 what?\r\n\r\n"))
    assert first.status == 200 and first.events[-1] == "[DONE]"
    assert (second.status, set(second.json)) == (400, {"code", "message", "traceId"})


def test_http_1_0_is_spoken(server: Server) -> None:
    (plain,) = answers(talk(server, post(SHORT, version="1.0")))
    assert plain.status == 200 and plain.headers["connection"] == "close"
    kept = answers(talk(server, post(SHORT, "Connection: keep-alive", version="1.0") + post(SHORT, version="1.0")))
    assert [reply.headers["connection"] for reply in kept] == ["keep-alive", "close"]
    asked = post(SHORT | {"stream": True}, "Connection: keep-alive", version="1.0")
    (stream,) = answers(talk(server, asked))
    assert "transfer-encoding" not in stream.headers and stream.headers["connection"] == "close"
    assert stream.events[-1] == "[DONE]"


@pytest.mark.parametrize("path", [*PATHS, "/v1/chat/completions", "/v1/models", "/health", "/nowhere"])
def test_other_methods_are_refused_and_the_connection_goes_on(path: str, server: Server) -> None:
    methods = ["PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "HEAD"]
    asked = [get(path, method=method) for method in methods]
    *found, last = answers(talk(server, *asked, get("/health", "Connection: close")), *methods)
    assert last.json == {"status": "ok"}
    refusal = 404 if path == "/nowhere" else 405
    assert [reply.status for reply in found[:-1]] == [refusal] * 5
    assert all(reply.headers["allow"] in ("GET", "POST", "GET, POST") for reply in found[:-1] if refusal == 405)
    assert found[-1].text == "" and int(found[-1].headers["content-length"]) > 0


def test_a_client_that_asks_first_is_told_to_go_on_or_not_to(server: Server) -> None:
    head, body = post(SHORT, "Expect: 100-continue", "Connection: close").split(b"\r\n\r\n")
    with connected(server) as client:
        client.sendall(head + b"\r\n\r\n")
        assert client.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert answers(until_closed(client))[0].status == 200
    too_large = b"POST / HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 99999999\r\n\r\n"
    assert answers(talk(server, too_large))[0].status == 413
    # It may keep the body to itself then: what comes next must not be taken for it.
    refused = get("/v1/getData", "Expect: 100-continue", "Content-Length: 5", method="PUT")
    assert answers(talk(server, refused))[0].headers["connection"] == "close"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (
            b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n{}", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1e3\r\n\r\n{}", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: \xb2\r\n\r\n{}", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999999999\r\n\r\n{}", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999999999999\r\n\r\n{}", 413),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n{}", 400),
        (
            b"POST / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: x\r\nTransfer-Encoding: gzip\r\n"
            b"Host: localhost\r\n\r\n{}",
            400,
        ),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\r\n folded\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX : a\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: evil.example\r\nHost: localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\norigin: http://localhost\r\n\r\n", 400),
        (b"GET /health\r\n\r\n", 505),
        (b"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"LOOK /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"CONNECT example.org:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000, 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 300 + b"\r\n", 431),
        (b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
        (
            b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: "
            + b"a" * 200_000,
            431,
        ),
    ],
    ids=lambda value: value if isinstance(value, int) else value[:70].decode("latin-1").replace("\r\n", " "),
)
def test_what_is_not_http_gets_one_answer_in_our_shape_and_no_other(
    request_: bytes, status: int, server: Server
) -> None:
    (reply,) = answers(talk(server, request_))
    assert (reply.status, set(reply.json), reply.json["code"]) == (status, {"code", "message", "traceId"}, status)
    assert (reply.headers["x-trace-id"], reply.headers["connection"]) == (reply.json["traceId"], "close")


def test_odd_addresses_lead_nowhere_or_where_they_say(server: Server) -> None:
    addresses = ["*", "//", "/%00%ff%0a", "/v1/../health", "/%2e%2e/health", "/v1/models/%2f", "/" + "a" * 60_000]
    for address in addresses:
        (reply,) = answers(talk(server, get(address, "Connection: close")))
        assert reply.status == 404, address
    whole = get("http://127.0.0.1/health?x=1#y", "Connection: close")
    assert answers(talk(server, whole))[0].status == 200


def test_a_key_in_an_address_that_leads_nowhere_is_neither_told_nor_logged(surroundings: dict[str, str]) -> None:
    addresses = ["x?subscription-key=s3cret", "x%3fsubscription-key=s3cret", "/nowhere?subscription-key=s3cret"]
    addresses += [
        "/v1/models/%3Fsubscription-key=s3cret",
        "/nowhere%3Fsubscription-key=s3cret",
        "/v1/models/other%3Fsubscription-key=s3cret",
    ]
    with running(surroundings) as fresh:
        for address in addresses:
            (reply,) = answers(talk(fresh, get(address, "Connection: close")))
            assert reply.status in (400, 404) and "s3cret" not in reply.text, address
        log = fresh.end()
    paths = [line["path"] for line in log if line["event"] == "request"]
    assert paths[-3:] == ["/v1/models/", "/nowhere", "/v1/models/other"]
    assert "s3cret" not in json.dumps(log)


def test_an_offer_of_another_protocol_is_passed_over(server: Server) -> None:
    """Java's HttpClient makes it with its first request, body and all."""
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA")
    chunked = get("/v1/getData", *offer, "Transfer-Encoding: chunked", method="POST")
    body = json.dumps(SHORT).encode()
    received = talk(
        server,
        post(SHORT, *offer) + post(SHORT, *offer)[:-1],
        b"}",
        chunked + b"%x\r\n%b\r\n" % (len(body), body) + b"0\r\n\r\n",
        get("/health", *offer),
        get("/health", "Connection: close"),
        nap=0.02,
    )
    found = answers(received)
    assert [reply.status for reply in found] == [200] * 5
    assert len({reply.json["response"] for reply in found[:3]}) == 1


def test_a_log_that_nobody_reads_does_not_stop_the_server(surroundings: dict[str, str]) -> None:
    with running(surroundings) as unread:
        with connected(unread, timeout=10) as client:
            for _ in range(3):
                client.sendall(get("/health", "X-Request-Id: " + "x" * 100) * 400)
                received = b""
                while received.count(b'{"status": "ok"}') < 400:
                    received += client.recv(1 << 16)
        lines = unread.end()
    assert sum(line["event"] == "request" for line in lines) == 1200


def test_a_unix_socket_may_be_half_closed_too(surroundings: dict[str, str], tmp_path_factory: Any) -> None:
    path = str(tmp_path_factory.mktemp("uds") / "s")
    with running(surroundings, "--uds", path):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(path)
            client.sendall(post(GREEDY))
            client.shutdown(socket.SHUT_WR)
            assert answers(until_closed(client))[0].json["response"] == ANSWER
