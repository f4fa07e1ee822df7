"""JSON strings as grammars: of any characters, of a length, of a pattern (ECMAScript's regular expressions), a format.

Written as JSON writes them: quotes and backslashes escaped. Control characters but tab and line breaks are never
written, nor are lone surrogates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llamacli.errors import UsageError
from llamacli.schema.gbnf import IMPOSSIBLE, NOTHING, Chars, Node, Rules, Text, either, then

Ranges = tuple[tuple[int, int], ...]

QUOTE = Text('"')
# As they are: printable, no surrogates, no controls.
_PLAIN: Ranges = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7E), (0xA0, 0xD7FF), (0xE000, 0x10FFFF))
_ESCAPES = {0x22: '\\"', 0x5C: "\\\\", 0x08: "\\b", 0x0C: "\\f", 0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t"}
_ALL: Ranges = ((0, 0x10FFFF),)
_DIGIT: Ranges = ((0x30, 0x39),)
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_ASCII: Ranges = ((0, 0x7F),)
_SPACE: Ranges = (
    *((9, 13), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F)),
    *((0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)),
)
_LINE_ENDS: Ranges = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))
MAX_PATTERN = 2000  # characters
MAX_GROUPS = 50  # in one another

_DAY = r"(\d{4}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8])))"
_YEAR = _DAY.replace(r"\d{4}", r"([1-9]\d{3})")  # no year 0: not every reader knows one
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_LABEL = r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL}){{1,3}}"
FORMATS = {
    "date": rf"^{_YEAR}$",
    "time": rf"^{_TIME}$",
    "date-time": rf"^{_YEAR}T{_TIME}$",
    "duration": r"^P(\d{1,4}D(T\d{1,4}[HMS])?|T\d{1,4}[HMS])$",
    "email": rf"^[A-Za-z0-9_+-]{{1,32}}(\.[A-Za-z0-9_+-]{{1,32}})?@{_HOST}$",
    "hostname": rf"^{_HOST}$",
    "ipv4": rf"^{_BYTE}(\.{_BYTE}){{3}}$",
    "ipv6": r"^[0-9a-f]{1,4}(:[0-9a-f]{1,4}){7}$",
    "uri": rf"^https?://{_HOST}(/[A-Za-z0-9_.~-]{{0,64}}){{0,8}}$",
    "uuid": r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
}


def any_string(rules: Rules, shortest: int = 0, longest: int | None = None) -> Node:
    """A JSON string of so many characters."""
    return then(QUOTE, rules.repeat(characters(rules, _ALL), shortest, longest), QUOTE)


def of_format(rules: Rules, name: str) -> Node:
    return matching(rules, FORMATS[name])


def matching(rules: Rules, pattern: str) -> Node:
    """A JSON string in which the pattern is found. Raises UsageError for what is not supported of the language."""
    return then(QUOTE, _Pattern(rules, pattern).node(), QUOTE)


def characters(rules: Rules, ranges: Ranges) -> Node:
    """One character out of the ranges, as JSON writes it."""
    plain = _common(ranges, _PLAIN)
    escaped = [Text(written) for code, written in _ESCAPES.items() if _is_in(code, ranges)]
    if not escaped:
        return Chars(plain) if plain else IMPOSSIBLE
    return rules.add("char", either(*([Chars(plain)] if plain else []), *escaped))


def _is_in(code: int, ranges: Ranges) -> bool:
    return any(low <= code <= high for low, high in ranges)


def _common(a: Ranges, b: Ranges) -> Ranges:
    both = ((max(low, least), min(high, most)) for low, high in a for least, most in b)
    return tuple((low, high) for low, high in both if low <= high)


def _joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    joined: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(high, joined[-1][1])
        else:
            joined.append((low, high))
    return tuple(joined)


def _others(ranges: Ranges) -> Ranges:
    others = []
    at = 0
    for low, high in _joined(ranges):
        if low > at:
            others.append((at, low - 1))
        at = high + 1
    return (*others, (at, 0x10FFFF)) if at <= 0x10FFFF else tuple(others)


# Classes that every reader of a pattern takes to be the same; \D and the like only as far as that is so.
_CLASSES = {
    "d": _DIGIT,
    "D": _common(_others(_DIGIT), _ASCII),
    "w": _WORD,
    "W": _common(_others(_WORD), _ASCII),
    "s": _SPACE,
    "S": _others((*_SPACE, (0x85, 0x85), (0x1C, 0x1F))),
}
_CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}


@dataclass(slots=True)
class _Pattern:
    """A reader of a regular expression, from left to right.

    What is not a regular language (look-around, back references) is refused, as are anchors anywhere but at the ends.
    """

    rules: Rules
    pattern: str
    _at: int = 0
    _depth: int = 0

    def node(self) -> Node:
        if len(self.pattern) > MAX_PATTERN:
            raise UsageError(f"the pattern is longer than {MAX_PATTERN:,} characters")
        anything = self.rules.repeat(characters(self.rules, _ALL), 0, None)
        branches = []
        while True:
            start = NOTHING if self._take("^") else anything
            body = self._sequence(is_top=True)
            end = NOTHING if self._take("$") else anything
            branches.append(then(start, body, end))
            if not self._take("|"):
                break
        if self._at < len(self.pattern):
            raise self._unsupported(f"{self.pattern[self._at]!r} there")
        return either(*branches)

    def _unsupported(self, what: str) -> UsageError:
        return UsageError(f"the pattern {self.pattern[:60]!r} cannot be used: {what} (character {self._at + 1})")

    def _peek(self) -> str:
        return self.pattern[self._at : self._at + 1]

    def _take(self, char: str) -> bool:
        if self._peek() != char:
            return False
        self._at += 1
        return True

    def _next(self) -> str:
        if self._at >= len(self.pattern):
            raise self._unsupported("it ends too early")
        self._at += 1
        return self.pattern[self._at - 1]

    def _alternatives(self) -> Node:
        branches = [self._sequence()]
        while self._take("|"):
            branches.append(self._sequence())
        return either(*branches)

    def _sequence(self, *, is_top: bool = False) -> Node:
        parts = []
        while (char := self._peek()) and char not in "|)":
            if is_top and char == "$":
                break
            parts.append(self._repeated(self._atom()))
        return then(*parts)

    def _repeated(self, node: Node) -> Node:
        low, high = self._times()
        if (low, high) == (1, 1):
            return node
        if self.rules.may_be_empty(node):
            raise self._unsupported("what it repeats may be empty")
        if self._peek() and self._peek() in "*+?{":
            if self._take("?"):
                return self.rules.repeat(node, low, high)  # reluctant: the same strings
            raise self._unsupported("a repetition of a repetition")
        return self.rules.repeat(node, low, high)

    def _times(self) -> tuple[int, int | None]:
        for char, times in {"*": (0, None), "+": (1, None), "?": (0, 1)}.items():
            if self._take(char):
                return times
        if not self._take("{"):
            return 1, 1
        low = self._number()
        high: int | None = low
        if self._take(","):
            high = None if self._peek() == "}" else self._number()
        if not self._take("}") or (high is not None and high < low):
            raise self._unsupported("a repetition that is no {m,n}")
        return low, high

    def _number(self) -> int:
        digits = ""
        while self._peek() and self._peek() in "0123456789":
            digits += self._next()
        if not digits or len(digits) > 6:
            raise self._unsupported("a repetition without a number, or with a huge one")
        return int(digits)

    def _atom(self) -> Node:
        char = self._next()
        if char == "(":
            return self._group()
        if char == "[":
            return self._one_of(self._class())
        if char == ".":
            return self._one_of(_others(_LINE_ENDS))
        if char == "\\":
            return self._one_of(self._escape())
        if char in "^$*+?{":
            self._at -= 1
            raise self._unsupported(f"{char!r} there")
        return self._one_of(((ord(char), ord(char)),))

    def _group(self) -> Node:
        if self._take("?") and not self._take(":"):
            self._name()
        self._depth += 1
        if self._depth > MAX_GROUPS:
            raise self._unsupported(f"more than {MAX_GROUPS} groups in one another")
        node = self._alternatives()
        self._depth -= 1
        if not self._take(")"):
            raise self._unsupported("a group that is not closed")
        return self.rules.add("group", node)

    def _name(self) -> None:
        """Of a named group. Look-ahead and look-behind begin alike."""
        if not self._take("<") or self._peek() in ("=", "!", ""):
            raise self._unsupported("look-around")
        while self._next() != ">":
            pass

    def _one_of(self, ranges: Ranges) -> Node:
        """A character. Single ones are written as texts, which grow together."""
        if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
            code = ranges[0][0]
            if code in _ESCAPES:
                return Text(_ESCAPES[code])
            if _is_in(code, _PLAIN):
                return Text(chr(code))
        node = characters(self.rules, ranges)
        if node == IMPOSSIBLE:
            raise self._unsupported("characters that are never written")
        return node

    def _escape(self) -> Ranges:
        char = self._next()
        if char in _CLASSES:
            return _CLASSES[char]
        code = self._code(char)
        return ((code, code),)

    def _code(self, char: str) -> int:
        """Of an escaped character."""
        if char in _CONTROLS:
            if char == "0" and self._peek().isdigit():
                raise self._unsupported("an octal escape")
            return _CONTROLS[char]
        if char in "xu":
            digits = "".join(self._next() for _ in range(2 if char == "x" else 4))
            try:
                return int(digits, 16)
            except ValueError:
                raise self._unsupported(f"\\{char}{digits}") from None
        if char.isalnum():
            raise self._unsupported(f"\\{char}")
        return ord(char)

    def _class(self) -> Ranges:
        is_negated = self._take("^")
        ranges: list[tuple[int, int]] = []
        while not self._take("]"):
            first = self._member()
            if self._peek() == "-" and self.pattern[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                last = self._member()
                if len(first) != 1 or len(last) != 1 or first[0][0] != first[0][1] or last[0][0] < first[0][0]:
                    raise self._unsupported("a range of characters that is none")
                ranges.append((first[0][0], last[0][0]))
            else:
                ranges += first
        return _others(tuple(ranges)) if is_negated else _joined(ranges)

    def _member(self) -> Ranges:
        char = self._next()
        if char != "\\":
            return ((ord(char), ord(char)),)
        if self._peek() == "b":
            self._at += 1
            return ((8, 8),)
        if self._peek() in ("D", "W", "S"):
            raise self._unsupported(f"\\{self._peek()} in a class")
        return self._escape()
