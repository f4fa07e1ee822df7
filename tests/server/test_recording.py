"""Recordings, what counts as the same question, and rules for faults: without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacli.errors import UsageError
from llamacli.server import matching, recording, rules, simulation
from llamacli.server.exchange import Exchange
from llamacli.server.matching import Matcher
from llamacli.server.recorder import Recorder
from llamacli.server.recording import Chunk, Recorded

HEAD = '{"format": "llamacli-recording", "version": 1, "model": "tiny"}'
ENTRY = (
    '{"request": {"path": "/v1/getData", "json": {"prompt": "a"}}, '
    '"response": {"status": 200, "json": {"response": "b"}}}'
)
DEFAULTS = {"temperature": 0.6, "top_p": 0.9, "top_k": 40}


def changed(old: str, new: str) -> str:
    """A recording with something else in its second line."""
    return f"{HEAD}\n{ENTRY.replace(old, new)}\n"


def entry(**changes: Any) -> Recorded:
    usual: dict[str, Any] = {"path": "/v1/getData", "body": b'{"prompt":"a"}', "status": 200, "headers": ()}
    return Recorded(**usual | {"chunks": (Chunk(b'{"response":"b"}'),)} | changes)


@given(st.lists(st.binary(max_size=40) | st.just(b'data: {"response":"\xc3\xa9"}\n\ndata: [DONE]\n\n'), min_size=1))
def test_what_is_written_is_read_again_to_the_byte(parts: list[bytes]) -> None:
    streamed = entry(chunks=tuple(Chunk(part, 0.25) for part in parts), is_stream=True, trace_id="t")
    whole = entry(chunks=(Chunk(parts[0]),), headers=(("content-type", "text/plain"),))
    raw = recording.head("tiny", {}) + recording.written(streamed) + recording.written(whole)
    read = recording.parse(raw, "x").entries
    assert [(e.chunks, e.is_stream, e.headers, e.trace_id) for e in read] == [
        (streamed.chunks, True, (), "t"),
        (whole.chunks, False, whole.headers, ""),
    ]


def test_a_recording_can_be_read_by_people() -> None:
    line = json.loads(recording.written(entry(chunks=(Chunk(b'data: {"response":"b"}\n\n', 0.5),), is_stream=True)))
    assert line["request"] == {"path": "/v1/getData", "json": {"prompt": "a"}}
    assert line["response"]["chunks"] == [{"after": 0.5, "events": [{"response": "b"}]}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: it is empty"),
        ("{}\n", "line 1: this is no recording"),
        (HEAD.replace("1", "2", 1), "line 1: it has version 2; this llamacli reads up to 1: update llamacli"),
        (f"{HEAD}\n{ENTRY}\n{ENTRY[:50]}", "line 3: it breaks off in the middle"),
        (f"{HEAD}\n{ENTRY[:50]}\n{ENTRY}\n", "line 2: it is not JSON"),
        (f"{HEAD}\n\n[1]\n", "line 3: it must be a JSON object"),
        (f"{HEAD}\n\xff\n", "line 2: byte 1 is not UTF-8"),
        (f"{HEAD}\n{'[' * 100_000}\n", "line 2: it is"),
        (f'{HEAD}\n{{"request": 1}}\n', "line 2: request must be an object"),
        (changed("status", "state"), "line 2: response.state is unknown; known are status"),
        (changed("200", "20"), "line 2: response.status must be a number between 200 and 599"),
        (changed("/v1", "v1"), "line 2: request.path must be a string such as /v1/getData"),
        (changed("200,", '200, "text": "",'), "line 2: response must have one of"),
        (changed("200,", '200, "headers": {"a b": ""},'), "line 2: response.headers.a b is no"),
        (changed("200,", '200, "after": -1,'), "line 2: response.after must be seconds"),
        (changed('200, "json"', '200, "chunks"'), "line 2: response.chunks must be an array"),
    ],
)
def test_a_recording_that_is_not_whole_is_refused_by_line_and_reason(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        recording.parse(text.encode("latin-1"), "talk.jsonl")
    assert str(caught.value).startswith(f"talk.jsonl, {said}")


def test_a_key_is_in_no_recording_wherever_it_was_said() -> None:
    key = 'secret-"key"/1'
    said = json.dumps({"code": 401, "message": f"{key} is not valid"}).encode()
    told = entry(body=json.dumps({"prompt": key}).encode(), chunks=(Chunk(said),))
    raw = recording.written(told, [key]) + recording.written(entry(chunks=(Chunk(b"\xff" + key.encode()),)), [key])
    assert "secret" not in raw.decode() and b"SCRUBBED is not valid" in raw
    assert b"c2VjcmV0" not in raw, "nor in base64"


def test_a_short_word_is_no_secret() -> None:
    assert b'"response": "none"' in recording.written(entry(chunks=(Chunk(b'{"response":"none"}'),)), ["none"])


def test_a_full_disk_cuts_no_line_in_half() -> None:
    reports: list[str] = []
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    Recorder(full, model="tiny", defaults={}, report=reports.append).close()
    assert len(reports) == 1 and "No space left" in reports[0]


def test_a_recording_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    for _ in range(2):
        recorder = Recorder(path, model="tiny", defaults={}, report=print)
        recorder.add(entry(), [])
        recorder.close()
        path.write_bytes(path.read_bytes().rstrip(b"\n"))  # as an editor may leave it
    assert [each.line for each in recording.read(path).entries] == [2, 3]


# -- the same question --------------------------------------------------------------------------------------------


def same(one: tuple[str, str], other: tuple[str, str], *match_on: str) -> bool:
    matcher = Matcher(DEFAULTS, matching.chosen(match_on))
    a, b = (matcher.key(matcher.question(path, body.encode())) for path, body in (one, other))
    return a == b


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('{"prompt":"a","top_k":3}', '{ "top_k": 3,\n "prompt": "a" }'),
        ('{"prompt":"a"}', '{"prompt":"a","stream":false,"temperature":0.6,"top_p":null}'),
        ('{"prompt":"a","temperature":1}', '{"prompt":"a","temperature":1.0}'),
        ('{"prompt":"a","system":"b"}', '{"prompt":"a","system prompt":"b"}'),
        ('{"prompt":"a","system":""}', '{"prompt":"a"}'),
        ('{"prompt":"a","stop":"b"}', '{"prompt":"a","stop":["b"]}'),
        ('{"prompt":"\\u00e9"}', '{"prompt":"é"}'),
    ],
)
def test_questions_that_mean_the_same_match(one: str, other: str) -> None:
    assert same(("/v1/getData", one), ("/", other))


@pytest.mark.parametrize(
    "other", ['{"prompt":"b"}', '{"prompt":"a","stream":true}', '{"prompt":"a","temperature":0}', "", '["a"]']
)
def test_questions_that_do_not_are_told_apart(other: str) -> None:
    assert not same(("/v1/getData", '{"prompt":"a"}'), ("/v1/getData", other))


def test_routes_are_told_apart_and_what_has_no_effect_is_not() -> None:
    chat = '{"messages":[{"role":"user","content":"a"}],"user":"me","max_completion_tokens":3}'
    plain = '{"messages":[{"role":"user","content":"a"}],"max_tokens":3}'
    assert same(("/v1/chat/completions", chat), ("/v1/chat/completions", plain))
    assert not same(("/v1/chat/completions", plain), ("/v1/completions", plain))


def test_the_fields_that_count_can_be_chosen_and_a_stream_always_counts() -> None:
    one, other = '{"prompt":"a","seed":1}', '{"prompt":"a","seed":2}'
    assert same(("/", one), ("/", other), "prompt") and not same(("/", one), ("/", other), "prompt,seed")
    assert not same(("/", '{"prompt":"a","stream":true}'), ("/", '{"prompt":"a"}'), "prompt")
    with pytest.raises(UsageError, match="'promt' is no field of a request"):
        matching.chosen(["promt"])


# -- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stattus=429", "'stattus' is unknown; known are status, retry-after, delay, token-rate, cut-after, malformed"),
        ("status=200", "status must be an integer between 400 and 599, not '200'"),
        ("status", "status must be an integer"),
        ("delay=-1", "delay must be a number between 0 and 3600"),
        ("delay=nan", "delay must be a number"),
        ("token-rate=0", "token-rate must be a number above 0"),
        ("malformed=1", "malformed must be without a value"),
        ("reset, reset", "reset is given twice"),
        ("content-type=html", "content-type must be a type such as text/html"),
        (" , ", "a simulation is missing"),
        ("delay=\u0663", "'delay=\u0663' must be of printable ASCII characters"),
        ("status=\xa0429", "must be of printable ASCII characters"),
        ("status\r\n=429", "must be of printable ASCII characters"),
    ],
)
def test_a_strange_fault_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        simulation.parse(text)


def test_an_answer_with_a_header_that_cannot_be_sent_has_not_begun() -> None:
    sent: list[MutableMapping[str, Any]] = []

    async def nothing() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def keep(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    exchange = Exchange({"method": "POST", "path": "/", "headers": [], "query_string": b""}, nothing, keep)
    with pytest.raises(UnicodeEncodeError):
        asyncio.run(exchange.respond(200, b"{}", headers=[("x-name", "\u0663")]))
    assert (exchange.status, sent) == (None, []), "an error may still be told"


def spoilt(fault: str, *parts: bytes) -> list[bytes]:
    """What comes out of a stream that was sent in these parts."""
    sent: list[bytes] = []

    async def nothing() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def keep(message: MutableMapping[str, Any]) -> None:
        sent.append(message.get("body", b""))

    async def run() -> None:
        scope = {"method": "POST", "path": "/", "headers": [], "query_string": b""}
        exchange = Exchange(scope, nothing, keep)
        await simulation.befall(simulation.parse(fault), exchange)
        await exchange.start_events()
        for part in parts:
            await exchange.events(part)
        await exchange.events(b"", last=True)

    asyncio.run(run())
    return [part for part in sent if part]


def test_events_are_told_apart_however_they_were_cut_on_their_way() -> None:
    assert spoilt("cut-after=99", b"data: a\n", b"\ndata: b\n\nda", b"ta: c\n\n") == [
        b"data: a\n\n",
        b"data: b\n\n",
        b"data: c\n\n",
    ]
    assert spoilt("malformed", b"data: {}\r\n\r\ndata: b\r\n\r\n") == [b"data\r\n\r\n", b"data: b\r\n\r\n"]
    assert spoilt("delay=0", b"data: no end") == [b"data: no end"]


def fired(rule: str, bodies: list[str], tmp_path: Path) -> list[bool]:
    path = tmp_path / "rules.toml"
    path.write_text(f'[[rule]]\nsimulate = "status=500"\n{rule}\n')
    found = rules.read(path)
    return [found.fault("/v1/getData", body.encode(), is_work=True) is not None for body in bodies]


def test_rules_choose_by_body_number_and_count(tmp_path: Path) -> None:
    assert fired('body = "l+ama"', ["llama", "alpaca"], tmp_path) == [True, False]
    assert fired("nth = [1, 3]", list("abcd"), tmp_path) == [True, False, True, False]
    assert fired('count = 1\nbody = "a"', list("bab"), tmp_path) == [False, True, False]
    assert fired('route = "/v1/completions"', ["a"], tmp_path) == [False]
    assert fired('route = "/"', ["a"], tmp_path) == [True], "one route, three addresses"


def test_chance_repeats_itself_with_its_seed(tmp_path: Path) -> None:
    drawn = [fired(f"probability = 0.5\nseed = {seed}", ["x"] * 200, tmp_path) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert 60 < sum(drawn[0]) < 140


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("nht = 2", "rule 1: 'nht' is unknown; known are simulate, route"),
        ("nth = 0", "rule 1: nth must be a number from 1 on"),
        ("probability = 2", "rule 1: probability must be a number between 0 and 1"),
        ('body = "("', "rule 1: body is no regular expression"),
        ("count = ", "is not TOML"),
    ],
)
def test_a_strange_rule_is_named(rule: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        fired(rule, [], tmp_path)
