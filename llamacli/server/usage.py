"""What each key has used, by UTC day: counted in memory, written to the ledger in batches, read back for a report.

Knows nothing of limits, and only ids of keys.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from llamacli.server.ledger import Ledger

Clock = Callable[[], float]  # Unix seconds


@dataclass(frozen=True, slots=True)
class Counts:
    """`errors` are those of the requests that were refused or failed. `last_used` is in Unix seconds."""

    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    last_used: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def plus(self, other: Counts) -> Counts:
        return Counts(
            self.requests + other.requests,
            self.errors + other.errors,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            max(self.last_used, other.last_used),
        )

    def minus(self, earlier: Counts) -> Counts:
        """What has been added since."""
        return Counts(
            self.requests - earlier.requests,
            self.errors - earlier.errors,
            self.prompt_tokens - earlier.prompt_tokens,
            self.completion_tokens - earlier.completion_tokens,
            self.last_used,
        )


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a report: a UTC day ("2024-12-31"), a key's id, and what it used that day."""

    day: str
    key_id: str
    counts: Counts


_NOTHING = Counts()
_COLUMNS = "requests, errors, prompt_tokens, completion_tokens, last_used"
_ADD = f"""
INSERT INTO usage (day, key, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (day, key) DO UPDATE SET
    requests = requests + excluded.requests, errors = errors + excluded.errors,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens,
    last_used = max(last_used, excluded.last_used)
"""


class Usage:
    """The counts of a running server. `record` and `tokens` never wait for the disk; `flush` and `refresh` do.

    What is counted stays in memory until it has been written, so that a flush that fails loses nothing.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._lock = threading.Lock()  # held for dictionary work only
        self._unwritten: dict[tuple[str, str], Counts] = {}
        self._written: dict[tuple[str, str], Counts] = {}  # of today, by all servers on this ledger

    def record(self, key_id: str, *, prompt_tokens: int = 0, completion_tokens: int = 0, is_error: bool) -> None:
        """One request that is over."""
        now = self.clock()
        place = (day_of(now), key_id)
        one = Counts(1, int(is_error), prompt_tokens, completion_tokens, now)
        with self._lock:
            self._unwritten[place] = self._unwritten.get(place, _NOTHING).plus(one)

    def tokens(self, key_id: str, day: str) -> int:
        """Prompt and completion tokens of a key on a day that is not over: written ones and those still here."""
        place = (day, key_id)
        with self._lock:
            return self._written.get(place, _NOTHING).tokens + self._unwritten.get(place, _NOTHING).tokens

    @property
    def n_unwritten(self) -> int:
        """Requests that the ledger does not hold yet."""
        with self._lock:
            return sum(counts.requests for counts in self._unwritten.values())

    def flush(self, ledger: Ledger) -> None:
        """Write what is not written. Raises ResourceError, and keeps it for the next time."""
        with self._lock:
            batch = dict(self._unwritten)
        if not batch:
            return
        with ledger.transaction():
            ledger.write(_ADD, [(*place, *_values(counts)) for place, counts in batch.items()])
            written = self._of_today(ledger)
        with self._lock:
            self._written = written
            for place, counts in batch.items():
                left = self._unwritten[place].minus(counts)
                if left.requests:
                    self._unwritten[place] = left
                else:
                    del self._unwritten[place]

    def refresh(self, ledger: Ledger) -> None:
        """Learn what has been written by others, or before this server began."""
        written = self._of_today(ledger)
        with self._lock:
            self._written = written

    def _of_today(self, ledger: Ledger) -> dict[tuple[str, str], Counts]:
        return {(line.day, line.key_id): line.counts for line in report(ledger, self.clock(), n_days=1)}


def report(ledger: Ledger, now: float, *, n_days: int) -> list[Line]:
    """The last days, today included, the newest last."""
    first = datetime.fromtimestamp(now, UTC).date() - timedelta(days=n_days - 1)
    query = f"SELECT day, key, {_COLUMNS} FROM usage WHERE day >= ? ORDER BY day, key"
    return [Line(day, key_id, Counts(*counts)) for day, key_id, *counts in ledger.read(query, (first.isoformat(),))]


def last_used(ledger: Ledger) -> dict[str, float]:
    """Unix seconds of the last request of each key that made any."""
    return dict(ledger.read("SELECT key, max(last_used) FROM usage GROUP BY key"))


def day_of(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).date().isoformat()


def seconds_of_day_left(now: float) -> float:
    """Until the next UTC midnight. A day of Unix time always has 86,400 seconds."""
    return 86_400 - now % 86_400


def _values(counts: Counts) -> tuple[float, ...]:
    return (counts.requests, counts.errors, counts.prompt_tokens, counts.completion_tokens, counts.last_used)
