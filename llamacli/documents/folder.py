"""The files in a directory that are worth reading, in a fixed order. Knows nothing of what is in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llamacli.documents import ignoring
from llamacli.documents.document import shown
from llamacli.documents.ignoring import Rules
from llamacli.documents.opening import unreadable
from llamacli.errors import UsageError

MAX_FILES = 1_000
MAX_SEEN = 50_000  # names looked at
MAX_DEPTH = 64


@dataclass(slots=True)
class Folder:
    """One directory that was named.

    skip   told of every path that is left out, and why
    """

    path: Path
    skip: Callable[[Path, str], None]
    _n_seen: int = field(default=0, init=False)

    def files(self) -> Iterator[Path]:
        """Paths, those of a directory in the order of their names. Links are not followed, so that no path comes twice.

        Raises UsageError for too many, and for a directory that cannot be read.
        """
        top = self.path.resolve()
        for n_files, path in enumerate(self._below(self.path, top, ignoring.rules_above(top), 0)):
            if n_files == MAX_FILES:
                raise UsageError(
                    f"{shown(str(self.path))} holds more than {MAX_FILES:,} files: name the part that matters"
                )
            yield path

    def _below(self, directory: Path, absolute: Path, rules: Rules, depth: int) -> Iterator[Path]:
        rules = rules.within(absolute)
        for entry in self._entries(directory, is_given=depth == 0):
            path = directory / entry.name
            is_directory = entry.is_dir(follow_symlinks=False)
            reason = _obstacle(entry, absolute / entry.name, rules)
            if reason is None and is_directory and depth == MAX_DEPTH:
                reason = "too deep"
            if reason is not None:
                self.skip(path, reason)
            elif is_directory:
                yield from self._below(path, absolute / entry.name, rules, depth + 1)
            else:
                yield path

    def _entries(self, directory: Path, *, is_given: bool) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(directory) as found:
                entries = []
                for entry in found:
                    self._n_seen += 1
                    if self._n_seen > MAX_SEEN:
                        raise UsageError(
                            f"{shown(str(self.path))} holds more than {MAX_SEEN:,} names: name the part that matters"
                        )
                    entries.append(entry)
        except OSError as error:
            if is_given:
                raise unreadable(directory, error) from None
            self.skip(directory, error.strerror or "unreadable")
            return []
        return sorted(entries, key=lambda entry: entry.name)


def _obstacle(entry: os.DirEntry[str], absolute: Path, rules: Rules) -> str | None:
    """Why a name in a directory is left out."""
    is_directory = entry.is_dir(follow_symlinks=False)
    if ignoring.is_left_out(entry.name, is_directory=is_directory):
        return "hidden" if entry.name.startswith(".") else "made by a tool"
    if entry.is_symlink():
        return "a link"
    if not is_directory and not entry.is_file(follow_symlinks=False):
        return "no file"
    if is_directory and ignoring.is_marked(absolute):
        return "made by a tool"
    if rules.leave_out(absolute, is_directory=is_directory):
        return "in .gitignore"
    return None
