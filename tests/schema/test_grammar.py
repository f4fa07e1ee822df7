"""JSON schemas as grammars: whatever the grammar writes satisfies the schema, and what it cannot hold is refused."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from gbnf_reader import Grammar
from hypothesis import given
from hypothesis import strategies as st

from llamacli.engine.sampling import check_grammar
from llamacli.errors import SchemaError, UsageError
from llamacli.schema.checking import validate
from llamacli.schema.grammar import any_object, choices, to_calls, to_grammar

PERSON = {
    "$defs": {"tag": {"type": "string", "maxLength": 8}},
    "type": "object",
    "title": "Person",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 3},
        "friend": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "friend"],
    "additionalProperties": False,
}


def checked(schema: Any, seed: int = 0, n: int = 20) -> Grammar:
    """The schema's grammar, after some of what it writes was found to satisfy the schema."""
    text = to_grammar(schema)
    check_grammar(text)
    grammar = Grammar(text)
    rng = random.Random(seed)
    for _ in range(n):
        jsonschema.validate(json.loads(grammar.derive(rng)), schema, jsonschema.Draft202012Validator)
    return grammar


def test_a_schema_with_everything_usual() -> None:
    grammar = checked(PERSON, n=100)
    assert grammar.accepts('{"name":"Ann","friend":null}')
    assert grammar.accepts(' {"name": "Ann", "age": 30, "tags": ["a", "b"], "friend": {"name": "B", "friend": null}}')
    assert not grammar.accepts('{"friend":null,"name":"Ann"}'), "the schema's order"
    assert not grammar.accepts('{"name":"Ann"}')
    assert not grammar.accepts('{"name":"Ann","friend":null,"x":1}')
    assert not grammar.accepts('{"name":"Ann","age":151,"friend":null}')
    assert not grammar.accepts('{"name":"Ann",  "friend":null}'), "a sampler must not get lost in white space"


ACCEPTED: list[tuple[Any, list[Any], list[Any]]] = [
    (True, [1, "a", None, {"a": [True, -1.5e3]}], []),
    ({"type": "object"}, [{}, {"a": {"b": []}}], [[], 1]),
    ({"type": ["string", "null"]}, ["a", None], [1, True]),
    ({"type": ["integer", "number"]}, [1, 1.5], ["1"]),
    ({"enum": ["a", "ab", "abc", 1, 1.5, None, {"x": [1]}]}, ["a", "abc", 1, {"x": [1]}], ["b", "abcd", 2]),
    ({"enum": ["a", 1], "type": "string"}, ["a"], [1]),
    ({"enum": ["a", "bbb"], "maxLength": 2}, ["a"], ["bbb"]),
    ({"const": 'é"\n'}, ['é"\n'], ["e"]),
    ({"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}]}, [["a", 1]], [[1, "a"]]),
    ({"type": "array", "minItems": 1, "maxItems": 2, "items": {"type": "null"}}, [[None]], [[], [None] * 3]),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 3}, [[1, 2, 3], [1] * 9], [[1, 2]]),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, [{"a": 1}, {}], [{"a": "b"}]),
    ({"type": "object", "additionalProperties": False}, [{}], [{"a": 1}]),
    ({"type": "object", "required": ["a"], "additionalProperties": {"type": "null"}}, [{"a": None}], [{}, {"a": 1}]),
    (
        {"type": "object", "properties": {"a": True, "b": True, "c": True}},
        [{}, {"a": 1}, {"c": 1}, {"a": 1, "c": 1}, {"a": 1, "b": 1, "c": 1}],
        [{"b": 1, "a": 1}],
    ),
    ({"properties": {"a": {"type": "integer"}}}, [{"a": 1}], [{"a": "b"}]),
    ({"type": "integer", "multipleOf": 5, "minimum": -7, "maximum": 11}, [-5, 0, 5, 10], [1, -10, 15]),
    ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, ["a", 1], [None]),
    (
        {
            "oneOf": [
                {"type": "object", "properties": {"k": {"const": "a"}, "x": {"type": "integer"}}, "required": ["k"]},
                {"type": "object", "properties": {"k": {"const": "b"}, "y": {"type": "null"}}, "required": ["k"]},
            ]
        },
        [{"k": "a", "x": 1}, {"k": "b", "y": None}],
        [{"k": "a", "y": None}],
    ),
    ({"allOf": [{"type": "integer", "minimum": 2}, {"type": "number", "maximum": 4}]}, [2, 4], [1, 5, 2.5]),
    (
        {
            "allOf": [
                {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                {"properties": {"b": {"type": "null"}}, "required": ["b"]},
            ]
        },
        [{"a": 1, "b": None}],
        [{"a": 1}, {"b": None}],
    ),
    (
        {"type": "object", "properties": {"a": True}, "anyOf": [{"required": ["a"]}, {"maxProperties": 5}]},
        [{"a": 1}],
        [],
    ),
    ({"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": {"type": "null"}}}, [None], [1]),
    ({"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n", "minimum": 3}, [3], [2]),
    ({"type": "string", "format": "date"}, ["2024-01-31"], ["2024-02-30", "x"]),
]


@pytest.mark.parametrize(("schema", "good", "bad"), ACCEPTED, ids=range(len(ACCEPTED)))
def test_what_is_written_and_what_is_not(schema: Any, good: list[Any], bad: list[Any]) -> None:
    grammar = checked(schema)
    for value in good:
        jsonschema.validate(value, schema, jsonschema.Draft202012Validator)
        assert grammar.accepts(json.dumps(value, ensure_ascii=False, separators=(",", ":"))), value
    for value in bad:
        assert not grammar.accepts(json.dumps(value, ensure_ascii=False, separators=(",", ":"))), value


REFUSED: list[tuple[Any, str]] = [
    ({"type": "array", "uniqueItems": True}, "#: uniqueItems"),
    ({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}, "#/properties/a: not "),
    ({"type": "object", "patternProperties": {"^x": {}}}, "patternProperties"),
    ({"if": {}, "then": {}}, "if, then"),
    ({"type": "string", "contentSchema": {}}, "contentSchema"),
    ({"type": "string", "nullable": True}, "nullable"),
    ({"enum": []}, "never be satisfied"),
    (False, "must be a JSON object"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "never be satisfied"),
    ({"type": "number", "exclusiveMinimum": 3, "maximum": 3}, "never be satisfied"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength 3 is more than maxLength 2"),
    ({"type": "string", "pattern": "(?=a)"}, "look-around"),
    ({"type": "string", "pattern": "a", "maxLength": 3}, "pattern cannot be combined"),
    ({"type": "string", "format": "iri"}, "format iri is not supported"),
    ({"type": "strnig"}, "no type strnig"),
    ({"type": []}, "no type is allowed"),
    ({"$ref": "https://example.org/schema.json"}, "must point into this schema"),
    ({"$ref": "#/$defs/missing"}, "nothing at"),
    ({"$ref": "#"}, "never be satisfied|leads back"),
    ({"allOf": [{"$ref": "#"}]}, "leads back"),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "never be satisfied"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "may both hold"),
    ({"oneOf": [{"type": "object"}, {"type": "object"}]}, "may both hold"),
    ({"anyOf": []}, "at least one schema"),
    ({"type": "integer", "multipleOf": 7}, "multipleOf needs"),
    ({"type": "number", "multipleOf": 0.1}, "integers only"),
    ({"minimum": 3}, "without a type"),
    ({"type": "integer", "minimum": "3"}, "minimum must be a number"),
    ({"type": "integer", "maximum": 10**18}, "more than 17 digits"),
    ({"type": "string", "maxLength": -1}, "0 or more"),
    ({"type": "object", "required": "a"}, "required must be"),
    ({"type": "object", "minProperties": 2}, "minProperties"),
    ({"const": float("nan")}, "no JSON value"),
    ({"const": "\ud800"}, "cannot be written"),
    ({"enum": [f"{i:05}" * 20 for i in range(5000)]}, "make it simpler"),
    (
        {"allOf": [{"properties": {"a": True}, "additionalProperties": False}, {"properties": {"b": True}}]},
        "forbids b",
    ),
]


@pytest.mark.parametrize(("schema", "reason"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_held_is_refused_by_name(schema: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        print(to_grammar(schema))


def test_a_schema_nested_beyond_all_reason_is_refused() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(UsageError, match="nest more than"):
        to_grammar(schema)


TEXT = st.text(st.characters(codec="utf-8"), max_size=6)
VALUE = st.one_of(TEXT, st.integers(), st.none(), st.booleans())
HUNDREDTHS = st.integers(-900, 900).map(lambda n: n / 100)


@st.composite
def scalars(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["boolean", "null", "integer", "number", "string", "enum", "format", "pattern", "any"]))
    low, more = draw(st.integers(0, 9)), draw(st.integers(1, 2000))
    if kind == "integer":
        return {"type": kind, "minimum": low - more, "maximum": low + more // 2}
    if kind == "number":
        least = draw(HUNDREDTHS)
        return {"type": kind, "minimum": least, "exclusiveMaximum": round(least + more / 100, 2)}
    if kind == "string":
        return {"type": kind, "minLength": low, "maxLength": low + more % 10}
    special: dict[str, dict[str, Any]] = {
        "enum": {"enum": draw(st.lists(VALUE, min_size=1))},
        "format": {"type": "string", "format": "date-time"},
        "pattern": {"type": "string", "pattern": "^[a-f]{2,4}$"},
        "any": {},
    }
    return special.get(kind, {"type": kind})


def containers(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    @st.composite
    def container(draw: st.DrawFn) -> dict[str, Any]:
        kind = draw(st.sampled_from(["object", "map", "array", "tuple", "anyOf"]))
        if kind == "object":
            properties = draw(st.dictionaries(TEXT, inner, max_size=5))
            required = [name for name in properties if draw(st.booleans())]
            return {"type": kind, "properties": properties, "required": required, "additionalProperties": False}
        if kind == "map":
            return {"type": "object", "additionalProperties": draw(inner)}
        if kind == "array":
            n = draw(st.integers(0, 2))
            return {"type": kind, "items": draw(inner), "minItems": n, "maxItems": n + 2}
        some = draw(st.lists(inner, min_size=1, max_size=3))
        return {"type": "array", "prefixItems": some} if kind == "tuple" else {"anyOf": some}

    return container()


SCHEMAS = st.recursive(scalars(), containers, max_leaves=8)


@given(SCHEMAS, st.integers(0, 10**6))
def test_whatever_is_written_satisfies_its_schema(schema: dict[str, Any], seed: int) -> None:
    checked(schema, seed, n=5)


def test_any_object() -> None:
    grammar = Grammar(any_object())
    assert grammar.accepts('{"a": [1, {"b": null}], "c": "d"}')
    assert not grammar.accepts("[]")


def test_choices() -> None:
    grammar = Grammar(choices(["yes", "no", "yes, but", "no"]))
    assert [grammar.accepts(text) for text in ("yes", " no", "yes, but", "y", "yesno")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    with pytest.raises(UsageError, match="at least one"):
        choices([])


def test_an_answer_that_breaks_its_schema_is_told_apart() -> None:
    assert validate({"type": "array", "items": {"type": "integer"}}, "[1, 2]") == [1, 2]
    with pytest.raises(SchemaError, match=r"\$\[1\]: 'b' is not of type 'integer'"):
        validate({"type": "array", "items": {"type": "integer"}}, '[1, "b"]')
    with pytest.raises(SchemaError, match="not whole JSON"):
        validate({}, '{"a":')
    with pytest.raises(UsageError, match="no valid JSON schema"):
        validate({"type": 3}, "1")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ('{"type": "integer", "allOf": [{"minimum": 1}, {"minimum": "2"}]}', r"no valid JSON schema: .*allOf\[1\]"),
        ('{"type": "object", "allOf": [{"properties": [1]}, {"properties": {"a": {}}}]}', "no valid JSON schema"),
        ('{"allOf": [{"enum": 5}, {"enum": [1]}]}', "no valid JSON schema"),
        ('{"oneOf": [{"type": [{}]}, {"type": "string"}]}', "no valid JSON schema"),
        ('{"type": "integer", "enum": [1e400]}', "never be satisfied"),
    ],
)
def test_what_is_no_schema_is_refused_however_it_is_malformed(written: str, said: str) -> None:
    schema = json.loads(written)
    with pytest.raises(UsageError, match=said):
        to_grammar(schema)
    with pytest.raises(UsageError, match=said):
        to_calls({"f": {"required": ["a"], "properties": {"a": schema}}}, required=True)


def test_a_reference_below_another_id_is_refused_for_it_means_another_place() -> None:
    inner = {"$id": "http://x/", "properties": {"b": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"type": "string"}}}
    schema = {"type": "object", "properties": {"a": inner}, "$defs": {"b": {"type": "integer"}}}
    with pytest.raises(UsageError, match=r"#/properties/a/properties/b: a \$ref below an \$id"):
        to_grammar(schema)
    checked({"$id": "http://x/", "type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {}}})
    checked({"properties": {"a": {"const": {"$id": "x", "$ref": "y"}}}, "required": ["a"]})
    checked({"properties": {"a": {"$id": "http://x/a", "type": "null"}}, "required": ["a"]})
