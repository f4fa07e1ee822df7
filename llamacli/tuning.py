"""Which settings are fastest for a job, told from rates that were measured. Measures nothing, loads nothing.

Two kinds of job: one answer, which waits for the model to load; and many at once, for which that is long past.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llamacli.engine.memory import MAX_ROWS

MARGIN = 0.05  # rewritten weights take memory twice: they must gain more than this share of the time
TIE = 0.04  # rates that lie no further apart are equal: then fewer threads, and larger batches, are the better ones
# CPUs that other programs may keep busy before only what is plainly better is believed: threads that have to share a
# core say nothing about those that need not, and all threads wait for the slowest.
BUSY, BUSY_MARGIN = 0.4, 0.25
ROWS = 32  # of a step that tells which threads are the best for many rows
SMALLEST_BATCH = 64  # that is worth choosing
USUAL_PROMPT, USUAL_ANSWER = 256, 128  # tokens, where nobody said how many


@dataclass(frozen=True, slots=True)
class Weights:
    """Rates of a model whose weights are in one order, all in seconds.

    load           until the first step can be computed at full speed
    threads        of a step of one row, by the threads that compute it
    threads_batch  of a step of many rows, by the threads
    steps          of a step by its rows, with the best threads; from one row on, in rising order
    """

    load: float
    threads: Mapping[int, float]
    threads_batch: Mapping[int, float]
    steps: Mapping[int, float]

    def step(self, rows: int) -> float:
        """Seconds of a step: measured, or between what was measured, or in proportion beyond it."""
        below, before = 1, self.steps[1]
        for at, seconds in self.steps.items():
            if at >= rows:
                return seconds if at == rows else before + (seconds - before) * (rows - below) / (at - below)
            below, before = at, seconds
        return before * rows / below

    def read(self, n: int) -> float:
        """Seconds to read a prompt of `n` tokens."""
        full, rest = divmod(n, self.batch)
        return full * self.step(self.batch) + (self.step(rest) if rest else 0.0)

    @property
    def batch(self) -> int:
        """Rows of a step with which a long prompt is read the fastest."""
        sizes = [rows for rows in self.steps if SMALLEST_BATCH <= rows < MAX_ROWS]
        by_size = {rows: self.step(rows) / rows for rows in (*sizes, MAX_ROWS)}
        best = min(by_size.values())
        return max(rows for rows, seconds in by_size.items() if seconds <= best * (1 + TIE))


@dataclass(frozen=True, slots=True)
class Attention:
    """Seconds with flash attention and without: to read `depth` tokens, and of a step of one row after them."""

    depth: int
    flash_read: float
    flash_step: float
    plain_read: float
    plain_step: float

    @property
    def gain(self) -> float:
        """The share of a usual answer's time that flash attention saves; negative where it costs time."""
        flash, plain = (
            read * USUAL_PROMPT / self.depth + step * USUAL_ANSWER
            for read, step in ((self.flash_read, self.flash_step), (self.plain_read, self.plain_step))
        )
        return 1 - flash / plain


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured of one model on one machine.

    stored      the weights in the file's own order
    rewritten   in the order that this CPU likes best; None where there is none, or no room for it: `why_not` says
    attention   None where it was not measured
    cores       those that could be had: one thread for each is what one would take without measuring
    others      CPUs that other programs kept busy meanwhile; None where that cannot be told
    spread      how far the repeats of the same step lay apart, mostly, as a share of their median
    seconds     that measuring took
    measured    when, in ISO 8601
    """

    stored: Weights
    rewritten: Weights | None = None
    why_not: str = ""
    attention: Attention | None = None
    cores: int = 0
    others: float | None = None
    spread: float = 0.0
    seconds: float = 0.0
    measured: str = ""

    @property
    def is_busy(self) -> bool:
        """Whether other programs were in the way."""
        return self.others is not None and self.others > BUSY

    @property
    def margin(self) -> float:
        return BUSY_MARGIN if self.is_busy else MARGIN

    @property
    def flash_attention(self) -> bool | None:
        """False where it costs time, else None: as llama.cpp likes. For one answer: many at once were not measured.

        The same for every one of them, because cells on the disk are of use for their own kind of attention only.
        """
        return False if self.attention is not None and self.attention.gain < -self.margin else None


@dataclass(frozen=True, slots=True)
class OneAnswer:
    """One prompt and its answer, in a program that loads the model for it.

    cached   tokens of the prompt that need not be computed, with weights as stored, and rewritten
    """

    n_prompt: int
    n_answer: int = USUAL_ANSWER
    cached: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class ManyAnswers:
    """So many at once for as long as the program lives, each with a prompt of its own."""

    slots: int
    n_prompt: int = USUAL_PROMPT
    n_answer: int = USUAL_ANSWER


@dataclass(frozen=True, slots=True)
class Chosen:
    """The settings for a job, and the numbers behind each: `why` has an entry for every other field.

    batch            rows of a step at most
    flash_attention  False where it costs time, else None: as llama.cpp likes
    """

    repack: bool
    threads: int
    threads_batch: int
    batch: int
    flash_attention: bool | None
    why: Mapping[str, str] = field(default_factory=dict)


def choose(rates: Rates, job: OneAnswer | ManyAnswers, forbidden: str = "", repack: bool | None = None) -> Chosen:
    """The fastest settings for a job.

    forbidden   why the weights cannot be rewritten now; empty where they can
    repack      what is settled already, or None
    """
    if repack is None:
        repack, why = _order(rates, job, forbidden)
    else:
        why = "as set"
    weights = rates.rewritten if repack and rates.rewritten else rates.stored
    threads, why_threads = _threads(rates, weights.threads, "a token alone takes")
    threads_batch, why_batch_threads = _threads(rates, weights.threads_batch, f"{ROWS} tokens take")
    batch = MAX_ROWS if rates.is_busy else weights.batch
    return Chosen(
        repack,
        threads,
        threads_batch,
        batch,
        rates.flash_attention if isinstance(job, OneAnswer) else None,
        {
            "repack": why,
            "threads": why_threads,
            "threads_batch": why_batch_threads,
            "batch": f"measured: prompts are read at {batch / weights.step(batch):,.0f} tokens/s",
            "flash_attention": _why_flash(rates.attention if isinstance(job, OneAnswer) else None),
        },
    )


def _order(rates: Rates, job: OneAnswer | ManyAnswers, forbidden: str) -> tuple[bool, str]:
    """Whether the weights are to be rewritten, and why."""
    stored = _cost(rates.stored, job, 0)
    if rates.rewritten is None:
        return False, f"{rates.why_not}; measured: {stored.text}"
    rewritten = _cost(rates.rewritten, job, 1)
    if forbidden:
        return False, f"{forbidden}; measured: {stored.text}; rewritten for this CPU {rewritten.text}"
    is_better = rewritten.seconds < stored.seconds * (1 - rates.margin)
    return is_better, f"measured: {stored.text}; rewritten for this CPU {rewritten.text}"


@dataclass(frozen=True, slots=True)
class _Cost:
    seconds: float  # the less, the better
    text: str


def _cost(weights: Weights, job: OneAnswer | ManyAnswers, order: int) -> _Cost:
    if isinstance(job, ManyAnswers):
        # The prompts of all are read one after the other, and their answers written together.
        seconds = job.slots * weights.read(job.n_prompt) + job.n_answer * weights.step(job.slots)
        return _Cost(seconds, f"{_three(job.slots * job.n_answer / seconds)} tokens/s with {job.slots} at once")
    n_read = max(1, job.n_prompt - job.cached[order])
    parts = (weights.load, weights.read(n_read), job.n_answer * weights.step(1))
    load, read, written = (f"{part:.2f} s" for part in parts)
    text = f"load {load} + {n_read:,} tokens read {read} + {job.n_answer:,} written {written} = {sum(parts):.2f} s"
    return _Cost(sum(parts), text)


def _threads(rates: Rates, seconds: Mapping[int, float], what: str) -> tuple[int, str]:
    best = min(seconds.values())
    chosen = min(threads for threads, each in seconds.items() if each <= best * (1 + TIE))
    told = ", ".join(f"{_three(1000 * each)} ms with {threads}" for threads, each in sorted(seconds.items()))
    if rates.is_busy and rates.cores and chosen != rates.cores:
        return rates.cores, f"{rates.cores} cores; measured on a busy machine: {what} {told}"
    return chosen, f"measured: {what} {told}"


def _why_flash(attention: Attention | None) -> str:
    if attention is None:
        return "not measured: as llama.cpp likes"
    verb = "saves" if attention.gain >= 0 else "costs"
    return f"measured: flash attention {verb} {abs(attention.gain):.0%} of the time after {attention.depth:,} tokens"


def _three(number: float) -> str:
    """About three digits, without an exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
