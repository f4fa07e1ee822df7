"""A long text in parts that fit: cut between paragraphs, else sentences, lines, words; each begins with what ended the
one before.

Token-exact by asking how long a prompt is; knows neither models nor prompts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from llamacli.errors import InputTooLong

# Where a text may be cut, the best places first. A piece keeps the white space behind it.
_BORDERS = (
    re.compile(r"\n[^\S\n]*\n\s*"),  # paragraphs
    re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]]*\s+|[\u3002\uff01\uff1f]+"),  # sentences
    re.compile(r"\n\s*"),
    re.compile(r"\s+"),
)
_INSIDE = len(_BORDERS)  # within a word
GRAIN = 12  # a part has as many pieces at least, so that little room is left over
NEAR = 0.75  # a better place to cut is taken from here on, counted from a part's beginning


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of the text, and how good a place to cut its end is: 0 is best."""

    start: int
    end: int
    level: int
    n_tokens: int  # of its own; together they may be fewer


def split(text: str, count: Callable[[str], int], whole: Callable[[str], int], *, room: int, overlap: int) -> list[str]:
    """Parts of the text, in order, that fit.

    count    tokens of a piece of text
    whole    tokens of the prompt that is made of a part: `room` at most
    overlap  tokens of a part that are repeated at the beginning of the next, at most

    Raises InputTooLong where there is no room for any text.
    """
    budget = room - whole("")
    if budget < GRAIN:
        raise no_room(room)
    pieces = _pieces(text, count, max(1, budget // GRAIN))
    sums = [0, *accumulate(piece.n_tokens for piece in pieces)]

    def part(first: int, end: int) -> str:
        return text[pieces[first].start : pieces[end - 1].end]

    parts: list[str] = []
    first = end = 0
    while end < len(pieces):
        before = end
        end = _furthest(first, before, sums, budget, lambda a, b: whole(part(a, b)) <= room)
        if end <= before:  # what is repeated leaves no room for more
            if first == before:
                raise no_room(room)
            first = end = before
            continue
        if end < len(pieces):
            end = _best_end(first, max(before, first), end, pieces, sums)
        parts.append(part(first, end).strip("\n"))
        first = _overlapped(first, end, sums, overlap)
    return parts


def no_room(room: int) -> InputTooLong:
    return InputTooLong(
        f"the instruction and the system prompt alone leave no room for a part of the input: {room:,} tokens are for "
        "all of it. Shorten them, or choose a larger --ctx-size"
    )


def _furthest(first: int, low: int, sums: list[int], budget: int, fits: Callable[[int, int], bool]) -> int:
    """The end of the longest part from `first` on that fits; `low` where nothing beyond it does."""
    end = low
    while end < len(sums) - 1 and sums[end + 1] - sums[first] <= budget:
        end += 1
    while end > low and not fits(first, end):
        end -= 1
    while end < len(sums) - 1 and fits(first, end + 1):
        end += 1
    return end


def _best_end(first: int, before: int, end: int, pieces: list[_Piece], sums: list[int]) -> int:
    """The best place to cut near the end, the last one of several that are as good."""
    least = sums[first] + NEAR * (sums[end] - sums[first])
    near = [k for k in range(before + 1, end + 1) if sums[k] >= least]
    return min(near, key=lambda k: (pieces[k - 1].level, -k))


def _overlapped(first: int, end: int, sums: list[int], overlap: int) -> int:
    """Where the next part begins: some pieces before the end of this one."""
    start = end
    while start - 1 > first and sums[end] - sums[start - 1] <= overlap:
        start -= 1
    while start < end and sums[start + 1] == sums[start]:  # costs nothing, but says nothing either
        start += 1
    return start


def _pieces(text: str, count: Callable[[str], int], most: int) -> list[_Piece]:
    """The whole text in pieces of `most` tokens; larger ones only where a character has more."""
    done: list[_Piece] = []
    todo = [(0, len(text), 0, 0)]  # start, end, level of the end, borders to look for
    while todo:
        start, end, level, borders = todo.pop()
        n = count(text[start:end])
        if n <= most or end - start == 1:
            done.append(_Piece(start, end, level, n))
        elif borders == _INSIDE:
            middle = (start + end) // 2
            todo += [(middle, end, level, borders), (start, middle, _INSIDE, borders)]
        else:
            todo += reversed(_cut(text, start, end, level, borders, max(1, (end - start) * most // n)))
    return done


def _cut(text: str, start: int, end: int, level: int, border: int, n_chars: int) -> list[tuple[int, int, int, int]]:
    """A stretch cut at borders of one kind, into pieces of about `n_chars` characters where there are many."""
    cuts = []
    last = start
    for match in _BORDERS[border].finditer(text, start, end):
        if match.end() < end and (border < 2 or match.end() - last >= n_chars // 2):
            cuts.append(match.end())
            last = match.end()
    ends = [*cuts, end]
    return [(a, b, border if b != end else level, border + 1) for a, b in zip([start, *cuts], ends, strict=True)]
