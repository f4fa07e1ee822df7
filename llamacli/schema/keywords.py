"""What a JSON schema says, read and checked keyword by keyword; and whether two schemas can be told apart.

What is not known is refused by name, never ignored. Knows nothing of grammars.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from llamacli.errors import UsageError
from llamacli.schema import numbers
from llamacli.schema.merging import ANNOTATIONS, NEVER, Schema
from llamacli.schema.values import TYPES, is_of, same

MAX_BOUND_DIGITS = 17  # tell all float64 numbers apart
_NUMERIC = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_KEYWORDS = {
    "object": frozenset({"properties", "required", "additionalProperties", "minProperties", "maxProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems", "uniqueItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "number": _NUMERIC,
    "integer": _NUMERIC,
    "boolean": frozenset(),
    "null": frozenset(),
}
_OF_ANY_TYPE = frozenset({"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"})
_DATA = frozenset({"const", "default", "enum", "example", "examples"})  # no schemas, whatever they look like
_KNOWN = ANNOTATIONS.union(_OF_ANY_TYPE, *_KEYWORDS.values())


def check_ids(document: Any) -> None:
    """Refuse an $id below the root with a $ref within: #/... there begins at that schema and not at the document."""
    todo: list[tuple[Any, str, bool]] = [(document, "#", False)]
    while todo:
        found, where, has_id = todo.pop()
        if isinstance(found, Mapping):
            has_id = has_id or (where != "#" and isinstance(found.get("$id"), str))
            if has_id and isinstance(found.get("$ref"), str):
                raise UsageError(f"{where}: a $ref below an $id that is not the whole schema's is not supported")
            todo += [(each, f"{where}/{name}", has_id) for name, each in found.items() if name not in _DATA]
        elif isinstance(found, list):
            todo += [(each, f"{where}/{i}", has_id) for i, each in enumerate(found)]


def check_keywords(schema: Schema, where: str) -> None:
    unknown = sorted(schema.keys() - _KNOWN)
    if unknown:
        raise UsageError(f"{where}: {', '.join(unknown)[:200]} not supported")


def types_of(schema: Schema, where: str) -> list[str]:
    """The types that a schema allows: all of them where it names none, or those that its other keywords speak of."""
    kinds = schema.get("type")
    if kinds is None:
        limited = [kind for kind in TYPES if _KEYWORDS[kind] & schema.keys()]
        if limited and "enum" not in schema and "const" not in schema:
            limits = ", ".join(sorted(_KEYWORDS[limited[0]] & schema.keys()))
            if limited[0] in ("object", "array", "string") and len(limited) == 1:
                return limited  # what everybody means who leaves it out
            raise UsageError(f"{where}: {limits} without a type; add one")
        return [kind for kind in TYPES if kind != "integer"]
    kinds = kinds if isinstance(kinds, list) else [kinds]
    for kind in kinds:
        if kind not in TYPES:
            raise UsageError(f"{where}: there is no type {str(kind)[:40]}")
    if not kinds:
        raise UsageError(f"{where}: no type is allowed")
    return [kind for kind in dict.fromkeys(kinds) if not (kind == "integer" and "number" in kinds)]


def listed_schemas(value: Any, where: str) -> list[Schema]:
    if not isinstance(value, list) or not value:
        raise UsageError(f"{where} must be an array with at least one schema")
    return [as_mapping(each, where) for each in value]


def as_mapping(schema: Any, where: str) -> Schema:
    if schema is True:
        return {}
    if schema is False:
        return NEVER
    if not isinstance(schema, Mapping):
        raise UsageError(f"{where}: a schema must be an object, true or false")
    return schema


def number_of(schema: Schema, name: str, where: str) -> Decimal | None:
    value = schema.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{where}: {name} must be a number")
    number = Decimal(repr(value))
    n_digits = numbers.MAX_DIGITS if name.startswith("exclusive") else MAX_BOUND_DIGITS
    if not number.is_finite() or _n_digits(number) > n_digits:
        raise UsageError(f"{where}: {name} has more than {n_digits} digits")
    return number


def _n_digits(number: Decimal) -> int:
    """Before and after the point."""
    _, _, fraction = format(number, "f").partition(".")
    return len(str(abs(int(number)))) + len(fraction.rstrip("0"))


def span(schema: Schema, where: str) -> numbers.Span:
    low, high = number_of(schema, "minimum", where), number_of(schema, "maximum", where)
    above, below = number_of(schema, "exclusiveMinimum", where), number_of(schema, "exclusiveMaximum", where)
    low_open = above is not None and (low is None or above >= low)
    high_open = below is not None and (high is None or below <= high)
    return numbers.Span(above if low_open else low, below if high_open else high, low_open, high_open)


def counts(schema: Schema, least: str, most: str, where: str) -> tuple[int, int | None]:
    bounds = []
    for name in (least, most):
        value = schema.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise UsageError(f"{where}: {name} must be an integer, 0 or more")
        bounds.append(value)
    low, high = bounds[0] or 0, bounds[1]
    if high is not None and low > high:
        raise UsageError(f"{where}: {least} {low} is more than {most} {high}")
    return low, high


def are_disjoint(a: Schema, b: Schema) -> bool:
    """Whether certainly no value satisfies both."""
    values, others = _values_of(a), _values_of(b)
    if values is not None and others is not None:
        return not any(same(one, other) for one in values for other in others)
    kinds, other_kinds = _kinds_of(a), _kinds_of(b)
    if not kinds & other_kinds:
        return True
    if kinds | other_kinds == {"object"}:
        return _are_told_apart(a, b)
    return False


def _are_told_apart(a: Schema, b: Schema) -> bool:
    """Objects that both need a property which is never the same."""
    shared = set(a.get("required", [])) & set(b.get("required", []))
    for name in shared:
        one, other = a.get("properties", {}).get(name), b.get("properties", {}).get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping) and are_disjoint(one, other):
            return True
    return False


def _values_of(schema: Schema) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else None


def _kinds_of(schema: Schema) -> set[str]:
    """Types, with integers counted as numbers."""
    values = _values_of(schema)
    if values is not None:
        return {kind for kind in TYPES if kind != "integer" and any(is_of(value, kind) for value in values)}
    kinds = schema.get("type", list(TYPES))
    return {"number" if kind == "integer" else kind for kind in (kinds if isinstance(kinds, list) else [kinds])}
