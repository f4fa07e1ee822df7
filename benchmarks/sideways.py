"""Two or more sides measured in turn, their medians, and the Markdown table they go into.

Knows nothing of what is measured.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import TypeVar

from llamacli import machine

WIDE = 0.2  # a spread from here on is mentioned: ratios near a goal are then worth little
BUSY = 0.25  # load average per core from which on other programs count as being in the way

_HEADER = ("what", "ours", "other", "ratio", "goal", "met")
T = TypeVar("T")


def in_turn(sides: Mapping[str, Callable[[], T]], n_runs: int, *, warms_up: bool = True) -> dict[str, list[T]]:
    """Measure every side once to warm it up, then `n_runs` times: A B C, B C A, ... Progress goes to stderr.

    warms_up   False for sides that have been measured before, in another way

    What changes in a machine within minutes (other programs, heat) then changes for all sides. Each round has an
    order of its own, the same in every run of a benchmark, so that nobody always follows the same neighbour.
    """
    found: dict[str, list[T]] = {name: [] for name in sides}
    shuffle = Random(0).shuffle
    for i in range(0 if warms_up else 1, n_runs + 1):
        order = list(sides.items())
        shuffle(order)
        for name, measure in order:
            print(f"{f'run {i} of {n_runs}' if i else 'warming up'}: {name}", file=sys.stderr, flush=True)
            value = measure()
            if i:
                found[name].append(value)
    return found


def spread(values: Sequence[float]) -> float:
    """Largest minus smallest, as a share of the median."""
    return (max(values) - min(values)) / median(values)


@dataclass(frozen=True, slots=True)
class Goal:
    """`is_met` takes our median and the other side's; the latter is NaN where there is none."""

    text: str
    is_met: Callable[[float, float], bool]


def at_most_times(limit: float) -> Goal:
    return Goal(f"≤ {limit:g}x", lambda ours, other: ours <= limit * other)


def at_least_times(limit: float) -> Goal:
    return Goal(f"≥ {limit:g}x", lambda ours, other: ours >= limit * other)


def at_most_more(limit: float, unit: str) -> Goal:
    return Goal(f"≤ {limit:g} {unit} more", lambda ours, other: ours - other <= limit)


def below(limit: float, unit: str) -> Goal:
    return Goal(f"< {limit:g} {unit}", lambda ours, _: ours < limit)


def above(limit: float, unit: str) -> Goal:
    return Goal(f"> {limit:,.0f} {unit}", lambda ours, _: ours > limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison. `ours` and `other` hold a value for each run; `other` is empty where there is no other side."""

    what: str
    unit: str
    ours: Sequence[float]
    other: Sequence[float] = ()
    goal: Goal | None = None

    def cells(self) -> tuple[str, ...]:
        ours = median(self.ours)
        other = median(self.other) if self.other else math.nan
        return (
            self.what,
            f"{_rounded(ours)} {self.unit}",
            f"{_rounded(other)} {self.unit}" if self.other else "",
            f"{ours / other:.2f}x" if self.other else "",
            self.goal.text if self.goal else "",
            ("yes" if self.goal.is_met(ours, other) else "no") if self.goal else "",
        )


def against_each(
    ours: str, what: str, unit: str, found: Mapping[str, Sequence[float]], goals: Mapping[str, Goal]
) -> list[Row]:
    """A row for each other side. `found` and `goals` go by the sides' names, `ours` is our own."""
    return [
        Row(what=f"{what}, against {name}", unit=unit, ours=found[ours], other=values, goal=goals.get(name))
        for name, values in found.items()
        if name != ours
    ]


def report(subject: str, rows: Sequence[Row], n_runs: int, load: float) -> str:
    """The whole output: what was measured and where, the table, and what makes it doubtful.

    load   the machine's load average before the first run
    """
    runs = "1 run" if n_runs == 1 else f"medians of {n_runs} runs"
    parts = [f"{subject}, {runs} of each side in turn, on {this_machine()}", table(rows)]
    notes = [*_busy(load, machine.usable_cores().threads), *wide_spreads(rows)]
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts)


def _busy(load: float, n_cores: int) -> Iterator[str]:
    if load >= BUSY * n_cores:
        yield f"the load average was {load:.2f} before the first run: other programs may have been in the way"


def wide_spreads(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each series that varies much; for the first row only, where several rows share one."""
    seen: list[Sequence[float]] = []
    for row in rows:
        for whose, values in (("our", row.ours), ("the other", row.other)):
            if values and values not in seen and spread(values) >= WIDE:
                seen.append(values)
                low, high = _rounded(min(values)), _rounded(max(values))
                yield f"{row.what}: {whose} runs lie between {low} and {high} {row.unit}"


def table(rows: Sequence[Row]) -> str:
    lines = [_HEADER, ("---",) * len(_HEADER), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def load_average() -> float:
    """Over the last minute; to be asked before our own work shows in it."""
    return os.getloadavg()[0]


def this_machine() -> str:
    cores = machine.usable_cores()
    return f"{machine.cpu_name()}, {cores.physical} cores, {cores.threads} threads"


def _rounded(value: float) -> str:
    """Three digits, or all that stand before the point."""
    n_decimals = next((n for n, least in enumerate((100, 10, 1)) if value >= least), 3)
    return f"{value:,.{n_decimals}f}"
