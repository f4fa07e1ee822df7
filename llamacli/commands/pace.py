"""How far a count of answers is: a bar with the time left on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import os
import sys
from time import monotonic
from typing import TYPE_CHECKING

from llamacli.commands.terminal import Notices, before_dying, harmless

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

EVERY = 5.0  # seconds between two lines
_STDERR = 2


class Pace:
    """Of one piece of work.

    what    what is counted: "prompts" for instance
    total   None where nobody knows
    done    how many were there before
    """

    def __init__(self, what: str, total: int | None, notices: Notices, *, done: int = 0, quiet: bool = False) -> None:
        self._what, self._total, self._notices = what, total, notices
        self._before = self.done = done
        self.n_tokens = 0
        self._started = self._said = monotonic()
        self._rich: RichProgress | None = None
        self._task: TaskID | None = None
        self._is_quiet = quiet
        if not quiet and os.isatty(_STDERR) and os.environ.get("TERM") != "dumb":
            self._show_bar()

    def _show_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._rich = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
        )
        self._task = self._rich.add_task(self._what, total=self._total, completed=self.done, rate="")
        self._rich.start()
        before_dying(self.end)  # which shows the cursor again

    def count(self, n: int = 1, *, n_tokens: int = 0) -> None:
        """So many more are done; their answers have so many tokens."""
        self.done += n
        self.n_tokens += n_tokens
        if self._rich is not None and self._task is not None:
            self._rich.update(self._task, completed=self.done, rate=self.rate)
            return
        now = monotonic()
        if not self._is_quiet and now >= self._said + EVERY:
            self._said = now
            of = "" if self._total is None else f" of {self._total:,}"
            self._notices.say(f"{self.done:,}{of} {self._what}, {self.rate}{self._left(now)}")

    @property
    def seconds(self) -> float:
        return monotonic() - self._started

    @property
    def rate(self) -> str:
        return f"{self.n_tokens / max(self.seconds, 1e-3):,.0f} tokens/s"

    def _left(self, now: float) -> str:
        n_new = self.done - self._before
        if self._total is None or not n_new:
            return ""
        seconds = round((self._total - self.done) * (now - self._started) / n_new)
        return f", {seconds // 60} min {seconds % 60:02} s left"

    def say(self, line: str) -> None:
        """A notice, above the bar if there is one."""
        if self._rich is not None:
            self._rich.console.print(f"llamacli: {harmless(line)}", markup=False, highlight=False, soft_wrap=True)
        else:
            self._notices.say(line)

    def end(self) -> None:
        if self._rich is not None:
            self._rich.stop()
            self._rich = None
