"""A second reader of GBNF, independent of llama.cpp's and of the writer: derives texts and recognises them."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

WORD = re.compile(
    r'\s*(?:(?P<text>"(?:\\.|[^"\\])*")|(?P<chars>\[(?:\\.|[^\]\\])*\])|(?P<times>\{\d*,?\d*\}|[*+?])|(?P<name>[\w-]+)'
    r"|(?P<sign>[()|]))"
)
ESCAPE = re.compile(r"\\(x[0-9A-F]{2}|u[0-9A-F]{4}|U[0-9A-F]{8}|.)")

# ("text", str) | ("chars", ranges) | ("rule", name) | ("then", parts) | ("or", parts) | ("many", part, low, high)
Node = tuple[Any, ...]


def plain(text: str) -> str:
    def one(match: re.Match[str]) -> str:
        code = match[1]
        return chr(int(code[1:], 16)) if code[0] in "xuU" and len(code) > 1 else code

    return ESCAPE.sub(one, text)


def ranges_of(body: str) -> tuple[tuple[int, int], ...]:
    members = [ord(plain(m[0])) if m[0] != "-" else "-" for m in re.finditer(r"\\x..|\\u.{4}|\\U.{8}|\\.|.", body)]
    ranges: list[tuple[int, int]] = []
    i = 0
    while i < len(members):
        low = members[i]
        assert isinstance(low, int), body
        if i + 2 < len(members) and members[i + 1] == "-":
            high = members[i + 2]
            assert isinstance(high, int)
            ranges.append((low, high))
            i += 3
        else:
            ranges.append((low, low))
            i += 1
    return tuple(ranges)


@dataclass
class Reader:
    words: list[tuple[str, str]]
    at: int = 0

    def peek(self) -> tuple[str, str]:
        return self.words[self.at] if self.at < len(self.words) else ("end", "")

    def alternatives(self) -> Node:
        parts = [self.sequence()]
        while self.peek() == ("sign", "|"):
            self.at += 1
            parts.append(self.sequence())
        return parts[0] if len(parts) == 1 else ("or", tuple(parts))

    def sequence(self) -> Node:
        parts: list[Node] = []
        while True:
            kind, word = self.peek()
            if kind == "end" or word in ("|", ")"):
                return ("then", tuple(parts))
            self.at += 1
            if kind == "times":
                parts[-1] = ("many", parts[-1], *times_of(word))
            elif kind == "text":
                parts.append(("text", plain(word[1:-1])))
            elif kind == "chars":
                parts.append(("chars", ranges_of(word[1:-1])))
            elif kind == "name":
                parts.append(("rule", word))
            else:
                assert word == "("
                parts.append(self.alternatives())
                assert self.peek() == ("sign", ")")
                self.at += 1


def times_of(word: str) -> tuple[int, int | None]:
    if word in "*+?":
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[word]
    low, comma, high = word[1:-1].partition(",")
    if not comma:
        return int(low), int(low)
    return int(low or 0), int(high) if high else None


@dataclass
class Grammar:
    """Reads what the project writes: one rule on each line."""

    text: str
    rules: dict[str, Node] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for line in self.text.splitlines():
            name, _, body = line.partition(" ::= ")
            words = []
            at = 0
            while at < len(body.rstrip()):
                match = WORD.match(body, at)
                assert match, body[at : at + 60]
                words.append((str(match.lastgroup), match[0].strip() if match.lastgroup != "text" else match["text"]))
                at = match.end()
            reader = Reader(words)
            self.rules[name] = reader.alternatives()
            assert reader.at == len(words), line
        for _ in self.rules:
            for name, body_node in self.rules.items():
                self.depths[name] = min(self.depths.get(name, 10**6), 1 + self.depth(body_node))

    def depth(self, node: Node) -> int:
        """How deep the shallowest derivation goes."""
        kind, *rest = node
        if kind == "rule":
            return self.depths.get(rest[0], 10**6)
        if kind == "then":
            return max((self.depth(part) for part in rest[0]), default=0)
        if kind == "or":
            return min(self.depth(part) for part in rest[0])
        if kind == "many":
            return 0 if rest[1] == 0 else self.depth(rest[0])
        return 0

    def derive(self, rng: random.Random, budget: int = 12) -> str:
        out: list[str] = []
        self._derive(self.rules["root"], rng, budget, out)
        return "".join(out)

    def _derive(self, node: Node, rng: random.Random, budget: int, out: list[str]) -> None:
        kind, *rest = node
        if kind == "text":
            out.append(rest[0])
        elif kind == "chars":
            low, high = rng.choice(rest[0])
            out.append(chr(rng.randint(low, min(high, low + 300)) if rng.random() < 0.9 else rng.randint(low, high)))
        elif kind == "rule":
            self._derive(self.rules[rest[0]], rng, budget - 1, out)
        elif kind == "then":
            for part in rest[0]:
                self._derive(part, rng, budget, out)
        elif kind == "or":
            fitting = [part for part in rest[0] if self.depth(part) < budget]
            self._derive(rng.choice(fitting or [min(rest[0], key=self.depth)]), rng, budget, out)
        else:
            part, low, high = rest
            most = low if self.depth(part) >= budget else min(high if high is not None else low + 4, low + 4)
            for _ in range(rng.randint(low, most)):
                self._derive(part, rng, budget, out)

    def accepts(self, text: str) -> bool:
        """Whether the whole text can be derived."""

        @cache
        def ends(node: Node, at: int) -> frozenset[int]:
            kind, *rest = node
            if kind == "text":
                return frozenset([at + len(rest[0])]) if text.startswith(rest[0], at) else frozenset()
            if kind == "chars":
                fits = at < len(text) and any(low <= ord(text[at]) <= high for low, high in rest[0])
                return frozenset([at + 1]) if fits else frozenset()
            if kind == "rule":
                return ends(self.rules[rest[0]], at)
            if kind == "or":
                return frozenset().union(*(ends(part, at) for part in rest[0]))
            if kind == "then":
                reached = frozenset([at])
                for part in rest[0]:
                    reached = frozenset().union(*(ends(part, i) for i in reached))
                return reached
            part, low, high = rest
            reached, found, n = frozenset([at]), frozenset[int](), 0
            seen: set[int] = set()
            while reached:
                if n >= low:
                    found |= reached
                    reached -= seen
                    seen |= reached
                if n == high:
                    break
                reached = frozenset().union(*(ends(part, i) for i in reached))
                n += 1
            return found

        return len(text) in ends(self.rules["root"], 0)
