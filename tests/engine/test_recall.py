"""What was answered is found again by what was asked and what was said, and by nothing less."""

from __future__ import annotations

from array import array

import pytest

from llamacli.engine.recall import Recall, spelling

PIECES = {
    1: b"",
    5: b" He",
    6: b"llo",
    7: b" you",
    8: b"\n\n",
    9: b"Us",
    10: b"er:",
    11: b"!",
    12: b"\xf0\x9f",
    13: b"\xa6\x99",
}


def ids(*tokens: int) -> array[int]:
    return array("i", tokens)


@pytest.mark.parametrize(
    ("text", "tokens", "spelt"),
    [
        ("Hello you!", ids(5, 6, 7, 11), ids(5, 6, 7, 11)),
        ("Hello", ids(5, 6, 8), ids(5, 6, 8)),  # white space at the end is the answer's own
        ("Hello", ids(5, 6, 8, 9, 10), ids(5, 6, 8)),  # "User:" was a stop string
        ("Hello \U0001f999", ids(5, 6, 7)[:2] + array("i", [12, 13]), None),
        ("Hello\U0001f999", ids(5, 6, 12, 13), ids(5, 6, 12, 13)),
        ("Hello\ufffd", ids(5, 6, 12), ids(5, 6, 12)),  # cut by max_tokens within a character
        ("Hello U", ids(5, 6, 9), None),  # a stop string began within a token
        ("Hello", ids(5, 1, 6), None),
        ("", ids(5, 6), None),
    ],
)
def test_an_answer_s_tokens_are_those_that_spell_what_was_shown(
    text: str, tokens: array[int], spelt: array[int] | None
) -> None:
    assert spelling(text, tokens, PIECES.__getitem__) == spelt


def test_an_answer_is_remembered_for_its_own_prompt_alone() -> None:
    recall = Recall()
    recall.note(ids(1, 2), ids(5, 6), "Hello")
    assert recall.knows("Hello\n") and not recall.knows("Hell")
    assert recall.continued(ids(1, 2), " Hello") == ids(1, 2, 5, 6)
    assert recall.continued(ids(1, 3), "Hello") is None
    assert recall.continued(ids(1, 2), "Bye") is None


def test_the_answer_that_nobody_came_back_to_is_forgotten_first() -> None:
    recall = Recall(max_tokens=150)
    for prompt in (1, 2):
        recall.note(ids(prompt), ids(5), "yes")
    assert recall.continued(ids(1), "yes")
    recall.note(ids(3), ids(5), "no")
    recall.note(ids(3), ids(6), "no")
    assert [recall.continued(ids(prompt), "yes") is not None for prompt in (1, 2)] == [True, False]
    assert recall.continued(ids(3), "no") == ids(3, 6)
    recall.note(ids(4), ids(*[5] * 300), "longer than all")
    assert not any(recall.knows(text) for text in ("yes", "no", "longer than all"))
