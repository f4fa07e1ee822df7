"""Answers checked against their schema, by the jsonschema library. Its only home."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llamacli.errors import SchemaError, UsageError


def satisfies(value: Any, schema: Mapping[str, Any], where: str = "#") -> bool:
    """Raises UsageError for what is no schema."""
    return next(_errors(value, schema, where), None) is None


def validate(schema: Mapping[str, Any] | bool, text: str) -> Any:
    """The value of an answer. Raises SchemaError, with the place and the reason, for one that breaks its schema."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise SchemaError(f"the answer is not whole JSON: {error.msg} at character {error.pos + 1}") from None
    for broken in _errors(value, schema, "#"):
        raise SchemaError(f"the answer does not satisfy the schema: {broken.json_path}: {broken.message[:300]}")
    return value


def _errors(value: Any, schema: Mapping[str, Any] | bool, where: str) -> Any:
    import jsonschema

    kind = jsonschema.Draft202012Validator
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise UsageError(f"{where}: no valid JSON schema: {error.json_path}: {error.message[:200]}") from None
    return kind(schema).iter_errors(value)
