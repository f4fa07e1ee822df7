"""Text safe to show: whole characters, and never the beginning of a stop string."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from llamacli.engine.detokenizer import Detokenizer


def pieces_of(raw: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(raw) + 1) for cut in cuts), len(raw)]
    return [raw[a:b] for a, b in pairwise(edges)]


def shown(detokenizer: Detokenizer, pieces: list[bytes]) -> list[str]:
    """Fed as the engine does it: nothing after a stop string."""
    texts = []
    for piece in pieces:
        texts.append(detokenizer.feed(piece))
        if detokenizer.stopped:
            break
    return [*texts, detokenizer.flush()]


def test_half_a_character_waits_for_its_other_half() -> None:
    detokenizer = Detokenizer()
    assert [detokenizer.feed(bytes([byte])) for byte in "é".encode()] == ["", "é"]


def test_half_a_character_at_the_end_becomes_a_replacement_character() -> None:
    assert "".join(shown(Detokenizer(), [b"caf", b"\xc3"])) == "caf\ufffd"


@given(st.text(), st.lists(st.integers(0, 1000), max_size=20))
def test_any_split_of_any_text_gives_the_text(text: str, cuts: list[int]) -> None:
    assert "".join(shown(Detokenizer(), pieces_of(text.encode(), cuts))) == text


@given(st.binary(max_size=60), st.lists(st.integers(0, 1000), max_size=20))
def test_any_split_of_any_bytes_gives_what_one_piece_gives(raw: bytes, cuts: list[int]) -> None:
    assert "".join(shown(Detokenizer(), pieces_of(raw, cuts))) == raw.decode("utf-8", "replace")


@given(
    st.text("abé ", max_size=30),
    st.lists(st.text("abé ", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 1000), max_size=20),
)
def test_the_earliest_stop_string_ends_the_text_wherever_tokens_are_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    detokenizer = Detokenizer(tuple(stops))
    texts = shown(detokenizer, pieces_of(text.encode(), cuts))
    begins = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    assert detokenizer.stopped == bool(begins)
    if begins:
        # A longer stop string may begin earlier than a shorter one that completes first.
        assert "".join(texts) in {text[:at] for at in begins}
        assert not any(stop in "".join(texts) for stop in stops)
    else:
        assert "".join(texts) == text


def test_of_two_stop_strings_in_one_piece_the_earlier_counts() -> None:
    assert Detokenizer(("two", "one")).feed(b"zero one two") == "zero "


def test_the_beginning_of_a_stop_string_is_never_shown() -> None:
    detokenizer = Detokenizer(("</end>",))
    assert [detokenizer.feed(piece) for piece in (b"yes</", b"en", b"d>no")] == ["yes", "", ""]
    assert detokenizer.stopped
    assert detokenizer.flush() == ""


def test_what_only_looked_like_a_stop_string_is_shown_after_all() -> None:
    detokenizer = Detokenizer(("</end>",))
    assert [detokenizer.feed(piece) for piece in (b"a</e", b"x")] == ["a", "</ex"]


def test_the_template_s_own_white_space_is_trimmed_and_the_rest_kept() -> None:
    pieces = [b" ", b" two", b" spaces", b" \n", b"\nkept", b" ", b"\n"]
    assert "".join(shown(Detokenizer(trim=True), pieces)) == " two spaces \n\nkept"
    assert "".join(shown(Detokenizer(), pieces)) == "  two spaces \n\nkept \n"


def test_white_space_before_a_stop_string_is_trimmed() -> None:
    assert "".join(shown(Detokenizer(("END",), trim=True), [b" yes \n", b"E", b"ND"])) == "yes"
