"""A file that is put before a question: its text."""

from __future__ import annotations

from pathlib import Path

from llamacli.commands.terminal import MAX_INPUT
from llamacli.errors import UsageError


def text_of(path: str) -> str:
    """Raises UsageError for what is no text file that can be read."""
    shown = path[:200]
    try:
        with Path(path).expanduser().open("rb") as file:
            raw = file.read(MAX_INPUT + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"{shown} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except RuntimeError:
        raise UsageError(f"{shown} cannot be read: there is no such user") from None
    if len(raw) > MAX_INPUT:
        raise UsageError(f"{shown} is more than {MAX_INPUT >> 20} MiB, thousands of times what a context holds")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{shown} is not UTF-8 text") from None
    if not text.strip():
        raise UsageError(f"{shown} is empty")
    return text.rstrip("\n")
