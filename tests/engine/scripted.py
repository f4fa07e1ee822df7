"""A model that says what a test tells it, remembers every batch, and checks what llama.cpp would abort on."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from llamacli.engine.model import Aborted, BatchFailed, KvFull
from llamacli.engine.sequence import Chunk, Logprobs, SamplingParams

N_VOCAB = 256
EOS = 2

Say = Callable[[tuple[int, ...]], int]


def count_up(tokens: tuple[int, ...]) -> int:
    """The next token is a function of all tokens before it, so any mix-up of sequences shows."""
    return 3 + sum((i + 1) * token for i, token in enumerate(tokens)) % (N_VOCAB - 3)


class ScriptedSampler:
    def __init__(self, model: ScriptedModel) -> None:
        self._model = model
        self._model.n_samplers += 1

    def sample(self, row: int) -> int | None:
        return self._model.say(self._model.outputs[row])

    def sample_from(self, logits: bytes) -> int | None:
        return self._model.say(tuple(array("i", logits)))

    def foreseen(self) -> array[int]:
        return array("i")

    def is_over(self) -> bool:
        return False

    def close(self) -> None:
        self._model.n_samplers -= 1


class ScriptedModel:
    """Cells are really shared and really run out: each holds a token, a position and the slots that use it."""

    n_guessed = 8

    def __init__(self, *, n_cells: int = 64, n_slots: int = 4, n_batch: int = 16, say: Say = count_up) -> None:
        self.n_cells, self.n_slots, self.n_batch, self.n_vocab = n_cells, n_slots, n_batch, N_VOCAB
        self.say = say
        self.batches: list[list[tuple[int, int, int]]] = []  # (sequence id, start, rows) of every batch
        self.outputs: dict[int, tuple[int, ...]] = {}
        self.n_samplers = 0
        self.faults: list[Exception] = []  # raised by the next runs; KvFull before anything is computed
        self.n_refused = 0  # batches for which there really were no cells: the ledger should have known
        self.is_closed = False
        self.n_grown = 0
        self.n_guesses = 0
        self._cells: list[tuple[int, int, set[int]]] = []

    @property
    def n_used(self) -> int:
        return len(self._cells)

    def tokens_of(self, slot: int) -> tuple[int, ...]:
        mine = sorted((position, token) for token, position, slots in self._cells if slot in slots)
        assert [position for position, _ in mine] == list(range(len(mine))), f"slot {slot} has holes"
        return tuple(token for _, token in mine)

    def run(self, chunks: list[Chunk]) -> list[int]:
        n_rows = sum(chunk.n for chunk in chunks)
        assert 0 < n_rows <= self.n_batch
        assert sum(len(chunk.guessed) for chunk in chunks) <= self.n_guessed
        assert len({chunk.sequence.slot for chunk in chunks}) == len(chunks), "one chunk for each slot"
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, KvFull):
            raise fault
        if self.n_used + n_rows > self.n_cells:
            self.n_refused += 1
            raise KvFull
        if fault:
            self._compute(chunks[:1])  # llama.cpp may have done a part of it
            raise fault
        self.batches.append([(chunk.sequence.id, chunk.start, chunk.n) for chunk in chunks])
        self.n_guesses += sum(len(chunk.guessed) for chunk in chunks)
        return self._compute(chunks)

    def _compute(self, chunks: list[Chunk]) -> list[int]:
        self.outputs = {}
        row = -1
        rows = []
        for sequence, start, n, guessed in chunks:
            assert sequence.slot is not None and 0 <= sequence.slot < self.n_slots
            before = self.tokens_of(sequence.slot)
            assert before == tuple(sequence.tokens[:start]), "what is computed must be what is known"
            tokens = (*sequence.tokens[: start + n - len(guessed)], *guessed)
            for position in range(start, start + n):
                self._cells.append((tokens[position], position, {sequence.slot}))
                row += 1
                if position + 1 >= len(sequence.tokens):
                    self.outputs[row] = tokens[: position + 1]
            rows.append(row)
        return rows

    def sampler(self, params: SamplingParams, prompt: array[int]) -> ScriptedSampler:
        return ScriptedSampler(self)

    def logprobs(self, row: int, token: int, n_top: int) -> Logprobs:
        return Logprobs(token, 0.0, ())

    def last_logits(self, row: int) -> bytes:
        """All tokens so far: the next one is a function of them."""
        return array("i", self.outputs[row]).tobytes()

    def save(self, slot: int, start: int, end: int) -> memoryview:
        return memoryview(array("i", self.tokens_of(slot)[start:end]).tobytes())

    def restore(self, slot: int, start: int, end: int, state: memoryview) -> bool:
        tokens = array("i", bytes(state))
        is_right = len(tokens) == end - start and len(self.tokens_of(slot)) == start
        if not is_right or self.n_used + len(tokens) > self.n_cells:
            return False
        self._cells += [(token, start + i, {slot}) for i, token in enumerate(tokens)]
        return True

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < 128 else b"?"

    def is_eog(self, token: int) -> bool:
        return token == EOS

    def seq_rm(self, slot: int, start: int, end: int) -> None:
        assert 0 <= slot < self.n_slots and end == -1
        for _, position, slots in self._cells:
            if position >= start:
                slots.discard(slot)
        self._cells = [cell for cell in self._cells if cell[2]]

    def seq_cp(self, source: int, target: int, start: int, end: int) -> None:
        assert source != target and not self.tokens_of(target)
        for _, position, slots in self._cells:
            if source in slots and start <= position < end:
                slots.add(target)

    def grow(self, n_cells: int, slot: int) -> None:
        assert all(slots == {slot} for _, _, slots in self._cells)
        self.n_cells = n_cells
        self.n_grown += 1

    def abort(self) -> None:
        self.faults.append(Aborted())

    def fail_once(self) -> None:
        self.faults.append(BatchFailed("told to"))

    def close(self) -> None:
        self.is_closed = True
