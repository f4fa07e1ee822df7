"""Cells of the KV cache: who uses how many, which prefixes are kept, what is evicted. Pure Python.

The cache is unified: sequences that share a prefix share its cells. The ledger here and llama.cpp's own
memory change in the same calls, so they cannot drift apart.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable
from typing import Protocol

LEAST_KEPT = 2  # prefixes that are kept even if nobody has come back to one for a while
PATIENCE = 4  # new conversations that nobody goes on with, for each prefix that is kept less
MIN_MISSED = 32  # tokens; a shorter prefix is worth nothing: all conversations begin alike
MIN_STORED = 64  # tokens; for a shorter prefix nothing is looked for on the disk, and nothing written


class Memory(Protocol):
    """The memory operations of llama.cpp that the ledger drives. Positions are half-open; end -1 is "to the end"."""

    def seq_rm(self, slot: int, start: int, end: int) -> None: ...

    def seq_cp(self, source: int, target: int, start: int, end: int) -> None: ...


def common_prefix(a: array[int], b: array[int]) -> int:
    """How many leading tokens two arrays share. Bisection over memcmp: microseconds for 4,096 tokens."""
    if a[:4] != b[:4]:
        return next((i for i, (x, y) in enumerate(zip(a[:4], b[:4], strict=False)) if x != y), min(len(a), len(b), 4))
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class _Span:
    """A run of cells that the same slots use. Spans form a tree: the parent holds the positions before."""

    __slots__ = ("n", "n_users", "parent", "start")

    def __init__(self, parent: _Span | None, start: int) -> None:
        self.parent = parent
        self.start = start
        self.n = 0
        self.n_users = 1  # slots that end here, and spans that follow

    @property
    def end(self) -> int:
        return self.start + self.n


class Cells:
    """Counts the cells in use when slots share prefixes. Each operation costs a few tree nodes, not tokens."""

    def __init__(self, n_cells: int) -> None:
        self.n_cells = n_cells
        self.n_used = 0
        self._last: dict[int, _Span] = {}

    @property
    def n_free(self) -> int:
        return self.n_cells - self.n_used

    def length(self, slot: int) -> int:
        """Positions that a slot holds."""
        last = self._last.get(slot)
        return last.end if last else 0

    def extend(self, slot: int, n: int) -> None:
        assert n <= self.n_free, f"{n} cells wanted, {self.n_free} free"
        last = self._last.get(slot)
        if last is None:
            last = self._last[slot] = _Span(None, 0)
        elif last.n_users > 1:
            last.n_users -= 1  # this slot leaves, its new span joins
            last = self._last[slot] = self._child(last)
        last.n += n
        self.n_used += n

    def truncate(self, slot: int, length: int) -> None:
        """Forget the positions from `length` on."""
        last = self._last.pop(slot, None)
        if last is None:
            return
        kept = self._reach(last, length)
        if kept is not None:
            kept.n_users += 1
            self._last[slot] = kept
        self._leave(last)

    def fork(self, source: int, target: int, length: int) -> None:
        """Let an empty slot share the first `length` positions of another."""
        assert target not in self._last and length <= self.length(source)
        if length:
            span = self._reach(self._last[source], length)
            assert span is not None
            span.n_users += 1
            self._last[target] = span

    def n_used_by(self, slots: Iterable[int]) -> int:
        """Cells that these slots use together."""
        seen: set[int] = set()
        total = 0
        for slot in slots:
            span = self._last.get(slot)
            while span is not None and id(span) not in seen:
                seen.add(id(span))
                total += span.n
                span = span.parent
        return total

    def _child(self, parent: _Span) -> _Span:
        parent.n_users += 1
        return _Span(parent, parent.end)

    def _reach(self, span: _Span, length: int) -> _Span | None:
        """The span that ends exactly at `length` on the way from `span` to the root, split off if needed."""
        while span.start >= length:
            if span.parent is None:
                return None
            span = span.parent
        if span.end > length:
            upper = _Span(span.parent, span.start)  # takes over span's place among the parent's users
            upper.n = length - span.start
            span.n -= upper.n
            span.start, span.parent = length, upper
            span = upper
        return span

    def _leave(self, span: _Span) -> None:
        current: _Span | None = span
        while current is not None:
            current.n_users -= 1
            if current.n_users:
                return
            self.n_used -= current.n
            current = current.parent


class KvCache:
    """Lends slots and cells to sequences, and keeps finished ones as prefixes for those that come later.

    n_kept   prefixes that are worth keeping, to begin with; see regard(). By default as many as there are slots
    """

    def __init__(self, n_cells: int, n_slots: int, memory: Memory, n_kept: int | None = None) -> None:
        self.cells = Cells(n_cells)
        self.n_slots = n_slots
        self._memory = memory
        self._free_slots = list(range(n_slots - 1, -1, -1))
        self._cached: dict[int, array[int]] = {}  # least recently used first
        self._most_kept = n_slots if n_kept is None else n_kept
        self._n_kept = self._most_kept
        self._n_in_vain = 0  # sequences that have come since somebody came back to a prefix
        self._gone: deque[array[int]] = deque(maxlen=max(self._most_kept, 1))  # the tokens of those given up by trim()

    @property
    def n_cached_slots(self) -> int:
        return len(self._cached)

    @property
    def n_lent_slots(self) -> int:
        return self.n_slots - len(self._free_slots) - len(self._cached)

    @property
    def can_lend(self) -> bool:
        return bool(self._free_slots or self._cached)

    def lend(self) -> int:
        """An empty slot; a kept prefix is given up for it if there is no other."""
        if not self._free_slots:
            self.evict()
        return self._free_slots.pop()

    def extend(self, slot: int, n: int) -> None:
        """Account for `n` cells that the last batch filled."""
        self.cells.extend(slot, n)

    def truncate(self, slot: int, length: int) -> None:
        self._memory.seq_rm(slot, length, -1)
        self.cells.truncate(slot, length)

    def release(self, slot: int) -> None:
        """Give back a slot and every cell that nobody else uses."""
        self.truncate(slot, 0)
        self._free_slots.append(slot)

    def keep(self, slot: int, tokens: array[int]) -> None:
        """Keep a finished sequence as a prefix. `tokens` are those the cells hold."""
        assert len(tokens) == self.cells.length(slot)
        if tokens:
            self._cached[slot] = tokens
        else:
            self.release(slot)

    def evict(self) -> bool:
        """Give up the kept prefix that was used longest ago. False if none is left."""
        if not self._cached:
            return False
        slot = next(iter(self._cached))
        del self._cached[slot]
        self.release(slot)
        return True

    def regard(self, tokens: array[int], length: int) -> None:
        """A sequence begins, and its first `length` tokens were there. What kept prefixes are worth shows in that.

        Each row of a batch looks at all cells in use, so prefixes that nobody comes back to make every step longer.
        While that happens fewer are kept; one that is missed, though it was there a while ago, calls for all again.
        """
        is_missed = any(common_prefix(tokens, gone) >= length + MIN_MISSED for gone in self._gone)
        if is_missed or length >= MIN_MISSED:
            self._n_kept, self._n_in_vain = self._most_kept, 0
            return
        self._n_in_vain += 1
        if self._n_in_vain % PATIENCE == 0:
            self._n_kept = max(self._n_kept - 1, min(LEAST_KEPT, self._most_kept))

    def trim(self) -> None:
        """Give up the prefixes that are not worth keeping at the moment."""
        while len(self._cached) > self._n_kept:
            self._gone.append(next(iter(self._cached.values())))
            self.evict()

    def make_room(self, n: int) -> bool:
        """Evict kept prefixes until `n` cells are free."""
        while self.cells.n_free < n:
            if not self.evict():
                return False
        return True

    def could_make_room(self, n: int) -> bool:
        """Whether make_room() would: else it would evict everything in vain."""
        lent = set(range(self.n_slots)).difference(self._free_slots, self._cached)
        return self.cells.n_cells - self.cells.n_used_by(lent) >= n

    def best_cached(self, tokens: array[int]) -> tuple[int, int]:
        """(slot, length) of the kept prefix that shares most with these tokens; (-1, 0) if none does."""
        best, length = -1, 0
        for slot, kept in self._cached.items():
            n = common_prefix(tokens, kept)
            if n > length:
                best, length = slot, n
        return best, length

    def adopt(self, tokens: array[int], donor: int, length: int) -> int:
        """A slot that already holds the first `length` of these tokens, shared with the slot `donor`."""
        kept = self._cached.pop(donor, None)
        if kept is not None:
            if length == len(kept):
                return donor  # the new sequence continues where the old one ended
            self._cached[donor] = kept  # now the most recently used
        if not self._free_slots and next(iter(self._cached), None) == donor:
            # The only slot to be had is the donor itself: cut it back and take it over.
            del self._cached[donor]
            self.truncate(donor, length)
            return donor
        slot = self.lend()
        if length:
            self._memory.seq_cp(donor, slot, 0, length)
            self.cells.fork(donor, slot, length)
        return slot

    def clear(self) -> None:
        """Give up every kept prefix."""
        while self.evict():
            pass
