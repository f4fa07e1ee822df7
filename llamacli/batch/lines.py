"""The lines of an input, one at a time: JSON objects or rows of a CSV, from a file or as a pipe brings them.

A line that is none is a value too, with what is wrong with it. Knows nothing of what the lines ask.
"""

from __future__ import annotations

import csv
import io
import json
import select
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Queue
from typing import Any, BinaryIO, NoReturn, Protocol

from llamacli.errors import UsageError

MAX_LINE = 16 << 20  # bytes
MAX_WAITING = 256  # lines of a pipe that are read ahead
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """One prompt's line, by its number in the input, from 1 on. Either its values or what is wrong with it."""

    number: int
    values: dict[str, Any] | None = None
    problem: str = ""


class Feed(Protocol):
    """Where lines come from."""

    def take(self, *, wait: bool) -> Line | None:
        """The next line. None where there is none yet, and where there will be none any more.

        wait   until there is one, or certainly none
        """

    @property
    def is_over(self) -> bool: ...


class Ready:
    """Lines that are all there."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self.is_over = False

    def take(self, *, wait: bool) -> Line | None:
        line = next(self._lines, None)
        self.is_over = line is None
        return line


class Coming:
    """Lines that somebody else is still writing: read in a thread of their own."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._queue: Queue[Line | BaseException | None] = Queue(MAX_WAITING)
        self.is_over = False
        threading.Thread(target=self._read, name="input", daemon=True).start()

    def _read(self) -> None:
        try:
            for line in self._lines:
                self._queue.put(line)
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)

    def take(self, *, wait: bool) -> Line | None:
        if self.is_over or (not wait and self._queue.empty()):
            return None
        found = self._queue.get()
        if isinstance(found, BaseException):
            self.is_over = True
            raise found
        self.is_over = found is None
        return found


class Patient(io.FileIO):
    """A descriptor that is read as if it were blocking: who shares it with us may have set it not to be."""

    def readinto(self, buffer: Any, /) -> int:
        while (n := super().readinto(buffer)) is None:
            select.select([self], [], [])
        return n


def jsonl(file: BinaryIO) -> Iterator[Line]:
    """A JSON object on each line; empty lines do not count as prompts."""
    number = 0
    while raw := file.readline(MAX_LINE + 1):
        number += 1
        if len(raw) > MAX_LINE:
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE)
            yield Line(number, problem=f"longer than {MAX_LINE >> 20} MiB")
            continue
        raw = raw.removeprefix(_BOM) if number == 1 else raw
        if raw.strip():
            yield _parsed(number, raw)


def _parsed(number: int, raw: bytes) -> Line:
    try:
        values = json.loads(raw.decode(), parse_constant=_no_constant)
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return Line(number, problem=f"not UTF-8: byte {error.start + 1} is {raw[error.start]:#04x}")
    except UnicodeEncodeError:
        return Line(number, problem="half of a surrogate pair (\\ud800-\\udfff), which is no character")
    except json.JSONDecodeError as error:
        return Line(number, problem=f"not JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return Line(number, problem=f"not JSON: {why}")
    if not isinstance(values, dict):
        return Line(number, problem='not a JSON object such as {"prompt": "Tell me about llama2"}')
    return Line(number, values)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def rows(file: BinaryIO, check: Callable[[list[str]], None]) -> Iterator[Line]:
    """The rows of a CSV whose first row names the columns, by the number of the line in which they begin.

    check   looks at these names

    Raises UsageError for a file without them.
    """
    csv.field_size_limit(MAX_LINE)
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    reader = csv.reader(text, strict=True)
    header = next(_records(reader), None)
    if header is None or header.problem:
        raise UsageError(f"the input has no row of column names: {header.problem if header else 'it is empty'}")
    names: list[str] = [name.strip() for name in _cells(header)]
    if len(set(names)) < len(names) or not all(names):
        raise UsageError("the columns of the input need names, each its own")
    check(names)
    for record in _records(reader):
        if record.problem:
            yield record
            continue
        cells = _cells(record)
        if len(cells) != len(names):
            yield Line(record.number, problem=f"{len(cells)} cells; there are {len(names)} columns")
        else:
            yield Line(record.number, dict(zip(names, cells, strict=True)))


def _cells(record: Line) -> list[str]:
    assert record.values is not None
    cells: list[str] = record.values["cells"]
    return cells


def _records(reader: Any) -> Iterator[Line]:
    """What the reader makes of the text, its errors included; empty rows do not count."""
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Line(number, problem=f"no CSV: {error}")
            continue
        if any("\udc80" <= character <= "\udcff" for cell in cells for character in cell):
            yield Line(number, problem="not UTF-8")
        elif cells:
            yield Line(number, {"cells": cells})
