"""Whatever of an answer is there, it can be closed; and a budget is kept to the token."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest
from gbnf_reader import Grammar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_grammar import SCHEMAS

from llamacli.engine.engine import Engine
from llamacli.engine.llama import ContextOptions, LlamaModel
from llamacli.engine.sequence import FinishReason, SamplingParams
from llamacli.errors import InputTooLong, LlamacliError, SchemaError, UsageError
from llamacli.prompt import Message, PromptBuilder
from llamacli.schema import form as forms
from llamacli.schema.checking import validate
from llamacli.schema.closing import Closing
from llamacli.schema.form import Form
from llamacli.schema.grammar import of_choices, of_schema
from llamacli.together import Step, Together

Answer = Callable[..., Step]


def closed(schema: Any, text: str) -> Any:
    """The value of a text and of what closes it."""
    closing = Closing(of_schema(schema))
    state, n = closing.after(closing.start, text)
    assert n == len(text)
    ending = closing.ending(state)
    assert len(ending.encode()) == closing.cost(state)
    return json.loads(text + ending)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "mood": {"enum": ["splendid", "bad"]},
        "friends": {"type": "array", "items": {"$ref": "#"}},
        "note": {"type": "string", "minLength": 3},
    },
    "required": ["name", "mood"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", {"name": "", "mood": "bad"}),
        ('{"name": "A\\', {"name": "A\t", "mood": "bad"}),
        ('{"name":"A","mood":"s', {"name": "A", "mood": "splendid"}),
        ('{"name":"A","mood":"bad","no', {"name": "A", "mood": "bad", "note": "000"}),
        ('{"name":"A","mood":"bad","note":"xy', {"name": "A", "mood": "bad", "note": "xy0"}),
        (
            '{"name":"A","mood":"bad","friends":[{',
            {"name": "A", "mood": "bad", "friends": [{"name": "", "mood": "bad"}]},
        ),
    ],
)
def test_an_answer_is_closed_in_the_shortest_way(text: str, value: Any) -> None:
    assert closed(PERSON, text) == value


def test_five_hundred_properties_can_be_closed() -> None:
    names = [f"p{i}" for i in range(500)]
    schema = {"type": "object", "properties": {name: {"type": "null"} for name in names}, "required": names}
    assert closed(schema, '{"p0":') == dict.fromkeys(names)


@pytest.mark.parametrize("answer", ["[" * 100_000, "1" * 5000])
def test_an_answer_that_cannot_even_be_read_does_not_have_its_form(answer: str) -> None:
    with pytest.raises(SchemaError, match="cannot be read"):
        validate(True, answer)


def test_a_choice_is_completed_and_two_are_told_apart() -> None:
    closing = Closing(of_choices(["no", "not now", "yes"]))
    state, _ = closing.after(closing.start, " no")
    assert closing.is_whole(state) and not closing.is_over(state) and closing.ending(state) == ""
    state, _ = closing.after(state, "t")
    assert not closing.is_whole(state) and closing.ending(state) == " now"
    assert closing.after(closing.start, "yellow") == (closing.after(closing.start, "ye")[0], 2)
    state, _ = closing.after(closing.start, "yes")
    assert closing.is_over(state)


@given(SCHEMAS, st.integers(0, 10**6))
@settings(max_examples=60)
def test_every_beginning_of_an_answer_can_be_closed(schema: dict[str, Any], seed: int) -> None:
    try:
        grammar = of_schema(schema)
    except UsageError:
        return
    rng = random.Random(seed)
    text = Grammar(grammar.text).derive(rng)
    beginning = text[: rng.randrange(len(text) + 1)]
    jsonschema.validate(closed(schema, beginning), schema, jsonschema.Draft202012Validator)


# -- with the model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answer(weights: Any, builder: PromptBuilder) -> Iterator[Answer]:
    """The last step of an answer, its delta's text the whole answer."""
    model = LlamaModel(weights, ContextOptions(n_cells=512, n_batch=64, threads=1, threads_batch=1))
    engine = Engine(model, n_limit=512)
    prompt = builder.build([Message("user", "Tell me about llama2")])

    def answered(form: Form, seed: int, max_tokens: int | None = None) -> Step:
        params = SamplingParams(temperature=1.5, top_p=1, top_k=0, seed=seed, max_tokens=max_tokens)
        steps = list(Together(engine, builder.tokenizer).answer(prompt, params, form))
        assert engine.is_idle
        text = "".join(step.delta.text for step in steps)
        return steps[-1]._replace(delta=steps[-1].delta._replace(text=text))

    yield answered
    model.close()


@pytest.mark.parametrize("max_tokens", [14, 15, 20, 40, 80])
def test_a_budget_is_kept_and_the_answer_closed_within_it(
    max_tokens: int, answer: Answer, builder: PromptBuilder
) -> None:
    form = forms.of_schema(PERSON)
    for seed in range(5):
        step = answer(form, seed, max_tokens)
        form.check(step.delta.text)
        assert step.delta.usage is not None
        n_added = len(builder.tokenizer.tokenize(step.added))
        assert step.delta.usage.completion_tokens + n_added <= max_tokens + bool(step.added)
        assert step.delta.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


def test_a_context_that_fills_up_closes_the_answer_and_says_so(answer: Answer) -> None:
    endless = {"type": "array", "items": {"type": "integer"}, "minItems": 100}
    step = answer(forms.of_schema(endless), 1)
    assert step.delta.finish_reason is FinishReason.CONTEXT and step.added.endswith("]")
    assert len(json.loads(step.delta.text)) >= 100


def test_a_budget_that_not_even_the_shortest_answer_fits_is_refused(answer: Answer) -> None:
    with pytest.raises(UsageError, match=r"--max-tokens 3 is too few for --schema: its shortest answer has \d+ tokens"):
        answer(forms.of_schema(PERSON), 1, 3)
    with pytest.raises(InputTooLong, match="the context has room for an answer of"):
        answer(forms.of_schema({"type": "string", "minLength": 5000}), 1)


KEYWORDS: dict[str, st.SearchStrategy[Any]] = {
    "type": st.sampled_from(["object", "array", "string", "number", "integer", "null", "boolean", "any", ["null", 3]]),
    "minimum": st.integers(-9, 9) | st.floats(),
    "maximum": st.integers(-9, 99) | st.none(),
    "multipleOf": st.integers(-1, 5),
    "minLength": st.integers(-1, 30),
    "maxLength": st.integers(0, 30),
    "pattern": st.sampled_from(["^a+$", "b|c", "(", "\\d{2}", "(?=x)", "^[^a]*$", "é"]),
    "format": st.sampled_from(["date", "uuid", "nonsense"]),
    "required": st.lists(st.sampled_from("abc"), max_size=3),
    "minItems": st.integers(0, 3),
    "uniqueItems": st.booleans(),
    "enum": st.lists(st.none() | st.booleans() | st.integers() | st.text(max_size=5), max_size=3),
    "const": st.floats() | st.text(max_size=3),
    "$ref": st.sampled_from(["#", "#/properties/a", "http://127.0.0.1/", 3]),
    "contains": st.just({}),
    "if": st.just({}),
    "title": st.text(max_size=5),
}


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, max_size=2)
    some = {"items": inner, "prefixItems": several, "anyOf": several, "oneOf": several, "allOf": several, "not": inner}
    named = st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    some |= {"properties": named, "additionalProperties": inner, "$defs": named}
    return st.fixed_dictionaries({}, optional=some | {name: KEYWORDS[name] for name in ("type", "required", "$ref")})


# Everything that a schema may say, in contradiction to itself too, and some things that it may not.
WILD = st.recursive(st.booleans() | st.fixed_dictionaries({}, optional=KEYWORDS), nested, max_leaves=6)


def held(answer: Answer, schema: Any, seed: int) -> bool:
    """Whether there was an answer, which then has its form. Everything else is a clear refusal."""
    try:
        form = forms.of_schema(schema)
        text = answer(form, seed, 10 + seed % 90).delta.text
    except (UsageError, InputTooLong) as refusal:
        assert "\n" not in str(refusal) and len(str(refusal)) > 20
        return False
    except LlamacliError as failure:
        raise AssertionError(f"{schema}: {failure}") from failure
    jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)
    form.check(text)
    return True


@settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(schema=WILD | SCHEMAS, seed=st.integers(0, 10**6))
def test_forty_random_schemas_are_satisfied_or_refused(answer: Answer, schema: Any, seed: int) -> None:
    held(answer, schema, seed)


@pytest.mark.slow
def test_a_thousand_random_schemas_are_satisfied_or_refused(answer: Answer) -> None:
    answered = []

    @settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(schema=SCHEMAS | WILD, seed=st.integers(0, 10**6))
    def each(schema: Any, seed: int) -> None:
        answered.append(held(answer, schema, seed))

    each()
    assert len(answered) >= 1000
    assert sum(answered) > 400
