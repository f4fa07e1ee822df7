"""One prompt and what has grown from it, and the small values that travel through the engine.

Knows nothing of llama.cpp.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from llamacli.errors import UsageError

MAX_SEED = 2**32 - 2  # 2**32 - 1 means "random" inside llama.cpp


NOTHING = array("i")  # no tokens


def draw_seed() -> int:
    """A seed for a request that brought none."""
    return int.from_bytes(os.urandom(4), "little") % (MAX_SEED + 1)


class FinishReason(StrEnum):
    """Why a sequence ended. `wire` is the word OpenAI's API and the Llama 2 API use for it."""

    STOP = "stop"  # the model said so, or a stop string came
    LENGTH = "length"  # max_tokens
    CONTEXT = "context"  # the context window, or the KV cache, is full
    CANCELLED = "cancelled"
    DEAD_END = "dead_end"  # no token is legal under the grammar
    FAILED = "failed"  # llama.cpp refused the batch

    @property
    def wire(self) -> str:
        return "length" if self is FinishReason.CONTEXT else str(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What one request wants of the sampler, and when it wants to stop.

    temperature    0-2; 0 is greedy
    top_k          0 switches it off. With top_p < 1 the nucleus is then looked for among the 1,000 likeliest
                   tokens, because sorting the whole vocabulary costs up to 2 ms for each token
    penalties      repeat > 0 (1 is neutral); frequency and presence -2..2 (0 is neutral); they look at the
                   last `penalty_last_n` tokens, prompt included
    logit_bias     token id → -100..100, added to the raw logit
    seed           0..2**32-2, each of them a seed; None draws one
    grammar        GBNF
    logprobs       how many alternatives to report for each token (0: only the token itself); None: none
    ignore_eos     the end-of-answer tokens are never drawn
    stop           strings that end the answer and are not part of it
    max_tokens     None: as many as the context holds

    Raises UsageError for a value out of range.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 40
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    grammar: str | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0, 2)
        _within("top_p", self.top_p, 0, 1)
        _within("min_p", self.min_p, 0, 1)
        _within("top_k", self.top_k, 0, 2**31 - 1)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("penalty_last_n", self.penalty_last_n, 0, 2**16)
        if not (0 < self.repeat_penalty <= 2):
            raise UsageError(f"repeat_penalty must be above 0 and at most 2, not {self.repeat_penalty:g}")
        if self.seed is not None:
            _within("seed", self.seed, 0, MAX_SEED)
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, 20)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if "" in self.stop:
            raise UsageError("a stop string must not be empty")
        if self.grammar is not None and not self.grammar.strip():
            raise UsageError("the grammar must not be empty")
        for token, bias in self.logit_bias.items():
            _within(f"logit_bias of token {token}", bias, -100, 100)

    @property
    def is_repeatable(self) -> bool:
        """Whether somebody may rely on getting the same answer again."""
        return self.seed is not None or self.temperature == 0


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # nor is NaN
        raise UsageError(f"{name} must be between {low:g} and {high:g}, not {str(value)[:40]}")


class Alternative(NamedTuple):
    token: int
    logprob: float


class Logprobs(NamedTuple):
    """Natural logarithms of the model's own probabilities, before any sampler touched them."""

    token: int
    logprob: float
    top: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt tokens: those whose KV was already there


class Load(NamedTuple):
    """What an engine is doing, and the tokens it has dealt with since it began."""

    slots_busy: int = 0
    waiting: int = 0  # paused ones among them
    cells_used: int = 0  # kept prefixes among them
    prefix_hit_tokens: int = 0  # not computed: their cells were there
    prefill_tokens: int = 0
    decode_tokens: int = 0
    guessed_tokens: int = 0  # computed on the chance that they come next
    right_guesses: int = 0  # those that did


class Delta(NamedTuple):
    """What one step added to one sequence. The last one has a finish_reason and the usage."""

    sequence_id: int
    text: str  # safe to show: whole characters, no beginning of a stop string; often empty
    token: int | None = None
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


class Sequence:
    """The tokens of a prompt and of its answer so far, and how many of them the KV cache holds.

    `n_computed` is the only progress stored: many pending tokens are a prefill, one is a decode step.
    """

    __slots__ = (
        "id",
        "max_tokens",
        "n_cached",
        "n_computed",
        "n_prompt",
        "slot",
        "tokens",
    )

    def __init__(self, id: int, prompt: Iterable[int], max_tokens: int | None = None) -> None:
        self.id = id
        self.tokens = array("i", prompt)
        self.n_prompt = len(self.tokens)
        self.n_computed = 0
        self.n_cached = 0
        self.max_tokens = max_tokens
        self.slot: int | None = None  # llama.cpp's seq_id, lent while the sequence runs

    @property
    def n_pending(self) -> int:
        return len(self.tokens) - self.n_computed

    @property
    def n_generated(self) -> int:
        return len(self.tokens) - self.n_prompt

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.id}: {self.n_prompt}+{self.n_generated} tokens, "
            f"{self.n_computed} computed, slot {self.slot}>"
        )


class Chunk(NamedTuple):
    """`n` tokens of a sequence from position `start` on: its part of the next batch.

    `guessed` are among them, and come last: tokens that may follow those that are known.
    """

    sequence: Sequence
    start: int
    n: int
    guessed: array[int] = NOTHING

    @property
    def wants_logits(self) -> bool:
        """Whether the last token known is in the chunk, so that the next one is drawn from its row.

        Each guessed token's row has logits then, too.
        """
        return self.start + self.n - len(self.guessed) == len(self.sequence.tokens)
