"""Follows a text through its grammar and knows the shortest way to its end, so that an answer can always be closed.

A text may be read in several ways until more of it is known. Each is a stack of what is still to come; stacks share
their lower parts, and equal ones are kept once. Costs are bytes in UTF-8, which are never fewer than tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from llamacli.schema.gbnf import Chars, Either, Grammar, Many, Node, Ref, Text, Then

_PLEASANT = "0a"  # where any character will do


class _Frame:
    """What is left of a node after `at` of it (characters, parts or repetitions), and then the frames below.

    `cost` is the shortest way from here to the end of the text.
    """

    __slots__ = ("at", "below", "cost", "node", "tops")

    def __init__(self, node: Node, at: int, below: _Frame | None, cost: float) -> None:
        self.node = node
        self.at = at
        self.below = below
        self.cost = cost
        self.tops: tuple[_Frame | None, ...] | None = None  # where the next character is decided; None: the end


State = tuple[_Frame | None, ...]  # the ways in which a text can be read; None is the end of it


class Closing:
    """Where texts stand in a grammar. A state is a value: it can be kept, and gone back to."""

    def __init__(self, grammar: Grammar) -> None:
        self._bodies = grammar.bodies
        self._rules = _rule_costs(grammar.bodies)
        self._costs: dict[int, float] = {}  # by id(node)
        self._frames: dict[tuple[int, int, int], _Frame] = {}
        self.start: State = self._tops(self._frame(grammar.bodies["root"], 0, None))

    def after(self, state: State, text: str) -> tuple[State, int]:
        """The state after as much of the text as the grammar allows, and how many characters that is."""
        for n, char in enumerate(text):
            code = ord(char)
            found = dict.fromkeys(top for frame in state if frame is not None for top in self._over(frame, char, code))
            if not found:
                return state, n
            state = tuple(found)
        return state, len(text)

    def is_whole(self, state: State) -> bool:
        """Whether the text may end here."""
        return None in state

    def is_over(self, state: State) -> bool:
        """Whether the text must end here."""
        return state == (None,)

    def cost(self, state: State) -> int:
        """Bytes of the shortest text that ends it."""
        return 0 if None in state else int(min(frame.cost for frame in state if frame is not None))

    def ending(self, state: State) -> str:
        """The shortest text that ends it."""
        if None in state:
            return ""
        frame: _Frame | None = min((frame for frame in state if frame is not None), key=lambda frame: frame.cost)
        parts = []
        while frame is not None:
            parts.append(self._shortest(frame.node, frame.at))
            frame = frame.below
        return "".join(parts)

    # -- stacks --

    def _frame(self, node: Node, at: int, below: _Frame | None) -> _Frame:
        key = (id(node), at, id(below))
        found = self._frames.get(key)
        if found is None:
            cost = self._left(node, at) + (below.cost if below else 0)
            found = self._frames[key] = _Frame(node, at, below, cost)
        return found

    def _over(self, frame: _Frame, char: str, code: int) -> Iterable[_Frame | None]:
        """The states behind a character that this frame allows."""
        node = frame.node
        if isinstance(node, Text):
            if node.text[frame.at] != char:
                return ()
            return self._tops(self._frame(node, frame.at + 1, frame.below))
        assert isinstance(node, Chars)
        return self._tops(frame.below) if any(low <= code <= high for low, high in node.ranges) else ()

    def _tops(self, frame: _Frame | None) -> State:
        """The frames at which a text that stands before `frame` is decided by its next character."""
        if frame is None:
            return (None,)
        if frame.tops is None:
            found: dict[_Frame | None, None] = {}
            seen: set[_Frame] = set()
            todo: list[_Frame | None] = [frame]
            while todo:
                each = todo.pop()
                if each is None:
                    found[None] = None
                elif each not in seen:
                    seen.add(each)
                    following = self._opened(each)
                    if following is None:
                        found[each] = None
                    else:
                        todo += following
            frame.tops = tuple(found)
        return frame.tops

    def _opened(self, frame: _Frame) -> list[_Frame | None] | None:
        """The frames that may stand in this one's place; None where it is a character's."""
        node, at, below = frame.node, frame.at, frame.below
        if isinstance(node, Text):
            return [below] if at == len(node.text) else None
        if isinstance(node, Chars):
            return None
        if isinstance(node, Ref):
            return [self._frame(self._bodies[node.rule], 0, below)]
        if isinstance(node, Either):
            return [self._frame(part, 0, below) for part in node.parts]
        if isinstance(node, Then):
            if at == len(node.parts):
                return [below]
            rest = below if at + 1 == len(node.parts) else self._frame(node, at + 1, below)
            return [self._frame(node.parts[at], 0, rest)]
        ways: list[_Frame | None] = [below] if at >= node.low else []
        if node.high is None or at < node.high:
            # Without an upper bound it does not matter how often the part came once it was often enough.
            done = min(at + 1, node.low) if node.high is None else at + 1
            ways.append(self._frame(node.part, 0, self._frame(node, done, below)))
        return ways

    # -- shortest texts --

    def _cost(self, node: Node) -> float:
        found = self._costs.get(id(node))
        if found is None:
            found = self._costs[id(node)] = _least(node, self._rules)
        return found

    def _left(self, node: Node, at: int) -> float:
        """The shortest rest of a node of which `at` is there already."""
        if at == 0:
            return self._cost(node)
        if isinstance(node, Text):
            return len(node.text[at:].encode())
        if isinstance(node, Then):
            return sum(map(self._cost, node.parts[at:]))
        assert isinstance(node, Many)
        return max(0, node.low - at) * self._cost(node.part)

    def _shortest(self, node: Node, at: int = 0) -> str:
        """The shortest rest of a node. No recursion: the rules of hundreds of properties refer to each other."""
        parts = []
        todo = [(node, at)]
        while todo:
            node, at = todo.pop()
            if isinstance(node, Text):
                parts.append(node.text[at:])
            elif isinstance(node, Chars):
                parts.append(_pleasant(node))
            elif isinstance(node, Ref):
                todo.append((self._bodies[node.rule], 0))
            elif isinstance(node, Then):
                todo += [(part, 0) for part in reversed(node.parts[at:])]
            elif isinstance(node, Either):
                todo.append((min(node.parts, key=self._cost), 0))
            elif at < node.low:
                todo += [(node.part, 0)] * (node.low - at)
        return "".join(parts)


def _pleasant(node: Chars) -> str:
    """The shortest of these characters."""
    for char in _PLEASANT:
        if any(low <= ord(char) <= high for low, high in node.ranges):
            return char
    return chr(min(low for low, _ in node.ranges))


def _least(node: Node, rules: Mapping[str, float]) -> float:
    """Bytes of the shortest text of a node, given those of the rules."""
    if isinstance(node, Text):
        return len(node.text.encode())
    if isinstance(node, Chars):
        return len(_pleasant(node).encode())
    if isinstance(node, Ref):
        return rules[node.rule]
    if isinstance(node, Then):
        return sum(_least(part, rules) for part in node.parts)
    if isinstance(node, Either):
        return min((_least(part, rules) for part in node.parts), default=math.inf)
    return node.low * _least(node.part, rules) if node.low else 0


def _rule_costs(bodies: Mapping[str, Node]) -> dict[str, float]:
    """Bytes of each rule's shortest text: lowered until nothing changes, which comes because no cost is negative."""
    users: dict[str, list[str]] = {name: [] for name in bodies}
    for name, body in bodies.items():
        for used in _references(body):
            users[used].append(name)
    costs = dict.fromkeys(bodies, math.inf)
    todo = dict.fromkeys(bodies)
    while todo:
        name = next(iter(todo))
        del todo[name]
        cost = _least(bodies[name], costs)
        if cost < costs[name]:
            costs[name] = cost
            todo |= dict.fromkeys(users[name])
    return costs


def _references(node: Node) -> set[str]:
    if isinstance(node, Ref):
        return {node.rule}
    if isinstance(node, Many):
        return _references(node.part)
    return set().union(*map(_references, node.parts)) if isinstance(node, Then | Either) else set()
