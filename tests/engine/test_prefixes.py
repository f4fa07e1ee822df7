"""Stored prefixes under the real tiny model: an answer from the disk is the answer that would have been computed."""

from __future__ import annotations

import random
from array import array
from pathlib import Path

import pytest
from conftest import Golden, MakeModel, golden
from test_llama import GREEDY, assert_same_answer, text_of

from llamacli.engine.engine import Engine
from llamacli.engine.kv import MIN_STORED
from llamacli.engine.llama import LlamaModel
from llamacli.engine.prefix_store import PrefixStore
from llamacli.engine.prefixes import Prefixes
from llamacli.engine.sequence import Delta, SamplingParams
from llamacli.prompt import PromptBuilder

LONG = [case for case in golden() if sum(len(message.content) for message in case.messages) > 190]


def engine_over(model: LlamaModel, directory: Path, fingerprint: bytes = bytes(32)) -> Engine:
    return Engine(model, max_cells=1024, prefixes=Prefixes(PrefixStore(directory, fingerprint)))


def asked(engine: Engine, prompt: array[int], params: SamplingParams = GREEDY) -> tuple[str, int]:
    """The answer and the tokens that were not computed for it. What is to be stored is stored."""
    deltas: list[Delta] = list(engine.generate(prompt, params, trim=True))
    assert engine.prefixes is not None
    for _ in engine.prefixes.save(engine.kv, engine.model):
        pass
    usage = deltas[-1].usage
    assert usage is not None
    return text_of(deltas), usage.cached_tokens


@pytest.fixture
def long_prompt(builder: PromptBuilder) -> array[int]:
    prompt = max((builder.build(case.messages).tokens for case in LONG), key=len)
    assert len(prompt) > MIN_STORED + 30
    return prompt


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.messages[-1].content[:40])
def test_a_golden_answer_comes_from_the_disk_as_it_was_computed(
    case: Golden, make_model: MakeModel, builder: PromptBuilder, tmp_path: Path
) -> None:
    prompt = builder.build(case.messages).tokens
    computed, _ = asked(engine_over(make_model(), tmp_path), prompt)
    assert_same_answer(make_model(n_cells=1024), prompt, computed, case.answer)
    assert asked(engine_over(make_model(), tmp_path), prompt) == (computed, len(prompt) if len(prompt) > 63 else 0)


@pytest.mark.parametrize("n", [64, 65, 90, 107])
def test_a_golden_answer_comes_from_the_disk_in_part(
    n: int, make_model: MakeModel, builder: PromptBuilder, tmp_path: Path
) -> None:
    case = next(case for case in LONG if len(builder.build(case.messages).tokens) == 108)
    prompt = builder.build(case.messages).tokens
    asked(engine_over(make_model(), tmp_path), prompt[:n], SamplingParams(max_tokens=1))
    answer, n_cached = asked(engine_over(make_model(n_slots=3), tmp_path), prompt)
    assert n_cached == n
    assert_same_answer(make_model(n_cells=1024), prompt, answer, case.answer)
    assert asked(engine_over(make_model(), tmp_path), prompt) == (answer, 108)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=3, temperature=1.5, top_p=1, top_k=0, max_tokens=20),
        SamplingParams(seed=4, temperature=1.2, repeat_penalty=1.5, frequency_penalty=1, min_p=0.02, max_tokens=20),
        SamplingParams(seed=5, temperature=1, grammar="root ::= [A-Z] [a-z ]+", max_tokens=20),
        SamplingParams(seed=6, temperature=0, logit_bias={278: 9.0}, max_tokens=5),
        SamplingParams(seed=7, temperature=0, logprobs=3, max_tokens=5),
        SamplingParams(seed=8, temperature=0, ignore_eos=True, max_tokens=1),
    ],
    ids=["hot", "penalties", "grammar", "bias", "logprobs", "one token"],
)
def test_every_sampler_draws_from_stored_logits_what_it_drew_from_computed_ones(
    params: SamplingParams, make_model: MakeModel, long_prompt: array[int], tmp_path: Path
) -> None:
    computed, _ = asked(engine_over(make_model(), tmp_path), long_prompt, params)
    stored, n_cached = asked(engine_over(make_model(n_slots=2), tmp_path), long_prompt, params)
    assert (stored, n_cached >= len(long_prompt) - 1) == (computed, True)


def test_a_bit_that_flips_anywhere_is_a_miss(make_model: MakeModel, long_prompt: array[int], tmp_path: Path) -> None:
    chance = random.Random(1)
    model = make_model()
    eight = SamplingParams(temperature=0, max_tokens=8)
    computed = asked(engine_over(model, tmp_path), long_prompt, eight)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    n_index = len(whole) - 3214 * len(long_prompt)
    for i in [*chance.sample(range(n_index), 15), *chance.sample(range(n_index, len(whole)), 25)]:
        damaged = bytearray(whole)
        damaged[i] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        engine = Engine(make_model(), prefixes=Prefixes(PrefixStore(tmp_path, bytes(32))))
        deltas = list(engine.generate(long_prompt, eight, trim=True))
        assert (text_of(deltas), deltas[-1].usage and deltas[-1].usage.cached_tokens) == computed, f"byte {i}"
        assert not path.exists()
        engine.close()


def test_cells_of_another_number_format_are_refused_even_under_our_fingerprint(
    make_model: MakeModel, long_prompt: array[int], tmp_path: Path
) -> None:
    half = {"type_k": "q8_0", "type_v": "q8_0"}
    answer, _ = asked(engine_over(make_model(**half), tmp_path), long_prompt)
    (path,) = tmp_path.iterdir()
    n_half = path.stat().st_size
    assert asked(engine_over(make_model(**half), tmp_path), long_prompt) == (answer, len(long_prompt))
    computed, n_cached = asked(engine_over(make_model(), tmp_path), long_prompt)
    assert n_cached == 0
    assert_same_answer(make_model(n_cells=1024), long_prompt, computed, answer)
    path.unlink()
    asked(engine_over(make_model(), tmp_path), long_prompt)
    (path,) = tmp_path.iterdir()
    n_logits = 4 * make_model().n_vocab
    assert n_half - n_logits < 0.6 * (path.stat().st_size - n_logits)


def test_a_restored_prefix_grows_and_shares_like_a_computed_one(
    make_model: MakeModel, long_prompt: array[int], tmp_path: Path
) -> None:
    endless = SamplingParams(temperature=0, ignore_eos=True, max_tokens=160)
    computed, _ = asked(engine_over(make_model(n_cells=256), tmp_path), long_prompt, endless)
    model = make_model(n_cells=256)
    assert asked(engine_over(model, tmp_path), long_prompt, endless) == (computed, len(long_prompt))
    assert model.n_cells > 256
    engine = engine_over(make_model(n_slots=4), tmp_path)
    for _ in range(3):
        engine.add(long_prompt, GREEDY)
    said: dict[int, str] = {}
    while not engine.is_idle:
        for delta in engine.step():
            said[delta.sequence_id] = said.get(delta.sequence_id, "") + delta.text
    assert len(said) == 3 and engine.prefixes is not None
    assert engine.prefixes.n_restored == len(long_prompt), "once for all"


def test_a_model_that_uses_all_of_llama_cpps_slots_stores_nothing(
    make_model: MakeModel, long_prompt: array[int], tmp_path: Path
) -> None:
    engine = engine_over(make_model(n_cells=1024, n_slots=256), tmp_path)
    assert asked(engine, long_prompt)[1] == 0
    assert list(tmp_path.iterdir()) == []


def test_what_is_stored_is_restored_when_its_turn_has_come_and_not_computed_again(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """While others wait, few kept prefixes have room: one that is restored too early is given up unused."""
    prompts = [array("i", [1, 300 + i, *range(1000, 1098)]) for i in range(8)]
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    for prompt in prompts:
        asked(engine_over(make_model(n_cells=1024), tmp_path), prompt, one)
    prefixes = Prefixes(PrefixStore(tmp_path, bytes(32)))
    engine = Engine(make_model(n_cells=1024, n_slots=3), max_running=1, prefixes=prefixes)
    three = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    for prompt in prompts:
        engine.add(prompt, three)
    cached = []
    while not engine.is_idle:
        cached += [delta.usage.cached_tokens for delta in engine.step() if delta.usage]
    assert cached == [100] * 8
    assert engine.load.prefill_tokens == 0, "the first token comes from the stored logits"


def test_an_answer_is_stored_with_its_prompt_and_a_conversation_goes_on_behind_it(
    make_model: MakeModel, long_prompt: array[int], tmp_path: Path
) -> None:
    endless = SamplingParams(temperature=0, ignore_eos=True, max_tokens=40)

    def conversed(prompt: array[int]) -> tuple[array[int], int, int]:
        """What the cache holds then, the tokens that were not computed, and the prompts that were written."""
        engine = engine_over(make_model(), tmp_path)
        deltas = list(engine.generate(prompt, endless))
        assert engine.prefixes is not None and deltas[-1].usage is not None
        tokens = prompt + array("i", [delta.token for delta in deltas if delta.token is not None])
        engine.prefixes.owe_answer(tokens, engine.kv)
        for _ in engine.prefixes.save(engine.kv, engine.model):
            pass
        return tokens[:-1], deltas[-1].usage.cached_tokens, engine.prefixes.n_stored  # the last one is not computed

    first, n_cached, n_stored = conversed(long_prompt)
    assert (n_cached, n_stored) == (0, 1), "the prompt needs no file of its own"
    second, n_cached, n_stored = conversed(first + long_prompt[:10])
    assert (n_cached, n_stored, len(list(tmp_path.iterdir()))) == (len(first), 1, 2)
    sizes = sorted(path.stat().st_size for path in tmp_path.iterdir())
    assert sizes[0] < sizes[1], "what both begin with is on the disk once"
    assert conversed(first)[1:] == (len(first) - 1, 1), "no logits: the last token is computed"
    assert conversed(second + long_prompt[:10])[1] == len(second)


def test_a_short_conversation_is_not_stored(make_model: MakeModel, tmp_path: Path) -> None:
    engine = engine_over(make_model(), tmp_path)
    deltas = list(engine.generate([1, 5, 9], SamplingParams(max_tokens=20)))
    assert engine.prefixes is not None
    tokens = array("i", [1, 5, 9, *(delta.token for delta in deltas if delta.token is not None)])
    engine.prefixes.owe_answer(tokens, engine.kv)
    assert not engine.prefixes.owes
