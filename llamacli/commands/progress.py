"""How far a download or a measurement is: a bar on a terminal, lines elsewhere, nothing with --quiet."""

from __future__ import annotations

import os
import sys
from time import monotonic
from typing import TYPE_CHECKING

from llamacli.commands.terminal import Notices, before_dying, harmless
from llamacli.models.transfer import Progress, Report

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

EVERY = 5.0  # seconds between two lines
_STDERR = 2


class Bar:
    """One download at a time."""

    def __init__(self, notices: Notices, *, quiet: bool = False, what: str = "downloading") -> None:
        self._notices = notices
        self._quiet = quiet
        self._what = what
        self._rich: RichProgress | None = None

    def begin(self, name: str, total: int) -> Report:
        """`total` in bytes. Returns what is to be told of the progress."""
        if self._quiet:
            return lambda progress: None
        if os.isatty(_STDERR) and os.environ.get("TERM") != "dumb":
            return self._begin_bar(name, total)
        return _Lines(self._notices, f"{self._what} {name}", total).report

    def end(self) -> None:
        if self._rich is not None:
            self._rich.stop()
            self._rich = None

    def _begin_bar(self, name: str, total: int) -> Report:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        self._rich = rich = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[trouble]}", markup=False),
            console=Console(file=sys.stderr),
        )
        # Begun with the first report, so that bytes of an earlier run do not count for the rate.
        task = rich.add_task(name, start=False, total=total, trouble="")
        rich.start()
        before_dying(self.end)  # which shows the cursor again
        has_begun = False

        def report(progress: Progress) -> None:
            nonlocal has_begun
            if not has_begun:
                has_begun = True
                rich.start_task(task)
                rich.reset(task, completed=progress.done, total=progress.total)
            rich.update(task, completed=progress.done, trouble=progress.trouble)

        return report


class Stages:
    """Work whose parts have names: a bar on a terminal, lines elsewhere."""

    def __init__(self, what: str, notices: Notices, *, quiet: bool = False) -> None:
        self._what, self._notices, self._quiet = what, notices, quiet
        self._stage = ""
        self._said = monotonic()
        self._rich: RichProgress | None = None
        self._task: TaskID | None = None
        if not quiet and os.isatty(_STDERR) and os.environ.get("TERM") != "dumb":
            self._show_bar()

    def _show_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._rich = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[stage]}", markup=False),
            console=Console(file=sys.stderr),
            transient=True,
        )
        self._task = self._rich.add_task(harmless(self._what), total=1.0, stage="")
        self._rich.start()
        before_dying(self.end)

    def report(self, share: float | None, stage: str) -> None:
        """share   of all the work that is done, from 0 to 1; None where nobody knows: then not every stage is a line"""
        if self._rich is not None and self._task is not None:
            self._rich.update(self._task, total=None if share is None else 1.0, completed=share or 0.0, stage=stage)
        elif stage and stage != self._stage and not self._quiet:
            self._say(share, stage)
        self._stage = stage

    def _say(self, share: float | None, stage: str) -> None:
        if share is not None:
            self._notices.say(f"{self._what}: {share:.0%}, {stage}")
        elif monotonic() >= self._said + EVERY:
            self._said = monotonic()
            self._notices.say(f"{self._what}: {stage}")

    def end(self) -> None:
        if self._rich is not None:
            self._rich.stop()
            self._rich = None


class _Lines:
    """Plain lines, one every few seconds, and one when all is there."""

    def __init__(self, notices: Notices, what: str, total: int) -> None:
        self._notices = notices
        self._what = what
        self._total = total
        self._started = self._next = monotonic()
        self._first: int | None = None
        self._trouble = ""
        self._is_over = False

    def report(self, progress: Progress) -> None:
        now = monotonic()
        if self._first is None:
            self._first = progress.done
            self._notices.say(f"{self._what}: {size(self._total)}{self._kept(progress.done)}")
            self._next = now + EVERY
        elif progress.trouble != self._trouble and progress.trouble:
            self._notices.say(f"{self._what}: {progress.trouble}")
        elif progress.done == progress.total and not self._is_over:
            self._is_over = True
            self._notices.say(f"{self._what}: done, {self._rate(progress.done, now)}")
        elif now >= self._next and not self._is_over:
            self._next = now + EVERY
            share = 100 * progress.done // max(1, progress.total)
            self._notices.say(
                f"{self._what}: {share} %, {size(progress.done)} of {size(progress.total)}, "
                f"{self._rate(progress.done, now)}{self._left(progress, now)}"
            )
        self._trouble = progress.trouble

    def _kept(self, done: int) -> str:
        return f", of which {size(done)} are here already" if done else ""

    def _speed(self, done: int, now: float) -> float:
        return (done - (self._first or 0)) / max(1e-3, now - self._started)

    def _rate(self, done: int, now: float) -> str:
        return f"{size(round(self._speed(done, now)))}/s"

    def _left(self, progress: Progress, now: float) -> str:
        speed = self._speed(progress.done, now)
        if speed <= 0:
            return ""
        seconds = round((progress.total - progress.done) / speed)
        return f", {seconds // 60} min {seconds % 60:02} s left"


def size(n_bytes: int) -> str:
    """Bytes for people, in the decimal units that the hub uses."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.2f} {name}" if unit == 10**9 else f"{n_bytes / unit:.1f} {name}"
    return f"{n_bytes} B"
