"""Sequences in, deltas out, one batch at a time: schedule, run, commit. No threads of its own.

One thread owns an engine; only abort() may be called from another.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from llamacli.engine.detokenizer import Detokenizer
from llamacli.engine.kv import KvCache, common_prefix
from llamacli.engine.model import Aborted, BatchFailed, KvFull, Model, Sampler
from llamacli.engine.scheduler import Scheduler
from llamacli.engine.sequence import Chunk, Delta, FinishReason, Load, Logprobs, SamplingParams, Sequence, Usage
from llamacli.errors import InputTooLong, ResourceError, UsageError

if TYPE_CHECKING:
    from llamacli.engine.prefixes import Prefixes
    from llamacli.engine.speculation import Speculation


@dataclass(slots=True)
class _Request:
    """A sequence with what draws its tokens and what turns them into text."""

    sequence: Sequence
    params: SamplingParams
    sampler: Sampler
    detokenizer: Detokenizer
    is_stored: bool  # the prompt's cells may come from the disk and go there
    is_restored: bool  # there is nothing to be looked for on the disk, or no more


class Engine:
    """Continuous batching over a model.

    n_limit        tokens that one sequence may hold at most, prompt and answer; by default all cells
    max_cells      the cache may grow up to here while a single sequence runs
    step_seconds   time that prompts may take of a step; None when nobody waits for anybody
    max_running    sequences that are computed at once; what slots are left hold kept prefixes
    keeps          finished sequences stay in the cache for those that begin alike
    prefixes       kept on disk, if any are
    speculation    guesses tokens, which are computed beside those that are known; None: nothing is guessed
    """

    def __init__(
        self,
        model: Model,
        *,
        n_limit: int | None = None,
        max_cells: int | None = None,
        step_seconds: float | None = 0.25,
        max_running: int | None = None,
        keeps: bool = True,
        prefixes: Prefixes | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.model = model
        self.speculation = speculation
        self.prefixes = prefixes
        self._keeps = keeps
        n_kept = None if max_running is None else model.n_slots - max_running
        self.kv = KvCache(model.n_cells, model.n_slots, model, n_kept)
        self._max_cells = max(max_cells or 0, model.n_cells)
        self.n_limit = min(n_limit or self._max_cells, self._max_cells)
        self._scheduler = Scheduler(
            self.kv,
            n_batch=model.n_batch,
            step_seconds=step_seconds,
            max_running=max_running,
            prepare=self._prepare,
            guess=self._guess if speculation is not None else None,
        )
        self._requests: dict[int, _Request] = {}
        self._early: list[Delta] = []  # first tokens that were drawn from stored logits, before any batch
        self._next_id = 0

    @property
    def is_idle(self) -> bool:
        return not self._requests

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything: some sequence is neither finished nor paused."""
        return bool(self._scheduler.running or self._scheduler.waiting)

    @property
    def load(self) -> Load:
        scheduler = self._scheduler
        return Load(
            len(scheduler.running),
            len(scheduler.waiting) + len(scheduler.paused),
            self.kv.cells.n_used,
            scheduler.n_reused,
            scheduler.n_prefilled,
            scheduler.n_decoded,
            *((0, 0) if self.speculation is None else (self.speculation.n_guessed, self.speculation.n_right)),
        )

    def add(
        self,
        prompt: Iterable[int],
        params: SamplingParams | None = None,
        *,
        trim: bool = False,
        is_stored: bool = True,
    ) -> Sequence:
        """Queue a prompt. Its answer comes out of step() under the sequence's id.

        is_stored   its cells may come from the disk and go there

        Raises UsageError for an empty prompt or an unknown token, InputTooLong when no token of an answer fits.
        """
        params = params or SamplingParams()
        sequence = Sequence(self._next_id, prompt, params.max_tokens)
        self._check(sequence.tokens)
        sampler = self.model.sampler(params, sequence.tokens)
        self._next_id += 1
        detokenizer = Detokenizer(params.stop, trim=trim)
        is_stored = is_stored and self.prefixes is not None and sequence.n_prompt >= self.prefixes.least
        self._requests[sequence.id] = _Request(sequence, params, sampler, detokenizer, is_stored, not is_stored)
        self._scheduler.add(sequence)
        return sequence

    def _check(self, prompt: array[int]) -> None:
        if not prompt:
            raise UsageError("the prompt is empty")
        if min(prompt) < 0 or max(prompt) >= self.model.n_vocab:
            raise UsageError(f"the prompt holds a token outside 0..{self.model.n_vocab - 1}")
        if len(prompt) >= self.n_limit:
            raise InputTooLong(
                f"the prompt is {len(prompt):,} tokens; the context holds {self.n_limit:,}, the answer included"
            )

    def step(self) -> list[Delta]:
        """Run one batch. Returns what it added to each sequence; may be empty while prompts are read."""
        chunks = self._scheduler.schedule()
        if self._early:  # they need not wait for the batch
            early, self._early = self._early, []
            return early
        return self._run(chunks) if chunks else self._relieve()

    def _run(self, chunks: list[Chunk]) -> list[Delta]:
        started = perf_counter()
        try:
            rows = self.model.run(chunks)
        except KvFull:
            return [] if self._scheduler.on_full(chunks) else self._relieve()
        except Aborted:
            self._roll_back(chunk.sequence for chunk in chunks)
            return []
        except BatchFailed:
            self._roll_back(chunk.sequence for chunk in chunks)
            return [self._finish(chunk.sequence, FinishReason.FAILED) for chunk in chunks]
        seconds = perf_counter() - started
        self._scheduler.commit(chunks, seconds)
        if self.speculation is not None and self.speculation.costs.learns:
            self.speculation.learn(chunks, seconds)
        deltas = []
        for chunk, row in zip(chunks, rows, strict=True):
            if chunk.guessed:
                deltas += self._advance_far(chunk, row - len(chunk.guessed))
            elif chunk.wants_logits:
                deltas.append(self._advance(chunk.sequence, row))
        return deltas

    def generate(
        self, prompt: Iterable[int], params: SamplingParams | None = None, *, trim: bool = False
    ) -> Iterator[Delta]:
        """The answer to one prompt, for an engine that serves nobody else. Closing the iterator cancels it."""
        assert self.is_idle, "the deltas of other sequences would be lost; use add() and step()"
        sequence = self.add(prompt, params, trim=trim)
        try:
            while sequence.id in self._requests:
                for delta in self.step():
                    if delta.sequence_id == sequence.id:
                        yield delta
        finally:
            self.cancel(sequence)

    def cancel(self, sequence: Sequence, *, keep: bool = False) -> None:
        """Forget a sequence at any stage and give its cells back. Does nothing if it has ended already.

        keep   what is computed of it stays in the cache, as if it had ended by itself
        """
        if sequence.id in self._requests:
            self._retire(sequence, keep=keep and self._keeps)

    def pause(self, sequence: Sequence) -> None:
        """Compute nothing more of a sequence until resume(): nobody reads its answer for now. See Scheduler.pause."""
        if sequence.id in self._requests:
            self._scheduler.pause(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Go on with a paused sequence. Does nothing if it is not paused, or has ended."""
        if sequence.id in self._requests:
            self._scheduler.resume(sequence)

    def save_some(self) -> bool:
        """Write a piece of what is to be kept on disk, for when there is no work. False when nothing is left."""
        return self.prefixes is not None and self.prefixes.save_some(self.kv, self.model)

    def abort(self) -> None:
        """Stop the step that is running, or else the next one. For another thread, on the way out."""
        self.model.abort()

    def close(self) -> None:
        """Cancel everything and free the model's context."""
        for request in list(self._requests.values()):
            self.cancel(request.sequence)
        self.kv.clear()
        if self.speculation is not None:
            self.speculation.close()
        self.model.close()

    def _prepare(self, sequence: Sequence) -> bool:
        """Take over what is stored of a prompt whose turn has come, as if it had been kept. False if that answers it.

        Not earlier: what is restored for somebody who waits could be given up for others until then.
        """
        request = self._requests[sequence.id]
        if not request.is_restored:
            request.is_restored = True
            assert self.prefixes is not None
            tokens = sequence.tokens
            running = (min(common_prefix(tokens, other.tokens), other.n_computed) for other in self._scheduler.running)
            n_there = max(self.kv.best_cached(tokens)[1], *running, 0)
            logits = self.prefixes.restore(tokens, self.kv, self.model, n_there)
            if logits is not None and request.params.logprobs is None:
                sequence.n_cached = sequence.n_prompt
                self._early.append(self._take(request, request.sampler.sample_from(logits)))
        return sequence.id in self._requests

    def _advance(self, sequence: Sequence, row: int) -> Delta:
        """Draw the next token of a sequence and say what it adds to the text."""
        request = self._requests[sequence.id]
        if request.is_stored and sequence.n_generated == 0:
            assert self.prefixes is not None
            self.prefixes.owe(sequence.tokens[:], self.model.last_logits(row))
        return self._take(request, *self._draw(request, row))

    def _draw(self, request: _Request, row: int) -> tuple[int | None, Logprobs | None]:
        token, n_top = request.sampler.sample(row), request.params.logprobs
        logprobs = None if token is None or n_top is None else self.model.logprobs(row, token, n_top)
        return token, logprobs

    def _advance_far(self, chunk: Chunk, row: int) -> list[Delta]:
        """Draw tokens as long as they are those that were guessed, and the one that follows.

        row   of the last token that was known; those of the guessed ones come behind it
        """
        assert self.speculation is not None
        sequence, guessed = chunk.sequence, chunk.guessed
        request = self._requests[sequence.id]
        deltas: list[Delta] = []
        is_right, n_right = True, 0
        while is_right and sequence.id in self._requests:
            token, logprobs = self._draw(request, row + n_right)
            is_right = n_right < len(guessed) and token == guessed[n_right]
            if not is_right:  # before the token is taken: the sequence may end with it, and is kept then
                self._scheduler.cut_back(sequence, chunk.start + 1 + n_right)
            n_right += is_right
            deltas.append(self._take(request, token, logprobs))
        has_ended = is_right and deltas[-1].token is None  # with a right guess that is no part of the answer
        self._scheduler.n_decoded += n_right - has_ended
        self.speculation.note(sequence, len(guessed), n_right)
        return deltas

    def _take(self, request: _Request, token: int | None, logprobs: Logprobs | None = None) -> Delta:
        """Add a token that was drawn."""
        sequence = request.sequence
        if token is None:
            return self._finish(sequence, FinishReason.DEAD_END)
        if self.model.is_eog(token):
            return self._finish(sequence, FinishReason.STOP)
        sequence.tokens.append(token)
        text = request.detokenizer.feed(self.model.piece(token))
        reason = self._reason_to_end(request)
        if reason is None:
            return Delta(sequence.id, text, token, logprobs)
        return self._finish(sequence, reason, text, token)._replace(logprobs=logprobs)

    def _reason_to_end(self, request: _Request) -> FinishReason | None:
        sequence = request.sequence
        if request.detokenizer.stopped:
            return FinishReason.STOP
        if request.params.grammar is not None and not request.params.ignore_eos and request.sampler.is_over():
            return FinishReason.STOP  # no step is needed to hear it from the model
        if sequence.max_tokens is not None and sequence.n_generated >= sequence.max_tokens:
            return FinishReason.LENGTH
        if len(sequence.tokens) >= self.n_limit:
            return FinishReason.CONTEXT
        return None

    def _finish(self, sequence: Sequence, reason: FinishReason, text: str = "", token: int | None = None) -> Delta:
        text += self._requests[sequence.id].detokenizer.flush()
        self._retire(sequence, keep=self._keeps and reason is not FinishReason.FAILED)
        usage = Usage(sequence.n_prompt, sequence.n_generated, sequence.n_cached)
        return Delta(sequence.id, text, token, None, reason, usage)

    def _retire(self, sequence: Sequence, *, keep: bool) -> None:
        self._scheduler.remove(sequence, keep=keep)
        if self.speculation is not None:
            self.speculation.forget(sequence)
        self._requests.pop(sequence.id).sampler.close()

    def _guess(self, decoding: list[Sequence], n_rows: int) -> list[array[int]]:
        """What may follow in each sequence, no further than its answer may go."""
        assert self.speculation is not None
        limits = [self._n_left(sequence) - 1 if sequence.n_generated else 0 for sequence in decoding]
        foreseen = {
            sequence.id: request.sampler.foreseen()
            for sequence in decoding
            if (request := self._requests[sequence.id]).params.grammar is not None
        }
        is_timed = not any(self._requests[sequence.id].params.is_repeatable for sequence in decoding)
        n_rows = min(n_rows, self.model.n_guessed)
        return self.speculation.plan(decoding, limits, n_rows, foreseen, is_timed=is_timed)

    def _n_left(self, sequence: Sequence) -> int:
        """Tokens that may still be added to a sequence."""
        n_left = self.n_limit - len(sequence.tokens)
        return n_left if sequence.max_tokens is None else min(n_left, sequence.max_tokens - sequence.n_generated)

    def _roll_back(self, sequences: Iterable[Sequence]) -> None:
        """Make llama.cpp forget rows of a batch that did not complete."""
        for sequence in sequences:
            assert sequence.slot is not None
            self.model.seq_rm(sequence.slot, sequence.n_computed, -1)

    def _relieve(self) -> list[Delta]:
        """The one running sequence finds no cell, and no kept prefix is left: enlarge the cache, or end it."""
        if not self._scheduler.running:
            return []
        sequence = self._scheduler.running[0]
        if self._grow(sequence):
            return []
        return [self._finish(sequence, FinishReason.CONTEXT)]

    def _grow(self, sequence: Sequence) -> bool:
        n_cells = min(self._max_cells, max(2 * self.model.n_cells, len(sequence.tokens) + 1))
        if n_cells <= self.model.n_cells:
            return False
        assert sequence.slot is not None
        try:
            self.model.grow(n_cells, sequence.slot)
        except ResourceError:
            return False
        self.kv.cells.n_cells = self.model.n_cells
        return True
