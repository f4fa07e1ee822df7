"""Calls of functions are told from texts, whole and in pieces alike."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacli.server.tools import CallReader, call_in, is_whole

ANSWERS = [
    '{"name":"f","arguments":{}}',
    ' {"name": "get_weather", "arguments": {"city": "Paris", "days": [1, 2]}}',
    "It is noon.",
    " It is noon.",
    '{"name" is how a call begins, and this is none',
    "",
]


@pytest.mark.parametrize("is_cut", [False, True])
@given(answer=st.sampled_from(ANSWERS), cuts=st.lists(st.integers(0, 70)))
def test_a_streamed_answer_is_what_the_whole_one_is(is_cut: bool, answer: str, cuts: list[int]) -> None:
    text = answer[:-3] if is_cut else answer
    at = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    reader = CallReader()
    content = arguments = ""
    for start, end in [*pairwise(at), (len(text), len(text))]:
        is_last = start == end
        more = reader.feed(text[start:end], ended=is_last, is_cut=is_cut)
        content, arguments = content + more[0], arguments + more[1]
    call = call_in(text, is_cut=is_cut)
    if call is None:
        assert (reader.name, content, arguments) == (None, text, "")
    else:
        assert (reader.name, content, arguments) == (call.name, "", call.arguments)


@pytest.mark.parametrize("end", ["", "{}", "[" * 100_000])
def test_a_call_without_its_end_is_not_whole_however_deep_it_goes(end: str) -> None:
    assert not is_whole('{"name":"f","arguments":' + end)
    assert is_whole(ANSWERS[1])
