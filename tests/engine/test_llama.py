"""The real engine on the real tiny model: golden answers, samplers, grammar, growth, aborts, and no leaks.

The near-tie rule: llama.cpp's sums depend on the batch a token is computed in and on the CPU, so greedy answers may
part where two tokens are nearly equally likely. Answers count as equal if, at the first token where they differ,
the model itself rates both within NEAR_TIE of each other.
"""

from __future__ import annotations

import json
import random
import threading
from array import array
from pathlib import Path

import pytest
from conftest import Golden, MakeModel, golden

from llamacli.engine.engine import Engine
from llamacli.engine.llama import LlamaModel, LlamaWeights, LoadOptions
from llamacli.engine.model import Aborted
from llamacli.engine.sequence import Chunk, Delta, FinishReason, SamplingParams, Sequence
from llamacli.errors import ModelError, UsageError
from llamacli.models import store
from llamacli.prompt import PromptBuilder

NEAR_TIE = 0.35  # nats; q8_0 weights, sums in another order
GREEDY = SamplingParams(temperature=0, max_tokens=128)
GOLDEN = golden()


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def assert_same_answer(model: LlamaModel, prompt: array[int], answer: str, expected: str) -> None:
    """Equal, or parted at a near tie."""
    if answer == expected:
        return
    vocabulary = model.vocabulary
    mine, theirs = vocabulary.tokenize(answer), vocabulary.tokenize(expected)
    n_same = next(
        (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs))
    )
    look = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
    engine = Engine(model)
    first = next(d for d in engine.generate([*prompt, *mine[:n_same]], look) if d.logprobs)
    assert first.logprobs is not None
    rated = {alternative.token: alternative.logprob for alternative in first.logprobs.top}
    parted = [each[n_same] if n_same < len(each) else vocabulary.eos for each in (mine, theirs)]
    gap = abs(rated.get(parted[0], -99) - rated.get(parted[1], -999))
    assert gap < NEAR_TIE, f"{answer!r} is not {expected!r}, and not for a near tie ({gap:.2f} nats)"


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.messages[-1].content[:40])
def test_a_golden_prompt_alone_gives_its_golden_answer(
    case: Golden, make_model: MakeModel, builder: PromptBuilder
) -> None:
    model = make_model(n_cells=1024)
    prompt = builder.build(case.messages)
    deltas = list(Engine(model).generate(prompt.tokens, GREEDY, trim=prompt.trim))
    assert_same_answer(model, prompt.tokens, text_of(deltas), case.answer)
    assert (deltas[-1].finish_reason is FinishReason.STOP) == case.ended


@pytest.mark.parametrize(("seed", "n_batch", "n_slots"), [(1, 512, 43), (2, 64, 16), (3, 33, 5)])
def test_batched_equals_alone_in_any_order_with_any_chunking_after_random_cancels(
    seed: int, n_batch: int, n_slots: int, make_model: MakeModel, builder: PromptBuilder
) -> None:
    chance = random.Random(seed)
    model = make_model(n_cells=4096, n_slots=n_slots, n_batch=n_batch)
    engine = Engine(model)
    cases = chance.sample(GOLDEN, len(GOLDEN))
    prompts = [builder.build(case.messages) for case in cases]
    added, doomed = {}, []
    for case, prompt in zip(cases, prompts, strict=True):
        added[engine.add(prompt.tokens, GREEDY, trim=prompt.trim).id] = case
        doomed.append(engine.add(chance.choice(prompts).tokens, SamplingParams(seed=7)))
    texts = dict.fromkeys(added, "")
    while not engine.is_idle:
        if doomed and chance.random() < 0.4:
            engine.cancel(doomed.pop())
        for delta in engine.step():
            if delta.sequence_id in texts:
                texts[delta.sequence_id] += delta.text
    for (_, case), prompt, text in zip(added.items(), prompts, texts.values(), strict=True):
        assert_same_answer(make_model(n_cells=1024), prompt.tokens, text, case.answer)


def test_a_shared_prefix_is_shared_for_real(make_model: MakeModel, builder: PromptBuilder) -> None:
    engine = Engine(make_model(n_cells=2048, n_slots=4))
    case = GOLDEN[0]
    prompt = builder.build(case.messages)
    first = list(engine.generate(prompt.tokens, GREEDY, trim=True))
    again = list(engine.generate(prompt.tokens, GREEDY, trim=True))
    assert text_of(first) == text_of(again)
    assert again[-1].usage is not None and again[-1].usage.cached_tokens == len(prompt.tokens) - 1


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_five_hundred_random_steps_leave_no_cell_slot_or_sampler_and_memory_flat(
    make_model: MakeModel, builder: PromptBuilder
) -> None:
    chance = random.Random(5)
    model = make_model(n_cells=512, n_slots=6, n_batch=64)
    engine = Engine(model, n_limit=256)
    prompts = [builder.build(case.messages).tokens for case in GOLDEN]
    grammar = "root ::= [a-zA-Z ,.]+"
    live: list[Sequence] = []
    sizes = []
    for round_ in range(500):
        if chance.random() < 0.4 and len(live) < 12:
            params = SamplingParams(max_tokens=20, grammar=chance.choice([None, None, grammar]), repeat_penalty=1.1)
            live.append(engine.add(chance.choice(prompts), params))
        elif chance.random() < 0.3 and live:
            engine.cancel(live.pop(chance.randrange(len(live))))
        for delta in engine.step():
            if delta.finish_reason:
                live = [sequence for sequence in live if sequence.id != delta.sequence_id]
        for sequence in engine._scheduler.running:
            assert sequence.slot is not None
            assert model.n_positions(sequence.slot) == engine.kv.cells.length(sequence.slot) == sequence.n_computed
        if round_ % 100 == 99:
            sizes.append(resident_bytes())
    for sequence in live:
        engine.cancel(sequence)
    engine.kv.clear()
    assert engine.is_idle
    assert (engine.kv.cells.n_used, engine.kv.n_lent_slots) == (0, 0)
    assert all(model.n_positions(slot) == 0 for slot in range(model.n_slots))
    assert sizes[-1] - sizes[1] < 8 << 20, f"resident memory grew: {sizes}"


def sampled(model: LlamaModel, prompt: array[int], **params: object) -> list[int]:
    asked = SamplingParams(**{"max_tokens": 12, "temperature": 1.5, "top_p": 1.0, "top_k": 0, **params})  # type: ignore[arg-type]
    return [d.token for d in Engine(model).generate(prompt, asked) if d.token is not None]


@pytest.fixture
def prompt(builder: PromptBuilder) -> array[int]:
    return builder.build(GOLDEN[0].messages).tokens


NOISE = array("i", [1, 9000, 17, 25000, 31000])  # says nothing to the model, so that its choices are wide open


def test_a_seed_repeats_its_answer_and_zero_is_a_seed(make_model: MakeModel) -> None:
    answers = {seed: sampled(make_model(n_cells=256), NOISE, seed=seed) for seed in (0, 1, 2)}
    assert len({tuple(answer) for answer in answers.values()}) == 3
    assert sampled(make_model(n_cells=256), NOISE, seed=0) == answers[0]


def test_without_a_seed_every_answer_is_another(make_model: MakeModel) -> None:
    assert len({tuple(sampled(make_model(n_cells=256), NOISE)) for _ in range(4)}) > 1


def test_temperature_zero_is_greedy_and_so_is_top_k_one(make_model: MakeModel) -> None:
    greedy = sampled(make_model(n_cells=256), NOISE, temperature=0)
    assert sampled(make_model(n_cells=256, n_slots=2), NOISE, temperature=0) == greedy  # drawn another way
    assert sampled(make_model(n_cells=256), NOISE, top_k=1, seed=3) == greedy
    assert sampled(make_model(n_cells=256), NOISE, top_k=1, top_p=0.9, seed=3) == greedy
    assert sampled(make_model(n_cells=256), NOISE, top_p=0.0, seed=3) == greedy
    assert sampled(make_model(n_cells=256), NOISE, min_p=1.0, seed=3) == greedy


def test_a_banned_token_is_never_drawn_and_a_favoured_one_always(make_model: MakeModel, prompt: array[int]) -> None:
    greedy = sampled(make_model(n_cells=256), prompt, temperature=0)
    assert greedy[0] not in sampled(make_model(n_cells=256), prompt, temperature=0, logit_bias={greedy[0]: -100.0})
    assert set(sampled(make_model(n_cells=256), prompt, temperature=0, logit_bias={1234: 100.0})) == {1234}


def test_penalties_make_repetition_rare(make_model: MakeModel, prompt: array[int]) -> None:
    favoured = {"temperature": 0, "logit_bias": {1234: 40.0}, "max_tokens": 8}
    assert sampled(make_model(n_cells=256), prompt, **favoured).count(1234) == 8
    assert sampled(make_model(n_cells=256), prompt, **favoured, repeat_penalty=2.0).count(1234) < 8
    assert sampled(make_model(n_cells=256), prompt, presence_penalty=2.0, frequency_penalty=2.0, seed=1)


def test_ignore_eos_writes_on_to_the_limit(make_model: MakeModel, builder: PromptBuilder) -> None:
    short = builder.build(next(c for c in GOLDEN if c.answer == "Paris").messages).tokens
    asked = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    assert list(Engine(make_model(n_cells=256)).generate(short, asked))[-1].finish_reason is FinishReason.LENGTH


def test_logprobs_are_the_model_s_own(make_model: MakeModel, prompt: array[int]) -> None:
    asked = SamplingParams(temperature=0, max_tokens=3, logprobs=5)
    for delta in Engine(make_model(n_cells=256)).generate(prompt, asked):
        assert delta.logprobs is not None and delta.token is not None
        top = delta.logprobs.top
        assert len(top) == 5 and top[0].token == delta.token
        assert [a.logprob for a in top] == sorted((a.logprob for a in top), reverse=True)
        assert delta.logprobs.logprob == top[0].logprob <= 0
    none = SamplingParams(temperature=0, max_tokens=1, logprobs=0)
    first = next(Engine(make_model(n_cells=256)).generate(prompt, none))
    assert first.logprobs is not None and first.logprobs.top == ()


JSON_GRAMMAR = r"""
root   ::= "{" ws "\"name\":" ws string "," ws "\"age\":" ws number "}"
string ::= "\"" [a-zA-Z ]{1,20} "\""
number ::= [1-9] [0-9]{0,2}
ws     ::= " "?
"""


@pytest.mark.parametrize("seed", range(8))
def test_a_grammar_holds_whatever_the_sampler_draws(seed: int, make_model: MakeModel, prompt: array[int]) -> None:
    asked = SamplingParams(temperature=2.0, top_p=1.0, top_k=0, seed=seed, grammar=JSON_GRAMMAR, max_tokens=80)
    deltas = list(Engine(make_model(n_cells=256)).generate(prompt, asked))
    assert deltas[-1].finish_reason is FinishReason.STOP
    answer = json.loads(text_of(deltas))
    assert set(answer) == {"name", "age"}


def test_a_grammar_that_allows_nothing_more_ends_the_answer(make_model: MakeModel, prompt: array[int]) -> None:
    asked = SamplingParams(temperature=0, grammar='root ::= "yes" | "no"', max_tokens=20)
    deltas = list(Engine(make_model(n_cells=256)).generate(prompt, asked))
    assert text_of(deltas) in ("yes", "no")
    assert deltas[-1].finish_reason is FinishReason.STOP


def test_no_legal_token_is_a_dead_end_and_not_a_dead_process(make_model: MakeModel, prompt: array[int]) -> None:
    asked = SamplingParams(temperature=0, grammar='root ::= "yes"', ignore_eos=True, max_tokens=20)
    deltas = list(Engine(make_model(n_cells=256)).generate(prompt, asked))
    assert (text_of(deltas), deltas[-1].finish_reason) == ("yes", FinishReason.DEAD_END)


@pytest.mark.parametrize("grammar", ['root ::= "unclosed', "other ::= [a]", "root ::= root [a]"])
def test_a_broken_grammar_is_refused(grammar: str, make_model: MakeModel, prompt: array[int]) -> None:
    engine = Engine(make_model(n_cells=256))
    with pytest.raises(UsageError, match="GBNF"):
        engine.add(prompt, SamplingParams(grammar=grammar))
    assert engine.is_idle


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        ("root ::= " + "(" * 501 + '"a"' + ")" * 501, "nests more than 500"),
        ('root ::= "a"{3000}', "repeats more than 2000 times"),
        ("root ::= [a-z]{2, 99999999999}", "repeats more than 2000 times"),
        ('root ::= "a"{5,2}', "at least 5 and at most 2"),
        ('root ::= "a\0"', "NUL"),
        ("root ::= " + '"a" ' * 70_000, "longer than 256 KiB"),
    ],
)
def test_a_grammar_that_would_kill_the_parser_is_refused(
    grammar: str, said: str, make_model: MakeModel, prompt: array[int]
) -> None:
    with pytest.raises(UsageError, match=said):
        Engine(make_model(n_cells=256)).add(prompt, SamplingParams(grammar=grammar))


def test_brackets_and_braces_in_a_grammar_s_literals_are_text(make_model: MakeModel, prompt: array[int]) -> None:
    grammar = 'root ::= "' + "(" * 600 + '{9999}" [({9999}]* # ((({9999}'
    Engine(make_model(n_cells=256)).add(prompt, SamplingParams(grammar=grammar))


@pytest.mark.parametrize("temperature", [1e-7, 5e-324])
def test_a_temperature_next_to_nothing_is_greedy(temperature: float, make_model: MakeModel, prompt: array[int]) -> None:
    greedy, cold = (
        text_of(list(Engine(make_model(n_cells=256)).generate(prompt, SamplingParams(temperature=t, max_tokens=12))))
        for t in (0, temperature)
    )
    assert cold == greedy


def test_a_grown_context_continues_the_same_answer(make_model: MakeModel, builder: PromptBuilder) -> None:
    case = next(c for c in GOLDEN if not c.ended)
    prompt = builder.build(case.messages)
    model = make_model(n_cells=256)
    asked = SamplingParams(temperature=0, max_tokens=600, ignore_eos=True)
    grown = list(Engine(model, max_cells=1024).generate(prompt.tokens, asked, trim=True))
    assert model.n_cells > 256 and grown[-1].finish_reason is FinishReason.LENGTH
    whole = list(Engine(make_model(n_cells=1024)).generate(prompt.tokens, asked, trim=True))
    assert_same_answer(make_model(n_cells=1024), prompt.tokens, text_of(grown), text_of(whole))


def test_abort_stops_a_long_prefill_and_the_engine_goes_on(make_model: MakeModel, prompt: array[int]) -> None:
    model = make_model(n_cells=1024, n_batch=1024)
    engine = Engine(model, step_seconds=None)
    long = array("i", [1] + [1000 + i % 20000 for i in range(1000)])
    engine.add(long, GREEDY)
    timer = threading.Timer(0.003, engine.abort)
    timer.start()
    assert engine.step() == []
    timer.join()
    assert model.n_positions(0) == 0
    assert engine.step()[0].token is not None


def test_what_llama_cpp_would_abort_on_stops_before_it(make_model: MakeModel) -> None:
    model = make_model(n_cells=256, n_slots=2, n_batch=32)
    sequence = Sequence(0, range(40))
    sequence.slot = 0
    with pytest.raises(AssertionError):
        model.run([Chunk(sequence, 0, 33)])
    sequence.slot = 2
    with pytest.raises(AssertionError):
        model.run([Chunk(sequence, 0, 1)])
    with pytest.raises(AssertionError):
        model.seq_rm(2, 0, -1)
    with pytest.raises(AssertionError):
        model.seq_cp(0, -1, 0, 1)
    with pytest.raises(UsageError, match="not in the vocabulary"):
        model.vocabulary.name(32000)
    with pytest.raises(UsageError, match="logit_bias"):
        model.sampler(SamplingParams(logit_bias={32000: 1.0}), array("i", [1]))


def test_an_abort_that_comes_too_early_stops_the_next_batch(make_model: MakeModel) -> None:
    model = make_model(n_cells=256)
    sequence = Sequence(0, [1, 2, 3])
    sequence.slot = 0
    model.abort()
    with pytest.raises(Aborted):
        model.run([Chunk(sequence, 0, 3)])


def test_a_model_that_does_not_load_says_why() -> None:
    with pytest.raises(ModelError, match=r"golden\.json cannot be loaded: .*magic"):
        LlamaWeights(store.bundled().parents[1] / "tests" / "golden.json", LoadOptions())
