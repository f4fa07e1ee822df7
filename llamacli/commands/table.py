"""Tables on stdout: drawn by rich on a terminal, plain aligned columns in a pipe."""

from __future__ import annotations

import os
from collections.abc import Sequence

from llamacli.commands import terminal
from llamacli.commands.terminal import harmless


def show(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """`right` are the columns whose text stands at their right edge."""
    safe = [[harmless(" ".join(cell.splitlines())) for cell in row] for row in rows]
    if os.isatty(terminal.STDOUT):
        _draw(header, safe, right)
        return
    lines = [list(header), *safe]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        write("  ".join(cells).rstrip())


def write(line: str) -> None:
    terminal.write_all(terminal.STDOUT, f"{line}\n".encode("utf-8", "backslashreplace"))


def _draw(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i in right else "left", overflow="fold", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
