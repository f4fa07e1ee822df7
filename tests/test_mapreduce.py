"""--on-overflow map-reduce: a long text read in parts, each asked the same, and one answer made of theirs."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from typing import Any

import pytest
from conftest import MakeModel, Run
from hypothesis import given
from hypothesis import strategies as st

from llamacli.engine.engine import Engine
from llamacli.engine.sequence import FinishReason, SamplingParams
from llamacli.errors import InputTooLong
from llamacli.mapreduce import COMBINE, MOST, MapReduce, worth_together
from llamacli.prompt import PromptBuilder
from llamacli.together import Together

TEXT = "\n\n".join(f"Paragraph {i}. The model reads it, and then it goes on to the next one." for i in range(160))
HOT = ("--temperature", "1", "--seed", "1")


def one_line(stderr: str) -> str:
    assert stderr.startswith("llamacli: ") and stderr.count("\n") == 1, stderr
    return stderr.removeprefix("llamacli: ").rstrip("\n")


def test_a_long_text_gets_one_answer_and_it_is_said_how_it_was_read(llamacli: Run) -> None:
    done = llamacli("--on-overflow", "map-reduce", *HOT, "-n", "20", "--json", "Summarise", input=TEXT)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    said = done.stderr.splitlines()[-1]
    n_parts, n_tokens = record["input"]["parts"], record["input"]["tokens"]
    assert n_parts > 3 and n_tokens == record["input"]["kept"] > 3000
    assert f"the input is {n_tokens:,} tokens; it was read in {n_parts} parts, whose answers are combined" in said
    assert record["usage"]["prompt_tokens"] > n_tokens
    assert record["settings"]["on_overflow"] == "map-reduce"
    assert set(record["timings"]) == {"load_s", "prefill_s", "first_token_s", "decode_tokens_per_s", "total_s"}


def test_a_seed_repeats_it_and_stdout_is_the_answer_alone(llamacli: Run) -> None:
    command = ("--on-overflow", "map-reduce", *HOT, "-n", "20", "-q", "Summarise")
    first, second = (llamacli(*command, input=TEXT) for _ in range(2))
    assert first.stdout == second.stdout and first.stdout.endswith("\n")
    assert first.stderr == ""


def test_a_text_that_fits_is_read_at_once(llamacli: Run) -> None:
    plain = llamacli(*HOT, "-n", "9", "Summarise", input="A short text.")
    asked = llamacli(*HOT, "-n", "9", "--on-overflow", "map-reduce", "Summarise", input="A short text.")
    assert (asked.stdout, asked.stderr) == (plain.stdout, "")


def test_the_last_answer_may_have_a_form(llamacli: Run) -> None:
    command = ("--on-overflow", "map-reduce", *HOT, "-n", "30", "-q")
    assert llamacli(*command, "--choices", "yes,no", "Is it long?", input=TEXT).stdout in ("yes\n", "no\n")
    assert json.loads(llamacli(*command, "--schema", "title", "Name it", input=TEXT).stdout).keys() == {"title"}


def test_without_an_instruction_or_room_for_it_it_is_exit_code_four(llamacli: Run) -> None:
    alone = llamacli("--on-overflow", "map-reduce", input=TEXT)
    assert alone.returncode == 4 and 'map-reduce "Summarise" < text' in one_line(alone.stderr)
    only = llamacli("--on-overflow", "map-reduce", "{stdin}", input=TEXT)
    assert only.returncode == 4 and "say what to do" in one_line(only.stderr)
    crowded = llamacli("--on-overflow", "map-reduce", "Summarise " + "word " * 900, input=TEXT)
    assert crowded.returncode == 4 and "leave no room" in one_line(crowded.stderr)


def test_a_batch_is_not_read_in_parts(llamacli: Run) -> None:
    refused = llamacli("batch", "-", "--on-overflow", "map-reduce", input="{}")
    assert refused.returncode == 2 and "is for one answer" in one_line(refused.stderr)


# -- the plan, over the real engine -----------------------------------------------------------------------------


class Recorded(Together):
    """Remembers what is asked."""

    def __init__(self, engine: Engine, builder: PromptBuilder) -> None:
        super().__init__(engine, builder.tokenizer)
        self.asked: list[tuple[Any, str]] = []
        self.most = 0
        self._detokenize: Callable[[array[int]], bytes] = builder.tokenizer.detokenize

    def ask(self, key: Any, prompt: Any, params: Any, form: Any = None) -> None:
        super().ask(key, prompt, params, form)
        self.asked.append((key, self._detokenize(prompt.tokens).decode()))
        self.most = max(self.most, len(self))


@pytest.fixture
def together(make_model: MakeModel, builder: PromptBuilder) -> Recorded:
    model = make_model(n_cells=1024, n_slots=5, n_batch=256)
    return Recorded(Engine(model, n_limit=256, step_seconds=None, max_running=4), builder)


def test_every_part_is_asked_the_same_and_rounds_go_on_until_the_answers_fit(
    together: Recorded, builder: PromptBuilder
) -> None:
    params = SamplingParams(seed=3, ignore_eos=True, max_tokens=40)
    rounds: list[int] = []
    counted: list[int] = []
    plan = MapReduce(
        together, builder, "What happens?", "Be brief.", params, at_once=4, begin=rounds.append, progress=counted.append
    )
    *_, last = plan.answer(TEXT[:9000])
    told = plan.told
    assert last.delta.finish_reason is FinishReason.LENGTH
    assert told.n_parts == rounds[0] > 10 and told.n_rounds == len(rounds) >= 3
    assert rounds == sorted(rounds, reverse=True) and len(counted) == sum(rounds) == len(together.asked) - 1
    assert together.most == 4
    for key, text in together.asked:
        assert "<<SYS>>\nBe brief.\n<</SYS>>" in text and text.rstrip().endswith("What happens? [/INST]")
        assert (COMBINE in text) == (key is None or key[0] > 0)
    parts = [text for key, text in together.asked if key is not None and key[0] == 0]
    assert all(any(f"Paragraph {i}. " in part for part in parts) for i in range(120))
    assert told.n_cut == sum(rounds), "nothing but the limit ends these answers"


def test_a_stdin_place_in_the_instruction_takes_each_part(together: Recorded, builder: PromptBuilder) -> None:
    params = SamplingParams(seed=3, max_tokens=8)
    plan = MapReduce(together, builder, "Before {stdin} after", None, params, at_once=4)
    assert list(plan.answer(TEXT[:2000]))
    assert all("Before" in text and "after [/INST]" in text and "{stdin}" not in text for _, text in together.asked)


def test_answers_that_are_joined_stand_in_the_order_of_parts_that_do_not_overlap(
    together: Recorded, builder: PromptBuilder
) -> None:
    params = SamplingParams(seed=3, ignore_eos=True, max_tokens=6)
    plan = MapReduce(together, builder, "Translate", None, params, at_once=4, joins=True)
    (last,) = plan.answer(TEXT[:3000])
    told = plan.told
    asked = [text for key, text in sorted(together.asked, key=lambda each: each[0] or (0, 0))]
    assert told.n_parts == len(asked) > 5 and told.n_rounds == 0
    assert all(COMBINE not in text and text.rstrip().endswith("Translate [/INST]") for text in asked)
    read = " ".join(" ".join(text.split("```")[1].split()) for text in asked)
    assert read == " ".join(TEXT[:3000].split()), "each word once, and in order"
    assert last.delta.text.count("\n\n") >= told.n_parts - 1
    assert last.delta.finish_reason is FinishReason.LENGTH and told.n_cut == told.n_parts
    assert last.delta.usage is not None and last.delta.usage.completion_tokens == 6 * told.n_parts


def test_no_room_between_instruction_and_answer_is_refused(together: Recorded, builder: PromptBuilder) -> None:
    plan = MapReduce(together, builder, "word " * 150, None, SamplingParams(seed=3))
    with pytest.raises(InputTooLong, match="leave no room"):
        plan.answer(TEXT)


@given(st.integers(0, 2**36), st.integers(0, 2**20), st.integers(1, 2**17))
def test_as_many_are_computed_together_as_cost_least(weights: int, cell: int, n_cells: int) -> None:
    def cost(k: int) -> float:
        return weights / k + k * cell * n_cells

    best = worth_together(weights, cell, n_cells)
    assert 1 <= best <= MOST
    assert best in (1, MOST) or cost(best) <= min(cost(k) for k in range(1, best)) * 1.0001
