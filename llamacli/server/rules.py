"""Which requests a simulated fault happens to: by route, by body, by chance with a seed, by their number.

seed = 7

[[rule]]
simulate = "status=429, retry-after=2"
route = "/v1/getData"     # all three addresses of the Llama 2 API
body = "llama ?2"         # a regular expression that is found in the body
nth = 2                   # or [2, 5]: of the requests that fit
probability = 0.1
count = 3                 # no more often than that
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamacli.errors import UsageError
from llamacli.server.matching import route_of
from llamacli.server.simulation import Fault, parse

_KEYS = ("simulate", "route", "body", "nth", "probability", "seed", "count")


@dataclass(slots=True)
class Rule:
    """nth      of the requests that fit, counted from 1; empty: all of them
    chance   is drawn from once for each request that fits and is due
    """

    fault: Fault
    route: str | None = None
    body: re.Pattern[str] | None = None
    nth: frozenset[int] = frozenset()
    probability: float = 1.0
    count: int | None = None
    seed: str = ""
    _n_seen: int = 0
    _n_fired: int = 0
    _chance: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self.rewind()

    def rewind(self) -> None:
        self._n_seen = self._n_fired = 0
        self._chance.seed(self.seed)

    def is_due(self, path: str, text: str, *, is_work: bool) -> bool:
        """Whether this request is one of its own. Counts it."""
        if route_of(path) != self.route and (self.route is not None or not is_work):
            return False
        if self.body is not None and not self.body.search(text):
            return False
        self._n_seen += 1
        if self.nth and self._n_seen not in self.nth:
            return False
        return self._chance.random() < self.probability

    def fire(self) -> Fault | None:
        """None when it has happened as often as it may."""
        if self.count is not None and self._n_fired >= self.count:
            return None
        self._n_fired += 1
        return self.fault


class Rules:
    """The first rule that is due has it. Those of the file stay; others last until the rewind."""

    def __init__(self, rules: Sequence[Rule] = ()) -> None:
        self._fixed = tuple(rules)
        self._rules = list(rules)

    def add(self, rule: Rule) -> None:
        """It goes before those that are there."""
        self._rules.insert(0, rule)

    def rewind(self) -> None:
        self._rules = list(self._fixed)
        for rule in self._rules:
            rule.rewind()

    def fault(self, path: str, raw: bytes, *, is_work: bool) -> Fault | None:
        """What is to happen to this request. `is_work`: it asks the model; others are only hit by their route."""
        if not self._rules:
            return None
        text = raw.decode("utf-8", "replace")
        due = [rule for rule in self._rules if rule.is_due(path, text, is_work=is_work)]
        return next((fault for rule in due if (fault := rule.fire()) is not None), None)


def read(path: Path) -> Rules:
    """Raises UsageError naming the rule and what is wrong with it."""
    try:
        value = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"--simulate {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"--simulate {path.name} is not TOML: {error}") from None
    unknown = [name for name in value if name not in ("rule", "seed")]
    if unknown:
        raise UsageError(f"--simulate {path.name}: {unknown[0][:50]!r} is unknown; known are seed and [[rule]]")
    found = value.get("rule", [])
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found) or not found:
        raise UsageError(f"--simulate {path.name} has no rules: each begins with [[rule]]")
    rules = []
    for number, each in enumerate(found, 1):
        try:
            rules.append(rule_of(each, default_seed=f"{value.get('seed', 0)}/{number}"))
        except UsageError as error:
            raise UsageError(f"--simulate {path.name}, rule {number}: {error}") from None
    return Rules(rules)


def rule_of(value: Mapping[str, Any], *, default_seed: str = "0") -> Rule:
    """Raises UsageError."""
    for name in value:
        if name not in _KEYS:
            raise UsageError(f"{name[:50]!r} is unknown; known are {', '.join(_KEYS)}")
    simulate, route, body = (_text(value, name) for name in ("simulate", "route", "body"))
    if simulate is None:
        raise UsageError('simulate is missing: say what is to happen, such as "status=429, retry-after=2"')
    seed = value.get("seed")
    return Rule(
        parse(simulate),
        route=route_of(route) if route is not None else None,
        body=_pattern(body) if body is not None else None,
        nth=_nth(value.get("nth")),
        probability=_probability(value.get("probability", 1.0)),
        count=_count(value.get("count")),
        seed=default_seed if seed is None else str(seed),
    )


def _text(value: Mapping[str, Any], name: str) -> str | None:
    found = value.get(name)
    if found is not None and not isinstance(found, str):
        raise UsageError(f"{name} must be text")
    return found


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageError(f"body is no regular expression: {error}") from None


def _nth(found: object) -> frozenset[int]:
    numbers = found if isinstance(found, list) else [] if found is None else [found]
    if not all(_is_whole(each, 1) for each in numbers):
        raise UsageError("nth must be a number from 1 on, or an array of them")
    return frozenset(numbers)


def _probability(found: object) -> float:
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= 1:
        raise UsageError("probability must be a number between 0 and 1")
    return float(found)


def _count(found: Any) -> int | None:
    if found is not None and not _is_whole(found, 0):
        raise UsageError("count must be a number, 0 or more")
    return None if found is None else int(found)


def _is_whole(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
