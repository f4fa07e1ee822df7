"""Schemas from a command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamacli.errors import UsageError
from llamacli.schema.reading import read, short_form


def test_the_short_form() -> None:
    assert short_form("name, age int, tags[], scores number[]?, address {street, zip int?}[]") == {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "scores": {"type": "array", "items": {"type": "number"}},
            "address": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"street": {"type": "string"}, "zip": {"type": "integer"}},
                    "required": ["street"],
                    "additionalProperties": False,
                },
            },
        },
        "required": ["name", "age", "tags", "address"],
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    "text", ["name,", ",", "name age", "a {b", "a[", "a b c", "a]", "a, a", "é!", "a {}", "{" * 50]
)
def test_what_is_no_short_form_is_told_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match="short schema") as caught:
        short_form(text)
    assert "\n" not in str(caught.value)


def test_a_file_and_json_itself(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema), "utf-8")
    assert read(str(file)) == read(f"@{file}") == read(json.dumps(schema)) == schema


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("", "is empty"),
        ("{", "is not JSON: .* at line 1"),
        ("missing/schema.json", "cannot be read"),
        ("missing.json", "cannot be read"),
    ],
)
def test_bad_schemas_are_told_in_one_line(argument: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        read(argument)
