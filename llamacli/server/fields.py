"""Reads a request's JSON body field by field: types and ranges, each error naming its field.

Knows nothing of what the fields mean. JSON's null counts as absent; booleans and numeric strings are no numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from llamacli.server.failure import Failure

_KINDS = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "an array", dict: "an object"}
MAX_SHOWN = 40  # characters of a bad value
MAX_DIGITS = 400  # of an integer: as far as a float goes


def parse(raw: bytes) -> Fields:
    """The JSON object of a body. Raises Failure 400 for anything else."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Failure(400, f"the body is not UTF-8: byte {error.start} is {raw[error.start]:#04x}") from None
    if not text.strip():
        raise Failure(400, 'the body is empty: send a JSON object such as {"prompt": "Tell me about llama2"}')
    try:
        values = json.loads(text, parse_constant=_no_constant, parse_int=_integer)
        if b"\\u" in raw:
            _check_surrogates(values)
    except json.JSONDecodeError as error:
        raise Failure(400, f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise Failure(400, "the body is nested too deeply") from None
    if not isinstance(values, dict):
        raise Failure(400, f"the body must be a JSON object, not {kind_of(values)}")
    return Fields(values)


def _no_constant(name: str) -> NoReturn:
    raise Failure(400, f"the body is not JSON: {name} is not allowed")


def _integer(digits: str) -> int:
    """No field wants more digits, and what Python does with thousands of them is slow or an error."""
    if len(digits) > MAX_DIGITS:
        raise Failure(400, f"the body holds an integer of {len(digits):,} characters; {MAX_DIGITS} are allowed")
    return int(digits)


def _check_surrogates(values: object) -> None:
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Failure(400, "the body holds half of a surrogate pair (\\ud800-\\udfff), which is no character") from None


def kind_of(value: object) -> str:
    return "null" if value is None else _KINDS.get(type(value), "something else")


class Fields:
    """A JSON object. Whoever reads a field marks it as known; `unknown` are those that nobody asked for.

    prefix   how errors name the object's fields: "messages[0]." for instance
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix
        self._known: set[str] = set()

    @property
    def unknown(self) -> list[str]:
        return [name for name in self._values if name not in self._known]

    def name(self, name: str) -> str:
        return self._prefix + name

    def refuse(self, name: str, what: str) -> NoReturn:
        """Raise Failure 400: the field must be `what`."""
        value = self._values.get(name)
        shown = json.dumps(value)[:MAX_SHOWN] if isinstance(value, str | int | float) else kind_of(value)
        raise Failure(400, f"{self.name(name)} must be {what}, not {shown}", param=self.name(name))

    def refuse_unknown(self) -> None:
        """Raise Failure 400 if there are fields that nobody asked for."""
        names = [self.name(name) for name in self.unknown if self.has(name)]
        if names:
            raise Failure(400, f"not supported: {', '.join(names)[:500]}. Leave it out", param=names[0][:100])

    def know(self, names: Iterable[str]) -> None:
        """Accept fields that have no effect."""
        self._known.update(names)

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def take(self, name: str) -> Any:
        """The value as it came; None when absent."""
        self._known.add(name)
        return self._values.get(name)

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            self.refuse(name, "a string")
        return value

    def number(self, name: str, low: float, high: float, *, is_low_allowed: bool = True) -> float | None:
        value = self.take(name)
        if value is None:
            return None
        span = f"between {low:g} and {high:g}" if is_low_allowed else f"above {low:g} and at most {high:g}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(name, f"a number {span}")
        if not low <= value <= high or (value == low and not is_low_allowed):
            self.refuse(name, span)
        return float(value)

    def integer(self, name: str, low: int, high: int | None = None) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        span = f"{low} or more" if high is None else f"between {low} and {high}"
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(name, f"an integer, {span}")
        if value < low or (high is not None and value > high):
            self.refuse(name, span)
        return value

    def flag(self, name: str) -> bool | None:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def choice(self, name: str, *choices: str) -> str | None:
        value = self.text(name)
        if value is not None and value not in choices:
            self.refuse(name, f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else choices[0])
        return value

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A string, or an array of at most `most` strings; none of them empty."""
        value = self.take(name)
        if value is None:
            return ()
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
            self.refuse(name, "a string or an array of strings")
        if len(values) > most:
            raise Failure(400, f"{self.name(name)} holds {len(values)} strings; {most} are allowed", param=name)
        for each in values:
            if not each:
                raise Failure(400, f"{self.name(name)} must not hold an empty string", param=self.name(name))
        return tuple(values)

    def object(self, name: str) -> Fields | None:
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(name, "an object")
        return Fields(value, f"{self.name(name)}.")

    def objects(self, name: str) -> list[Fields] | None:
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, list):
            self.refuse(name, "an array of objects")
        for i, each in enumerate(value):
            if not isinstance(each, dict):
                where = f"{self.name(name)}[{i}]"
                raise Failure(400, f"{where} must be an object, not {kind_of(each)}", param=where)
        return [Fields(each, f"{self.name(name)}[{i}].") for i, each in enumerate(value)]
