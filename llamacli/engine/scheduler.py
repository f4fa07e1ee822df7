"""Decides which tokens go into the next batch. Pure Python; knows nothing of llama.cpp."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable

from llamacli.engine.kv import KvCache, common_prefix
from llamacli.engine.sequence import Chunk, Sequence

MIN_CHUNK = 8  # rows of prompts beside streams at least: with fewer a prompt would never be read
LONG_CHUNK = 64  # from so many rows on a CPU's attention is computed in tiles: twice as fast in a long context
TILE = 16  # rows that a CPU's matrix kernels compute together: a batch of 20 takes as long as one of 32
UNHURRIED = 4  # times as long may a step take while no stream waits for it
MIN_SHARED = 32  # a prefix shorter than this is not worth waiting for
RESERVE = 32  # cells held back for each running sequence when another one is let in


Prepare = Callable[[Sequence], bool]
Guess = Callable[[list[Sequence], int], "list[array[int]]"]


class Scheduler:
    """First come, first served; decode rows first, then prompt chunks with the room that is left.

    Of that room the oldest prompt gets half, and the rest goes to those that need least: a short prompt behind long
    ones is answered soon, and of several that come together the first need not wait for the last.

    n_batch       rows of a batch at most
    step_seconds  how long the prefill part of one step may take, so that no stream stalls behind a long
                  prompt; None where nobody else waits
    max_running   sequences that are computed at once; the other slots hold kept prefixes. By default all slots
    prepare       is called with a sequence whose turn has come, before a prefix is looked for; False when it has
                  removed it
    guess         is called with all decoding sequences and a number of rows, and returns what may follow in each of
                  them, in so many rows at most; not while a prompt is being read
    """

    def __init__(
        self,
        kv: KvCache,
        *,
        n_batch: int,
        step_seconds: float | None = 0.25,
        max_running: int | None = None,
        prepare: Prepare | None = None,
        guess: Guess | None = None,
    ) -> None:
        assert n_batch >= kv.n_slots, "every decoding sequence must find a row"
        self.kv = kv
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self.paused: set[Sequence] = set()
        self.n_prefilled = 0  # rows computed of prompts, and of answers that had to be computed again
        self.n_decoded = 0
        self.n_reused = 0  # tokens whose cells were there already when their sequence was let in
        self._prepare = prepare
        self._guess = guess
        self._n_batch = n_batch
        self._max_running = kv.n_slots if max_running is None else max_running
        self._step_seconds = step_seconds
        self._prefill_rate = 0.0  # tokens/s, exponential average; 0 until measured
        self._chunk_cap = n_batch  # halved while llama.cpp says the cache is full
        self._is_short = False  # llama.cpp holds less than the ledger believes: let nobody in until somebody leaves
        self._leaders: dict[int, tuple[Sequence, int]] = {}  # sequence id → who computes its prefix, how far

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence, *, keep: bool = False) -> None:
        """Take a sequence out, at any stage. `keep` leaves its tokens in the cache as a prefix for others."""
        self._leaders.pop(sequence.id, None)
        if sequence in self.paused:
            self.paused.remove(sequence)
            return
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        self._is_short = False
        self.running.remove(sequence)
        self.cut_back(sequence, len(sequence.tokens))  # right guesses that stand beyond the end of the answer
        if keep:
            self.kv.keep(sequence.slot, sequence.tokens[: sequence.n_computed])
        else:
            self.kv.release(sequence.slot)
        sequence.slot = None

    def pause(self, sequence: Sequence) -> None:
        """Compute nothing more of a sequence until resume().

        Its slot goes to the next one and its cells are kept as a prefix: as long as nobody else needs them it
        goes on where it stopped, without computing anything again.
        """
        self.remove(sequence, keep=True)
        sequence.n_computed = 0  # until it is let in again
        self.paused.add(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Let a paused sequence go on. It comes before those that arrived after it."""
        if sequence not in self.paused:
            return
        self.paused.remove(sequence)
        at = next((i for i, other in enumerate(self.waiting) if other.id > sequence.id), len(self.waiting))
        self.waiting.insert(at, sequence)

    def schedule(self) -> list[Chunk]:
        """The next batch. Empty when there is nothing to do, or when the only running sequence finds no cell."""
        self._admit()
        while self.running:
            chunks = self._decode_rows()
            if chunks is not None:
                chunks += self._prompt_chunks(self._n_batch - len(chunks))
                if chunks:
                    return self._with_guesses(chunks)
            if not self._preempt():
                return []
        return []

    def commit(self, chunks: list[Chunk], seconds: float) -> None:
        """Book a batch that llama.cpp has computed in this time."""
        n_rows = 0
        has_prompt = False
        for sequence, _, n, guessed in chunks:
            assert sequence.slot is not None
            self.kv.extend(sequence.slot, n)
            sequence.n_computed += n
            n_rows += n
            if n - len(guessed) == 1 and sequence.n_generated:
                self.n_decoded += 1
            else:
                self.n_prefilled += n
                has_prompt = True
        self._chunk_cap = self._n_batch
        if has_prompt and n_rows >= TILE and seconds > 0:
            rate = n_rows / seconds
            self._prefill_rate = rate if not self._prefill_rate else 0.7 * self._prefill_rate + 0.3 * rate

    def cut_back(self, sequence: Sequence, length: int) -> None:
        """Forget what was computed of a running sequence from position `length` on: guesses that were wrong."""
        if sequence.n_computed > length:
            assert sequence.slot is not None
            self.kv.truncate(sequence.slot, length)
            sequence.n_computed = length

    def on_full(self, chunks: list[Chunk]) -> bool:
        """llama.cpp found no cells for this batch. False when nothing is left to give up.

        In order: a kept prefix, the size of prompt chunks, the youngest running sequence.
        """
        if self.kv.evict():
            return True
        longest = max(chunk.n for chunk in chunks)
        if longest > 1:
            self._chunk_cap = longest // 2
            return True
        self._is_short = True
        return self._preempt()

    def _decode_rows(self) -> list[Chunk] | None:
        decoding = [s for s in self.running if s.n_pending == 1]
        if not self.kv.make_room(len(decoding)):
            return None
        return [Chunk(s, s.n_computed, 1) for s in decoding]

    def _with_guesses(self, chunks: list[Chunk]) -> list[Chunk]:
        """The same chunks with what may follow in each sequence, while all of them are decoding."""
        if self._guess is None or any(chunk.n > 1 for chunk in chunks):
            return chunks
        room = min(self._n_batch, self._chunk_cap, self.kv.cells.n_free) - len(chunks)
        if room <= 0:
            return chunks
        guesses = self._guess([chunk.sequence for chunk in chunks], room)
        return [
            Chunk(chunk.sequence, chunk.start, 1 + len(guessed), guessed) if guessed else chunk
            for chunk, guessed in zip(chunks, guesses, strict=True)
        ]

    def _prompt_chunks(self, n_rows: int) -> list[Chunk]:
        prefilling = [s for s in self.running if s.n_pending > 1]
        if not prefilling:
            return []
        n_decoding = len(self.running) - len(prefilling)
        budget = min(n_rows, self._prefill_budget(n_decoding))
        wanted = sum(s.n_pending for s in prefilling)
        self.kv.make_room(min(budget, wanted) + n_decoding)
        budget = min(budget, self.kv.cells.n_free - n_decoding)
        return [
            Chunk(sequence, sequence.n_computed, n)
            for sequence, n in zip(prefilling, self._shares(prefilling, budget), strict=True)
            if n > 0
        ]

    def _shares(self, prefilling: list[Sequence], budget: int) -> list[int]:
        """How many rows each prompt gets. They come in order of arrival."""
        wishes = [min(sequence.n_pending, self._chunk_cap) for sequence in prefilling]
        shares = [0] * len(wishes)
        shares[0] = min(wishes[0], -(-budget // 2))
        budget -= shares[0]
        for i in sorted(range(len(wishes)), key=lambda i: prefilling[i].n_pending):
            more = min(wishes[i] - shares[i], budget)
            shares[i] += more
            budget -= more
        return shares

    def _prefill_budget(self, n_decoding: int) -> int:
        """Prompt tokens that fit into the time of one step, in whole tiles together with the streams' rows."""
        if self._step_seconds is None:
            return self._n_batch
        if not self._prefill_rate:
            n = 2 * LONG_CHUNK
        elif n_decoding:
            n = max(MIN_CHUNK, int(self._prefill_rate * self._step_seconds))
        else:
            n = max(LONG_CHUNK, int(self._prefill_rate * UNHURRIED * self._step_seconds))
        n_rows = n_decoding + n
        n_whole = n_rows // TILE * TILE
        if n_whole - n_decoding < MIN_CHUNK:
            n_whole += TILE
        return n_whole - n_decoding

    def _preempt(self) -> bool:
        """Send the youngest running sequence back to wait; what it has computed is given up.

        False for the only one: it must end instead.
        """
        if len(self.running) < 2:
            return False
        sequence = self.running.pop()
        assert sequence.slot is not None
        self.kv.release(sequence.slot)
        sequence.slot = None
        sequence.n_computed = 0  # until it is let in again
        self.waiting.appendleft(sequence)
        return True

    def _admit(self) -> None:
        held: list[Sequence] = []
        while self._has_place():
            sequence = self.waiting[0]
            if self._is_led(sequence):
                held.append(self.waiting.popleft())
                continue
            if self._prepare is not None and not self._prepare(sequence):
                continue
            self.waiting.popleft()
            donor, length = self._longest_prefix(sequence)
            if self._is_led(sequence):
                held.append(sequence)
            elif self._fits(sequence, donor, length):
                self._start(sequence, donor, length)
            else:
                held.append(sequence)
                break  # nobody overtakes a sequence that waits for room
        self.waiting.extendleft(reversed(held))

    def _has_place(self) -> bool:
        """Whether one more sequence may be let in, if it fits."""
        if not self.waiting or len(self.running) >= self._max_running:
            return False
        return self.kv.can_lend and not (self._is_short and bool(self.running))

    def _is_led(self, sequence: Sequence) -> bool:
        """Whether a running sequence is just computing the prefix that this one can share."""
        leader, length = self._leaders.get(sequence.id, (None, 0))
        if leader is not None and leader.slot is not None and leader.n_computed < length:
            return True
        self._leaders.pop(sequence.id, None)
        return False

    def _longest_prefix(self, sequence: Sequence) -> tuple[int, int]:
        """(slot, length) of the longest computed prefix. Notes a leader if waiting for it shares much more."""
        slot, length = self.kv.best_cached(sequence.tokens)
        leader, shareable = None, length + MIN_SHARED
        for other in self.running:
            common = common_prefix(sequence.tokens, other.tokens)
            if min(common, other.n_computed) > length:
                assert other.slot is not None
                slot, length = other.slot, min(common, other.n_computed)
            if common > max(shareable, other.n_computed + MIN_SHARED):
                leader, shareable = other, common
        last = len(sequence.tokens) - 1  # one row must be computed: the next token is drawn from it
        if leader is not None and shareable > length + MIN_SHARED:
            self._leaders[sequence.id] = leader, min(shareable, last)
        return slot, min(length, last)

    def _fits(self, sequence: Sequence, donor: int, length: int) -> bool:
        if not self.running:
            return True
        active = [s.slot for s in self.running if s.slot is not None]
        shared = length if donor in active else 0
        room = self.kv.cells.n_cells - self.kv.cells.n_used_by(active)
        return len(sequence.tokens) - shared + RESERVE * (len(active) + 1) <= room

    def _start(self, sequence: Sequence, donor: int, length: int) -> None:
        sequence.slot = self.kv.adopt(sequence.tokens, donor, length) if length else self.kv.lend()
        if sequence.n_generated == 0:
            sequence.n_cached = length
            self.kv.regard(sequence.tokens, length)
        if not self.paused:  # what is computed of these is kept, too
            self.kv.trim()
        self.n_reused += length
        sequence.n_computed = length
        # Keep the order of arrival: a sequence that was sent back is older than those that came later.
        at = next((i for i, s in enumerate(self.running) if s.id > sequence.id), len(self.running))
        self.running.insert(at, sequence)
