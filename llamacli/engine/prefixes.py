"""Between the engine and its prefix store: stored cells become a kept prefix, a prompt's cells become a file.

After restore() everything goes on as if the prefix had been kept in the cache all along. What is to be stored is
noted when its prompt has been read, and written by save() when nobody waits.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from llamacli.engine.kv import MIN_STORED, KvCache, common_prefix
from llamacli.engine.model import Model
from llamacli.engine.prefix_file import PIECE, Damaged, Draft
from llamacli.engine.prefix_store import MAX_CHAIN, Found, PrefixStore

MAX_OWED = 32  # prompts that wait to be written; each keeps its logits in memory


class _Owed(NamedTuple):
    tokens: array[int]
    logits: bytes | None  # after the last token, where somebody may ask for the very same again


class Prefixes:
    """The stored prefixes of an engine's model. Its methods belong to the engine's thread.

    least        tokens of a prompt that is looked for and kept

    n_restored   tokens that came from the store since it began
    n_stored     prompts that were written
    """

    def __init__(self, store: PrefixStore, *, least: int = MIN_STORED) -> None:
        self.least = least
        self.n_restored = 0
        self.n_stored = 0
        self._store = store
        self._owed: deque[_Owed] = deque(maxlen=MAX_OWED)
        self._expected: tuple[array[int], Found | None] | None = None
        self._saving: Iterator[None] | None = None  # begun by save_some()

    @property
    def owes(self) -> bool:
        """Whether there is anything to write. Any thread may ask."""
        return bool(self._owed) or self._saving is not None

    def expect(self, tokens: array[int]) -> None:
        """A prompt that will come: look for it, and check what is found while the context is being made."""
        found = self._store.find(tokens)
        if found is not None:
            found.begin()
        self._expected = tokens, found

    def restore(self, tokens: array[int], kv: KvCache, model: Model, n_there: int) -> bytes | None:
        """Keep the stored cells of a prompt as a prefix in the cache.

        n_there   tokens of it that need not be computed as it is

        Returns the logits after its last token, if all its cells are there and they are known.
        """
        if n_there > len(tokens) - MIN_STORED:
            return None
        while (found := self._look(tokens)) is not None and found.length >= n_there + MIN_STORED:
            try:
                n = _taken_over(found, tokens, kv, model)
            except Damaged as damaged:
                self._store.discard(damaged.path)
                if damaged.path.exists():  # it cannot be removed: it would be found again and again
                    return None
                continue
            self.n_restored += n
            return found.logits if n == len(tokens) else None
        return None

    def owe(self, tokens: array[int], logits: bytes) -> None:
        """Note a prompt that has been read. What is restored is noted too: it may not be stored to its end."""
        self._owed.append(_Owed(tokens, logits))

    def owe_answer(self, tokens: array[int], kv: KvCache) -> None:
        """Note what is computed of a prompt and its answer: a conversation that goes on from there.

        The prompt by itself then needs no file.
        """
        tokens = tokens[: kv.best_cached(tokens)[1]]
        if len(tokens) < self.least:
            return
        others = (owed for owed in self._owed if common_prefix(owed.tokens, tokens) < len(owed.tokens))
        self._owed = deque(others, maxlen=MAX_OWED)
        self._owed.append(_Owed(tokens, None))

    def save(self, kv: KvCache, model: Model) -> Iterator[None]:
        """Write what is owed and still in the cache, a piece at each step. What cannot be written is forgotten."""
        while self._owed:
            owed = self._owed.popleft()
            with suppress(OSError):
                yield from self._write(owed, kv, model)

    def save_some(self, kv: KvCache, model: Model) -> bool:
        """Write one piece. False when nothing is left to write."""
        if self._saving is None:
            self._saving = self.save(kv, model) if self._owed else iter(())
        if next(self._saving, self) is self:
            self._saving = None
        return self.owes

    def _look(self, tokens: array[int]) -> Found | None:
        expected, self._expected = self._expected, None
        if expected is not None and expected[0] == tokens:
            return expected[1]
        return self._store.find(tokens)

    def _write(self, owed: _Owed, kv: KvCache, model: Model) -> Iterator[None]:
        tokens, n = owed.tokens, len(owed.tokens)
        base = self._store.find(tokens)
        if base is not None and (base.is_all or (owed.logits is None and base.length == n)):
            return
        if base is not None and (base.length < n // 2 or base.n_files >= MAX_CHAIN):
            base = None  # to read what is not needed of it would cost more than it saves on the disk
        start = base.length if base else 0
        n_logits = len(owed.logits or b"")
        draft: Draft | None = None
        try:
            for first in range(start, n, PIECE):
                slot, length = kv.best_cached(tokens)
                state = model.save(slot, first, min(first + PIECE, n)) if length == n else b""
                if not state:
                    return
                if draft is None:
                    n_bytes = len(state) * (-(-(n - start) // PIECE)) + n_logits + 8 * n
                    draft = self._store.draft(tokens, owed.logits, base, start, n_bytes)
                if draft is None:
                    return
                draft.add(state)
                yield
            draft = draft or self._store.draft(tokens, owed.logits, base, start, n_logits + 8 * n)
            if draft is not None:
                draft.finish()
                self.n_stored += 1
        finally:
            if draft is not None:
                draft.discard()


def _taken_over(found: Found, tokens: array[int], kv: KvCache, model: Model) -> int:
    """Fill a slot with stored cells and keep it as a prefix. Returns its length; 0 if there is no room. Raises Damaged.

    Cells that are not of use are cut off again, wherever in the middle they come.
    """
    if not kv.can_lend or not kv.could_make_room(found.n_cells):
        return 0
    kv.make_room(found.n_cells)
    slot, n = kv.lend(), 0
    try:
        for piece in found.pieces():
            if not model.restore(slot, piece.start, piece.end, piece.state):
                break
            n = piece.keep
            if n < piece.end:
                model.seq_rm(slot, n, -1)
    except Damaged:
        kv.release(slot)
        raise
    kv.extend(slot, n)
    kv.keep(slot, tokens[:n])
    return n
