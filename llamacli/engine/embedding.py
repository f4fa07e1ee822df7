"""Texts to vectors: the mean of a model's last hidden states, in a small context of its own.

Llama 2 was never trained for this: such vectors tell texts apart, but a model made for embeddings does it better.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator, Sequence
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

    limit   tokens of a text at most
    """

    def __init__(self, weights: LlamaWeights, *, limit: int, threads: int) -> None:
        self._bindings = bindings()
        self._c = self._bindings.c
        self._weights = weights
        self._threads = threads
        self._context: int | None = None
        self._n_cells = 0
        self._batch = Batch(self._c, ROWS)
        self.limit = min(limit, MAX_TOKENS)
        self.n_embd: int = self._c.llama_model_n_embd(weights.pointer)

    def check(self, texts: Sequence[Sequence[int]]) -> None:
        """Raises InputTooLong or UsageError."""
        n_vocab = self._weights.vocabulary.n_tokens
        for i, tokens in enumerate(texts):
            if not tokens:
                raise UsageError(f"input {i} is empty")
            if len(tokens) > self.limit:
                raise InputTooLong(
                    f"input {i} is {len(tokens):,} tokens; an embedding is made of {self.limit:,} at most"
                )
            if min(tokens) < 0 or max(tokens) >= n_vocab:
                raise UsageError(f"input {i} holds a token outside 0..{n_vocab - 1}")

    def vectors(self, texts: Sequence[Sequence[int]]) -> Iterator[bytes | None]:
        """For each text float32[n_embd] of length 1, as bytes; None after each step in between.

        The texts must have passed check(). Raises ResourceError when there is no memory for the context.
        """
        import numpy as np

        self._make_room(max(map(len, texts)))
        memory = self._c.llama_get_memory(self._context)
        for tokens in texts:
            self._c.llama_memory_clear(memory, False)
            sequence = Tokens(0, array("i", tokens))
            sequence.slot = 0
            total = np.zeros(self.n_embd, dtype=np.float64)
            for start in range(0, len(tokens), ROWS):
                if start:
                    yield None
                n = min(ROWS, len(tokens) - start)
                rows = np.ctypeslib.as_array(self._run(Chunk(sequence, start, n), n))
                total += rows.reshape(n, self.n_embd).sum(axis=0, dtype=np.float64)
            length = float(np.linalg.norm(total))
            yield (total / length if length else total).astype("<f4").tobytes()

    def _run(self, chunk: Chunk, n: int) -> Any:
        """float32[n * n_embd], valid until the next step."""
        self._batch.fill([chunk], 1, all_rows=True)
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
        params.n_seq_max = 1
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
