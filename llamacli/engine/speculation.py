"""Decides how many guessed tokens are computed beside those that are known, and whose.

A guess that proves right saves its sequence a step; what proves wrong was computed in vain. The sampler draws every
token from logits that the model has computed for exactly what stands before it, so what is written has the same
distribution with guesses as without. Knows nothing of llama.cpp.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Mapping
from heapq import heapify, heapreplace
from typing import TYPE_CHECKING

from llamacli.engine.lookup import Guesses, Lookup
from llamacli.engine.sequence import Chunk, Sequence

if TYPE_CHECKING:
    from llamacli.engine.draft_model import DraftModel

FURTHEST = 8  # tokens that a smaller model writes ahead
LEAST_CHANCE = 0.02  # of a guess that is considered at all
TRUST = 0.85  # what a promised token counts, beside one that is certain
_WEIGHT = 0.2  # of the newest time in the average
_DISTURBED = 3.0  # times the average: a longer step counts as one that took so long
_REMEMBERED = 200  # steps
_SPELT = 4.0, 5.0  # so it begins

# What a step of so many rows takes, in steps of one row: a 7B in a K-quant on two cores. Smaller models, other formats
# and more cores have cheaper rows, as `tune` finds out. Eight rows cost nearly as much as sixteen, because the kernels
# for many rows take sixteen at once.
ON_CPU = {1: 1.0, 2: 2.1, 4: 3.6, 7: 6.6, 8: 8.1, 16: 8.9, 17: 11.0, 32: 12.0, 33: 15.0, 48: 16.0}
ON_GPU = {1: 1.0, 8: 1.1, 16: 1.25, 32: 1.5, 64: 2.0}


class StepCosts:
    """What a step takes by its rows: a table, and what is measured on the way if it learns.

    table    rows → time, in any unit
    learns   trust measured times more than the table. Which tokens are guessed then depends on the clock, and a batch
             of other rows rounds otherwise: an answer that must be repeatable goes by the table
    """

    def __init__(self, table: Mapping[int, float] = ON_CPU, *, learns: bool = False) -> None:
        assert table, "something must be known"
        self.learns = learns
        self._rows = sorted(table)
        self._times = [table[rows] for rows in self._rows]
        self._measured: dict[int, float] = {}
        self._when: dict[int, int] = {}  # the step in which each was measured the last time
        self._n_steps = 0
        self._known: dict[int, float] = {}  # what of() has answered since the last measurement

    def learn(self, n_rows: int, seconds: float) -> None:
        if not self.learns:
            return
        before = self._of(n_rows) if self._measured else seconds
        # A step that was disturbed by something else on the machine says little.
        self._measured[n_rows] = before + _WEIGHT * (min(seconds, _DISTURBED * before) - before)
        self._n_steps += 1
        self._when[n_rows] = self._n_steps
        self._known.clear()
        # What looks too dear is not tried: what is old is forgotten, so that it cannot look so for ever.
        for rows in [rows for rows, when in self._when.items() if when < self._n_steps - _REMEMBERED]:
            del self._when[rows], self._measured[rows]

    def of(self, n_rows: int) -> float:
        found = self._known.get(n_rows)
        if found is None:
            found = self._known[n_rows] = self._of(n_rows)
        return found

    def _of(self, n_rows: int) -> float:
        if not self._measured:
            return self.tabled(n_rows)
        if n_rows in self._measured:
            return self._measured[n_rows]
        nearest = min(self._measured, key=lambda rows: abs(rows - n_rows))
        return self._measured[nearest] * self.tabled(n_rows) / self.tabled(nearest)

    def tabled(self, n_rows: int) -> float:
        """Without the clock: between two rows of the table on a straight line, and beyond it on from its last two."""
        rows, times = self._rows, self._times
        if len(rows) == 1:
            return times[0]
        i = min(max(bisect_left(rows, n_rows), 1), len(rows) - 1)
        share = (n_rows - rows[i - 1]) / (rows[i] - rows[i - 1])
        return times[i - 1] + share * (times[i] - times[i - 1])


Cost = Callable[[int], float]
_NOBODY: Mapping[int, array[int]] = {}


class Speculation:
    """The guesses for all sequences of an engine: from their own texts, and from a smaller model if there is one."""

    def __init__(self, costs: StepCosts, draft_model: DraftModel | None = None) -> None:
        self.costs = costs
        self.draft_model = draft_model
        self.n_guessed = 0
        self.n_right = 0
        self._lookups: dict[int, Lookup] = {}  # by sequence id
        self._foreseen: set[int] = set()  # sequences whose guesses are a grammar's, in this step
        # By sequence id: tokens of a grammar that were cut as they were foreseen, of how many. Each answer learns for
        # itself: if it is to be repeatable, it must not depend on those before it.
        self._spelt: dict[int, tuple[float, float]] = {}

    def plan(
        self,
        decoding: list[Sequence],
        limits: list[int],
        n_rows: int,
        foreseen: Mapping[int, array[int]] = _NOBODY,
        *,
        is_timed: bool = True,
    ) -> list[array[int]]:
        """Guesses for each of these sequences, which have one pending token each; most often none.

        limits     how many each may have
        n_rows     how many there may be
        foreseen   by sequence id: what a grammar leaves no choice about
        is_timed   measured times count, if there are any
        """
        cost = self.costs.of if is_timed else self.costs.tabled
        self._foreseen = {key for key, tokens in foreseen.items() if tokens}
        offers = [
            self._forced(sequence, foreseen[sequence.id], min(limit, n_rows))
            if sequence.id in self._foreseen
            else self._offer(sequence, min(limit, n_rows))
            for sequence, limit in zip(decoding, limits, strict=True)
        ]
        if self.draft_model is not None:
            self._ask(self.draft_model, decoding, limits, offers, n_rows, cost)
        if not any(offers):
            return [array("i") for _ in offers]
        shares = share_out([[chance for _, chance in offer] for offer in offers], n_rows, cost)
        return [array("i", [token for token, _ in offer[:n]]) for offer, n in zip(offers, shares, strict=True)]

    def _forced(self, sequence: Sequence, tokens: array[int], limit: int) -> Guesses:
        """What must come is certain, but not how the model cuts it into tokens."""
        n_right, n = self._spelt.setdefault(sequence.id, _SPELT)
        chance, offer = 1.0, []
        for token in tokens[: max(limit, 0)]:
            chance *= n_right / n
            offer.append((token, chance))
        return offer

    def _offer(self, sequence: Sequence, limit: int) -> list[tuple[int, float]]:
        lookup = self._lookups.get(sequence.id)
        if lookup is None:
            lookup = self._lookups[sequence.id] = Lookup(sequence.tokens)
        lookup.catch_up()
        return [(token, chance) for token, chance in lookup.guess(limit) if chance >= LEAST_CHANCE]

    def _ask(
        self,
        model: DraftModel,
        decoding: list[Sequence],
        limits: list[int],
        offers: list[Guesses],
        n_rows: int,
        cost: Cost,
    ) -> None:
        """Let the smaller model write where the text itself says too little."""
        asked = [
            i
            for i, (limit, offer) in enumerate(zip(limits, offers, strict=True))
            if limit > 0 and decoding[i].id not in self._foreseen and (not offer or offer[0][1] < model.chance)
        ]
        if not asked:
            return
        n = _tokens_ahead(model, len(decoding), len(asked), n_rows, cost)
        if not n and model.is_rested():
            n = 1
        n = min(n, max(limits[i] for i in asked))
        for i, guesses in zip(asked, model.guess([decoding[i] for i in asked], n), strict=True):
            if guesses:
                offers[i] = guesses[: limits[i]]

    def learn(self, chunks: list[Chunk], seconds: float) -> None:
        """What a step took, if all its rows were for tokens that follow one another, and none for a prompt."""
        if all(chunk.n - len(chunk.guessed) == 1 for chunk in chunks):
            self.costs.learn(sum(chunk.n for chunk in chunks), seconds)

    def note(self, sequence: Sequence, n_guessed: int, n_right: int) -> None:
        """So many guesses of a sequence were computed, and so many of them were what the sampler drew."""
        self.n_guessed += n_guessed
        self.n_right += n_right
        if sequence.id in self._foreseen and sequence.id in self._spelt:  # else this step was its last one
            before, n = self._spelt[sequence.id]
            self._spelt[sequence.id] = before + n_right, n + min(n_right + 1, n_guessed)

    def forget(self, sequence: Sequence) -> None:
        self._lookups.pop(sequence.id, None)
        self._spelt.pop(sequence.id, None)
        if self.draft_model is not None:
            self.draft_model.forget(sequence)

    def close(self) -> None:
        if self.draft_model is not None:
            self.draft_model.close()


def _tokens_ahead(model: DraftModel, n_known: int, n_asked: int, n_rows: int, cost: Cost) -> int:
    """How many tokens to write ahead for most tokens of a second; 0 where that does not pay."""
    best, best_rate, expected, right = 0, n_known / cost(n_known), float(n_known), TRUST
    for n in range(1, min(FURTHEST, n_rows // n_asked) + 1):
        right *= model.chance
        expected += n_asked * right
        rate = expected / (cost(n_known + n * n_asked) + n * model.cost * cost(1))
        if rate > best_rate:
            best, best_rate = n, rate
    return best


def share_out(chances: list[list[float]], n_most: int, cost: Cost) -> list[int]:
    """How many guesses of each sequence are worth their rows.

    chances   of each sequence's guesses, falling; one row each is computed in any case
    cost      of a step by its rows

    The likeliest first, as many as make most tokens of a second.
    """
    shares = [0] * len(chances)
    n_known = len(chances)
    queue = [(-offer[0], i) for i, offer in enumerate(chances) if offer]
    heapify(queue)
    best, best_rate = shares[:], n_known / cost(n_known)
    expected = float(n_known)
    for n_extra in range(1, n_most + 1):
        if not queue or not queue[0][0]:
            break
        chance, i = queue[0]
        expected -= TRUST * chance
        shares[i] += 1
        following = -chances[i][shares[i]] if shares[i] < len(chances[i]) else 0.0
        heapreplace(queue, (following, i))
        rate = expected / cost(n_known + n_extra)
        if rate > best_rate:
            best, best_rate = shares[:], rate
    return best
