"""Answers checked against their schema, by the jsonschema library. Its only home."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llamacli.errors import SchemaError, UsageError


def satisfies(value: Any, schema: Mapping[str, Any], where: str = "#") -> bool:
    """Raises UsageError for what is no schema."""
    try:
        return next(_errors(value, schema, where), None) is None
    except (TypeError, ValueError, ArithmeticError, RecursionError):
        raise UsageError(f"{where}: the schema is nested too deeply, or its numbers are too large") from None


def validate(schema: Mapping[str, Any] | bool, text: str) -> Any:
    """The value of an answer. Raises SchemaError, with the place and the reason, for one that breaks its schema."""
    try:
        value = json.loads(text)
        broken = next(_errors(value, schema, "#"), None)
    except json.JSONDecodeError as error:
        raise SchemaError(f"the answer is not whole JSON: {error.msg} at character {error.pos + 1}") from None
    except (ValueError, ArithmeticError, RecursionError):
        raise SchemaError("the answer cannot be read: it is nested too deeply, or its numbers are too long") from None
    if broken is not None:
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
