"""Texts to vectors: the mean of a model's last hidden states, in a small context of its own.

Llama 2 was never trained for this: such vectors tell texts apart, but a model made for embeddings does it better.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llamacli.engine.bindings import bindings
from llamacli.engine.llama import Batch, LlamaWeights, padded
from llamacli.engine.sequence import Chunk
from llamacli.engine.sequence import Sequence as Tokens
from llamacli.errors import EngineError, InputTooLong, ResourceError, UsageError

MAX_TOKENS = 2048  # of one text; a 7B model takes a gibibyte for so many
ROWS = 128  # of a step: the streams of others wait for no more
_POOLING_NONE = 0  # llama.h: enum llama_pooling_type


class Embedder:
    """One thread owns it. The context is made for the first text, and again for one that needs a larger one.

    limit      tokens of a text at most
    together   texts that share a step where they are short: faster, and a hundredth or two from each alone
    """

    def __init__(self, weights: LlamaWeights, *, limit: int, threads: int, together: int = 1) -> None:
        self._bindings = bindings()
        self._c = self._bindings.c
        self._weights = weights
        self._threads = threads
        self._together = together
        self._context: int | None = None
        self._n_cells = 0
        self._batch = Batch(self._c, ROWS)
        self.limit = min(limit, MAX_TOKENS)
        self.n_embd: int = self._c.llama_model_n_embd(weights.pointer)

    def check(self, texts: Sequence[Sequence[int]], name: Callable[[int], str] = "input {}".format) -> None:
        """Raises InputTooLong or UsageError, which calls the text at fault by its name."""
        n_vocab = self._weights.vocabulary.n_tokens
        for i, tokens in enumerate(texts):
            if not tokens:
                raise UsageError(f"{name(i)} is empty")
            if len(tokens) > self.limit:
                raise InputTooLong(
                    f"{name(i)} is {len(tokens):,} tokens; an embedding is made of {self.limit:,} at most: split it"
                )
            if min(tokens) < 0 or max(tokens) >= n_vocab:
                raise UsageError(f"{name(i)} holds a token outside 0..{n_vocab - 1}")

    def vectors(self, texts: Sequence[Sequence[int]], *, is_unit: bool = True) -> Iterator[bytes | None]:
        """For each text float32[n_embd], as bytes; None after each step that ends no text.

        is_unit   of length 1; else the mean of the states as it is

        The texts must have passed check(). Raises ResourceError when there is no memory for the context.
        """
        import numpy as np

        self._make_room(max(map(len, texts)))
        memory = self._c.llama_get_memory(self._context)
        total = np.zeros(self.n_embd, dtype=np.float64)
        for step in _steps(texts, self._together):
            if not step[0].start:
                self._c.llama_memory_clear(memory, False)
            n_rows = sum(chunk.n for chunk in step)
            rows = np.ctypeslib.as_array(self._run(step, n_rows)).reshape(n_rows, self.n_embd)
            row = 0
            for sequence, start, n, _ in step:
                part = rows[row : row + n].sum(axis=0, dtype=np.float64)
                total = total + part if start else part
                row += n
                if start + n < len(sequence.tokens):
                    yield None
                    continue
                length = float(np.linalg.norm(total)) if is_unit else len(sequence.tokens)
                yield (total / length if length else total).astype("<f4").tobytes()

    def _run(self, step: list[Chunk], n: int) -> Any:
        """float32[n * n_embd], valid until the next step."""
        self._batch.fill(step, self._together, all_rows=True)
        code = self._c.llama_decode(self._context, self._batch.native)
        self._c.llama_synchronize(self._context)
        address = self._c.llama_get_embeddings(self._context)
        if code != 0 or not address:
            raise EngineError(f"llama.cpp could not compute an embedding (llama_decode returned {code})")
        return (ctypes.c_float * (n * self.n_embd)).from_address(ctypes.addressof(address.contents))

    def _make_room(self, n_tokens: int) -> None:
        if n_tokens <= self._n_cells:
            return
        self.close()
        params = self._c.llama_context_default_params()
        params.n_ctx = padded(n_tokens)
        params.n_batch = params.n_ubatch = params.n_outputs_max = ROWS
        params.n_seq_max = self._together
        params.n_threads = params.n_threads_batch = self._threads
        params.embeddings = True
        params.pooling_type = _POOLING_NONE
        params.kv_unified = True
        self._bindings.keep_log()
        self._context = self._c.llama_init_from_model(self._weights.pointer, params)
        if not self._context:
            raise ResourceError(f"no context for embeddings of {n_tokens:,} tokens: {self._bindings.log.reason()}")
        self._n_cells = self._c.llama_n_ctx(self._context)
        self._bindings.silence_log()

    def close(self) -> None:
        if self._context:
            self._c.llama_free(self._context)
            self._context, self._n_cells = None, 0


def _steps(texts: Sequence[Sequence[int]], together: int) -> Iterator[list[Chunk]]:
    """A long text takes steps of its own; short ones share one as far as they fit into it."""
    step: list[Chunk] = []
    for tokens in texts:
        n = len(tokens)
        if step and (len(step) == together or sum(chunk.n for chunk in step) + n > ROWS):
            yield step
            step = []
        sequence = Tokens(len(step), array("i", tokens))
        sequence.slot = len(step)
        if n <= ROWS:
            step.append(Chunk(sequence, 0, n))
        else:
            yield from ([Chunk(sequence, start, min(ROWS, n - start))] for start in range(0, n, ROWS))
    if step:
        yield step
