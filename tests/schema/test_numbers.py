"""Grammars of numbers between two bounds write those numbers, and no others."""

from __future__ import annotations

import random
from decimal import Decimal

from gbnf_reader import Grammar
from hypothesis import given
from hypothesis import strategies as st

from llamacli.schema import numbers
from llamacli.schema.gbnf import IMPOSSIBLE, Rules
from llamacli.schema.numbers import Span

BOUND = st.one_of(
    st.none(),
    st.integers(-3000, 3000).map(Decimal),
    st.decimals(-30, 30, places=3),
    st.decimals(-2, 2, places=1),
)
SPAN = st.builds(Span, BOUND, BOUND, st.booleans(), st.booleans())


def holds(span: Span, number: Decimal) -> bool:
    if span.low is not None and (number < span.low or (span.low_open and number == span.low)):
        return False
    return span.high is None or not (number > span.high or (span.high_open and number == span.high))


@given(SPAN, st.integers(-4000, 4000), st.randoms(use_true_random=False))
def test_integers(span: Span, other: int, rng: random.Random) -> None:
    node = numbers.integers(span)
    low, high = numbers.whole_bounds(span)
    if node == IMPOSSIBLE:
        assert low is not None and high is not None and low > high
        return
    grammar = Grammar(Rules().spell(node))
    for _ in range(3):
        text = grammar.derive(rng)
        assert str(int(text)) == text
        assert holds(span, Decimal(text))
    assert grammar.accepts(str(other)) == holds(span, Decimal(other))


@given(SPAN, st.decimals(-40, 40, places=4), st.randoms(use_true_random=False))
def test_decimals(span: Span, other: Decimal, rng: random.Random) -> None:
    node = numbers.decimals(span)
    if node == IMPOSSIBLE:
        assert span.low is not None and span.high is not None
        assert span.low > span.high or (span.low == span.high and (span.low_open or span.high_open))
        return
    grammar = Grammar(Rules().spell(node))
    for _ in range(3):
        text = grammar.derive(rng)
        assert holds(span, Decimal(text))
        whole, point, fraction = text.lstrip("-").partition(".")
        assert whole == str(int(whole)) and bool(point) == bool(fraction)
    for number in (other, other.quantize(Decimal("0.1")), other.to_integral_value()):
        written = format(number, "f")
        if not (number == 0 and written.startswith("-")):
            assert grammar.accepts(written) == holds(span, number), (span, written, grammar.text)


def test_bounds_themselves_are_written_unless_they_are_open() -> None:
    closed = Grammar(Rules().spell(numbers.decimals(Span(Decimal("0.25"), Decimal("0.5")))))
    assert closed.accepts("0.25") and closed.accepts("0.5") and closed.accepts("0.250")
    opened = Grammar(Rules().spell(numbers.decimals(Span(Decimal("0.25"), Decimal("0.5"), True, True))))
    assert not opened.accepts("0.25") and not opened.accepts("0.5") and not opened.accepts("0.50")
    assert opened.accepts("0.2500001") and opened.accepts("0.4999")
