"""The real model: weights, vocabulary, context, batch arrays and memory calls of llama.cpp.

Every native call that can abort the process is guarded here. One thread owns a context; abort() alone may be
called from another.
"""

from __future__ import annotations

import ctypes
import math
import os
from array import array
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamacli.engine.bindings import bindings
from llamacli.engine.model import Aborted, BatchFailed, KvFull
from llamacli.engine.sampling import Grammars, LlamaSampler
from llamacli.engine.sequence import Alternative, Chunk, Logprobs, SamplingParams
from llamacli.errors import ModelError, ResourceError, UsageError

MAX_SLOTS = 256  # LLAMA_MAX_SEQ
CELL_BLOCK = 256  # llama.cpp pads a context to this many cells
KV_TYPES = {
    "f32": 0,
    "f16": 1,
    "q8_0": 8,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
}  # ggml.h: enum ggml_type
_FLASH_ATTENTION = {None: -1, False: 0, True: 1}  # llama.h: enum llama_flash_attn_type


def padded(n_cells: int) -> int:
    """The context size that llama.cpp makes of a wish."""
    return -(-n_cells // CELL_BLOCK) * CELL_BLOCK


class Vocabulary:
    """Text to token ids and back. Threads may share it."""

    def __init__(self, pointer: int) -> None:
        self._bindings = bindings()
        c = self._bindings.c
        self.pointer = pointer
        self.n_tokens: int = c.llama_vocab_n_tokens(pointer)
        self.bos: int = c.llama_vocab_bos(pointer)
        self.eos: int = c.llama_vocab_eos(pointer)
        self.adds_bos: bool = c.llama_vocab_get_add_bos(pointer)
        self.grammars = Grammars(pointer)
        self._pieces: dict[int, bytes] = {}
        self._eog: frozenset[int] | None = None

    def tokenize(self, text: str, *, parse_special: bool = False) -> array[int]:
        """Token ids of a text, without BOS or EOS.

        parse_special   read "</s>" and its like as control tokens instead of as text: only for trusted text

        SentencePiece vocabularies put a space before every text, so pieces tokenized apart do not add up.
        """
        raw = text.encode("utf-8", "replace")
        tokens = array("i", bytes(4 * (len(raw) + 2)))
        n = self._tokenize_into(tokens, raw, parse_special)
        if n < 0:
            tokens = array("i", bytes(4 * -n))
            n = self._tokenize_into(tokens, raw, parse_special)
        return tokens[:n]

    def _tokenize_into(self, tokens: array[int], raw: bytes, parse_special: bool) -> int:
        out = (ctypes.c_int32 * len(tokens)).from_buffer(tokens)
        n: int = self._bindings.c.llama_tokenize(self.pointer, raw, len(raw), out, len(tokens), False, parse_special)
        return n

    def piece(self, token: int) -> bytes:
        """The bytes of a token: perhaps only a part of a character; nothing for a control token."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._read_piece(token, special=False)
        return found

    def name(self, token: int) -> str:
        """A token as people should see it: control tokens with their names."""
        return self._read_piece(token, special=True).decode("utf-8", "replace")

    def _read_piece(self, token: int, *, special: bool) -> bytes:
        if not 0 <= token < self.n_tokens:
            raise UsageError(f"token {token} is not in the vocabulary of {self.n_tokens:,} tokens")
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._bindings.fast.llama_token_to_piece(self.pointer, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def detokenize(self, tokens: array[int]) -> bytes:
        """The bytes of some tokens; control tokens have none."""
        return b"".join(map(self.piece, tokens))

    def spelt(self, tokens: array[int]) -> str:
        """Some tokens as people should see them: control tokens with their names."""
        return b"".join(self._read_piece(token, special=True) for token in tokens).decode("utf-8", "replace")

    @property
    def eog(self) -> frozenset[int]:
        """The tokens that end an answer."""
        if self._eog is None:
            is_eog = self._bindings.fast.llama_vocab_is_eog
            self._eog = frozenset(t for t in range(self.n_tokens) if is_eog(self.pointer, t))
        return self._eog

    def is_eog(self, token: int) -> bool:
        is_one: bool = self._bindings.fast.llama_vocab_is_eog(self.pointer, token)
        return is_one


def open_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a model file without its weights. It stays open until the process ends."""
    return LlamaWeights(path, LoadOptions(vocab_only=True)).vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """gpu_layers: -1 is all of them. repack: rewrite the weights for this CPU; slower to load, see `tune`."""

    gpu_layers: int = 0
    repack: bool = False
    vocab_only: bool = False


class LlamaWeights:
    """A loaded model file: read-only, shared by its contexts. Raises ModelError with llama.cpp's own reason."""

    def __init__(self, path: Path, options: LoadOptions) -> None:
        self._bindings = bindings()
        c = self._bindings.c
        params = c.llama_model_default_params()
        params.n_gpu_layers = options.gpu_layers
        params.use_extra_bufts = options.repack
        params.vocab_only = options.vocab_only
        self._bindings.keep_log()
        self.path = path
        self.pointer: int | None = c.llama_model_load_from_file(os.fsencode(path), params)
        if not self.pointer:
            raise ModelError(f"{path} cannot be loaded: {self._bindings.log.reason()}")
        self.is_rewritten = self._bindings.log.rewrote_weights()  # rounds otherwise than the file's own order does
        self.vocabulary = Vocabulary(c.llama_model_get_vocab(self.pointer))
        self.n_ctx_train: int = c.llama_model_n_ctx_train(self.pointer)

    def close(self) -> None:
        if self.pointer:
            self.vocabulary.grammars.close()
            self._bindings.c.llama_model_free(self.pointer)
            self.pointer = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextOptions:
    """Sizes of a context, and the threads it computes with.

    n_cells          cells of the KV cache, all sequences together; padded to 256
    n_slots          sequences at once, kept prefixes included
    n_batch          rows of one step
    threads          for a step of one row; threads_batch for all others
    type_k, type_v   number format of the cache: a key of KV_TYPES
    flash_attention  None: where llama.cpp has it, which is everywhere; a quantized cache needs it
    """

    n_cells: int = 512
    n_slots: int = 1
    n_batch: int = 512
    threads: int = 1
    threads_batch: int = 1
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attention: bool | None = None


class LlamaModel:
    """A context over loaded weights: the engine's Model (see model.py)."""

    def __init__(self, weights: LlamaWeights, options: ContextOptions) -> None:
        if not 1 <= options.n_slots <= MAX_SLOTS:
            raise UsageError(f"{options.n_slots} sequences at once: llama.cpp takes 1 to {MAX_SLOTS}")
        self._bindings = bindings()
        self._c = self._bindings.c
        self._options = options
        self.weights = weights
        self.vocabulary = weights.vocabulary
        self.n_vocab = weights.vocabulary.n_tokens
        self.n_slots = options.n_slots
        self.n_batch = max(options.n_batch, options.n_slots)
        self._abort_flag = ctypes.create_string_buffer(2)
        self._context: int | None = self._create(options.n_cells)
        self._batch = Batch(self._c, self.n_batch)
        self.piece = weights.vocabulary.piece
        self.is_eog = weights.vocabulary.is_eog
        self._bindings.silence_log()
        if options.n_slots > 1:
            import numpy  # noqa: F401  (for argmax(): not in the middle of somebody's answer)

    def _create(self, n_cells: int) -> int:
        options, c = self._options, self._c
        params = c.llama_context_default_params()
        params.n_ctx = padded(n_cells)
        params.n_batch = params.n_ubatch = self.n_batch
        params.n_seq_max = params.n_outputs_max = min(self.n_slots + 1, MAX_SLOTS)  # one more: see save()
        params.n_threads, params.n_threads_batch = options.threads, options.threads_batch
        params.type_k, params.type_v = KV_TYPES[options.type_k], KV_TYPES[options.type_v]
        params.flash_attn_type = _FLASH_ATTENTION[options.flash_attention]
        params.kv_unified = True  # one pass over the weights for a mixed batch, and prefixes shared without copying
        params.abort_callback = self._bindings.abort_callback
        params.abort_callback_data = ctypes.addressof(self._abort_flag)
        self._bindings.keep_log()
        context: int | None = c.llama_init_from_model(self.weights.pointer, params)
        if not context:
            raise ResourceError(
                f"no context of {params.n_ctx} tokens: {self._bindings.log.reason()}; choose a smaller --ctx-size"
            )
        self.n_cells: int = c.llama_n_ctx(context)
        self._memory = c.llama_get_memory(context)
        return context

    def set_threads(self, threads: int, threads_batch: int) -> None:
        """For the steps from now on. See ContextOptions."""
        self._options = replace(self._options, threads=threads, threads_batch=threads_batch)
        self._c.llama_set_n_threads(self._context, threads, threads_batch)

    def run(self, chunks: list[Chunk]) -> list[int]:
        """See Model.run. The guards are llama.cpp's own conditions, which abort the process there."""
        rows = self._batch.fill(chunks, self.n_slots)
        code = self._c.llama_decode(self._context, self._batch.native)
        self._c.llama_synchronize(self._context)
        if code == 0:
            return rows
        if code == 1:
            raise KvFull
        if code == 2:
            self._abort_flag[0] = b"\0"
            raise Aborted
        raise BatchFailed(f"llama_decode returned {code}")

    def sampler(self, params: SamplingParams, prompt: array[int]) -> LlamaSampler:
        return LlamaSampler(self, self.vocabulary, params, prompt)

    def draw(self, chain: Any, row: int) -> int:
        """Let a sampler chain draw from the logits of a row. The row must have been flagged in the last batch."""
        token: int = self._bindings.fast.llama_sampler_sample(chain, self._context, row)
        return token

    def argmax(self, row: int) -> int:
        """The likeliest token of a row: in numpy a twentieth of what a sampler chain takes for it (40 us)."""
        import numpy as np

        return int(np.frombuffer(self.logits(row), dtype=np.float32).argmax())

    def logits(self, row: int) -> Any:
        """float32[n_vocab], owned by llama.cpp and valid until the next run(). A ctypes array."""
        address = self._bindings.fast.llama_get_logits_ith(self._context, row)
        if not address:
            raise BatchFailed(f"row {row} of the last batch has no logits")
        return (ctypes.c_float * self.n_vocab).from_address(address)

    def logprobs(self, row: int, token: int, n_top: int) -> Logprobs:
        import numpy as np

        logits = np.frombuffer(self.logits(row), dtype=np.float32).astype(np.float64)
        peak = float(logits.max())
        logprobs = logits - (peak + math.log(float(np.exp(logits - peak).sum())))
        best = np.argpartition(-logprobs, n_top)[:n_top] if n_top else np.empty(0, dtype=np.int64)
        best = best[np.argsort(-logprobs[best], kind="stable")]
        top = tuple(Alternative(int(i), float(logprobs[i])) for i in best)
        return Logprobs(token, float(logprobs[token]), top)

    def last_logits(self, row: int) -> bytes:
        return bytes(memoryview(self.logits(row)))

    def save(self, slot: int, start: int, end: int) -> memoryview:
        """See Model.save. llama.cpp saves whole sequences: the positions become one of their own, in the spare slot."""
        spare = self._spare
        if spare is None:
            return memoryview(b"")
        self._check_slot(slot)
        self._c.llama_memory_seq_cp(self._memory, slot, spare, start, end)
        size = self._c.llama_state_seq_get_size(self._context, spare)
        state = (ctypes.c_uint8 * size)()
        n_written = self._c.llama_state_seq_get_data(self._context, state, size, spare)
        self._c.llama_memory_seq_rm(self._memory, spare, 0, -1)
        return memoryview(state)[:n_written]

    def restore(self, slot: int, start: int, end: int, state: memoryview) -> bool:
        """See Model.restore. llama.cpp itself refuses what is for another shape, number format or flash attention."""
        spare = self._spare
        if spare is None:
            return False
        native = (ctypes.c_uint8 * len(state)).from_buffer(state)
        n_read = self._c.llama_state_seq_set_data(self._context, native, len(state), spare)
        is_right = n_read == len(state) and self._span(spare) == (start, end) and self.n_positions(slot) == start
        if is_right:
            self._c.llama_memory_seq_cp(self._memory, spare, slot, start, end)
        self._c.llama_memory_seq_rm(self._memory, spare, 0, -1)
        return is_right

    @property
    def _spare(self) -> int | None:
        """A slot of llama.cpp's that the engine does not know of."""
        return self.n_slots if self.n_slots < MAX_SLOTS else None

    def _span(self, slot: int) -> tuple[int, int]:
        """The positions of a slot, the spare one too."""
        first: int = self._c.llama_memory_seq_pos_min(self._memory, slot)
        last: int = self._c.llama_memory_seq_pos_max(self._memory, slot)
        return first, last + 1

    def seq_rm(self, slot: int, start: int, end: int) -> None:
        self._check_slot(slot)
        self._c.llama_memory_seq_rm(self._memory, slot, start, end)

    def seq_cp(self, source: int, target: int, start: int, end: int) -> None:
        self._check_slot(source)
        self._check_slot(target)
        self._c.llama_memory_seq_cp(self._memory, source, target, start, end)

    def n_positions(self, slot: int) -> int:
        """How many positions llama.cpp itself holds for a slot."""
        self._check_slot(slot)
        last: int = self._c.llama_memory_seq_pos_max(self._memory, slot)
        return last + 1

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.n_slots:
            raise AssertionError(f"slot {slot} of {self.n_slots}")  # llama.cpp would abort the process

    def grow(self, n_cells: int, slot: int) -> None:
        """A larger context with this slot's cells copied over: 6 GB/s or more, and the zero fill of the new cache."""
        c, old = self._c, self._context
        size = c.llama_state_seq_get_size(old, slot)
        state = (ctypes.c_uint8 * size)()
        n_written = c.llama_state_seq_get_data(old, state, size, slot)
        n_cells_before, memory_before = self.n_cells, self._memory
        new = self._create(n_cells)
        if c.llama_state_seq_set_data(new, state, n_written, slot) == 0:
            c.llama_free(new)
            self.n_cells, self._memory = n_cells_before, memory_before
            raise ResourceError(f"the KV cache cannot be moved to a context of {n_cells} tokens")
        self._context = new
        c.llama_free(old)
        self._bindings.silence_log()

    def abort(self) -> None:
        self._abort_flag[0] = b"x"

    def close(self) -> None:
        """Frees the context. Samplers go before it, the weights after it."""
        if self._context:
            self._c.llama_free(self._context)
            self._context = None


class Batch:
    """The arrays of a llama_batch, owned by us and filled in place.

    One int32 token, position and slot, and one int8 flag for each of `n_rows` rows.
    """

    def __init__(self, c: Any, n_rows: int) -> None:
        int32s = ctypes.c_int32 * n_rows
        tokens, positions, slots = int32s(), int32s(), int32s()
        n_slots_of_row = int32s(*[1] * n_rows)
        flags = (ctypes.c_int8 * n_rows)()
        first = ctypes.addressof(slots)
        slot_pointers = (ctypes.c_void_p * (n_rows + 1))(*[first + 4 * i for i in range(n_rows)], None)
        self.n_rows = n_rows
        self.native = c.llama_batch(
            token=tokens,
            pos=positions,
            n_seq_id=n_slots_of_row,
            seq_id=ctypes.cast(slot_pointers, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
            logits=flags,
        )
        self._owned = (tokens, positions, slots, n_slots_of_row, flags, slot_pointers)
        self._tokens, self._positions, self._slots = (
            memoryview(a).cast("B").cast("i") for a in (tokens, positions, slots)
        )
        self._flags = memoryview(flags).cast("B")

    def fill(self, chunks: list[Chunk], n_slots: int, *, all_rows: bool = False) -> list[int]:
        """Lay the chunks out one after the other. Returns the last row of each.

        all_rows   every row has an output, not just the last one of each sequence
        """
        rows = []
        row = 0
        for sequence, start, n in chunks:
            slot = sequence.slot
            end = row + n
            if slot is None or not 0 <= slot < n_slots or n < 1 or end > self.n_rows:
                raise AssertionError(f"{sequence} with {n} rows at row {row} of {self.n_rows}")
            if n == 1:
                self._tokens[row], self._positions[row], self._slots[row] = (
                    sequence.tokens[start],
                    start,
                    slot,
                )
            else:
                self._tokens[row:end] = memoryview(sequence.tokens)[start : start + n]
                self._positions[row:end] = array("i", range(start, start + n))
                self._slots[row:end] = array("i", [slot]) * n
                self._flags[row:end] = bytes(n)
            self._flags[end - 1] = start + n == len(sequence.tokens)
            if all_rows:
                self._flags[row:end] = b"\x01" * n
            rows.append(end - 1)
            row = end
        self.native.n_tokens = row
        return rows
