"""The ledger of cells: exact under every sharing, and never apart from llama.cpp's own memory."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llamacli.engine.kv import Cells, KvCache, common_prefix
from llamacli.engine.sequence import NOTHING


class Remembered:
    """A memory that remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int, int]] = []

    def seq_rm(self, slot: int, start: int, end: int) -> None:
        self.calls.append(("rm", slot, start, end))

    def seq_cp(self, source: int, target: int, start: int, end: int) -> None:
        self.calls.append(("cp", source, target, end))


def tokens(*ids: int) -> array[int]:
    return array("i", ids)


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=40))
def test_common_prefix_is_what_counting_gives(a: list[int], b: list[int]) -> None:
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_prefix(tokens(*a), tokens(*b)) == expected


class CellsAgainstSets(RuleBasedStateMachine):
    """The span tree against the naive picture: a set of cell names for each slot."""

    SLOTS = 4

    def __init__(self) -> None:
        super().__init__()
        self.cells = Cells(1000)
        self.naive: dict[int, list[int]] = {slot: [] for slot in range(self.SLOTS)}
        self.next_name = 0

    @rule(slot=st.integers(0, 3), n=st.integers(1, 5))
    def extend(self, slot: int, n: int) -> None:
        self.cells.extend(slot, n)
        self.naive[slot] += range(self.next_name, self.next_name + n)
        self.next_name += n

    @rule(slot=st.integers(0, 3), length=st.integers(0, 20))
    def truncate(self, slot: int, length: int) -> None:
        self.cells.truncate(slot, min(length, len(self.naive[slot])))
        del self.naive[slot][length:]

    @precondition(lambda self: not all(self.naive.values()))
    @rule(source=st.integers(0, 3), share=st.integers(0, 20))
    def fork(self, source: int, share: int) -> None:
        target = next(slot for slot, names in self.naive.items() if not names)
        length = min(share, len(self.naive[source]))
        self.cells.truncate(target, 0)
        self.cells.fork(source, target, length)
        self.naive[target] = self.naive[source][:length]

    @invariant()
    def counts_agree(self) -> None:
        assert self.cells.n_used == len(set().union(*map(set, self.naive.values())))
        for slot, names in self.naive.items():
            assert self.cells.length(slot) == len(names)
        assert self.cells.n_used_by([0, 2]) == len({*self.naive[0], *self.naive[2]})


TestCells = CellsAgainstSets.TestCase
TestCells.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def kept(kv: KvCache, ids: array[int]) -> int:
    slot = kv.lend()
    kv.extend(slot, len(ids))
    kv.keep(slot, ids)
    return slot


def test_a_kept_prefix_is_shared_without_new_cells() -> None:
    memory = Remembered()
    kv = KvCache(100, 4, memory)
    donor = kept(kv, tokens(1, 2, 3, 4, 5))
    slot = kv.adopt(tokens(1, 2, 3, 9), donor, 3)
    assert slot != donor
    assert kv.cells.n_used == 5
    assert memory.calls == [("cp", donor, slot, 3)]


def test_a_sequence_that_continues_a_kept_one_takes_over_its_slot() -> None:
    kv = KvCache(100, 4, Remembered())
    donor = kept(kv, tokens(1, 2, 3))
    assert kv.adopt(tokens(1, 2, 3, 4), donor, 3) == donor
    assert kv.n_cached_slots == 0


def test_the_prefix_that_was_used_longest_ago_is_evicted_first() -> None:
    kv = KvCache(100, 3, Remembered())
    old, young = kept(kv, tokens(1, 2)), kept(kv, tokens(3, 4))
    assert kv.best_cached(tokens(1, 2, 5)) == (old, 2)
    kv.release(kv.adopt(tokens(1, 9), old, 1))  # used: now the younger one
    kv.evict()
    assert kv.best_cached(tokens(3, 4))[1] == 0
    assert kv.best_cached(tokens(1, 2))[1] == 2
    assert young in [kv.lend(), kv.lend()]


def test_the_only_slot_left_is_cut_back_and_taken_over() -> None:
    kv = KvCache(100, 1, Remembered())
    donor = kept(kv, tokens(1, 2, 3))
    assert kv.adopt(tokens(1, 2, 9), donor, 2) == donor
    assert kv.cells.length(donor) == 2 == kv.cells.n_used


def test_room_is_made_from_kept_prefixes_only() -> None:
    kv = KvCache(10, 4, Remembered())
    kept(kv, tokens(1, 2, 3, 4))
    running = kv.lend()
    kv.extend(running, 4)
    assert kv.make_room(6)
    assert not kv.make_room(7)
    assert kv.cells.length(running) == 4


def answered(kv: KvCache, first: int, begins: array[int] = NOTHING) -> bool:
    """One sequence from its beginning to its end. Whether what it begins with was there."""
    ids = begins + tokens(*range(first, first + 40))
    slot, length = kv.best_cached(ids)
    lent = kv.adopt(ids, slot, length) if length else kv.lend()
    kv.regard(ids, length)
    kv.trim()
    kv.extend(lent, len(ids) - length)
    kv.keep(lent, ids)
    return length > 0


def test_prefixes_that_nobody_comes_back_to_are_not_kept_for_ever() -> None:
    kv = KvCache(4000, 12, Remembered(), n_kept=8)
    for i in range(8):
        answered(kv, 100 * i)
    assert kv.n_cached_slots >= 7, "each may be the beginning of a conversation"
    for i in range(8, 40):
        answered(kv, 100 * i)
    assert kv.n_cached_slots == 3  # the last one has ended since
    assert answered(kv, 3900)


def test_who_comes_back_finds_all_of_them_again() -> None:
    kv = KvCache(4000, 12, Remembered(), n_kept=8)
    for i in range(40):
        answered(kv, 100 * i)
    assert not answered(kv, 3500), "given up meanwhile"
    for i in range(5):
        answered(kv, 5000 + 100 * i)
    assert answered(kv, 3500)
    assert all(answered(kv, 5000 + 100 * i) for i in range(5))


def test_a_beginning_that_all_prompts_share_says_nothing() -> None:
    kv = KvCache(4000, 12, Remembered(), n_kept=8)
    for i in range(40):
        answered(kv, 100 * i, begins=tokens(*range(10)))
    assert kv.n_cached_slots == 3


def test_giving_everything_back_leaves_nothing() -> None:
    memory = Remembered()
    kv = KvCache(100, 4, memory)
    donor = kept(kv, tokens(1, 2, 3))
    slot = kv.adopt(tokens(1, 2, 9), donor, 2)
    kv.extend(slot, 5)
    kv.release(slot)
    kv.clear()
    assert (kv.cells.n_used, kv.n_lent_slots, kv.n_cached_slots) == (0, 0, 0)


def test_more_cells_than_there_are_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="cells wanted"):
        Cells(3).extend(0, 4)
