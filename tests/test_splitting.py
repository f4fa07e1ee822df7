"""Parts that fit, cut where a reader would, and nothing of the text left out."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llamacli.engine.llama import LlamaWeights
from llamacli.errors import InputTooLong
from llamacli.splitting import split

FRAME = 10  # tokens of a prompt beside its part


def count(text: str) -> int:
    """A token for each word and each mark, as a stand-in for a vocabulary."""
    return len(re.findall(r"\w{1,5}|\S|\n", text))


def parts_of(text: str, room: int, overlap: int = 0) -> list[str]:
    return split(text, count, lambda part: FRAME + count(part), room=room, overlap=overlap)


SENTENCES = [f"Sentence {i} says one thing or another." for i in range(60)]
PROSE = "\n\n".join(" ".join(SENTENCES[i : i + 6]) for i in range(0, 60, 6))


def test_parts_end_with_paragraphs_where_some_end_near() -> None:
    parts = parts_of(PROSE, 140)
    assert "\n\n".join(parts) == PROSE
    assert all(FRAME + count(part) <= 140 for part in parts)


def test_parts_of_one_paragraph_end_with_sentences() -> None:
    text = " ".join(SENTENCES)
    parts = parts_of(text, 60)
    assert len(parts) > 5 and all(part.rstrip().endswith("another.") for part in parts)
    assert "".join(parts) == text


def test_as_much_is_taken_as_fits() -> None:
    text = "word " * 1000
    parts = parts_of(text, 110)
    assert all(count(part) > 90 for part in parts[:-1])
    assert "".join(parts) == text


def test_the_end_of_a_part_is_repeated_in_the_next_up_to_the_overlap() -> None:
    text = " ".join(SENTENCES)
    parts = parts_of(text, 80, overlap=20)
    for before, after in pairwise(parts):
        shared = next(n for n in range(min(len(before), len(after)), -1, -1) if before.endswith(after[:n]))
        assert 5 < count(after[:shared]) <= 20
        assert after.startswith("Sentence")


@pytest.mark.parametrize("text", ["x" * 5000, "a" + "\n" * 3000 + "b", "。".join(["漢字"] * 900)])
def test_a_text_without_words_is_split_all_the_same(text: str) -> None:
    parts = parts_of(text, 60)
    assert all(FRAME + count(part) <= 60 for part in parts)
    assert "".join(parts).replace("\n", "") == text.replace("\n", "")


def test_where_there_is_no_room_it_is_said() -> None:
    with pytest.raises(InputTooLong, match="leave no room"):
        parts_of(PROSE, FRAME + 5)


@example("a.a..a..a.a.a.a..a.a \n\n", 30, 0)  # a piece of no tokens at a border
@given(
    st.text(st.sampled_from("ab .!\n\u00e9漢"), max_size=600),
    st.integers(30, 80),
    st.integers(0, 8),
)
def test_whatever_the_text_parts_fit_and_nothing_is_lost(text: str, room: int, overlap: int) -> None:
    parts = parts_of(text, room, overlap)
    assert all(FRAME + count(part) <= room for part in parts)
    if overlap == 0:
        assert "".join(parts).replace("\n", "") == text.replace("\n", "")
    at = 0  # every character stands in some part, in order
    squeezed = text.replace("\n", "")
    for part in parts:
        piece = part.replace("\n", "")
        found = squeezed.rfind(piece, 0, at + len(piece))
        assert found >= 0
        at = max(at, found + len(piece))
    assert at == len(squeezed)


def test_parts_fit_to_the_token_in_the_real_vocabulary(weights: LlamaWeights) -> None:
    vocabulary = weights.vocabulary

    def tokens(text: str) -> int:
        return len(vocabulary.tokenize(text))

    def whole(part: str) -> int:
        return tokens(f"[INST] ```\n{part}\n``` Sum up [/INST]")

    parts = split(PROSE * 20, tokens, whole, room=300, overlap=20)
    assert all(200 < whole(part) <= 300 for part in parts[:-1])
