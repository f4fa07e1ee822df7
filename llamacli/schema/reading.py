"""Schemas as they are given on a command line: a file, JSON, or the short form `name, age int, tags[]`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from llamacli.errors import UsageError

MAX_FILE = 1 << 20  # bytes
_SHORT_TYPES = {
    "str": "string",
    "string": "string",
    "int": "integer",
    "integer": "integer",
    "num": "number",
    "number": "number",
    "float": "number",
    "bool": "boolean",
    "boolean": "boolean",
}
_WORD = re.compile(r"\s*([\w-]+|[\[\]{},?]|.)", re.DOTALL)
_NAME = re.compile(r"[\w-]+")


def read(argument: str) -> Any:
    """The schema that is meant. Raises UsageError."""
    given = argument.strip()
    if not given:
        raise UsageError("--schema is empty: name a file, or say something like 'name, age int, tags[]'")
    if given.startswith("{"):
        return _parsed(given, "--schema")
    if given.startswith("@") or given.endswith(".json") or "/" in given:
        return _from_file(Path(given.removeprefix("@")))
    return short_form(given)


def _from_file(path: Path) -> Any:
    try:
        with path.expanduser().open("rb") as file:
            raw = file.read(MAX_FILE + 1)
    except OSError as error:
        raise UsageError(f"the schema cannot be read from {str(path)[:200]}: {error.strerror}") from None
    except RuntimeError:
        raise UsageError(f"the schema cannot be read from {str(path)[:200]}: there is no such user") from None
    if len(raw) > MAX_FILE:
        raise UsageError(f"the schema in {path.name} is longer than {MAX_FILE >> 10} KiB")
    try:
        return _parsed(raw.decode("utf-8-sig"), path.name)
    except UnicodeDecodeError:
        raise UsageError(f"the schema in {path.name} is not UTF-8 text") from None


def _parsed(text: str, name: str) -> Any:
    try:
        schema = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{name} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise UsageError(f"{name} is nested too deeply") from None
    except ValueError:
        raise UsageError(f"{name} holds a number of more digits than can be read") from None
    if not isinstance(schema, dict):
        raise UsageError(f"{name} must be a JSON object")
    return schema


def short_form(text: str) -> dict[str, Any]:
    """A schema from `name, age int, tags[], address {street, zip?}`.

    Fields are separated by commas. After the name: a type (str, int, number, bool; str when absent) or fields in
    braces, `[]` for a list of these, `?` for one that may be left out. Raises UsageError.
    """
    return _Short(text).fields(end="")


class _Short:
    def __init__(self, text: str) -> None:
        self._text = text
        self._words = [match[1] for match in _WORD.finditer(text.strip())]
        self._at = 0
        self._depth = 0

    def _peek(self) -> str:
        return self._words[self._at] if self._at < len(self._words) else ""

    def _take(self, word: str) -> bool:
        if self._peek() != word:
            return False
        self._at += 1
        return True

    def _wrong(self, wanted: str) -> UsageError:
        found = repr(self._peek()) if self._peek() else "the end"
        return UsageError(
            f"the short schema {self._text[:80]!r}: {wanted} was expected, not {found}; it looks like "
            "'name, age int, tags[]'"
        )

    def fields(self, end: str) -> dict[str, Any]:
        self._depth += 1
        if self._depth > 20:
            raise UsageError("the short schema nests more than 20 deep")
        properties: dict[str, Any] = {}
        required = []
        while True:
            name = self._peek()
            if not _NAME.fullmatch(name):
                raise self._wrong("a field's name")
            self._at += 1
            if name in properties:
                raise UsageError(f"the short schema names {name} twice")
            properties[name], is_optional = self._type()
            if not is_optional:
                required.append(name)
            if self._take(end) if end else self._at >= len(self._words):
                break
            if not self._take(","):
                raise self._wrong(f"a comma{' or ' + end if end else ''}")
        self._depth -= 1
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def _type(self) -> tuple[dict[str, Any], bool]:
        is_optional = self._take("?")
        kind: dict[str, Any] = {"type": "string"}
        if self._take("{"):
            kind = self.fields(end="}")
        elif _NAME.fullmatch(self._peek()):
            word = self._peek()
            if word not in _SHORT_TYPES:
                raise self._wrong("a type (str, int, number, bool)")
            self._at += 1
            kind = {"type": _SHORT_TYPES[word]}
        while self._take("["):
            if not self._take("]"):
                raise self._wrong("']'")
            kind = {"type": "array", "items": kind}
        return kind, is_optional or self._take("?")
