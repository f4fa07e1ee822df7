"""The engine against a scripted model: company changes nothing, nobody starves, nothing leaks."""

from __future__ import annotations

import random
from itertools import islice

import pytest
from scripted import EOS, ScriptedModel, count_up

from llamacli.engine.engine import Engine
from llamacli.engine.kv import KvCache
from llamacli.engine.model import KvFull
from llamacli.engine.scheduler import TILE, Scheduler
from llamacli.engine.sequence import Chunk, Delta, FinishReason, SamplingParams, Sequence
from llamacli.errors import InputTooLong, UsageError

TEN = SamplingParams(max_tokens=10)


def step(engine: Engine, deltas: dict[int, list[Delta]]) -> None:
    for delta in engine.step():
        deltas.setdefault(delta.sequence_id, []).append(delta)


def drain(engine: Engine, deltas: dict[int, list[Delta]] | None = None) -> dict[int, list[Delta]]:
    """Every delta until the engine is idle, by sequence."""
    deltas = {} if deltas is None else deltas
    for _ in range(100_000):
        if engine.is_idle:
            return deltas
        step(engine, deltas)
    raise AssertionError("the engine does not come to an end")


def alone(prompt: list[int], n: int) -> list[int]:
    """What the scripted model says to a prompt."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(count_up(tuple(tokens)))
    return tokens[len(prompt) :]


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [delta.token for delta in deltas if delta.token is not None]


def is_running(sequence: Sequence) -> bool:
    return sequence.slot is not None


def is_clean(engine: Engine, model: ScriptedModel) -> bool:
    engine.kv.clear()
    return (model.n_used, model.n_samplers, engine.kv.cells.n_used, engine.kv.n_lent_slots) == (0, 0, 0, 0)


def test_one_prompt_gives_its_answer_and_its_usage() -> None:
    engine = Engine(ScriptedModel())
    deltas = list(engine.generate([1, 5, 6], TEN))
    assert tokens_of(deltas) == alone([1, 5, 6], 10)
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    usage = deltas[-1].usage
    assert usage is not None and (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (3, 10, 0)


def test_the_end_of_answer_token_ends_it_and_is_not_part_of_it() -> None:
    engine = Engine(ScriptedModel(say=lambda tokens: 65 if len(tokens) < 5 else EOS))
    deltas = list(engine.generate([1, 9]))
    assert "".join(delta.text for delta in deltas) == "AAA"
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert deltas[-1].usage is not None and deltas[-1].usage.completion_tokens == 3


def test_a_stop_string_ends_the_answer_before_it() -> None:
    script = b"one two three"
    engine = Engine(ScriptedModel(say=lambda tokens: script[len(tokens) - 2]))
    deltas = list(engine.generate([1, 9], SamplingParams(stop=("two",))))
    assert "".join(delta.text for delta in deltas) == "one "
    assert deltas[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("seed", range(30))
def test_company_changes_nothing(seed: int) -> None:
    """Any prompts, in any order, with any batch size, cells and company, answer as they do alone."""
    chance = random.Random(seed)
    model = ScriptedModel(
        n_cells=chance.choice([48, 100, 400]), n_slots=chance.randint(1, 6), n_batch=chance.choice([6, 16, 64])
    )
    engine = Engine(model, n_limit=48)
    shared = [chance.randrange(3, 200) for _ in range(20)]
    expected = {}
    deltas: dict[int, list[Delta]] = {}
    for _ in range(12):
        own = [chance.randrange(3, 200) for _ in range(chance.randint(1, 12))]
        prompt = shared[: chance.choice([0, 0, 7, 20])] + own
        n = chance.randint(1, 48 - len(prompt) - 1)
        sequence = engine.add(prompt, SamplingParams(max_tokens=n))
        expected[sequence.id] = alone(prompt, n)
        for _ in range(chance.randint(0, 4)):
            step(engine, deltas)
    drain(engine, deltas)
    assert {sequence_id: tokens_of(each) for sequence_id, each in deltas.items()} == expected
    assert model.n_refused == 0
    assert is_clean(engine, model)


def test_a_long_prompt_does_not_stall_a_decoding_sequence() -> None:
    model = ScriptedModel(n_cells=400, n_batch=16)
    engine = Engine(model)
    talking = engine.add([1, 2, 3], SamplingParams(max_tokens=40))
    engine.step()
    engine.add(list(range(3, 203)), TEN)
    while any(s.n_pending > 1 for s in engine._scheduler.running) or engine._scheduler.waiting:
        before = talking.n_generated
        engine.step()
        assert talking.n_generated == before + 1 or talking.id not in engine._requests


def test_every_decoding_sequence_has_a_row_in_every_batch() -> None:
    model = ScriptedModel(n_cells=200, n_slots=4)
    engine = Engine(model)
    for first in (3, 50, 100, 150):
        engine.add([first, 4], SamplingParams(max_tokens=20))
    engine.step()
    for _ in range(15):
        assert len(engine.step()) == 4


def test_nobody_overtakes_a_sequence_that_waits_for_room() -> None:
    model = ScriptedModel(n_cells=128, n_slots=4, n_batch=128)
    engine = Engine(model, n_limit=100)
    engine.add(list(range(3, 53)), SamplingParams(max_tokens=20))
    engine.step()
    large = engine.add(list(range(100, 160)), SamplingParams(max_tokens=5))
    small = engine.add([9, 8, 7], SamplingParams(max_tokens=5))
    engine.step()
    assert (large.slot, small.slot) == (None, None)
    ends = [d.sequence_id for _ in range(100) for d in engine.step() if d.finish_reason]
    assert ends.index(large.id) <= ends.index(small.id)


def test_a_sequence_that_was_sent_back_goes_on_before_those_that_came_later() -> None:
    model = ScriptedModel(n_cells=90, n_slots=2, n_batch=90)
    engine = Engine(model, n_limit=80)
    first = engine.add(list(range(3, 13)), SamplingParams(max_tokens=60))
    second = engine.add(list(range(103, 113)), SamplingParams(max_tokens=60))
    engine.step()
    third = engine.add([9, 8, 7], SamplingParams(max_tokens=60))
    while is_running(second):
        engine.step()
    while not is_running(second):
        engine.step()
        assert is_running(second) or not is_running(third)
    assert first.n_generated > second.n_generated


def test_prompts_share_the_batch_with_decoding() -> None:
    model = ScriptedModel(n_cells=200, n_batch=16)
    engine = Engine(model)
    first = engine.add([1, 2, 3], SamplingParams(max_tokens=20))
    engine.step()
    second = engine.add(list(range(3, 30)), TEN)
    engine.step()
    assert model.batches[-1] == [(first.id, 3, 1), (second.id, 0, 15)]


def test_a_step_with_a_prompt_fills_whole_tiles() -> None:
    model = ScriptedModel(n_cells=1000, n_slots=4, n_batch=512)
    engine = Engine(model)
    for i in range(3):
        engine.add([3 + i, 4], SamplingParams(max_tokens=20))
    engine.step()
    engine.add(list(range(3, 253)) * 2, TEN)
    engine.step()
    assert sum(n for _, _, n in model.batches[-1]) % TILE == 0


def test_where_rows_take_long_the_prompt_s_part_of_a_step_shrinks_to_a_tile() -> None:
    """As it does deep in a long context: there a row costs several times what it cost at the beginning."""
    scheduler = Scheduler(KvCache(4000, 4, ScriptedModel(n_cells=4000)), n_batch=512, step_seconds=0.25)
    stream = Sequence(0, [1, 2, 3])
    scheduler.add(stream)
    scheduler.commit(scheduler.schedule(), 0.01)
    stream.tokens.append(4)
    scheduler.add(Sequence(1, range(3, 2003)))
    for _ in range(12):
        chunks = scheduler.schedule()
        n_rows = sum(chunk.n for chunk in chunks)
        scheduler.commit(chunks, 0.02 * n_rows)
        stream.tokens.append(5)
    assert n_rows == TILE


def test_of_prompts_that_come_together_the_first_does_not_wait_for_the_last() -> None:
    engine = Engine(ScriptedModel(n_cells=1000, n_slots=4, n_batch=64))
    prompts = [engine.add([i, *range(3, 103)], TEN) for i in range(100, 104)]
    while not (deltas := engine.step()):
        pass
    assert [delta.sequence_id for delta in deltas] == [prompts[0].id]
    assert sum(prompt.n_computed for prompt in prompts[1:]) < 200


def test_a_short_prompt_overtakes_long_ones_and_starves_nobody() -> None:
    model = ScriptedModel(n_cells=2000, n_slots=3, n_batch=32)
    engine = Engine(model)
    long = engine.add(list(range(3, 253)), TEN)
    engine.add([99, *range(3, 253)], TEN)
    engine.step()
    for i in range(10):
        before = long.n_computed
        short = engine.add([100 + i, 9, 8], SamplingParams(max_tokens=1))
        while not any(delta.sequence_id == short.id for delta in engine.step()):
            pass
        assert long.n_computed >= before + 14 or not long.n_pending > 1
    assert not long.n_pending > 1


def test_a_shared_prefix_is_computed_once_even_when_all_arrive_together() -> None:
    model = ScriptedModel(n_cells=1000, n_slots=8, n_batch=64)
    engine = Engine(model)
    system = list(range(3, 203))
    for i in range(6):
        engine.add([*system, 210 + i, 220 + i], TEN)
    deltas = drain(engine)
    n_prompt_rows = sum(n for batch in model.batches for _, _, n in batch) - 6 * 9
    assert n_prompt_rows <= 202 + 5 * 3
    cached = [each[-1].usage.cached_tokens for each in deltas.values() if each[-1].usage]
    assert sorted(cached) == [0, 200, 200, 200, 200, 200]


def test_a_leader_that_is_cancelled_does_not_leave_its_followers_waiting() -> None:
    engine = Engine(ScriptedModel(n_cells=1000, n_slots=4, n_batch=32))
    system = list(range(3, 203))
    leader = engine.add([*system, 1], TEN)
    follower = engine.add([*system, 2], TEN)
    engine.step()
    engine.cancel(leader)
    assert tokens_of(drain(engine)[follower.id]) == alone([*system, 2], 10)


def test_a_finished_conversation_is_a_prefix_of_its_next_turn() -> None:
    engine = Engine(ScriptedModel(n_cells=200))
    prompt = list(range(3, 53))
    answer = tokens_of(list(engine.generate(prompt, TEN)))
    last = list(engine.generate([*prompt, *answer, 7, 8], TEN))[-1]
    assert last.usage is not None and last.usage.cached_tokens == 59  # the last answer token was never computed


def test_an_exact_repetition_computes_one_row_and_answers_the_same() -> None:
    model = ScriptedModel(n_cells=200, n_batch=64)
    engine = Engine(model)
    prompt = list(range(3, 53))
    first = tokens_of(list(engine.generate(prompt, TEN)))
    model.batches.clear()
    assert tokens_of(list(engine.generate(prompt, TEN))) == first
    assert model.batches[0][0][1:] == (49, 1)


def test_a_full_cache_costs_kept_prefixes_first() -> None:
    model = ScriptedModel(n_cells=64, n_slots=4, n_batch=64)
    engine = Engine(model)
    list(engine.generate(list(range(3, 43)), TEN))
    assert engine.kv.n_cached_slots == 1
    deltas = list(engine.generate(list(range(100, 150)), TEN))
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    assert engine.kv.n_cached_slots == 1


def test_a_full_cache_sends_the_youngest_back_and_fails_nobody() -> None:
    model = ScriptedModel(n_cells=64, n_slots=4, n_batch=64)
    engine = Engine(model, n_limit=60)
    prompts = [list(range(3 + i, 9 + i)) for i in range(3)]
    for prompt in prompts:
        engine.add(prompt, SamplingParams(max_tokens=30))
    deltas = drain(engine)
    for i, prompt in enumerate(prompts):
        assert tokens_of(deltas[i]) == alone(prompt, 30)
        assert deltas[i][-1].finish_reason is FinishReason.LENGTH
    assert is_clean(engine, model)


def test_only_a_lone_sequence_ends_for_want_of_cells() -> None:
    engine = Engine(ScriptedModel(n_cells=20))
    deltas = list(engine.generate([1, 2, 3]))
    assert deltas[-1].finish_reason is FinishReason.CONTEXT
    assert len(tokens_of(deltas)) == 17
    assert deltas[-1].finish_reason.wire == "length"


def test_the_cache_grows_for_a_lone_sequence_up_to_its_bound() -> None:
    model = ScriptedModel(n_cells=16)
    engine = Engine(model, max_cells=60, n_limit=50)
    deltas = list(engine.generate([1, 2, 3]))
    assert tokens_of(deltas) == alone([1, 2, 3], 47)
    assert deltas[-1].finish_reason is FinishReason.CONTEXT
    assert (model.n_cells, model.n_grown) == (60, 2)


def test_llama_cpp_finding_no_cells_shrinks_the_work_and_fails_nobody() -> None:
    model = ScriptedModel(n_cells=200, n_slots=4, n_batch=64)
    engine = Engine(model)
    list(engine.generate([90, 91, 92], TEN))
    first = engine.add(list(range(3, 43)), TEN)
    second = engine.add(list(range(103, 143)), TEN)
    model.faults += [KvFull(), KvFull()]
    engine.step()
    assert engine.kv.n_cached_slots == 0, "first a kept prefix goes"
    engine.step()
    engine.step()
    assert max(n for _, _, n in model.batches[-1]) == 20, "then prompt chunks are halved: 40 rows were wanted"
    while second.slot is not None:
        model.faults.append(KvFull())
        engine.step()
    assert first.slot is not None, "then the youngest is sent back"
    engine.step()
    assert second.slot is None, "and is not let in again while llama.cpp holds less than the ledger believes"
    deltas = drain(engine)
    assert tokens_of(deltas[first.id]) == alone(list(range(3, 43)), 10)
    assert tokens_of(deltas[second.id]) == alone(list(range(103, 143)), 10)


class ShortModel(ScriptedModel):
    """Is full before its ledger is, as llama.cpp may be when its cells are in pieces."""

    n_real = 100

    def run(self, chunks: list[Chunk]) -> list[int]:
        if self.n_used + sum(chunk.n for chunk in chunks) > self.n_real:
            raise KvFull
        return super().run(chunks)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_ledger_that_believes_too_much_stalls_nobody(n: int) -> None:
    engine = Engine(ShortModel(n_cells=256, n_slots=4, n_batch=64))
    for i in range(n):
        engine.add([3 + i] * 20, SamplingParams(max_tokens=60))
    finished: dict[int, FinishReason] = {}
    for _ in range(1000):
        finished |= {delta.sequence_id: delta.finish_reason for delta in engine.step() if delta.finish_reason}
    assert finished == dict.fromkeys(range(n), FinishReason.LENGTH)


def test_an_aborted_step_leaves_the_engine_able_to_go_on() -> None:
    model = ScriptedModel(n_cells=200, n_batch=16)
    engine = Engine(model)
    sequence = engine.add(list(range(3, 53)), TEN)
    engine.step()
    engine.abort()
    assert engine.step() == []
    assert tokens_of(drain(engine)[sequence.id]) == alone(list(range(3, 53)), 10)


def test_a_failing_batch_ends_its_members_and_nobody_else() -> None:
    model = ScriptedModel(n_cells=200, n_slots=1, n_batch=64)
    engine = Engine(model)
    broken = engine.add([1, 2, 3], TEN)
    waiting = engine.add([4, 5, 6], TEN)
    engine.step()
    model.fail_once()
    (failed,) = engine.step()
    assert (failed.sequence_id, failed.finish_reason) == (broken.id, FinishReason.FAILED)
    assert engine.kv.n_cached_slots == 0, "what it has computed is not to be trusted"
    assert tokens_of(drain(engine)[waiting.id]) == alone([4, 5, 6], 10)
    assert is_clean(engine, model)


def test_cancelling_gives_everything_back_while_reading_and_while_writing() -> None:
    model = ScriptedModel(n_cells=400, n_batch=16)
    engine = Engine(model)
    reading = engine.add(list(range(3, 103)), TEN)
    writing = engine.add([1, 2, 3], TEN)
    waiting = [engine.add([i], TEN) for i in range(5, 12)]
    for _ in range(3):
        engine.step()
    assert reading.n_pending > 1 and writing.n_generated > 0
    for sequence in (reading, writing, *waiting):
        engine.cancel(sequence)
        engine.cancel(sequence)  # a second time does nothing
    assert engine.is_idle and engine.step() == []
    assert is_clean(engine, model)


def test_closing_the_iterator_cancels_the_answer() -> None:
    model = ScriptedModel(n_cells=400)
    engine = Engine(model)
    deltas = engine.generate([1, 2, 3])
    list(islice(deltas, 3))
    deltas.close()  # type: ignore[attr-defined]
    assert engine.is_idle and is_clean(engine, model)


@pytest.mark.parametrize("seed", range(2))
def test_ten_thousand_random_steps_leave_nothing_in_use(seed: int) -> None:
    chance = random.Random(seed)
    model = ScriptedModel(n_cells=96, n_slots=5, n_batch=16)
    engine = Engine(model, n_limit=60)
    live: list[Sequence] = []
    paused: list[Sequence] = []
    for _ in range(10_000):
        act = chance.random()
        if act < 0.3 and len(live) < 12:
            prompt = list(range(3, 3 + chance.randint(1, 40)))[:: chance.choice([1, 1, 2])]
            live.append(engine.add(prompt, SamplingParams(max_tokens=chance.randint(1, 20))))
        elif act < 0.45 and live:
            engine.cancel(live.pop(chance.randrange(len(live))))
        elif act < 0.5 and live:
            sequence = chance.choice(live)
            if sequence in paused:
                paused.remove(sequence)
                engine.resume(sequence)
            else:
                paused.append(sequence)
                engine.pause(sequence)
            paused = [each for each in paused if each in live]
        else:
            if act < 0.55:
                model.faults.append(chance.choice([KvFull(), KvFull()]))
            for delta in engine.step():
                if delta.finish_reason:
                    live = [s for s in live if s.id != delta.sequence_id]
        assert model.n_used == engine.kv.cells.n_used
        assert engine.kv.n_lent_slots == len(engine._scheduler.running)
    model.faults.clear()
    for sequence in live:
        engine.cancel(sequence)
    assert engine.is_idle and is_clean(engine, model)


def test_a_paused_sequence_takes_no_rows_and_goes_on_where_it_stopped() -> None:
    model = ScriptedModel(n_cells=200)
    engine = Engine(model)
    paused = engine.add([1, 5, 6], SamplingParams(max_tokens=20))
    other = engine.add([1, 9], SamplingParams(max_tokens=40))
    deltas: dict[int, list[Delta]] = {}
    for _ in range(5):
        step(engine, deltas)
    engine.pause(paused)
    model.batches.clear()
    for _ in range(5):
        step(engine, deltas)
    assert {row[0] for batch in model.batches for row in batch} == {other.id}
    engine.resume(paused)
    model.batches.clear()
    drain(engine, deltas)
    assert tokens_of(deltas[paused.id]) == alone([1, 5, 6], 20)
    assert {row[2] for batch in model.batches for row in batch} == {1}, "nothing is computed twice"
    assert is_clean(engine, model)


def test_an_engine_of_paused_sequences_has_no_work_and_lets_others_use_everything() -> None:
    model = ScriptedModel(n_cells=64, n_slots=2, n_batch=64)
    engine = Engine(model)
    paused = [engine.add(list(range(first, first + 20)), SamplingParams(max_tokens=5)) for first in (3, 103)]
    deltas: dict[int, list[Delta]] = {}
    step(engine, deltas)
    for sequence in paused:
        engine.pause(sequence)
    assert (engine.has_work, engine.step()) == (False, [])
    assert engine.load.waiting == 2
    large = engine.add(list(range(50, 100)), SamplingParams(max_tokens=10))
    while engine.has_work:
        step(engine, deltas)
    assert tokens_of(deltas[large.id]) == alone(list(range(50, 100)), 10)
    for sequence in paused:
        engine.resume(sequence)
    drain(engine, deltas)
    for sequence, first in zip(paused, (3, 103), strict=True):
        assert tokens_of(deltas[sequence.id]) == alone(list(range(first, first + 20)), 5)
    assert is_clean(engine, model)


def test_a_paused_sequence_can_be_cancelled_and_one_that_waits_can_be_paused() -> None:
    model = ScriptedModel(n_slots=1)
    engine = Engine(model)
    running, waiting = engine.add([1, 5], TEN), engine.add([1, 6], TEN)
    engine.step()
    engine.pause(waiting)
    engine.pause(running)
    engine.cancel(running)
    engine.resume(running)  # too late: nothing happens
    assert engine.step() == []
    engine.resume(waiting)
    engine.resume(waiting)
    assert tokens_of(drain(engine)[waiting.id]) == alone([1, 6], 10)
    assert is_clean(engine, model)


def test_a_resumed_sequence_comes_before_those_that_arrived_after_it() -> None:
    engine = Engine(ScriptedModel(n_slots=4), max_running=1)
    first = engine.add([1, 5], SamplingParams(max_tokens=4))
    engine.step()
    engine.pause(first)
    second, third = engine.add([1, 6], TEN), engine.add([1, 7], TEN)
    engine.step()
    engine.resume(first)
    ends = [delta.sequence_id for _ in range(40) for delta in engine.step() if delta.finish_reason]
    assert ends == [second.id, first.id, third.id]


def test_slots_beyond_those_that_compute_hold_kept_prefixes() -> None:
    model = ScriptedModel(n_cells=400, n_slots=6)
    engine = Engine(model, max_running=2)
    for first in range(3, 13):
        engine.add([first, 4, 5], TEN)
    while engine.has_work:
        engine.step()
        assert engine.load.slots_busy <= 2
    assert max(len(batch) for batch in model.batches) == 2
    assert engine.kv.n_cached_slots >= 4


def test_the_load_counts_every_token_once() -> None:
    engine = Engine(ScriptedModel(n_cells=200))
    prompt = list(range(3, 33))
    list(engine.generate(prompt, TEN))
    list(engine.generate([*prompt, 200], TEN))
    load = engine.load
    assert (load.prefix_hit_tokens, load.prefill_tokens, load.decode_tokens) == (30, 31, 18)
    assert (load.slots_busy, load.waiting) == (0, 0)


def test_bad_prompts_are_refused_before_anything_native_sees_them() -> None:
    engine = Engine(ScriptedModel(n_cells=20))
    with pytest.raises(UsageError, match="empty"):
        engine.add([])
    with pytest.raises(UsageError, match=r"outside 0\.\.255"):
        engine.add([1, 256])
    with pytest.raises(UsageError, match="outside"):
        engine.add([-1])
    with pytest.raises(InputTooLong, match="20 tokens; the context holds 20"):
        engine.add([5] * 20)
    assert engine.is_idle


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repeat_penalty": 0},
        {"seed": 2**32 - 1},
        {"max_tokens": 0},
        {"stop": ("",)},
        {"logprobs": 21},
        {"grammar": " "},
        {"logit_bias": {5: 101.0}},
        {"presence_penalty": 2.5},
    ],
)
def test_a_parameter_out_of_range_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        SamplingParams(**wrong)  # type: ignore[arg-type]
