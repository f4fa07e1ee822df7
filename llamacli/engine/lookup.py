"""Guesses how a sequence goes on: as it went on the last time that the same tokens stood in it.

Answers quote: from the document they are about, from the question, from themselves. Knows nothing of models.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

Guesses = list[tuple[int, float]]  # tokens, each with the chance that it and all before it are right

SHORTEST = 2  # tokens that must have stood there before
LONGER = 3  # tokens that are looked for first
LONGEST = 16  # counted of a match: a longer one says no more
_EDGES = (2, 3, 4, 6, 10)  # matches of so many tokens and more are trusted alike
_KINDS = tuple(max(sum(match >= edge for edge in _EDGES) - 1, 0) for match in range(LONGEST + 1))
_PRIOR = (0.25, 0.4, 0.55, 0.75, 0.9)  # how often the next token is right after a match, before anything is known
_PRIOR_WEIGHT = 12.0  # tokens that it takes to learn otherwise: what is copied right now says little of where it ends
_MEMORY = 0.97  # what a token counts when the next one comes


class Lookup:
    """One sequence, token by token: where its end has stood before, and how often such a place foretold the next.

    Every token says whether the guess was right, also where nobody made use of it. So what is not worth guessing is
    found out for nothing, and so is when it is again.
    """

    __slots__ = ("_at", "_hits", "_last", "_match", "_n", "_tokens", "_tries")

    def __init__(self, tokens: array[int]) -> None:
        """`tokens` may grow later on; what is added is taken up by catch_up()."""
        self._tokens = tokens
        self._n = 0  # tokens taken up
        self._last: dict[int, int] = {}  # a pair or three of tokens → where the token after them last stood
        self._at = -1  # where the token stands that is expected next; -1: nothing is
        self._match = 0  # tokens before it that are those at the end
        self._hits = [prior * _PRIOR_WEIGHT for prior in _PRIOR]
        self._tries = [_PRIOR_WEIGHT] * len(_PRIOR)
        self.catch_up(is_answer=False)

    def catch_up(self, *, is_answer: bool = True) -> None:
        """Take up the tokens that have come. Of a prompt's own nothing is learnt: an answer is written otherwise."""
        tokens = self._tokens
        for n in range(self._n, len(tokens)):
            if is_answer and self._at >= 0:
                self._learn(tokens[self._at] == tokens[n])
            if n >= SHORTEST:
                self._note(n)
            self._n = n + 1
            if is_answer:
                self._look()
        self._n = len(tokens)
        if not is_answer:
            self._look()

    def guess(self, n: int) -> Iterator[tuple[int, float]]:
        """Up to `n` tokens that may come next, each with its chance that it and all before it are right.

        What was found near the end goes round: a list of equal lines is expected to go on.
        """
        at, match, chance = self._at, self._match, 1.0
        if at < 0:
            return
        period = self._n - at
        for i in range(n):
            kind = _KINDS[min(match + i, LONGEST)]
            chance *= self._hits[kind] / self._tries[kind]
            yield self._tokens[at + i % period], chance

    def _learn(self, is_right: bool) -> None:
        kind = _KINDS[self._match]
        prior = (1 - _MEMORY) * _PRIOR_WEIGHT  # it never quite goes: a kind that was always wrong gets another chance
        self._hits[kind] = self._hits[kind] * _MEMORY + prior * _PRIOR[kind] + is_right
        self._tries[kind] = self._tries[kind] * _MEMORY + prior + 1
        if is_right:
            self._at += 1
            self._match = min(self._match + 1, LONGEST)
        else:
            self._at = -1

    def _note(self, n: int) -> None:
        """Token `n` comes after these."""
        tokens, last = self._tokens, self._last
        pair = tokens[n - 2] << 24 | tokens[n - 1]
        last[pair] = n
        if n >= LONGER:
            last[tokens[n - 3] << 48 | pair] = n

    def _look(self) -> None:
        """Find where the end has stood before, unless a guess that was right goes on."""
        if self._at >= 0 and self._match >= LONGER:
            return
        tokens, n = self._tokens, self._n
        if n < SHORTEST:
            return
        pair = tokens[n - 2] << 24 | tokens[n - 1]
        at = self._last.get(tokens[n - 3] << 48 | pair) if n >= LONGER else None
        if at is None:
            at = self._last.get(pair)
        self._at = -1 if at is None else at
        self._match = 0 if at is None else self._matching(at)

    def _matching(self, at: int) -> int:
        """How many tokens before `at` are those at the end."""
        tokens, n = self._tokens, self._n
        match = 0
        while match < LONGEST and match < at and tokens[at - 1 - match] == tokens[n - 1 - match]:
            match += 1
        return match
