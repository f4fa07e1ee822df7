"""What the engine asks of a model. llama.py has the real one; the tests have one that says what they tell it."""

from __future__ import annotations

from array import array
from typing import Protocol

from llamacli.engine.kv import Memory
from llamacli.engine.sequence import Chunk, Logprobs, SamplingParams


class KvFull(Exception):
    """No cells for this batch; nothing has changed."""


class Aborted(Exception):
    """abort() stopped the batch; some of its rows may have been computed."""


class BatchFailed(Exception):
    """llama.cpp refused or failed the batch; what its sequences hold in the cache is not to be trusted."""


class Sampler(Protocol):
    """Draws the tokens of one sequence; remembers its penalties, its grammar and its random numbers."""

    def sample(self, row: int) -> int | None:
        """The next token, drawn from the logits of a row of the last batch. None: no token is legal."""

    def sample_from(self, logits: bytes) -> int | None:
        """The next token, drawn from float32[n_vocab]."""

    def foreseen(self) -> array[int]:
        """Tokens that are likely to come because the grammar leaves no choice; most often none."""

    def is_over(self) -> bool:
        """Whether the grammar allows nothing but the end of the answer now."""

    def close(self) -> None: ...


class Model(Memory, Protocol):
    """A model with its KV cache.

    n_cells     cells of the cache
    n_slots     sequences that it can hold at once
    n_batch     rows of a batch at most
    n_guessed   those of them that may be for guessed tokens
    n_vocab     token ids are 0..n_vocab-1
    """

    n_cells: int
    n_slots: int
    n_batch: int
    n_guessed: int
    n_vocab: int

    def run(self, chunks: list[Chunk]) -> list[int]:
        """Compute a batch. Returns each chunk's last row, which sample() and logprobs() take.

        So they do the rows of guessed tokens, which come last in a chunk, and the row before them.

        Raises KvFull, Aborted or BatchFailed.
        """

    def sampler(self, params: SamplingParams, prompt: array[int]) -> Sampler: ...

    def logprobs(self, row: int, token: int, n_top: int) -> Logprobs: ...

    def last_logits(self, row: int) -> bytes:
        """float32[n_vocab] of a row that sample() takes, copied."""

    def save(self, slot: int, start: int, end: int) -> memoryview:
        """The cells of some positions of a slot, for restore(). Empty where this model cannot."""

    def restore(self, slot: int, start: int, end: int, state: memoryview) -> bool:
        """Append saved cells to a slot that ends at `start`. False, and nothing has changed, if they do not fit."""

    def piece(self, token: int) -> bytes: ...

    def is_eog(self, token: int) -> bool: ...

    def grow(self, n_cells: int, slot: int) -> None:
        """Enlarge the cache; only this slot's content survives. Raises ResourceError."""

    def abort(self) -> None:
        """Stop the running batch, or else the next one. The only method that another thread may call."""

    def close(self) -> None: ...
