"""Keeps a running server and the ledger in step: once a second what was used goes in, and who may ask comes out.

All disk work is in one thread of its own; the server's event loop never waits for it.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from llamacli.errors import LlamacliError, ResourceError
from llamacli.server.keyring import KeyRing
from llamacli.server.keys import every
from llamacli.server.ledger import PATIENCE, Ledger
from llamacli.server.usage import Clock, Usage

PERIOD = 1.0  # seconds; what a killed server may lose, and half of what a new or revoked key may take
_SHORT_PATIENCE = 0.5  # seconds to wait for another writer; what is not written now is written in the next round


class Accounts:
    """The keys and the usage of a running server. Close it, or the last second is lost.

    ring, usage   for the event loop: they never wait
    report        is told when the ledger begins to fail, and when it works again, a line each; of a bug, the traceback
    """

    def __init__(
        self,
        path: Path,
        *,
        given: Sequence[str] = (),
        clock: Clock = time.time,
        report: Callable[[str], None],
        period: float = PERIOD,
    ) -> None:
        """Opens the ledger and reads it. Raises ResourceError or UsageError when that fails."""
        self.usage = Usage(clock)
        self.ring = KeyRing(given, self.usage)
        self._report = report
        self._period = period
        self._path = path
        self._ledger: Ledger | None = None
        self._seen = -1
        self._has_failed = False
        self._lock = threading.Lock()  # the ledger is used by one thread at a time
        self._closing = threading.Event()
        try:
            self.keep_step()
        except BaseException:
            self._let_go()
            raise
        self._thread = threading.Thread(target=self._run, name="accounts", daemon=True)
        self._thread.start()

    def __enter__(self) -> Accounts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write the rest and end. Raises ResourceError when it cannot be written, with the number that is lost."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()
        try:
            self.keep_step(PATIENCE)
        except LlamacliError as error:
            lost = self.usage.n_unwritten
            raise ResourceError(f"the usage of the last {lost:,} requests is lost: {error}") from error
        finally:
            self._let_go()

    def keep_step(self, patience: float = _SHORT_PATIENCE) -> None:
        """Read the keys if anyone has changed the ledger, then write what was used. One round of the thread."""
        with self._lock:
            ledger = self._in_place()
            ledger.wait_at_most(patience)
            # Keys first: a revoked key must not wait for a write that fails.
            count = ledger.change_count()
            if count != self._seen:
                self.ring.replace(every(ledger))
                self.usage.refresh(ledger)
                self._seen = count
            self.usage.flush(ledger)

    def _in_place(self) -> Ledger:
        """The ledger to which the path leads now: another one after it was removed or replaced."""
        if self._ledger is not None and not self._ledger.is_in_place():
            # Closed before the other is opened: both find their -wal and -shm files by the same names.
            self._let_go()
        if self._ledger is None:
            self._ledger = Ledger(self._path)
            self._seen = -1
        return self._ledger

    def _let_go(self) -> None:
        ledger, self._ledger = self._ledger, None
        if ledger is not None:
            ledger.close()

    def _run(self) -> None:
        while not self._closing.wait(self._period):
            try:
                self.keep_step()
            except LlamacliError as error:
                self._fail(str(error))
            except Exception as bug:  # a thread that ends would let revoked keys in for ever
                self._fail("".join(traceback.format_exception(bug)))
            else:
                if self._has_failed:
                    self._report("keys and usage are in step with the ledger again")
                self._has_failed = False

    def _fail(self, why: str) -> None:
        if not self._has_failed:
            self._report(f"keys stay as they were, and usage is kept in memory: {why}")
        self._has_failed = True
