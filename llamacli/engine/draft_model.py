"""A smaller model of the same vocabulary that writes ahead; what the larger one would have written too is kept.

Knows nothing of where either model comes from, and of the larger one only what it has written.
"""

from __future__ import annotations

import math
from typing import Protocol

from llamacli.engine.kv import Memory, common_prefix
from llamacli.engine.lookup import Guesses
from llamacli.engine.model import BatchFailed, KvFull
from llamacli.engine.sequence import Chunk, Logprobs, Sequence

LEAST_SURE = 0.35  # the smaller model stops where its likeliest token has a lower probability
PATIENCE = 64  # steps after which what did not pay is tried again
_PRIOR, _PRIOR_WEIGHT = 0.7, 8.0
_MEMORY = 0.98
_SUREST = 0.98


class Drafting(Memory, Protocol):
    """What is asked of the smaller model; LlamaModel does it."""

    n_cells: int
    n_slots: int
    n_batch: int

    def run(self, chunks: list[Chunk]) -> list[int]: ...

    def logprobs(self, row: int, token: int, n_top: int) -> Logprobs: ...

    def close(self) -> None: ...


class _Mirror:
    """What the smaller model holds of a sequence: `held.tokens` are in its cells up to `n_computed`."""

    __slots__ = ("asked", "held")

    def __init__(self, sequence_id: int, slot: int) -> None:
        self.held = Sequence(sequence_id, ())
        self.held.slot = slot
        self.asked: Guesses = []  # token, probability: what it foretold the last time


class DraftModel:
    """Guesses for all sequences together, a batch for each token ahead.

    cost      of one of its steps, in steps of the larger model with one row
    n_limit   tokens of a text that it was made for; by default all its cells
    """

    def __init__(self, model: Drafting, *, cost: float, n_limit: int | None = None) -> None:
        self.cost = cost
        self._n_limit = min(n_limit or model.n_cells, model.n_cells)
        self._model = model
        self._mirrors: dict[int, _Mirror] = {}  # by sequence id; least recently used first
        self._free = list(range(model.n_slots))
        self._hits, self._tries = _PRIOR * _PRIOR_WEIGHT, _PRIOR_WEIGHT
        self._sure = self._hits  # what it had expected of its hits
        self._n_rests = 0
        self._is_broken = False

    @property
    def chance(self) -> float:
        """How often its next token has been right."""
        return self._hits / self._tries

    def is_rested(self) -> bool:
        """Whether it is time to try again, though it did not pay. Asked once in a step."""
        self._n_rests = (self._n_rests + 1) % PATIENCE
        return self._n_rests == 0

    def guess(self, sequences: list[Sequence], n: int) -> list[Guesses]:
        """Up to `n` tokens for each of these; none where its text has still to be read."""
        guesses: list[Guesses] = [[] for _ in sequences]
        if self._is_broken or n < 1:
            return guesses
        mirrors = [self._mirror(sequence) for sequence in self._that_fit(sequences, n)]
        if not mirrors:
            return guesses
        try:
            written = self._write(mirrors, self._read(mirrors), n)
        except (KvFull, BatchFailed):
            self._is_broken = True  # the larger model does without
            return guesses
        return [written.get(sequence.id, []) for sequence in sequences]

    def forget(self, sequence: Sequence) -> None:
        mirror = self._mirrors.pop(sequence.id, None)
        if mirror is not None:
            self._release(mirror)

    def close(self) -> None:
        self._model.close()

    def _that_fit(self, sequences: list[Sequence], n: int) -> list[Sequence]:
        """Those for which there are cells; what is held of others is given up for them."""
        fitting, n_cells = [], 0
        for sequence in [each for each in sequences if len(each.tokens) + n <= self._n_limit][: self._model.n_slots]:
            if n_cells + len(sequence.tokens) + n <= self._model.n_cells:
                n_cells += len(sequence.tokens) + n
                fitting.append(sequence)
        wanted = {sequence.id for sequence in fitting}
        others = [key for key in self._mirrors if key not in wanted]
        n_cells += sum(len(self._mirrors[key].held.tokens) for key in others)
        for i, key in enumerate(others):
            if n_cells <= self._model.n_cells and len(others) - i + len(wanted) <= self._model.n_slots:
                break
            n_cells -= len(self._mirrors[key].held.tokens)
            self._release(self._mirrors.pop(key))
        return fitting

    def _mirror(self, sequence: Sequence) -> _Mirror:
        """Its mirror, with what the larger model has written instead of what was foretold."""
        mirror = self._mirrors.pop(sequence.id, None)
        if mirror is None:
            mirror = _Mirror(sequence.id, self._free.pop())
        self._mirrors[sequence.id] = mirror
        held = mirror.held
        self._judge(mirror, sequence)
        same = common_prefix(held.tokens[: held.n_computed], sequence.tokens)
        same = min(same, len(sequence.tokens) - 1)  # the last row must be computed: a token is drawn from it
        if same < held.n_computed:
            assert held.slot is not None
            self._model.seq_rm(held.slot, same, -1)
            held.n_computed = same
        held.tokens = sequence.tokens[:]
        return mirror

    def _judge(self, mirror: _Mirror, sequence: Sequence) -> None:
        """Learn from what was foretold and has come."""
        start = len(mirror.held.tokens) - len(mirror.asked)
        for i, (token, probability) in enumerate(mirror.asked):
            if start + i >= len(sequence.tokens):
                break
            is_right = sequence.tokens[start + i] == token
            prior = (1 - _MEMORY) * _PRIOR_WEIGHT
            self._hits = self._hits * _MEMORY + prior * _PRIOR + is_right
            self._sure = self._sure * _MEMORY + prior * _PRIOR + probability
            self._tries = self._tries * _MEMORY + prior + 1
            if not is_right:
                break
        mirror.asked = []

    def _read(self, mirrors: list[_Mirror]) -> dict[int, int]:
        """Compute what is new of the texts, one batch of it. Returns the rows of those read to their end, by id."""
        room, chunks = self._model.n_batch, []
        for mirror in sorted(mirrors, key=lambda each: each.held.n_pending):
            held = mirror.held
            n = min(held.n_pending, room)
            if n:
                chunks.append(Chunk(held, held.n_computed, n))
                room -= n
        return self._run(chunks)

    def _write(self, mirrors: list[_Mirror], rows: dict[int, int], n: int) -> dict[int, Guesses]:
        chances = {mirror.held.id: 1.0 for mirror in mirrors}
        found: dict[int, Guesses] = {mirror.held.id: [] for mirror in mirrors}
        factor = min(self._hits / self._sure, 1.2)
        for i in range(n):
            going_on = []
            for mirror in mirrors:
                held = mirror.held
                row = rows.get(held.id)
                if row is None:
                    continue
                token, logprob = self._model.logprobs(row, 0, 1).top[0]
                probability = math.exp(logprob)
                if probability < LEAST_SURE:
                    continue
                chances[held.id] *= min(probability * factor, _SUREST)
                found[held.id].append((token, chances[held.id]))
                mirror.asked.append((token, probability))
                held.tokens.append(token)
                going_on.append(held)
            if i == n - 1 or not going_on:
                break
            rows = self._run([Chunk(held, held.n_computed, 1) for held in going_on])
        return found

    def _run(self, chunks: list[Chunk]) -> dict[int, int]:
        rows = self._model.run(chunks)
        for held, _, n, _ in chunks:
            held.n_computed += n
        return {chunk.sequence.id: row for chunk, row in zip(chunks, rows, strict=True) if not chunk.sequence.n_pending}

    def _release(self, mirror: _Mirror) -> None:
        slot = mirror.held.slot
        assert slot is not None
        self._model.seq_rm(slot, 0, -1)
        self._free.append(slot)
