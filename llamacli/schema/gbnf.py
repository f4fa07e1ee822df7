"""Grammar rules as values, and their spelling in GBNF. Knows nothing of JSON.

What llama.cpp makes of a grammar is minded here: more than 2,000 repetitions lose their upper bound without a word,
a repetition of what may be empty counts as left recursion, and brackets cost its parser a stack frame each.
Rules that can never end are taken out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from llamacli.errors import UsageError

MAX_BYTES = 1 << 18  # what the sampler takes
MAX_BRANCHINGS = 50  # of texts that share more and more of their beginning
BLOCK = 1000  # repetitions that are written as {m,n}
MAX_TIMES = 100_000  # a finite upper bound above this is lowered to it


@dataclass(frozen=True, slots=True)
class Text:
    """Exactly these characters."""

    text: str


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of these ranges (code points, both ends included)."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Ref:
    rule: str


@dataclass(frozen=True, slots=True)
class Then:
    """One after the other; without parts: nothing."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Either:
    """One of them; without parts: impossible."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Many:
    """`low` to `high` times; high None: no bound."""

    part: Node
    low: int
    high: int | None


Node = Text | Chars | Ref | Then | Either | Many
NOTHING: Node = Then(())
IMPOSSIBLE: Node = Either(())


@dataclass(frozen=True, slots=True)
class Grammar:
    """Finished rules by their names, each of which can end; `root` is where a text begins. `text` is their GBNF."""

    bodies: Mapping[str, Node]
    text: str


def then(*parts: Node) -> Node:
    """Parts in sequence; neighbouring texts grow together."""
    joined: list[Node] = []
    for part in parts:
        for each in part.parts if isinstance(part, Then) else (part,):
            last = joined[-1] if joined else None
            if isinstance(each, Text) and isinstance(last, Text):
                joined[-1] = Text(last.text + each.text)
            elif each != Text(""):
                joined.append(each)
    return joined[0] if len(joined) == 1 else Then(tuple(joined))


def either(*parts: Node) -> Node:
    """One of the parts, each of them once."""
    flat = [each for part in parts for each in (part.parts if isinstance(part, Either) else (part,))]
    unique = tuple(dict.fromkeys(flat))
    return unique[0] if len(unique) == 1 else Either(unique)


def maybe(part: Node) -> Node:
    return Many(part, 0, 1)


class Rules:
    """The rules of one grammar. Rule names are made here; equal rules are kept once."""

    def __init__(self) -> None:
        self._bodies: dict[str, Node] = {}
        self._names: dict[Node, str] = {}

    def reserve(self, hint: str) -> Ref:
        """A rule whose body comes later, so that it may refer to itself."""
        name = f"{hint}-{len(self._bodies)}"
        self._bodies[name] = IMPOSSIBLE
        return Ref(name)

    def define(self, ref: Ref, body: Node) -> None:
        self._bodies[ref.rule] = body

    def add(self, hint: str, body: Node) -> Node:
        """A reference to a rule with this body. What is no longer than a reference stays as it is."""
        if isinstance(body, Ref) or body in (NOTHING, IMPOSSIBLE):
            return body
        if body not in self._names:
            ref = self.reserve(hint)
            self._bodies[ref.rule] = body
            self._names[body] = ref.rule
        return Ref(self._names[body])

    def may_be_empty(self, node: Node) -> bool:
        if isinstance(node, Ref):
            return self.may_be_empty(self._bodies[node.rule])
        if isinstance(node, Then):
            return all(map(self.may_be_empty, node.parts))
        if isinstance(node, Either):
            return any(map(self.may_be_empty, node.parts))
        if isinstance(node, Many):
            return node.low == 0 or self.may_be_empty(node.part)
        return node == Text("")

    def repeat(self, part: Node, low: int, high: int | None) -> Node:
        """`part`, which must not be empty, `low` to `high` times; high None: no bound."""
        if part == IMPOSSIBLE:
            return NOTHING if low == 0 else IMPOSSIBLE
        if high == 0:
            return NOTHING
        once = self.add("each", part) if not isinstance(part, Chars) else part
        forced = self._exactly(once, low)
        if high is None:
            return then(forced, Many(once, 0, None))
        return then(forced, self._up_to(once, max(min(high, MAX_TIMES), low) - low))

    def _exactly(self, once: Node, times: int) -> Node:
        blocks, rest = divmod(times, BLOCK)
        block = self.add("block", Many(once, BLOCK, BLOCK)) if blocks else NOTHING
        return then(Many(block, blocks, blocks) if blocks else NOTHING, Many(once, rest, rest) if rest else NOTHING)

    def _up_to(self, once: Node, times: int) -> Node:
        """Unambiguous: either fewer than a block, or a whole block and up to the rest."""
        if times == 0:
            return NOTHING
        blocks, rest = divmod(times, BLOCK)
        if not blocks:
            return Many(once, 0, rest)
        block = self.add("block", Many(once, BLOCK, BLOCK))
        less = self.add("less", Many(once, 0, BLOCK - 1))
        tail: Node = Many(once, 0, rest) if rest else NOTHING
        for _ in range(blocks):
            tail = self.add("more", either(less, then(block, tail)))
        return tail

    def spell(self, root: Node) -> str:
        """The grammar as GBNF. See finish()."""
        return self.finish(root).text

    def finish(self, root: Node) -> Grammar:
        """The whole grammar. Nothing refers to its rule `root`, which comes last and starts a line.

        Raises UsageError where nothing satisfies it and where it is too long.
        """
        bodies = self._bodies | {"root": root}
        alive = _endable(bodies)
        if "root" not in alive:
            raise UsageError("the schema can never be satisfied: no finite value has this form")
        bodies = {name: _pruned(bodies[name], alive) for name in bodies if name in alive}
        used = _reached(bodies)
        bodies = {name: body for name, body in bodies.items() if name in used}
        text = "".join(f"{name} ::= {_spelt(body)}\n" for name, body in bodies.items())
        size = len(text.encode())
        if size > MAX_BYTES:
            raise UsageError(f"the schema needs a grammar of {size:,} bytes; {MAX_BYTES:,} are taken: make it simpler")
        return Grammar(bodies, text)


def _references(node: Node) -> Iterator[str]:
    todo = [node]
    while todo:
        each = todo.pop()
        if isinstance(each, Ref):
            yield each.rule
        elif isinstance(each, Then | Either):
            todo += each.parts
        elif isinstance(each, Many):
            todo.append(each.part)


def _can_end(node: Node, alive: set[str]) -> bool:
    if isinstance(node, Ref):
        return node.rule in alive
    if isinstance(node, Then):
        return all(_can_end(part, alive) for part in node.parts)
    if isinstance(node, Either):
        return any(_can_end(part, alive) for part in node.parts)
    if isinstance(node, Many):
        return node.low == 0 or _can_end(node.part, alive)
    return isinstance(node, Text) or bool(node.ranges)


def _endable(bodies: dict[str, Node]) -> set[str]:
    """The rules that derive some finite text."""
    users: dict[str, list[str]] = {}
    for name, body in bodies.items():
        for used in set(_references(body)):
            users.setdefault(used, []).append(name)
    alive: set[str] = set()
    todo = list(bodies)
    while todo:
        name = todo.pop()
        if name not in alive and _can_end(bodies[name], alive):
            alive.add(name)
            todo += users.get(name, [])
    return alive


def _pruned(node: Node, alive: set[str]) -> Node:
    """A node that can end, without the alternatives in it that cannot."""
    if isinstance(node, Then):
        return then(*[_pruned(part, alive) for part in node.parts])
    if isinstance(node, Either):
        return either(*[_pruned(part, alive) for part in node.parts if _can_end(part, alive)])
    if isinstance(node, Many):
        return Many(_pruned(node.part, alive), node.low, node.high) if _can_end(node.part, alive) else NOTHING
    return node


def _reached(bodies: dict[str, Node]) -> set[str]:
    reached = {"root"}
    todo = ["root"]
    while todo:
        for name in _references(bodies[todo.pop()]):
            if name not in reached:
                reached.add(name)
                todo.append(name)
    return reached


def _spelt(node: Node, *, inside: bool = False) -> str:
    """`inside`: something stands before or after it, so that alternatives and sequences need brackets."""
    if isinstance(node, Text):
        return '"' + "".join(map(_in_text, node.text)) + '"'
    if isinstance(node, Chars):
        return "[" + "".join(map(_range, node.ranges)) + "]"
    if isinstance(node, Ref):
        return node.rule
    if isinstance(node, Many):
        return _bracketed(node.part) + _times(node.low, node.high)
    if isinstance(node, Then):
        return " ".join(_spelt(part, inside=True) for part in node.parts) or '""'
    spelt = " | ".join(_spelt(part) for part in node.parts)
    return f"({spelt})" if inside else spelt


def _bracketed(node: Node) -> str:
    is_one = isinstance(node, Chars | Ref)
    return _spelt(node) if is_one else f"({_spelt(node)})"


def _times(low: int, high: int | None) -> str:
    if high is None:
        return {0: "*", 1: "+"}.get(low, f"{{{low},}}")
    if (low, high) == (0, 1):
        return "?"
    if low == high:
        return "" if low == 1 else f"{{{low}}}"
    return f"{{{low},{high}}}"


def _in_text(char: str) -> str:
    code = ord(char)
    if char in '"\\':
        return "\\" + char
    return char if 0x20 <= code < 0x7F or 0xA0 <= code < 0x2000 else _escaped(code)


def _range(span: tuple[int, int]) -> str:
    low, high = span
    return _in_class(low) if low == high else f"{_in_class(low)}-{_in_class(high)}"


def _in_class(code: int) -> str:
    char = chr(code)
    if char in "\\[]-":
        return "\\" + char
    return char if 0x20 <= code < 0x7F and char not in '^"' else _escaped(code)


def _escaped(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02X}"
    return f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"


def one_of(rules: Rules, texts: Iterable[str]) -> Node:
    """One of these texts. What they begin with alike is written once: llama.cpp then follows one of them, not all."""
    return _branches(rules, sorted(set(texts)), MAX_BRANCHINGS)


def _branches(rules: Rules, texts: Sequence[str], depth: int) -> Node:
    if depth == 0:
        return either(*map(Text, texts))
    branches = []
    for _, group in groupby(texts, key=lambda text: text[:1]):
        same = list(group)
        common = _beginning(same[0], same[-1])  # sorted: what these two share, all do
        rest = _branches(rules, [text[len(common) :] for text in same], depth - 1) if len(same) > 1 else NOTHING
        branches.append(then(Text(common), rules.add("branch", rest)))
    return either(*branches)


def _beginning(a: str, b: str) -> str:
    """What both texts begin with."""
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]
