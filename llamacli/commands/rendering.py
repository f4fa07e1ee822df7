"""An answer on a terminal: plain while it comes, and each part of it set as Markdown once it is complete.

A part is a paragraph, a list, a table, a block of code. Only the part that is being written is ever drawn again, so
that an answer longer than the screen comes out right; a part that is itself longer than the screen, or during which the
window has changed its size, stays as it came. Lines are broken here and not by the terminal, whose idea of a
character's width may be another: where the part begins on the screen is then known.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from os import terminal_size

from llamacli.commands.terminal import harmless

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_ITEM = re.compile(r"\s*(?:[-*+]|\d{1,9}[.)])(?:\s|$)")
_JOINS = "\u200d\ufe0f"  # make one character of several: counted as wide as they would be apart, or wider
_TAB = 4


class Setting:
    """One answer.

    write   to the terminal
    size    of its window, now
    sets    whether Markdown is to be set at all
    """

    def __init__(self, write: Callable[[str], None], size: Callable[[], terminal_size], *, sets: bool) -> None:
        self._write = write
        self._size = size
        self._sets = sets
        self._begin()

    def _begin(self) -> None:
        self._part = ""  # as it came, spelt harmless
        self._row = self._column = 0  # of the cursor, since the part began
        self._window = self._size()

    def feed(self, text: str) -> None:
        text = harmless(text).replace("\t", " " * _TAB)
        if not self._part:
            text = text.lstrip("\n")
        if not text:
            return
        self._draw(text)
        if "\n" in text:
            while (end := complete(self._part)) > 0:
                self._settle(self._part[:end], self._part[end:])

    def end(self) -> None:
        """The answer is complete: the cursor is at the beginning of a line afterwards."""
        if self._part.strip():
            self._settle(self._part, None)

    def _draw(self, text: str) -> None:
        self._part += text
        self._write(self._broken(text))

    def _broken(self, text: str) -> str:
        """With a newline wherever the window's edge comes."""
        width, shown = max(2, self._window.columns), []
        for character in text:
            n = _width(character)
            if character == "\n" or self._column + n > width - 1:
                shown.append("\n")
                self._row, self._column = self._row + 1, 0
            if character != "\n":
                shown.append(character)
                self._column += n
        return "".join(shown)

    def _settle(self, part: str, rest: str | None) -> None:
        """Set a part that is complete, and begin the next one. `rest` is None at the end of the answer."""
        if self._sets and self._can_go_back():
            back = f"\r\x1b[{self._row}A\x1b[J" if self._row else "\r\x1b[J"
            drawn = self._set(part.strip("\n"))
            self._begin()
            self._part = rest or ""
            self._write(back + drawn + ("\n" if rest is None else "\n\n") + self._broken(self._part))
            return
        if rest is None and self._column:
            self._write("\n")
        self._begin()
        self._part = rest or ""
        self._broken(self._part)  # it stands there already

    def _can_go_back(self) -> bool:
        window = self._size()
        return window == self._window and self._row < window.lines

    def _set(self, text: str) -> str:
        """With the control sequences of bold text, colours and so on; no newline at its end."""
        return markdown(text, self._window.columns)


def complete(text: str) -> int:
    """Where the first part of a text ends, if it is complete: behind the blank lines after it. 0 if it is not.

    A list goes on after a blank line if an item or an indented line follows, so that the line after it must be there.
    """
    lines = text.splitlines(keepends=True)
    fence, end = "", 0
    is_list = bool(lines) and (_ITEM.match(lines[0]) is not None or lines[0][:1] == " ")
    for i, line in enumerate(lines):
        if not line.endswith("\n"):
            return 0
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and fence and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
            fence = ""
        end += len(line)
        if fence or line.strip() or i == 0:
            continue
        if not is_list:
            return end
        after = next((other for other in lines[i + 1 :] if other.strip()), "")
        if after.endswith("\n") and not _ITEM.match(after) and after[:1] != " ":
            return end
    return 0


def markdown(text: str, width: int) -> str:
    """A part of a text, set for a terminal of this width. What looks like HTML is text, and line breaks stay."""
    from io import StringIO

    from markdown_it import MarkdownIt
    from rich.console import Console
    from rich.markdown import Markdown

    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    # A terminal has no pictures; a link may stand in another part; an entity may be a character that does harm.
    parser.disable(["image", "reference", "entity"])
    tokens = parser.parse(text)
    for token in tokens:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    document = Markdown(text, code_theme="ansi_dark", hyperlinks=False)
    document.parsed = tokens
    out = StringIO()
    Console(file=out, width=width, force_terminal=True, legacy_windows=False).print(document)
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").split("\n"))


def _width(character: str) -> int:
    """Columns that it may take, rather one more than one less."""
    if character in _JOINS:
        return 1
    from rich.cells import cell_len

    return 1 if " " <= character <= "~" else cell_len(character)
