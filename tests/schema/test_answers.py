"""The real model, drawing at random, held to schemas: every finished answer parses and satisfies its schema."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from test_grammar import SCHEMAS

from llamacli.engine.engine import Engine
from llamacli.engine.sequence import Delta, FinishReason, SamplingParams
from llamacli.prompt import Message, PromptBuilder
from llamacli.schema.grammar import choices, to_grammar
from llamacli.schema.reading import short_form

Ask = Callable[[str, int], tuple[str, Delta]]


@pytest.fixture(scope="module")
def ask(weights: Any, builder: PromptBuilder) -> Iterator[Ask]:
    from llamacli.engine.llama import ContextOptions, LlamaModel

    model = LlamaModel(weights, ContextOptions(n_cells=512, n_batch=64, threads=1, threads_batch=1))
    engine = Engine(model, n_limit=512)
    prompt = builder.build([Message("user", "Tell me about llama2")])

    def answered(grammar: str, seed: int) -> tuple[str, Delta]:
        params = SamplingParams(grammar=grammar, temperature=1.5, top_p=1, top_k=0, seed=seed, max_tokens=150)
        deltas = list(engine.generate(prompt.tokens, params, trim=prompt.trim))
        return "".join(delta.text for delta in deltas), deltas[-1]

    yield answered
    model.close()


def held(ask: Ask, schema: Any, seed: int) -> bool:
    """Whether the answer came to its end. Then it must satisfy the schema."""
    text, end = ask(to_grammar(schema), seed)
    if end.finish_reason is FinishReason.LENGTH:
        return False
    assert end.finish_reason in (FinishReason.STOP, FinishReason.DEAD_END)
    jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)
    return True


def test_an_answer_has_the_form_of_its_schema(ask: Ask) -> None:
    person = short_form("name, age int, is_member bool")
    person["properties"]["name"]["maxLength"] = 20
    assert all(held(ask, person, seed) for seed in range(5))


def test_an_answer_is_one_of_the_choices(ask: Ask) -> None:
    answers = {ask(choices(["yes", "no", "may be"]), seed)[0] for seed in range(20)}
    assert answers <= {"yes", "no", "may be"} and len(answers) > 1


@settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS)
def test_answers_of_twenty_random_schemas(ask: Ask, schema: dict[str, Any]) -> None:
    held(ask, schema, 1)


@pytest.mark.slow
def test_answers_of_a_thousand_random_schemas(ask: Ask) -> None:
    ended = []
    rng = random.Random(3)

    @settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(schema=SCHEMAS)
    def each(schema: dict[str, Any]) -> None:
        ended.append(held(ask, schema, rng.randrange(10**6)))

    each()
    assert sum(ended) > 500
