"""Where a long piece of work is: a line that replaces itself on a terminal, one every few seconds elsewhere."""

from __future__ import annotations

import os
import sys
from time import monotonic
from typing import TYPE_CHECKING

from llamacli.commands.terminal import Notices, harmless

if TYPE_CHECKING:
    from rich.status import Status

EVERY = 5.0  # seconds between two lines
_STDERR = 2


class Stages:
    def __init__(self, notices: Notices, *, quiet: bool = False) -> None:
        self._notices = notices
        self._is_quiet = quiet
        self._said = monotonic()
        self._status: Status | None = None
        if not quiet and os.isatty(_STDERR) and os.environ.get("TERM") != "dumb":
            self._show()

    def _show(self) -> None:
        from rich.console import Console
        from rich.status import Status

        self._status = Status("", console=Console(file=sys.stderr))
        self._status.start()

    def begin(self, what: str) -> None:
        if self._status is not None:
            from rich.text import Text

            self._status.update(Text(harmless(what)))
            return
        now = monotonic()
        if not self._is_quiet and now >= self._said + EVERY:
            self._said = now
            self._notices.say(what)

    def end(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
