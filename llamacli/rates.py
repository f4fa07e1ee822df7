"""How fast a model is on this machine: seconds to load it, to read a prompt, to add a token to each of some streams.

Only what llama.cpp computes is timed: nothing is drawn (but in answer()), and no text is made. Knows no terminal and
judges nothing.

Every result is a Timing: the seconds of each repeat in the order they were taken, their median, and how far apart they
lie. A Meter measures a model that is loaded; two of them (other weights, another cache) can take turns.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from time import perf_counter

from llamacli.engine.llama import LlamaWeights, LoadOptions
from llamacli.engine.model import Model
from llamacli.engine.sequence import Chunk, SamplingParams, Sequence
from llamacli.errors import UsageError


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that the same work took, again and again: one or more."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def mean(self) -> float:
        """What the work takes in the long run, moments that held it up included."""
        return fmean(self.seconds)

    @property
    def spread(self) -> float:
        """How far the quickest and the slowest lie apart, as a share of the median: 0 is a steady machine."""
        return (max(self.seconds) - min(self.seconds)) / self.median if self.median else 0.0

    def __add__(self, other: Timing) -> Timing:
        """The repeats of both, as if they had been taken in one go."""
        return Timing(self.seconds + other.seconds)


def load_seconds(path: Path, options: LoadOptions, *, repeats: int = 1) -> Timing:
    """To load a file and nothing else. A mapped file is read later, by the first step. Raises ModelError."""
    seconds = []
    for _ in range(repeats):
        started = perf_counter()
        weights = LlamaWeights(path, options)
        seconds.append(perf_counter() - started)
        weights.close()
    return Timing(tuple(seconds))


class Meter:
    """Measures a model through its cache, which it has for itself.

    The first step of a model whose file is mapped reads all weights: decode(repeats=1) on a new one tells what that
    takes, and whatever is measured after it is not disturbed by it.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        chance = random.Random(0)
        # Any tokens do: what a step takes does not depend on them.
        self._tokens = array("i", (chance.randrange(model.n_vocab) for _ in range(model.n_cells)))
        self._held = [0] * model.n_slots  # of the tokens, by each slot

    def prefill(self, n: int, *, batch: int | None = None, depth: int = 0, repeats: int = 3) -> Timing:
        """To read `n` tokens of one prompt.

        batch   rows that are computed at once; by default as many as the model takes
        depth   tokens that stand before them in the cache already, not timed

        Raises UsageError for more than the cache or a batch holds.
        """
        rows = self.model.n_batch if batch is None else batch
        self._check(1, depth + n, rows)
        seconds = []
        for _ in range(repeats):
            self._fill(1, depth)
            started = perf_counter()
            self._read(0, depth + n, rows)
            seconds.append(perf_counter() - started)
        return Timing(tuple(seconds))

    def decode(self, streams: int = 1, *, depth: int = 0, repeats: int = 5) -> Timing:
        """To compute one token of each of `streams` sequences in one step, with `depth` tokens before each of them.

        Each sequence has cells of its own, as prompts have that share nothing. The depth is the same for every repeat.
        Raises UsageError for more than the cache or a batch holds.
        """
        self._check(streams, depth + 1, streams)
        self._fill(streams, depth)
        chunks = [Chunk(self._sequence(slot, depth + 1), depth, 1) for slot in range(streams)]
        seconds = []
        for _ in range(repeats):
            started = perf_counter()
            self.model.run(chunks)
            seconds.append(perf_counter() - started)
            for slot in range(streams):
                self.model.seq_rm(slot, depth, -1)
        return Timing(tuple(seconds))

    def answer(self, streams: int = 1, *, depth: int = 0, n: int = 8, params: SamplingParams | None = None) -> Timing:
        """To compute and to draw one more token of each of `streams` sequences, `n` times: as answers are written.

        What decode() measures, with the drawing, and each step a token further. Raises UsageError as it does.
        """
        self._check(streams, depth + n, streams)
        self._fill(streams, depth)
        sequences = [self._sequence(slot, depth + 1) for slot in range(streams)]
        samplers = [self.model.sampler(params or SamplingParams(), sequence.tokens) for sequence in sequences]
        seconds = []
        for i in range(depth, depth + n):
            started = perf_counter()
            rows = self.model.run([Chunk(sequence, i, 1) for sequence in sequences])
            for sequence, sampler, row in zip(sequences, samplers, rows, strict=True):
                sequence.tokens.append(sampler.sample(row) or 0)
            seconds.append(perf_counter() - started)
        for slot, sampler in enumerate(samplers):
            sampler.close()
            self.model.seq_rm(slot, depth, -1)
        return Timing(tuple(seconds))

    def _check(self, streams: int, length: int, rows: int) -> None:
        model = self.model
        if not (1 <= streams <= model.n_slots and 1 <= rows <= model.n_batch):
            raise UsageError(
                f"{streams} streams and {rows} rows of a step: this model was given room for "
                f"{model.n_slots} and {model.n_batch}"
            )
        if streams * length > model.n_cells:
            raise UsageError(f"{streams} x {length:,} tokens: the cache holds {model.n_cells:,}")

    def _fill(self, streams: int, depth: int) -> None:
        """Let the first slots hold the first `depth` tokens each, and the others nothing.

        One is computed, and its cells are copied for the others: that takes a hundredth of the time.
        """
        for slot, held in enumerate(self._held):
            wanted = depth if slot < streams else 0
            if held > wanted or (slot and held != wanted):
                keep = wanted if slot == 0 else 0
                self.model.seq_rm(slot, keep, -1)
                self._held[slot] = keep
        self._read(0, depth, self.model.n_batch)
        if depth and any(held != depth for held in self._held[1:streams]):
            cells = self.model.save(0, 0, depth)
            for slot in range(1, streams):
                if self._held[slot] == 0 and len(cells) and self.model.restore(slot, 0, depth, cells):
                    self._held[slot] = depth
                self._read(slot, depth, self.model.n_batch)

    def _read(self, slot: int, length: int, rows: int) -> None:
        """Compute what a slot lacks of the first `length` tokens."""
        sequence = self._sequence(slot, length)
        while (held := self._held[slot]) < length:
            n = min(rows, length - held)
            self.model.run([Chunk(sequence, held, n)])
            self._held[slot] = held + n

    def _sequence(self, slot: int, length: int) -> Sequence:
        sequence = Sequence(slot, self._tokens[:length])
        sequence.slot = slot
        return sequence
