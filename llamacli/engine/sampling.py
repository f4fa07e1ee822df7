"""Sampler chains and grammars of llama.cpp: which token comes next."""

from __future__ import annotations

import ctypes
import re
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llamacli.engine.bindings import bindings
from llamacli.engine.sequence import NOTHING, SamplingParams, draw_seed
from llamacli.errors import UsageError

if TYPE_CHECKING:
    from llamacli.engine.llama import LlamaModel, Vocabulary

MAX_GRAMMARS = 64  # kept compiled
MAX_FORCED = 64  # characters that are looked ahead
MAX_BRANCHING = 1 << 20  # branches of a grammar times its bytes: looking ahead copies it, and more takes milliseconds
TOP_K_BOUND = 1000  # candidates when top_k is off but top_p sorts them
_NEVER = float("-inf")
COLDEST = 1e-6  # a lower temperature is greedy all the same, and its quotients leave the range of float32
LEAST_PENALTY = 1e-6  # likewise

# llama.cpp's parser calls itself for every bracket and unrolls repetitions: beyond these it dies of it.
MAX_GRAMMAR_BYTES = 1 << 18
MAX_GRAMMAR_DEPTH = 500
MAX_REPETITIONS = 2000


class LlamaSampler:
    """The chain of one sequence: logit_bias → penalties → top_k → top_p → min_p → temperature → draw.

    A grammar stays outside the chain: the chain draws, the grammar looks at that one token (8 us), and only
    when it objects the whole vocabulary is filtered (2-5 ms) and the chain draws again. llama.cpp kills the
    process when a grammar accepts an illegal token, so nothing is accepted unchecked.
    """

    def __init__(self, model: LlamaModel, vocabulary: Vocabulary, params: SamplingParams, prompt: array[int]) -> None:
        self._bindings = bindings()
        self._model = model
        self._vocabulary = vocabulary
        for token in params.logit_bias:
            if not 0 <= token < vocabulary.n_tokens:
                raise UsageError(f"logit_bias names token {token}; the vocabulary has {vocabulary.n_tokens:,} tokens")
        self._grammar = vocabulary.grammars.clone(params.grammar) if params.grammar else None
        self._chain: Any = _build_chain(vocabulary, params)
        if _has_penalties(params):
            for token in prompt[max(0, len(prompt) - params.penalty_last_n) :]:
                self._bindings.fast.llama_sampler_accept(self._chain, token)
        # Importing numpy costs more than a single answer can save, so only a model for many sequences does it.
        self._is_argmax = model.n_slots > 1 and _is_greedy(params) and not _biases(vocabulary, params)
        self._candidates = _Candidates(self._bindings.c, vocabulary.n_tokens) if self._grammar else None
        self._looks_ahead = params.grammar is not None and vocabulary.grammars.is_light(params.grammar)
        self._may_end = not params.ignore_eos
        self._forced = ""  # what of the text that was foreseen has not come yet

    def sample(self, row: int) -> int | None:
        if self._is_argmax:
            return self._model.argmax(row)
        if self._candidates is None:
            return self._model.draw(self._chain, row)
        token = self._sample_legal(self._candidates, self._model.logits(row))
        if token is not None:
            self._accept(token)
        return token

    def sample_from(self, logits: bytes) -> int | None:
        values = (ctypes.c_float * (len(logits) // 4)).from_buffer_copy(logits)
        candidates = self._candidates or _Candidates(self._bindings.c, len(values))
        if self._grammar is None:
            token: int | None = candidates.drawn_by(self._bindings.fast.llama_sampler_apply, self._chain, values)
        else:
            token = self._sample_legal(candidates, values)
        if token is not None:
            self._accept(token)
        return token

    def foreseen(self) -> array[int]:
        """The tokens of the text that the grammar leaves no choice about; the model may still cut them otherwise."""
        if not self._looks_ahead:
            return NOTHING
        if not self._forced:
            self._forced = self._vocabulary.grammars.forced_text(self._grammar)
        return self._vocabulary.continuing(self._forced)

    def is_over(self) -> bool:
        if self._grammar is None or self._candidates is None or not self._may_end:
            return False
        if self._vocabulary.grammars.goes_on(self._grammar):
            return False
        is_end = self._vocabulary.is_eog
        legal = self._candidates.legal(self._bindings.fast.llama_sampler_apply, self._grammar)
        return bool(legal) and all(map(is_end, legal))

    def _sample_legal(self, candidates: _Candidates, logits: Any) -> int | None:
        apply = self._bindings.fast.llama_sampler_apply
        token = candidates.drawn_by(apply, self._chain, logits)
        if candidates.is_legal(apply, self._grammar, token):
            return token
        token = candidates.drawn_by(apply, self._chain, logits, first=self._grammar)
        return token if candidates.is_legal(apply, self._grammar, token) else None

    def _accept(self, token: int) -> None:
        if self._grammar:
            self._bindings.fast.llama_sampler_accept(self._grammar, token)
        self._bindings.fast.llama_sampler_accept(self._chain, token)
        if self._forced:
            piece = self._vocabulary.piece(token).decode("utf-8", "replace")
            self._forced = self._forced[len(piece) :] if self._forced.startswith(piece) else ""

    def close(self) -> None:
        free = self._bindings.c.llama_sampler_free
        if self._chain:
            free(self._chain)
        if self._grammar:
            free(self._grammar)
        self._chain = self._grammar = None


class Grammars:
    """The compiled grammars of one vocabulary. Copying one (6 us) costs less than compiling it again."""

    def __init__(self, vocabulary: int, n_tokens: int, piece: Callable[[int], bytes]) -> None:
        self._vocabulary = vocabulary
        self._n_tokens, self._piece = n_tokens, piece
        self._letters: tuple[_Letters, _Letters] | None = None
        self._compiled: dict[str, Any] = {}  # least recently used first
        self._is_light: dict[str, bool] = {}  # of the same grammars

    def clone(self, text: str) -> Any:
        """A fresh grammar for one answer, which frees it. Raises UsageError for what is no GBNF."""
        grammar = self._compiled.pop(text, None) or self._compile(text)
        self._compiled[text] = grammar
        if len(self._compiled) > MAX_GRAMMARS:
            oldest = next(iter(self._compiled))
            bindings().c.llama_sampler_free(self._compiled.pop(oldest))
            self._is_light.pop(oldest, None)
        return bindings().c.llama_sampler_clone(grammar)

    def is_light(self, text: str) -> bool:
        """Whether looking ahead in it takes less than a millisecond or so, however it goes on."""
        found = self._is_light.get(text)
        if found is None:
            found = self._is_light[text] = _n_branches(text) * len(text) <= MAX_BRANCHING
        return found

    def goes_on(self, grammar: Any) -> bool:
        """Whether any character may come next. Some 250 tokens tell: a hundredth of the vocabulary, and of its time."""
        return any(letters.legal(grammar) for letters in self._bytes())

    def forced_text(self, grammar: Any) -> str:
        """What must come next, as far as there is only one character of ASCII each time."""
        letters, _ = self._bytes()
        text = b""
        ahead = None
        try:
            while len(text) < MAX_FORCED:
                found = letters.legal(ahead or grammar)
                if len(found) != 1:
                    break
                text += found[0]
                ahead = ahead or bindings().c.llama_sampler_clone(grammar)
                bindings().fast.llama_sampler_accept(ahead, letters.token_of(found[0]))
        finally:
            if ahead:
                bindings().c.llama_sampler_free(ahead)
        return text.decode()

    def _bytes(self) -> tuple[_Letters, _Letters]:
        """The tokens of one byte each: the characters of ASCII, and what all others are made of."""
        if self._letters is None:
            tokens = {piece: token for token in range(self._n_tokens) if len(piece := self._piece(token)) == 1}
            plain = {raw: token for raw, token in tokens.items() if raw.isascii()}
            self._letters = _Letters(plain), _Letters({raw: tokens[raw] for raw in tokens.keys() - plain.keys()})
        return self._letters

    def close(self) -> None:
        for grammar in self._compiled.values():
            bindings().c.llama_sampler_free(grammar)
        self._compiled.clear()
        self._is_light.clear()

    def _compile(self, text: str) -> Any:
        check_grammar(text)
        grammar = bindings().c.llama_sampler_init_grammar(self._vocabulary, text.encode("utf-8", "replace"), b"root")
        if not grammar:
            raise UsageError("the grammar is no valid GBNF, or recurses to the left; its root rule must be called root")
        return grammar


class _Letters:
    """llama_token_data[n] of tokens that are one byte each."""

    def __init__(self, tokens: dict[bytes, int]) -> None:
        c = bindings().c
        self._tokens = tokens
        n = max(len(tokens), 1)  # of none there can be no memoryview
        self._fresh = (c.llama_token_data * n)()
        for entry, token in zip(self._fresh, tokens.values(), strict=False):
            entry.id = token
        self._data = (c.llama_token_data * n)()
        self._logits = memoryview(self._data).cast("B").cast("f")[1::3]
        self._all = c.llama_token_data_array(data=self._data, size=len(self._tokens), selected=-1, sorted=False)

    def legal(self, grammar: Any) -> list[bytes]:
        ctypes.memmove(self._data, self._fresh, ctypes.sizeof(self._data))
        self._all.size, self._all.selected = len(self._tokens), -1
        bindings().fast.llama_sampler_apply(grammar, ctypes.byref(self._all))
        return [raw for raw, logit in zip(self._tokens, self._logits, strict=False) if logit > _NEVER]

    def token_of(self, raw: bytes) -> int:
        return self._tokens[raw]


class _Candidates:
    """llama_token_data[n_vocab] (id, logit, p), filled from the logits each time a chain is to choose from it."""

    def __init__(self, c: Any, n_vocab: int) -> None:
        self._fresh = (c.llama_token_data * n_vocab)()
        memoryview(self._fresh).cast("B").cast("i")[::3] = array("i", range(n_vocab))
        self._data = (c.llama_token_data * n_vocab)()
        self._logits = memoryview(self._data).cast("B").cast("f")[1::3]
        self._all = c.llama_token_data_array(data=self._data, size=n_vocab, selected=-1, sorted=False)
        self._one_data = (c.llama_token_data * 1)()
        self._one = c.llama_token_data_array(data=self._one_data, size=1, selected=-1, sorted=False)
        self._n_vocab = n_vocab

    def drawn_by(self, apply: Any, chain: Any, logits: Any, first: Any = None) -> int:
        """The token that the chain selects, after the filter `first` if there is one. Accepts nothing."""
        ctypes.memmove(self._data, self._fresh, ctypes.sizeof(self._data))
        self._logits[:] = memoryview(logits).cast("B").cast("f")
        self._all.size, self._all.selected, self._all.sorted = self._n_vocab, -1, False
        if first:
            apply(first, ctypes.byref(self._all))
        apply(chain, ctypes.byref(self._all))
        token: int = self._all.data[self._all.selected].id
        return token

    def legal(self, apply: Any, grammar: Any) -> list[int]:
        """All tokens that a grammar allows. A few milliseconds."""
        ctypes.memmove(self._data, self._fresh, ctypes.sizeof(self._data))
        self._all.size, self._all.selected, self._all.sorted = self._n_vocab, -1, False
        apply(grammar, ctypes.byref(self._all))
        return [token for token, logit in enumerate(self._logits) if logit > _NEVER]

    def is_legal(self, apply: Any, grammar: Any, token: int) -> bool:
        self._one_data[0].id, self._one_data[0].logit = token, 1.0
        self._one.size, self._one.selected = 1, -1
        apply(grammar, ctypes.byref(self._one))
        legal: bool = self._one_data[0].logit > _NEVER
        return legal


# Literals, character classes and comments, in which brackets mean nothing; brackets; repetitions.
_GRAMMAR_PARTS = re.compile(
    r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*|(?P<bracket>[()])|\{\s*(?P<low>\d*)\s*,?\s*(?P<high>\d*)\s*\}'
)


def check_grammar(text: str) -> None:
    """Refuse what makes llama.cpp's grammar parser crash or fill the memory. Raises UsageError."""
    if "\0" in text:
        raise UsageError("the grammar holds a NUL character")
    if len(text.encode("utf-8", "replace")) > MAX_GRAMMAR_BYTES:
        raise UsageError(f"the grammar is longer than {MAX_GRAMMAR_BYTES >> 10} KiB")
    depth = 0
    for part in _GRAMMAR_PARTS.finditer(text):
        if part["bracket"]:
            depth += 1 if part["bracket"] == "(" else -1
            if depth > MAX_GRAMMAR_DEPTH:
                raise UsageError(f"the grammar nests more than {MAX_GRAMMAR_DEPTH} brackets")
        elif part["low"] or part["high"]:
            _check_repetition(part[0], part["low"], part["high"])


def _n_branches(text: str) -> int:
    """About how many ways a grammar may go on at once: all its alternatives, and what may be repeated or left out."""
    n_repeated = sum(int(part["high"] or part["low"] or 0) for part in _GRAMMAR_PARTS.finditer(text))
    bare = _GRAMMAR_PARTS.sub("", text)
    return sum(map(bare.count, "|?*+")) + n_repeated


def _check_repetition(written: str, low: str, high: str) -> None:
    if any(len(n) > 9 or int(n or 0) > MAX_REPETITIONS for n in (low, high)):
        raise UsageError(f"the grammar repeats more than {MAX_REPETITIONS} times: {written[:40]}")
    if low and high and int(low) > int(high):
        raise UsageError(f"the grammar repeats at least {low} and at most {high} times")


def _has_penalties(params: SamplingParams) -> bool:
    neutral = params.repeat_penalty == 1 and params.frequency_penalty == 0 and params.presence_penalty == 0
    return params.penalty_last_n > 0 and not neutral


def _is_greedy(params: SamplingParams) -> bool:
    """Whether nothing but the model's own logits decides. (A bias is looked for apart.)"""
    return params.temperature < COLDEST and params.grammar is None and not _has_penalties(params)


def _build_chain(vocabulary: Vocabulary, params: SamplingParams) -> Any:
    c = bindings().c
    chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
    biases = _biases(vocabulary, params)
    if biases:
        entries = (c.llama_logit_bias * len(biases))(*[c.llama_logit_bias(t, b) for t, b in biases.items()])
        c.llama_sampler_chain_add(chain, c.llama_sampler_init_logit_bias(vocabulary.n_tokens, len(biases), entries))
    if _has_penalties(params):
        penalties = c.llama_sampler_init_penalties(
            vocabulary.n_tokens,
            params.penalty_last_n,
            max(params.repeat_penalty, LEAST_PENALTY),
            params.frequency_penalty,
            params.presence_penalty,
        )
        c.llama_sampler_chain_add(chain, penalties)
    for sampler in _selectors(params):
        c.llama_sampler_chain_add(chain, sampler)
    return chain


def _selectors(params: SamplingParams) -> list[Any]:
    """What narrows the candidates down, and the draw at the end. Neutral samplers are left out: each costs time."""
    c = bindings().c
    if params.temperature < COLDEST:
        return [c.llama_sampler_init_greedy()]
    selectors = []
    sorts = params.top_p < 1
    if params.top_k or sorts:
        selectors.append(c.llama_sampler_init_top_k(params.top_k or TOP_K_BOUND))
    if sorts:
        selectors.append(c.llama_sampler_init_top_p(params.top_p, 1))
    if params.min_p > 0:
        selectors.append(c.llama_sampler_init_min_p(params.min_p, 1))
    if params.temperature != 1:
        selectors.append(c.llama_sampler_init_temp(params.temperature))
    seed = draw_seed() if params.seed is None else params.seed
    selectors.append(c.llama_sampler_init_dist(seed))
    return selectors


def _biases(vocabulary: Vocabulary, params: SamplingParams) -> dict[int, float]:
    """The request's own biases, and the tokens that must never be drawn."""
    biases = dict(params.logit_bias)
    count = ctypes.c_int32()
    suppressed = bindings().c.llama_vocab_get_suppress_tokens(vocabulary.pointer, ctypes.byref(count))
    for i in range(count.value):
        biases[suppressed[i]] = _NEVER
    if params.ignore_eos:
        biases |= dict.fromkeys(vocabulary.eog, _NEVER)
    return biases
