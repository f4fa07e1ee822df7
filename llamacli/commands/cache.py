"""`llamacli cache`: what is kept of computed prompts on the disk, and its end. Never shows what the prompts say."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from llamacli.commands import table
from llamacli.commands.terminal import Notices
from llamacli.config import Settings
from llamacli.engine import prefix_store
from llamacli.engine.prefix_store import Entry
from llamacli.errors import ResourceError

_UNKNOWN = "?"


def show(settings: Settings, directory: Path, *, as_json: bool) -> None:
    """A row for each file, the one used last first; or one JSON object."""
    entries = prefix_store.entries(directory)
    budget = prefix_store.budget_of(directory, settings.cache_size)
    n_bytes = sum(entry.n_bytes for entry in entries)
    if as_json:
        shown = {
            "directory": str(directory),
            "budget": budget,
            "size": n_bytes,
            "entries": [_as_object(entry) for entry in entries],
        }
        table.write(json.dumps(shown, ensure_ascii=False))
        return
    if entries:
        table.show(("MODEL", "TOKENS", "KEPT FROM", "SIZE", "LAST USED"), [_row(e) for e in entries], right=(1, 2, 3))
    table.write(f"{_size(n_bytes)} of {_size(budget)} in {directory}")


def clear(directory: Path, notices: Notices) -> None:
    """Raises ResourceError for what cannot be removed."""
    try:
        n_files, n_bytes = prefix_store.clear(directory)
    except OSError as error:
        raise ResourceError(f"{error.filename} cannot be removed: {error.strerror}") from None
    notices.say(f"removed {n_files:,} prefixes, {_size(n_bytes)}" if n_files else "there was nothing to remove")


def _row(entry: Entry) -> tuple[str, ...]:
    title = entry.title
    last_used = f"{datetime.fromtimestamp(entry.last_used):%Y-%m-%d %H:%M}"
    if title is None:
        return _UNKNOWN, _UNKNOWN, _UNKNOWN, _size(entry.n_bytes), last_used
    return title.label, f"{len(title.tokens):,}", f"{title.start:,}", _size(entry.n_bytes), last_used


def _as_object(entry: Entry) -> dict[str, object]:
    title = entry.title
    return {
        "file": entry.path.name,
        "model": title.label if title else None,
        "tokens": len(title.tokens) if title else None,
        "from": title.start if title else None,
        "size": entry.n_bytes,
        "created": _time(title.created) if title else None,
        "last_used": _time(entry.last_used),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _size(n_bytes: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes} bytes"
