"""The form that an answer must have: held by a grammar while it is written, and checked when it is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llamacli.errors import SchemaError, UsageError
from llamacli.schema import checking, grammar, reading
from llamacli.schema.closing import Closing
from llamacli.schema.gbnf import Grammar

MAX_CHOICES = 1000


@dataclass(frozen=True)
class Form:
    """Either JSON that satisfies a schema, or exactly one of some texts.

    source   how messages call it
    """

    source: str
    grammar: Grammar
    schema: Mapping[str, Any] | None = None
    choices: tuple[str, ...] = ()

    @cached_property
    def closing(self) -> Closing:
        return Closing(self.grammar)

    def check(self, answer: str) -> None:
        """Raises SchemaError, with the reason, for an answer that does not have this form."""
        if self.schema is not None:
            checking.validate(self.schema, answer)
        elif answer not in self.choices:
            shown = answer if len(answer) <= 60 else f"{answer[:57]}..."
            raise SchemaError(f"the answer is none of the choices ({', '.join(self.choices)[:200]}): {shown!r}")


def of_schema(schema: Any, source: str = "--schema") -> Form:
    """Raises UsageError, naming the place, for what is no schema and for what a grammar cannot hold."""
    if not isinstance(schema, Mapping):
        raise UsageError(f"{source} must be a JSON object")
    try:
        held = grammar.of_schema(schema)
        checking.satisfies(None, schema)  # for what it says of a schema that is none
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None
    return Form(source, held, schema)


def json_object(source: str = "--json-object") -> Form:
    return of_schema({"type": "object"}, source)


def of_choices(texts: Sequence[str], source: str = "--choices") -> Form:
    """Raises UsageError where there are none, too many, or an empty one."""
    texts = tuple(dict.fromkeys(text.strip() for text in texts))
    if len(texts) > MAX_CHOICES:
        raise UsageError(f"{source} names {len(texts):,} choices; {MAX_CHOICES:,} are taken")
    try:
        held = grammar.of_choices(texts)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None
    return Form(source, held, choices=texts)


def wanted(schema: str | None, *, is_object: bool, choices: str | None) -> Form | None:
    """The form that options on a command line ask for. Raises UsageError; also where they ask for several."""
    given = {"--schema": schema is not None, "--json-object": is_object, "--choices": choices is not None}
    names = [name for name, is_given in given.items() if is_given]
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)} contradict each other: an answer has one form")
    for text in (schema, choices):
        if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
            raise UsageError(f"{names[0]} must be text in UTF-8")
    if schema is not None:
        return of_schema(reading.read(schema))
    if choices is not None:
        return of_choices(choices.split(","))
    return json_object() if is_object else None
