"""JSON values as schemas see them: their types, when two are the same, and their one compact spelling."""

from __future__ import annotations

import json
import math
from typing import Any

from llamacli.errors import UsageError

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


def same(a: Any, b: Any) -> bool:
    """Equal as JSON: 1 is 1.0, but true is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return bool(a == b)


def is_of(value: Any, kind: str) -> bool:
    """Whether a value is of a schema's type."""
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, int | float):
        return kind == "number" or (kind == "integer" and (isinstance(value, int) or value.is_integer()))
    names: dict[type, str] = {str: "string", list: "array", dict: "object"}
    return kind == names.get(type(value))


def spelt(value: Any, where: str) -> str:
    """Compact JSON. Raises UsageError for what JSON does not know."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{where}: {value} is no JSON value")
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        text.encode()
    except (ValueError, UnicodeEncodeError):
        raise UsageError(f"{where}: a value that cannot be written as JSON in UTF-8") from None
    return text
