"""Guessed tokens: worth their rows, never seen in an answer unless they are right, and nothing left of them."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import EOS, ScriptedModel, ScriptedSampler, count_up
from test_engine import drain, is_clean, tokens_of

from llamacli.engine.bindings import bindings
from llamacli.engine.draft_model import DraftModel
from llamacli.engine.engine import Engine
from llamacli.engine.llama import ContextOptions, LlamaModel, LlamaWeights
from llamacli.engine.lookup import Lookup
from llamacli.engine.model import Aborted, KvFull
from llamacli.engine.sequence import Alternative, Chunk, Delta, FinishReason, Logprobs, SamplingParams, Sequence
from llamacli.engine.speculation import ON_CPU, Speculation, StepCosts, share_out
from llamacli.gguf import read_model
from llamacli.prompt import Message, PromptBuilder

FREE = {1: 1.0, 2: 1.001}  # rows cost next to nothing: whatever can be guessed is
PERIOD = 7


def guessing(model: ScriptedModel, costs: dict[int, float] = FREE, n_limit: int | None = None) -> Engine:
    return Engine(model, speculation=Speculation(StepCosts(costs)), n_limit=n_limit)


def in_circles(tokens: tuple[int, ...]) -> int:
    """Repeats itself, with a surprise now and then."""
    n = len(tokens)
    return 3 + (n * n) % 90 if n % 19 == 0 else 100 + n % PERIOD


def alone(say: Callable[[tuple[int, ...]], int], prompt: list[int], n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(say(tuple(tokens)))
    return tokens[len(prompt) :]


def assert_all_say_what_they_would_alone(
    engine: Engine, prompts: list[list[int]], n: int, say: Callable[[tuple[int, ...]], int]
) -> None:
    """Or the beginning of it, where the cache has run full."""
    limit = engine.n_limit
    wanted = {
        engine.add(prompt, SamplingParams(max_tokens=n)).id: alone(say, prompt, min(n, limit - len(prompt)))
        for prompt in prompts
    }
    for sequence_id, deltas in drain(engine).items():
        said = tokens_of(deltas)
        assert said == wanted[sequence_id][: len(said)]
        assert len(said) == len(wanted[sequence_id]) or deltas[-1].finish_reason is FinishReason.CONTEXT


def test_what_repeats_itself_takes_fewer_steps_and_says_the_same() -> None:
    model = ScriptedModel(n_cells=256, say=in_circles)
    engine = guessing(model)
    said = tokens_of(list(engine.generate([1, 5, 6], SamplingParams(max_tokens=120))))
    assert said == alone(in_circles, [1, 5, 6], 120)
    assert len(model.batches) < 60
    speculation = engine.speculation
    assert speculation is not None and 120 - len(model.batches) <= speculation.n_right <= speculation.n_guessed
    assert (engine.load.guessed_tokens, engine.load.right_guesses) == (speculation.n_guessed, speculation.n_right)
    assert engine.load.decode_tokens == 120 - 1, "the first one came with the prompt"
    assert is_clean(engine, model)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(3, 12), min_size=1, max_size=30), min_size=1, max_size=6),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(40, 200),
    st.sampled_from([FREE, ON_CPU]),
)
def test_guesses_and_company_change_nothing(
    prompts: list[list[int]], n: int, period: int, n_cells: int, costs: dict[int, float]
) -> None:
    def say(tokens: tuple[int, ...]) -> int:
        return tokens[-period] if len(tokens) > period and sum(tokens) % 5 else 3 + sum(tokens) % 9

    model = ScriptedModel(n_cells=n_cells, say=say)
    engine = guessing(model, costs, n_limit=40)
    assert_all_say_what_they_would_alone(engine, prompts, n, say)
    assert is_clean(engine, model)


@pytest.mark.parametrize("n", range(1, 12))
def test_an_answer_ends_at_its_length_and_what_is_kept_of_it_is_what_it_said(n: int) -> None:
    model = ScriptedModel(n_cells=256, say=in_circles)
    engine = guessing(model)
    prompt = [100 + i % PERIOD for i in range(1, 20)]
    said = tokens_of(list(engine.generate(prompt, SamplingParams(max_tokens=n))))
    assert len(said) == n
    # The scripted model itself checks that the cells which the next turn goes on from are the ones it is told.
    again = list(engine.generate([*prompt, *said, 9, 9], SamplingParams(max_tokens=5)))
    assert tokens_of(again) == alone(in_circles, [*prompt, *said, 9, 9], 5)
    assert again[-1].usage is not None and again[-1].usage.cached_tokens >= len(prompt) + n - 1


def test_a_stop_string_among_right_guesses_ends_the_answer_there() -> None:
    script = b"one two one two one two one two one two END one two one two"
    model = ScriptedModel(n_cells=256, say=lambda tokens: script[len(tokens) - 2])
    engine = guessing(model)
    deltas = list(engine.generate([1, 9], SamplingParams(stop=("two one two one two E",))))
    assert "".join(delta.text for delta in deltas) == "one two one two one "
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert is_clean(engine, model)


def test_an_end_of_answer_that_was_guessed_ends_it() -> None:
    prompt = [1, *(50, 51, 52, 53, 54, EOS) * 3]
    model = ScriptedModel(n_cells=256, say=lambda tokens: prompt[len(tokens) % 6 + 1])
    engine = guessing(model)
    deltas = list(engine.generate(prompt))
    assert deltas[-1].finish_reason is FinishReason.STOP and EOS not in tokens_of(deltas)
    assert engine.speculation is not None and engine.speculation.n_right > 0
    assert engine.load.decode_tokens == len(tokens_of(deltas))
    assert is_clean(engine, model)


def test_nothing_is_guessed_while_a_prompt_is_read() -> None:
    model = ScriptedModel(n_cells=512, n_batch=8, say=in_circles)
    engine = guessing(model)
    engine.add([1, 5], SamplingParams(max_tokens=80))
    for _ in range(12):
        engine.step()
    late = engine.add([1, *range(3, 103)], SamplingParams(max_tokens=1))
    before = model.n_guesses
    while late.n_pending > 1:
        engine.step()
    assert before > 0 and model.n_guesses == before


@pytest.mark.parametrize("fault", [KvFull(), Aborted()])
def test_a_batch_that_does_not_complete_loses_its_guesses_only(fault: Exception) -> None:
    model = ScriptedModel(n_cells=256, say=in_circles)
    engine = guessing(model)
    engine.add([1, 5], SamplingParams(max_tokens=60))
    said: list[int] = []
    while not model.n_guesses:
        said += tokens_of(engine.step())
    model.faults = [fault]
    assert engine.step() == []
    said += [token for deltas in drain(engine).values() for token in tokens_of(deltas)]
    assert said == alone(in_circles, [1, 5], 60)
    assert is_clean(engine, model)


def test_who_cannot_be_guessed_soon_costs_no_row() -> None:
    """Tokens that come in the same pairs, but never the same way: whatever is guessed is wrong."""

    def say(tokens: tuple[int, ...]) -> int:
        n = len(tokens) // 3
        return (200, 201, 3 + n % 100)[len(tokens) % 3]

    model = ScriptedModel(n_cells=1024, say=say)
    engine = guessing(model, ON_CPU)
    list(engine.generate([1, 5, 6], SamplingParams(max_tokens=280)))
    assert model.n_guesses < 20


# -- what a grammar leaves no choice about --

KEYS = 'root ::= "{\\"name\\":\\"" [A-Z] [a-z]{2,6} "\\",\\"city\\":\\"" [A-Z] [a-z]{2,6} "\\"}"'


def steps_of(engine: Engine, prompt: array[int], params: SamplingParams) -> tuple[int, list[Delta]]:
    engine.add(prompt, params)
    n, deltas = 0, []
    while not engine.is_idle:
        n += 1
        deltas += engine.step()
    return n, deltas


def test_what_a_grammar_forces_is_not_waited_for(engine: Engine, weights: LlamaWeights) -> None:
    plain = of(weights, None)
    prompt = built(weights, Message("user", "Extract JSON: Anna Smith is 34 years old and lives in Paris."))
    for params in (
        SamplingParams(temperature=0, max_tokens=60, grammar=KEYS),
        SamplingParams(temperature=0.8, seed=3, max_tokens=60, grammar=KEYS),
    ):
        n_steps, deltas = steps_of(engine, prompt, params)
        n_plain, without = steps_of(plain, prompt, params)
        assert tokens_of(deltas) == tokens_of(without)
        assert n_steps < 0.8 * n_plain
        assert json.loads("".join(delta.text for delta in deltas)).keys() == {"name", "city"}
    plain.close()
    engine.close()


def test_an_answer_that_its_grammar_ends_takes_no_step_more(engine: Engine, weights: LlamaWeights) -> None:
    prompt = built(weights, Message("user", "Is it?"))
    n_steps, deltas = steps_of(engine, prompt, SamplingParams(grammar='root ::= "a" [bc] "d"', max_tokens=9))
    assert deltas[-1].finish_reason is FinishReason.STOP and deltas[-1].token is not None
    assert n_steps <= len(tokens_of(deltas))
    may_go_on = SamplingParams(temperature=0, grammar='root ::= "a" | "ab"', max_tokens=9)
    assert "".join(delta.text for delta in steps_of(engine, prompt, may_go_on)[1]) in ("a", "ab")
    engine.close()


class Speller(ScriptedSampler):
    """Foresees what never comes."""

    def foreseen(self) -> array[int]:
        return array("i", [5, 6, 7])


class Spelling(ScriptedModel):
    def sampler(self, params: SamplingParams, prompt: array[int]) -> ScriptedSampler:
        return Speller(self)


def test_how_well_a_grammar_was_foreseen_in_one_answer_does_not_change_the_next() -> None:
    model = Spelling(n_cells=256, say=lambda tokens: 100 + len(tokens) % 90)
    engine = guessing(model, {1: 1.0, 2: 1.3})
    guesses = []
    for _ in range(3):
        before = model.n_guesses
        list(engine.generate([1, 5, 6], SamplingParams(seed=7, grammar="root", max_tokens=30)))
        guesses.append(model.n_guesses - before)
    assert guesses[0] > 0 and len(set(guesses)) == 1
    assert is_clean(engine, model)


@pytest.mark.parametrize(
    ("grammar", "forced"),
    [
        ('root ::= "{\\"name\\":" [a-z]+', '{"name":'),
        ('root ::= "yes" | "no"', ""),
        ('root ::= "true" | "trial"', "tr"),
        ('root ::= "a" "é"', "a"),
        ("root ::= [a-z]+", ""),
        ('root ::= "' + "x" * 300 + '"', "x" * 64),
    ],
)
def test_the_text_that_a_grammar_forces(weights: LlamaWeights, grammar: str, forced: str) -> None:
    grammars = weights.vocabulary.grammars
    one = grammars.clone(grammar)
    assert grammars.forced_text(one) == forced
    assert grammars.forced_text(one) == forced, "looking ahead changes nothing"
    pieces = b"".join(map(weights.vocabulary.piece, weights.vocabulary.continuing(forced)))
    assert pieces.decode() == forced


def test_a_grammar_that_may_go_on_in_thousands_of_ways_is_not_looked_ahead_in(engine: Engine) -> None:
    """To copy one takes as long as a step."""
    for n, is_foreseen in ((20, True), (4000, False)):
        grammar = "root ::= " + " | ".join(f'"number {i}"' for i in range(n))
        sampler = engine.model.sampler(SamplingParams(grammar=grammar), array("i", [1]))
        assert bool(sampler.foreseen()) is is_foreseen
        sampler.close()
    engine.close()


@pytest.mark.parametrize(
    ("grammar", "text", "goes_on"),
    [
        ("root ::= [жд]+", "жд", True),
        ('root ::= "é"?', "", True),
        ('root ::= "é"?', "é", False),
        ('root ::= "yes" | "yesterday"', "yes", True),
        ('root ::= "yes" | "yesterday"', "yesterday", False),
    ],
)
def test_single_bytes_tell_whether_a_grammar_goes_on(
    weights: LlamaWeights, grammar: str, text: str, goes_on: bool
) -> None:
    grammars = weights.vocabulary.grammars
    one = grammars.clone(grammar)
    for token in weights.vocabulary.continuing(text):
        bindings().fast.llama_sampler_accept(one, token)
    assert grammars.goes_on(one) is goes_on


def test_what_is_foreseen_shrinks_with_what_comes_of_it(engine: Engine, weights: LlamaWeights) -> None:
    model, text = engine.model, '{"first name":"'
    prompt = weights.vocabulary.tokenize("A name:")
    sequence = Sequence(0, prompt)
    sequence.slot = 0
    sampler = model.sampler(SamplingParams(temperature=0, grammar='root ::= "{\\"first name\\":\\"" [a-z]+'), prompt)
    row = model.run([Chunk(sequence, 0, len(prompt))])[0]
    while text:
        assert sampler.foreseen() == weights.vocabulary.continuing(text)
        token = sampler.sample(row)  # always from the same logits: only the grammar moves
        assert token is not None
        text = text[len(model.piece(token)) :]
    assert not sampler.foreseen()
    sampler.close()
    engine.close()


# -- a smaller model that writes ahead --


class Clerk(ScriptedModel):
    """Foretells what `say` says: surely, unless it hesitates."""

    hesitates = False

    def logprobs(self, row: int, token: int, n_top: int) -> Logprobs:
        told = self.say(self.outputs[row])
        return Logprobs(told, 0.0, (Alternative(told, -3.0 if self.hesitates else -0.05),))


def assisted(model: ScriptedModel, clerk: Clerk, *, cost: float = 0.01, n_limit: int | None = None) -> Engine:
    return Engine(
        model,
        n_limit=n_limit,
        speculation=Speculation(StepCosts(FREE), DraftModel(clerk, cost=cost)),
    )


def test_a_smaller_model_saves_steps_where_the_text_says_nothing() -> None:
    model, clerk = ScriptedModel(n_cells=256), Clerk(n_cells=256)
    engine = assisted(model, clerk)
    said = tokens_of(list(engine.generate([1, 5, 6], SamplingParams(max_tokens=100))))
    assert said == alone(count_up, [1, 5, 6], 100)
    assert len(model.batches) < 40
    assert is_clean(engine, model) and clerk.n_used == 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(3, 12), min_size=1, max_size=30), min_size=1, max_size=6),
    st.integers(1, 40),
    st.integers(2, 9),
    st.integers(20, 200),
    st.booleans(),
)
def test_a_smaller_model_that_is_often_wrong_changes_nothing(
    prompts: list[list[int]], n: int, often: int, n_cells: int, hesitates: bool
) -> None:
    clerk = Clerk(n_cells=n_cells, say=lambda tokens: count_up(tokens) if sum(tokens) % often else 7)
    clerk.hesitates = hesitates
    model = ScriptedModel(n_cells=200)
    engine = assisted(model, clerk, n_limit=40)
    assert_all_say_what_they_would_alone(engine, prompts, n, count_up)
    assert clerk.n_refused == 0
    assert is_clean(engine, model) and clerk.n_used == 0


def test_a_smaller_model_that_does_not_pay_is_left_alone() -> None:
    clerk = Clerk(n_cells=512, say=lambda _: 7)
    engine = assisted(ScriptedModel(n_cells=512), clerk, cost=0.3)
    list(engine.generate([1, 5, 6], SamplingParams(max_tokens=300)))
    assert len(clerk.batches) < 60
    costly = Clerk(n_cells=512)
    engine = assisted(ScriptedModel(n_cells=512), costly, cost=1.5)
    list(engine.generate([1, 5, 6], SamplingParams(max_tokens=300)))
    assert len(costly.batches) < 10


def test_a_text_beyond_what_the_smaller_model_was_made_for_is_not_given_to_it() -> None:
    model, clerk = ScriptedModel(n_cells=256), Clerk(n_cells=256)
    engine = Engine(model, speculation=Speculation(StepCosts(FREE), DraftModel(clerk, cost=0.01, n_limit=40)))
    said = tokens_of(list(engine.generate([1, 5, 6], SamplingParams(max_tokens=100))))
    assert said == alone(count_up, [1, 5, 6], 100)
    assert 20 < max(start + n for batch in clerk.batches for _, start, n in batch) <= 40


def test_an_answer_outlives_the_smaller_model() -> None:
    model, clerk = ScriptedModel(n_cells=256), Clerk(n_cells=256)
    engine = assisted(model, clerk)
    engine.add([1, 5, 6], SamplingParams(max_tokens=60))
    said = [token for _ in range(4) for token in tokens_of(engine.step())]
    clerk.fail_once()
    said += [token for deltas in drain(engine).values() for token in tokens_of(deltas)]
    assert said == alone(count_up, [1, 5, 6], 60)


# -- what is worth its row --


def test_the_likeliest_guesses_get_the_rows_that_pay() -> None:
    offers = [[0.9, 0.8], [0.5, 0.1], [], [0.05]]
    assert share_out(offers, 8, StepCosts({1: 1.0, 16: 16.0}).of) == [0, 0, 0, 0]  # each row costs a whole step
    assert share_out(offers, 8, StepCosts({1: 1.0, 4: 4.0, 7: 4.0, 8: 8.0}).of) == [
        2,
        1,
        0,
        0,
    ]  # three more cost nothing
    assert share_out(offers, 8, StepCosts({1: 1.0, 4: 4.0, 9: 5.0, 10: 50.0}).of) == [2, 1, 0, 0]


def test_no_more_rows_are_given_than_there_are() -> None:
    assert share_out([[0.9] * 9, [0.8] * 9], 3, StepCosts(FREE).of) == [3, 0]
    assert share_out([[0.9] * 2, [0.8] * 2], 8, StepCosts(FREE).of) == [2, 2]
    assert share_out([[], []], 8, StepCosts(FREE).of) == [0, 0]


def test_a_step_costs_what_was_measured_and_in_between_what_the_table_makes_of_it() -> None:
    costs = StepCosts({1: 1.0, 2: 2.0, 4: 4.0}, learns=True)
    assert (costs.of(1), costs.of(3), costs.of(6)) == (1.0, 3.0, 6.0)
    for _ in range(50):
        costs.learn(2, 0.5)
    assert costs.of(2) == pytest.approx(0.5) and costs.of(4) == pytest.approx(1.0)
    costs.learn(2, 60.0)  # the machine was busy with something else
    assert costs.of(2) < 0.8


def test_what_once_looked_too_dear_is_forgotten() -> None:
    costs = StepCosts({1: 1.0, 2: 2.0}, learns=True)
    costs.learn(1, 1.0)
    for _ in range(9):
        costs.learn(2, 500.0)
    assert costs.of(2) > 10
    for _ in range(250):
        costs.learn(1, 1.0)
    assert costs.of(2) == pytest.approx(2.0)


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(seed=7)])
def test_where_an_answer_must_be_repeatable_no_clock_is_looked_at(params: SamplingParams) -> None:
    """Steps of one row seem to take for ever, so that by the clock every guess would be worth its row."""

    def batches(costs: StepCosts, params: SamplingParams) -> list[list[tuple[int, int, int]]]:
        model = ScriptedModel(n_cells=256, say=in_circles)
        engine = Engine(model, speculation=Speculation(costs))
        list(engine.generate([1, 5, 6], replace(params, max_tokens=80)))
        return model.batches

    def hasty() -> StepCosts:
        costs = StepCosts({1: 1.0, 16: 16.0}, learns=True)
        for n_rows in range(2, 12):
            costs.learn(n_rows, 1e-9)
        costs.learn(1, 1.0)
        return costs

    assert batches(hasty(), params) == batches(StepCosts({1: 1.0, 16: 16.0}), params)
    assert len(batches(hasty(), SamplingParams())) < len(batches(hasty(), params))


# -- where guesses come from --


def guesses_of(tokens: list[int], n: int) -> list[int]:
    return [token for token, _ in Lookup(array("i", tokens)).guess(n)]


def test_what_followed_the_last_time_is_guessed() -> None:
    assert guesses_of([1, 10, 11, 12, 13, 14, 9, 10, 11], 3) == [12, 13, 14]
    assert guesses_of([10, 11, 20, 7, 10, 11, 30, 7, 10, 11], 2) == [30, 7]
    assert guesses_of([5, 10, 11, 20, 6, 10, 11, 30, 5, 10, 11], 1) == [20], "three that agree before two"
    assert guesses_of([1, 2, 3, 4], 3) == []
    assert guesses_of([1], 3) == guesses_of([], 3) == []


def test_a_list_of_equal_lines_goes_on() -> None:
    assert guesses_of([1, 7, 8, 9, 7, 8, 9, 7, 8, 9], 7) == [7, 8, 9, 7, 8, 9, 7]


def test_chances_fall_along_a_guess_and_rise_with_what_comes_true() -> None:
    tokens = array("i", [1, *range(100, 160), 5, 6, 100, 101])
    lookup = Lookup(tokens)
    first = [chance for _, chance in lookup.guess(6)]
    assert first == sorted(first, reverse=True) and 0 < first[-1] < first[0] < 1
    for token in range(102, 140):
        tokens.append(token)
        lookup.catch_up()
    later = list(lookup.guess(6))
    assert [token for token, _ in later] == list(range(140, 146))
    assert later[-1][1] > first[0]


def test_chances_sink_with_what_does_not_come_true() -> None:
    tokens = array("i", [1, 200, 201])
    lookup = Lookup(tokens)
    for i in range(60):
        tokens.extend([3 + i, 200, 201])
        lookup.catch_up()
    assert next(iter(lookup.guess(1)))[1] < 0.1


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), max_size=120), st.integers(0, 120))
def test_a_guess_is_what_came_after_the_same_tokens(tokens: list[int], n_prompt: int) -> None:
    grown = array("i", tokens[:n_prompt])
    lookup = Lookup(grown)
    grown.extend(tokens[n_prompt:])
    lookup.catch_up()
    guessed = [token for token, _ in lookup.guess(4)]
    if guessed:
        pair = tokens[-2:]
        assert any(tokens[i : i + 2] == pair and tokens[i + 2] == guessed[0] for i in range(len(tokens) - 2))


# -- the real model --


@pytest.fixture
def engine(weights: LlamaWeights) -> Engine:
    return of(weights, Speculation(StepCosts(FREE)))


def of(weights: LlamaWeights, speculation: Speculation | None) -> Engine:
    options = ContextOptions(n_cells=1024, n_batch=512, threads=2, threads_batch=2, n_guessed=24)
    return Engine(LlamaModel(weights, options), step_seconds=None, speculation=speculation)


def built(weights: LlamaWeights, *messages: Message) -> array[int]:
    return PromptBuilder(read_model(weights.path), weights.vocabulary).build(list(messages)).tokens


COPIED = " ".join(
    ["the", "small", "red", "boat", "went", "down", "the", "river", "past", "green", "hills", "and", "quiet", "farms"][
        ::-1
    ]
)
COPYING = [f"Repeat: {COPIED}", f"Repeat after me: {COPIED}", f"```\n{COPIED}\n```\n\nRepeat the text."]


def test_copies_take_a_third_of_the_steps_and_are_the_same(engine: Engine, weights: LlamaWeights) -> None:
    plain = of(weights, None)
    speculation = engine.speculation
    assert speculation is not None
    greedy = SamplingParams(temperature=0, max_tokens=100)
    n_tokens = n_steps = 0
    for text in COPYING:
        prompt = built(weights, Message("user", text))
        engine.add(prompt, greedy)
        said: list[int] = []
        while not engine.is_idle:
            n_steps += 1
            said += tokens_of(engine.step())
        assert said == tokens_of(list(plain.generate(prompt, greedy)))
        n_tokens += len(said)
    assert n_tokens / n_steps > 2
    assert speculation.n_right > speculation.n_guessed / 3
    plain.close()
    engine.close()


def test_golden_answers_are_the_same_with_guesses(engine: Engine, weights: LlamaWeights) -> None:
    golden = json.loads(Path(__file__).parents[1].joinpath("golden.json").read_text("utf-8"))
    for case in golden[::3]:
        system = [Message("system", case["system"])] if case["system"] else []
        prompt = built(weights, *system, *(Message(each["role"], each["content"]) for each in case["messages"]))
        text = "".join(
            d.text for d in engine.generate(prompt, SamplingParams(temperature=0, max_tokens=100), trim=True)
        )
        assert text == case["greedy"] or case["greedy"].startswith(text[:300])
    engine.close()


def test_drawn_tokens_log_probabilities_and_grammars_agree_with_the_guesses(
    engine: Engine, weights: LlamaWeights
) -> None:
    """The random numbers go on with each token that is written, not with each that was computed."""
    plain = of(weights, None)
    prompt = built(weights, Message("user", COPYING[0]))
    for params in (
        SamplingParams(temperature=0.7, seed=5, max_tokens=60, repeat_penalty=1.1),
        SamplingParams(temperature=1.0, seed=9, max_tokens=60, logprobs=2),
        SamplingParams(temperature=0, max_tokens=60, grammar='root ::= ("the small red boat " | [a-z ]+)+'),
    ):
        with_guesses = list(engine.generate(prompt, params))
        without = list(plain.generate(prompt, params))
        assert tokens_of(with_guesses) == tokens_of(without)
        for ours, theirs in zip(with_guesses, without, strict=True):
            assert (ours.logprobs is None) == (theirs.logprobs is None)
            if ours.logprobs and theirs.logprobs:
                assert ours.logprobs.logprob == pytest.approx(theirs.logprobs.logprob, abs=0.1)
    assert engine.speculation is not None and engine.speculation.n_right > 0
    plain.close()
    engine.close()
