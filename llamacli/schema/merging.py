"""Two JSON schemas that both must hold, as one. What cannot be written as one is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llamacli.errors import UsageError

Schema = Mapping[str, Any]

ANNOTATIONS = frozenset(
    {
        *("$anchor", "$comment", "$defs", "$id", "$schema", "definitions", "default", "deprecated", "description"),
        *("example", "examples", "readOnly", "title", "writeOnly", "contentEncoding", "contentMediaType"),
    }
)
NEVER: Schema = {"enum": []}


def merged(a: Schema, b: Schema, where: str) -> Schema:
    """Raises UsageError for two values of a keyword that only the answer's reader could reconcile."""
    both = {**a, **b}
    for keyword in a.keys() & b.keys() - ANNOTATIONS:
        if a[keyword] != b[keyword] or type(a[keyword]) is not type(b[keyword]):
            join = _JOINS.get(keyword)
            if join is None:
                raise UsageError(f"{where}: two values of {keyword} cannot be combined")
            both[keyword] = join(a[keyword], b[keyword], where)
    _check_closed(a, b, where)
    return both


def _check_closed(a: Schema, b: Schema, where: str) -> None:
    """A part that allows no other properties forbids those that only the other part names."""
    for closed, other in ((a, b), (b, a)):
        more = other.get("properties", {}).keys() - closed.get("properties", {}).keys()
        if more and closed.get("additionalProperties", True) not in (True, {}):
            names = ", ".join(sorted(more))[:100]
            raise UsageError(f"{where}: additionalProperties of one part forbids {names} of the other")


def _types(a: Any, b: Any, where: str) -> list[str]:
    first, second = _listed(a), _listed(b)
    kept = [each for each in first if each in second or (each == "integer" and "number" in second)]
    return kept + [each for each in second if each == "integer" and "number" in first and each not in kept]


def _listed(types: Any) -> list[Any]:
    return list(types) if isinstance(types, list) else [types]


def _enums(a: Any, b: Any, where: str) -> list[Any]:
    from llamacli.schema.values import same

    return [value for value in a if any(same(value, other) for other in b)]


def _properties(a: Any, b: Any, where: str) -> dict[str, Any]:
    both = {**a, **b}
    for name in a.keys() & b.keys():
        both[name] = all_of(a[name], b[name])
    return both


def all_of(a: Any, b: Any) -> Any:
    """Both, to be merged when it is looked at: they may refer to themselves."""
    if a == b or b is True:
        return a
    return b if a is True else {"allOf": [a, b]}


def _larger(a: Any, b: Any, where: str) -> Any:
    return max(a, b)


def _smaller(a: Any, b: Any, where: str) -> Any:
    return min(a, b)


def _both_schemas(a: Any, b: Any, where: str) -> Any:
    return all_of(a, b)


def _united(a: Any, b: Any, where: str) -> list[Any]:
    return [*a, *(each for each in b if each not in a)]


_JOINS: dict[str, Callable[[Any, Any, str], Any]] = {
    "type": _types,
    "enum": _enums,
    "properties": _properties,
    "required": _united,
    "additionalProperties": _both_schemas,
    "items": _both_schemas,
    "allOf": lambda a, b, _: [*a, *b],
    **dict.fromkeys(("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"), _larger),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"), _smaller),
}
