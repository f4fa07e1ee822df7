"""What throughput.py compares: our engine, a bare loop, llama_cpp.Llama and llama-bench, all told the same.

Importing this imports the whole llama_cpp package, so it must come before the engine's own light import of it.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, Protocol, cast

from llama_cpp import Llama

from llamacli.engine.bindings import bindings
from llamacli.engine.engine import Engine
from llamacli.engine.llama import ContextOptions, LlamaModel, LlamaWeights
from llamacli.engine.model import Sampler
from llamacli.engine.sequence import Chunk, Delta, Logprobs, SamplingParams

N_BATCH = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every side does: read `n_prefill` tokens, and continue a short prompt by `n_decode` tokens."""

    path: Path
    threads: int
    n_ctx: int
    n_prefill: int
    n_decode: int


class Speed(NamedTuple):
    """In tokens per second."""

    prefill: float
    decode: float


class Side(Protocol):
    """A program that reads and continues prompts, one at a time and greedily. Nothing is kept between two calls."""

    def prefill(self, prompt: Sequence[int]) -> float:
        """Seconds until the prompt is read and the first token drawn."""

    def decode(self, prompt: Sequence[int], n: int) -> float:
        """Tokens per second of the `n` that follow the first one."""


class TimedModel:
    """A model that adds up the time spent in run(). All else is the model's own."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self.n_cells, self.n_slots = model.n_cells, model.n_slots
        self.n_batch, self.n_guessed, self.n_vocab = model.n_batch, model.n_guessed, model.n_vocab
        self.piece, self.is_eog = model.piece, model.is_eog
        self.seq_rm, self.seq_cp = model.seq_rm, model.seq_cp
        self.last_logits, self.save, self.restore = model.last_logits, model.save, model.restore
        self.abort, self.close = model.abort, model.close
        self.seconds = 0.0

    def run(self, chunks: list[Chunk]) -> list[int]:
        started = perf_counter()
        try:
            return self._model.run(chunks)
        finally:
            self.seconds += perf_counter() - started

    def sampler(self, params: SamplingParams, prompt: array[int]) -> Sampler:
        return self._model.sampler(params, prompt)

    def logprobs(self, row: int, token: int, n_top: int) -> Logprobs:
        return self._model.logprobs(row, token, n_top)

    def grow(self, n_cells: int, slot: int) -> None:
        self._model.grow(n_cells, slot)
        self.n_cells = self._model.n_cells


class OurEngine:
    def __init__(
        self, weights: LlamaWeights, work: Work, *, n_slots: int = 1, options: ContextOptions | None = None
    ) -> None:
        """options   in place of those that the work and the slots make"""
        options = options or ContextOptions(
            n_cells=work.n_ctx,
            n_slots=n_slots,
            n_batch=N_BATCH,
            threads=work.threads,
            threads_batch=work.threads,
        )
        self._model = TimedModel(LlamaModel(weights, options))
        self._engine = Engine(self._model, step_seconds=None)

    def prefill(self, prompt: Sequence[int]) -> float:
        started = perf_counter()
        self._start([prompt], 1)
        return perf_counter() - started

    def decode(self, prompt: Sequence[int], n: int) -> float:
        self._start([prompt], 1 + n)
        started = perf_counter()
        return self._finish() / (perf_counter() - started)

    def own_time(self, prompt: Sequence[int], n: int) -> float:
        """Seconds for each token of one stream that pass outside of the model's run()."""
        self._start([prompt], 1 + n)
        started, in_model = perf_counter(), self._model.seconds
        n_tokens = self._finish()
        return (perf_counter() - started - (self._model.seconds - in_model)) / n_tokens

    def steps(self, prompts: Sequence[Sequence[int]], n: int) -> tuple[float, float]:
        """Seconds of a step that adds a token to every answer, and of that part of it that is not the model's run()."""
        self._start(prompts, 2 * n)
        begun: set[int] = set()
        while len(begun) < len(prompts):
            begun |= {delta.sequence_id for delta in self._engine.step()}
        started, in_model = perf_counter(), self._model.seconds
        for _ in range(n):  # none has ended by then
            self._engine.step()
        elapsed, in_model = perf_counter() - started, self._model.seconds - in_model
        self._finish()
        return elapsed / n, (elapsed - in_model) / n

    def whole(self, prompts: Sequence[Sequence[int]], n: int) -> float:
        """Tokens per second of all answers together, `n` tokens each, from the first prompt's start on."""
        started = perf_counter()
        n_tokens = self._start(prompts, n, ignore_eos=False) + self._finish()
        return n_tokens / (perf_counter() - started)

    def close(self) -> None:
        self._engine.close()

    def _start(self, prompts: Sequence[Sequence[int]], n: int, *, ignore_eos: bool = True) -> int:
        """Add prompts and step until the first tokens come. Returns how many came."""
        self._engine.kv.clear()
        params = SamplingParams(temperature=0, ignore_eos=ignore_eos, max_tokens=n)
        for prompt in prompts:
            self._engine.add(prompt, params)
        while not (deltas := self._engine.step()):
            pass
        return _n_tokens(deltas)

    def _finish(self) -> int:
        """Step until nothing is left. Returns how many tokens came."""
        n_tokens = 0
        while not self._engine.is_idle:
            n_tokens += _n_tokens(self._engine.step())
        return n_tokens


class BareLoop:
    """llama_decode and a greedy sampler over the same weights: Python that keeps no books."""

    def __init__(self, weights: LlamaWeights, work: Work) -> None:
        self._c = c = bindings().c
        params = c.llama_context_default_params()
        params.n_ctx = work.n_ctx
        params.n_batch = params.n_ubatch = N_BATCH
        params.n_threads = params.n_threads_batch = work.threads
        self._context: Any = c.llama_init_from_model(weights.pointer, params)
        self._memory = c.llama_get_memory(self._context)
        self._sampler: Any = c.llama_sampler_init_greedy()

    def prefill(self, prompt: Sequence[int]) -> float:
        self._c.llama_memory_clear(self._memory, False)
        started = perf_counter()
        self._next(prompt)
        return perf_counter() - started

    def decode(self, prompt: Sequence[int], n: int) -> float:
        self._c.llama_memory_clear(self._memory, False)
        token = self._next(prompt)
        started = perf_counter()
        for _ in range(n):
            token = self._next((token,))
        return n / (perf_counter() - started)

    def close(self) -> None:
        self._c.llama_sampler_free(self._sampler)
        self._c.llama_free(self._context)

    def _next(self, tokens: Sequence[int]) -> int:
        native = (ctypes.c_int32 * len(tokens))(*tokens)
        if self._c.llama_decode(self._context, self._c.llama_batch_get_one(native, len(tokens))) != 0:
            raise SystemExit("the bare loop's llama_decode failed")
        token: int = self._c.llama_sampler_sample(self._sampler, self._context, -1)
        return token


class HighLevel:
    """llama_cpp.Llama with its create_completion. It repacks the weights and offers no way not to.

    It stops when the model ends its answer, so tokens are counted and not assumed.
    """

    def __init__(self, work: Work) -> None:
        self._llama: Any = Llama(
            str(work.path),
            n_ctx=work.n_ctx,
            n_batch=N_BATCH,
            n_threads=work.threads,
            n_threads_batch=work.threads,
            verbose=False,
        )

    def prefill(self, prompt: Sequence[int]) -> float:
        started = perf_counter()
        self._exhaust(self._answer(prompt, 1))
        return perf_counter() - started

    def decode(self, prompt: Sequence[int], n: int) -> float:
        answer = self._answer(prompt, 1 + n)
        next(answer)
        started, n_before = perf_counter(), self._llama.n_tokens
        self._exhaust(answer)
        return self._counted(self._llama.n_tokens - n_before, n) / (perf_counter() - started)

    def whole(self, prompt: Sequence[int], n: int) -> float:
        """Tokens per second of one answer, from the prompt's start on."""
        started = perf_counter()
        self._exhaust(self._answer(prompt, n))
        # The last token is drawn and not evaluated.
        return self._counted(self._llama.n_tokens - len(prompt) + 1, n) / (perf_counter() - started)

    def close(self) -> None:
        self._llama.close()

    def _answer(self, prompt: Sequence[int], n: int) -> Iterator[Any]:
        self._llama.reset()  # else it would go on from the prompt before, where the two agree
        answer = self._llama.create_completion(list(prompt), max_tokens=n, temperature=0.0, stream=True)
        return cast(Iterator[Any], answer)

    def _exhaust(self, answer: Iterator[Any]) -> None:
        for _ in answer:
            pass

    def _counted(self, n_tokens: int, n_wanted: int) -> int:
        if n_tokens < n_wanted // 2:
            raise SystemExit(
                f"llama_cpp.Llama ended its answer after {n_tokens} of {n_wanted} tokens: too few to measure"
            )
        return n_tokens


def speed(side: Side, work: Work, prompt: Sequence[int]) -> Speed:
    """`prompt` is the one to continue; the one to read is any tokens."""
    read = side.prefill([prompt[0], *range(1000, 999 + work.n_prefill)])
    return Speed(work.n_prefill / read, side.decode(prompt, work.n_decode))


def llama_bench(program: str, work: Work, *, repack: bool) -> Speed:
    """llama.cpp's own measurement, with its own warm-up. It draws no tokens: it evaluates random ones."""
    command = [program, "-m", str(work.path), "-p", str(work.n_prefill), "-n", str(work.n_decode), "-r", "1"]
    command += ["-t", str(work.threads), "-b", str(N_BATCH), "-ngl", "0", "--repack", str(int(repack)), "-o", "json"]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout
    found = {bool(test["n_gen"]): float(test["avg_ts"]) for test in json.loads(output)}
    return Speed(prefill=found[False], decode=found[True])


def _n_tokens(deltas: list[Delta]) -> int:
    return sum(delta.token is not None for delta in deltas)
