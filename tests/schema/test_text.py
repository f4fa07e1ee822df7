"""Strings of a pattern or a format: whatever the grammar writes, the pattern finds."""

from __future__ import annotations

import datetime
import ipaddress
import json
import random
import re
import uuid
from collections.abc import Callable

import pytest
from gbnf_reader import Grammar
from hypothesis import given
from hypothesis import strategies as st

from llamacli.errors import UsageError
from llamacli.schema import text
from llamacli.schema.gbnf import Rules

PATTERNS = [
    "^[A-Z]{2}[0-9]{3,5}$",
    "^a|b$",
    "abc",
    r"^\d+(\.\d+)?$",
    r'^"quoted\\"$',
    r"^(?:yes|no|(?<other>may\x62e))$",
    r"^[^a-z\s]+$",
    r"^.\n.$",
    r"^[\w.+-]+@[\w-]+\.[a-z]{2,}$",
    r"^\u00e9t\u00e9 \S*$",
    "^$",
    "^x*?y??$",
    r"^[\]\-^]$",
    r"^(a|)b$",
    r"^(ab{0,2}){1,3}$",
]
REFUSED = [
    "(?=a)b",
    "(?<!a)b",
    r"(a)\1",
    "a$b",
    "a^b",
    "(^a)",
    "[z-a]",
    "a**",
    "*",
    "a{3,1}",
    "(a",
    "a)",
    "[a",
    "(a*)*",
    r"\p{L}",
    r"\bword",
    "[]",
    "\\",
]


def grammar_of(pattern: str) -> Grammar:
    rules = Rules()
    return Grammar(rules.spell(text.matching(rules, pattern)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_written_matches(pattern: str) -> None:
    grammar = grammar_of(pattern)
    rng = random.Random(1)
    for _ in range(50):
        value = json.loads(grammar.derive(rng))
        assert re.search(pattern.replace("(?<", "(?P<"), value), value


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_no_grammar_can_hold_is_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match="pattern"):
        grammar_of(pattern)


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12))
def test_every_printable_text_can_be_written(value: str) -> None:
    rules = Rules()
    grammar = Grammar(rules.spell(text.any_string(rules, len(value), len(value))))
    assert grammar.accepts(json.dumps(value, ensure_ascii=False))
    assert not grammar.accepts(json.dumps(value + "x", ensure_ascii=False))


def test_a_long_string_is_counted_exactly() -> None:
    rules = Rules()
    grammar = Grammar(rules.spell(text.any_string(rules, 1500, 2750)))
    for n, fits in {1499: False, 1500: True, 2345: True, 2750: True, 2751: False}.items():
        assert grammar.accepts(f'"{"a" * n}"') == fits, n


CHECKS: dict[str, Callable[[str], object]] = {
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "date-time": datetime.datetime.fromisoformat,
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "uuid": uuid.UUID,
}


@pytest.mark.parametrize("name", text.FORMATS)
def test_formats(name: str) -> None:
    rules = Rules()
    grammar = Grammar(rules.spell(text.of_format(rules, name)))
    rng = random.Random(2)
    for _ in range(50):
        value = json.loads(grammar.derive(rng, 30))
        assert re.search(text.FORMATS[name], value)
        if name in CHECKS:
            CHECKS[name](value)
