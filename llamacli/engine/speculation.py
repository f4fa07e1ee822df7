"""Decides how many guessed tokens are computed beside those that are known, and whose.

A guess that proves right saves its sequence a step; what proves wrong was computed in vain. The sampler draws every
token from logits that the model has computed for exactly what stands before it, so what is written has the same
distribution with guesses as without. Knows nothing of llama.cpp.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Mapping
from heapq import heapify, heapreplace

from llamacli.engine.draft_model import FURTHEST, DraftModel, Guesses
from llamacli.engine.lookup import Lookup
from llamacli.engine.sequence import Sequence

LEAST_CHANCE = 0.02  # of a guess that is considered at all
MARGIN = 1.03  # a step with guesses must promise so much more
_WEIGHT = 0.2  # of the newest time in the average

# What a step of so many rows takes, in steps of one row: K-quants on two cores. Other formats, and more cores, have
# cheaper rows. Eight rows cost as much as sixteen, because the kernels for many rows take sixteen at once.
ON_CPU = {1: 1.0, 2: 1.6, 4: 2.7, 7: 4.2, 8: 5.2, 16: 5.4, 17: 7.2, 32: 7.6, 33: 9.8, 48: 10.2}
ON_GPU = {1: 1.0, 8: 1.1, 16: 1.25, 32: 1.5, 64: 2.0}


class StepCosts:
    """What a step takes by its rows: a table, and what is measured on the way if it learns.

    table    rows → time, in any unit
    learns   trust measured times more than the table. Which tokens are guessed then depends on the clock, and a batch
             of other rows rounds otherwise: where a seed must repeat an answer it must not learn
    """

    def __init__(self, table: Mapping[int, float] = ON_CPU, *, learns: bool = False) -> None:
        assert table, "something must be known"
        self.learns = learns
        self._rows = sorted(table)
        self._times = [table[rows] for rows in self._rows]
        self._measured: dict[int, float] = {}
        self._known: dict[int, float] = {}  # what of() has answered since the last measurement

    def learn(self, n_rows: int, seconds: float) -> None:
        if self.learns:
            before = self._measured.get(n_rows, seconds)
            # A step that was disturbed by something else on the machine says little.
            self._measured[n_rows] = before + _WEIGHT * (min(seconds, 3 * before) - before)
            self._known.clear()

    def of(self, n_rows: int) -> float:
        found = self._known.get(n_rows)
        if found is None:
            found = self._known[n_rows] = self._of(n_rows)
        return found

    def _of(self, n_rows: int) -> float:
        if not self._measured:
            return self._tabled(n_rows)
        if n_rows in self._measured:
            return self._measured[n_rows]
        nearest = min(self._measured, key=lambda rows: abs(rows - n_rows))
        return self._measured[nearest] * self._tabled(n_rows) / self._tabled(nearest)

    def _tabled(self, n_rows: int) -> float:
        """On a straight line between the neighbours in the table; beyond it, on from its last two."""
        rows, times = self._rows, self._times
        if len(rows) == 1:
            return times[0]
        i = min(max(bisect_left(rows, n_rows), 1), len(rows) - 1)
        share = (n_rows - rows[i - 1]) / (rows[i] - rows[i - 1])
        return times[i - 1] + share * (times[i] - times[i - 1])


class Speculation:
    """The guesses for all sequences of an engine: from their own texts, and from a smaller model if there is one."""

    def __init__(self, costs: StepCosts, draft_model: DraftModel | None = None) -> None:
        self.costs = costs
        self.draft_model = draft_model
        self.n_guessed = 0
        self.n_right = 0
        self._lookups: dict[int, Lookup] = {}  # by sequence id

    def plan(self, decoding: list[Sequence], limits: list[int], n_rows: int) -> list[array[int]]:
        """Guesses for each of these sequences, which have one pending token each; most often none.

        limits   how many each may have
        n_rows   how many there may be
        """
        offers = [self._offer(sequence, min(limit, n_rows)) for sequence, limit in zip(decoding, limits, strict=True)]
        if self.draft_model is not None:
            self._ask(self.draft_model, decoding, limits, offers, n_rows)
        if not any(offers):
            return [array("i") for _ in offers]
        shares = share_out([[chance for _, chance in offer] for offer in offers], n_rows, self.costs)
        return [array("i", [token for token, _ in offer[:n]]) for offer, n in zip(offers, shares, strict=True)]

    def _offer(self, sequence: Sequence, limit: int) -> list[tuple[int, float]]:
        lookup = self._lookups.get(sequence.id)
        if lookup is None:
            lookup = self._lookups[sequence.id] = Lookup(sequence.tokens)
        lookup.catch_up()
        return [(token, chance) for token, chance in lookup.guess(limit) if chance >= LEAST_CHANCE]

    def _ask(
        self, model: DraftModel, decoding: list[Sequence], limits: list[int], offers: list[Guesses], n_rows: int
    ) -> None:
        """Let the smaller model write where the text itself says too little."""
        asked = [
            i
            for i, (limit, offer) in enumerate(zip(limits, offers, strict=True))
            if limit > 0 and (not offer or offer[0][1] < model.chance)
        ]
        if not asked:
            return
        n = self._tokens_ahead(model, len(decoding), len(asked), n_rows)
        if not n and model.is_rested():
            n = 1
        n = min(n, max(limits[i] for i in asked))
        for i, guesses in zip(asked, model.guess([decoding[i] for i in asked], n), strict=True):
            if guesses:
                offers[i] = guesses[: limits[i]]

    def _tokens_ahead(self, model: DraftModel, n_known: int, n_asked: int, n_rows: int) -> int:
        """How many tokens to write ahead for most tokens of a second; 0 where that does not pay."""
        step = self.costs.of(1)
        best, best_rate, expected, right = 0, MARGIN * n_known / self.costs.of(n_known), float(n_known), 1.0
        for n in range(1, min(FURTHEST, n_rows // n_asked) + 1):
            right *= model.chance
            expected += n_asked * right
            rate = expected / (self.costs.of(n_known + n * n_asked) + n * model.cost * step)
            if rate > best_rate:
                best, best_rate = n, rate
        return best

    def note(self, n_guessed: int, n_right: int) -> None:
        """So many guesses of a sequence were computed, and so many of them were what the sampler drew."""
        self.n_guessed += n_guessed
        self.n_right += n_right

    def forget(self, sequence: Sequence) -> None:
        self._lookups.pop(sequence.id, None)
        if self.draft_model is not None:
            self.draft_model.forget(sequence)

    def close(self) -> None:
        if self.draft_model is not None:
            self.draft_model.close()


def share_out(chances: list[list[float]], n_most: int, costs: StepCosts) -> list[int]:
    """How many guesses of each sequence are worth their rows.

    chances   of each sequence's guesses, falling; one row each is computed in any case

    The likeliest first, as many as make most tokens of a second.
    """
    shares = [0] * len(chances)
    n_known = len(chances)
    queue = [(-offer[0], i) for i, offer in enumerate(chances) if offer]
    heapify(queue)
    best, best_rate = shares[:], MARGIN * n_known / costs.of(n_known)
    expected = float(n_known)
    for n_extra in range(1, n_most + 1):
        if not queue or not queue[0][0]:
            break
        chance, i = queue[0]
        expected -= chance
        shares[i] += 1
        following = -chances[i][shares[i]] if shares[i] < len(chances[i]) else 0.0
        heapreplace(queue, (following, i))
        rate = expected / costs.of(n_known + n_extra)
        if rate > best_rate:
            best, best_rate = shares[:], rate
    return best
