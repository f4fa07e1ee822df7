"""Decimal numbers between two bounds, as grammars that write no other: exact digits, no exponents, no leading zeros."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from llamacli.schema.gbnf import IMPOSSIBLE, NOTHING, Chars, Many, Node, Text, either, maybe, then

MAX_DIGITS = 15  # a float64 holds every decimal number of so many digits
_DIGITS = ((0x30, 0x39),)


@dataclass(frozen=True, slots=True)
class Span:
    """Numbers from low to high; None: no bound. `*_open`: the bound itself is not among them."""

    low: Decimal | None = None
    high: Decimal | None = None
    low_open: bool = False
    high_open: bool = False


def integers(span: Span) -> Node:
    """The integers of a span. Where it has no bound, MAX_DIGITS digits are one."""
    low, high = whole_bounds(span)
    if low is None:
        low = min(-(10**MAX_DIGITS) + 1, high if high is not None else 0)
    if high is None:
        high = max(10**MAX_DIGITS - 1, low)
    negative = _naturals(max(1, -high), -low) if low < 0 else IMPOSSIBLE
    positive = _naturals(max(0, low), high) if high >= 0 else IMPOSSIBLE
    return either(*_possible(_negated(negative), positive))


def whole_bounds(span: Span) -> tuple[int | None, int | None]:
    """The smallest and the largest integer of a span."""
    low, high = None, None
    if span.low is not None:
        low = int(span.low.to_integral_value(ROUND_CEILING))
        low += span.low_open and low == span.low
    if span.high is not None:
        high = int(span.high.to_integral_value(ROUND_FLOOR))
        high -= span.high_open and high == span.high
    return low, high


def decimals(span: Span) -> Node:
    """The numbers of a span, with or without a fraction. Those that have no bound there have MAX_DIGITS digits."""
    low, high, zero = span.low, span.high, Decimal(0)
    negative = positive = IMPOSSIBLE
    if low is None or low < 0:
        # Zero itself is written without a sign.
        nearest, is_open = (-high, span.high_open) if high is not None and high < 0 else (zero, True)
        negative = _unsigned(nearest, None if low is None else -low, is_open, span.low_open)
    if high is None or high >= 0:
        nearest, is_open = (low, span.low_open) if low is not None and low >= 0 else (zero, False)
        positive = _unsigned(nearest, high, is_open, span.high_open)
    return either(*_possible(_negated(negative), positive))


def _negated(node: Node) -> Node:
    return IMPOSSIBLE if node == IMPOSSIBLE else then(Text("-"), node)


def _possible(*nodes: Node) -> list[Node]:
    return [node for node in nodes if node != IMPOSSIBLE]


def _digit(low: int, high: int) -> Node:
    if low > high:
        return IMPOSSIBLE
    return Text(str(low)) if low == high else Chars(((0x30 + low, 0x30 + high),))


def _some_digits(low: int, high: int) -> Node:
    return Many(Chars(_DIGITS), low, high) if high > 0 else NOTHING


def _naturals(low: int, high: int) -> Node:
    """The integers from low to high, neither of them negative."""
    if low > high:
        return IMPOSSIBLE
    parts = []
    while low <= high:  # one length after the other
        n = len(str(low))
        if low == 10 ** (n - 1) and high == 10 ** len(str(high)) - 1:
            parts.append(then(_digit(1, 9), _some_digits(n - 1, len(str(high)) - 1)))
            break
        last = min(high, 10**n - 1)
        parts.append(_same_length(str(low), str(last)))
        low = last + 1
    return either(*parts)


def _same_length(low: str, high: str) -> Node:
    """The digit strings from low to high, as long as these."""
    if not low:
        return NOTHING
    if low == "0" * len(low) and high == "9" * len(high):
        return _some_digits(len(low), len(low))
    if low[0] == high[0]:
        return then(Text(low[0]), _same_length(low[1:], high[1:]))
    n = len(low) - 1
    first, last = int(low[0]), int(high[0])
    parts = []
    if low[1:] != "0" * n:
        parts.append(then(Text(low[0]), _same_length(low[1:], "9" * n)))
        first += 1
    if high[1:] != "9" * n:
        last -= 1
    if first <= last:
        parts.append(then(_digit(first, last), _some_digits(n, n)))
    if high[1:] != "9" * n:
        parts.append(then(Text(high[0]), _same_length("0" * n, high[1:])))
    return either(*parts)


def _unsigned(low: Decimal, high: Decimal | None, low_open: bool, high_open: bool) -> Node:
    """The decimal numbers from low to high, neither of them negative."""
    if high is None:
        return _unbounded(low, low_open)
    if low > high or (low == high and (low_open or high_open)):
        return IMPOSSIBLE
    first, last = int(low), int(high)
    above, below = _fraction(low), _fraction(high)
    n_free = max(1, MAX_DIGITS - len(str(last)))
    if first == last:
        return _with_fraction(first, _between(above, below, low_open, high_open, n_free))
    parts = [_with_fraction(first, _at_least(above, low_open, n_free))]
    if first + 1 <= last - 1:
        parts.append(then(_naturals(first + 1, last - 1), _any_fraction(n_free)))
    parts.append(_with_fraction(last, _at_most(below, high_open, n_free)))
    return either(*_possible(*parts))


def _unbounded(low: Decimal, is_open: bool) -> Node:
    first = int(low)
    n_free = max(1, MAX_DIGITS - len(str(first)))
    lowest = _with_fraction(first, _at_least(_fraction(low), is_open, n_free))
    larger = _naturals(first + 1, max(10**MAX_DIGITS - 1, first + 1))
    return either(lowest, then(larger, _any_fraction(n_free)))


def _with_fraction(whole: int, fraction: _Fraction) -> Node:
    """`whole`, followed by a point and some of the fraction's digits, or by nothing where that is allowed."""
    some = IMPOSSIBLE if fraction.some == IMPOSSIBLE else then(Text("."), fraction.some)
    if some == IMPOSSIBLE:
        return Text(str(whole)) if fraction.may_be_absent else IMPOSSIBLE
    return then(Text(str(whole)), maybe(some) if fraction.may_be_absent else some)


def _any_fraction(n: int) -> Node:
    return maybe(then(Text("."), _some_digits(1, n)))


def _fraction(number: Decimal) -> str:
    """The digits after the point, without zeros at the end."""
    _, _, digits = format(number, "f").partition(".")
    return digits.rstrip("0")


@dataclass(frozen=True, slots=True)
class _Fraction:
    """Digits after a point: at least one (`some`), and whether there may be none."""

    some: Node
    may_be_absent: bool


def _at_least(digits: str, is_open: bool, n: int) -> _Fraction:
    """Fractions from 0.`digits` on, of `n` digits; of one more than `digits` where these are as many."""
    if digits:
        rest = _at_least(digits[1:], is_open, max(n - 1, 1))
        here = then(Text(digits[0]), maybe(rest.some) if rest.may_be_absent else rest.some)
        return _Fraction(either(*_possible(here, _and_any(_digit(int(digits[0]) + 1, 9), n))), False)
    if not is_open:
        return _Fraction(_some_digits(1, n), True)
    return _Fraction(then(Many(Text("0"), 0, n - 1), _and_any(_digit(1, 9), n)), False)


def _at_most(digits: str, is_open: bool, n: int) -> _Fraction:
    """Fractions up to 0.`digits`."""
    if not digits:
        return _Fraction(IMPOSSIBLE if is_open else Many(Text("0"), 1, n), not is_open)
    rest = _at_most(digits[1:], is_open, max(n - 1, 1))
    if rest.some == IMPOSSIBLE:
        here = Text(digits[0]) if rest.may_be_absent else IMPOSSIBLE
    else:
        here = then(Text(digits[0]), maybe(rest.some) if rest.may_be_absent else rest.some)
    return _Fraction(either(*_possible(_and_any(_digit(0, int(digits[0]) - 1), n), here)), True)


def _between(low: str, high: str, low_open: bool, high_open: bool, n: int) -> _Fraction:
    """Fractions from 0.`low` to 0.`high`."""
    if not low:
        if not low_open:
            return _at_most(high, high_open, n)
        return _above_zero(high, high_open, n)
    if low[0] == high[0]:
        rest = _between(low[1:], high[1:], low_open, high_open, max(n - 1, 1))
        return _Fraction(then(Text(low[0]), maybe(rest.some) if rest.may_be_absent else rest.some), False)
    first, last = _at_least(low[1:], low_open, max(n - 1, 1)), _at_most(high[1:], high_open, max(n - 1, 1))
    parts = [
        then(Text(low[0]), maybe(first.some) if first.may_be_absent else first.some),
        _and_any(_digit(int(low[0]) + 1, int(high[0]) - 1), n),
        _closed(Text(high[0]), last),
    ]
    return _Fraction(either(*_possible(*parts)), False)


def _above_zero(digits: str, is_open: bool, n: int) -> _Fraction:
    """Fractions above 0 and up to 0.`digits`, which is more than 0."""
    rest = _above_zero(digits[1:], is_open, max(n - 1, 1)) if digits[0] == "0" else _at_least("", True, n)
    parts = [then(Text("0"), rest.some)]
    if digits[0] != "0":
        parts.append(_and_any(_digit(1, int(digits[0]) - 1), n))
        parts.append(_closed(Text(digits[0]), _at_most(digits[1:], is_open, max(n - 1, 1))))
    return _Fraction(either(*_possible(*parts)), False)


def _closed(first: Node, rest: _Fraction) -> Node:
    if rest.some == IMPOSSIBLE:
        return first if rest.may_be_absent else IMPOSSIBLE
    return then(first, maybe(rest.some) if rest.may_be_absent else rest.some)


def _and_any(node: Node, n: int) -> Node:
    return IMPOSSIBLE if node == IMPOSSIBLE else then(node, _some_digits(0, n - 1))
