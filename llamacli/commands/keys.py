"""Subscription keys of the server, and what each has used, on the command line: `keys create/list/revoke`, `usage`.

Parses nothing and decides nothing: the rooms below do. A key goes to stdout once, alone; everything said about it goes
to stderr.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from llamacli.commands import terminal
from llamacli.commands.terminal import Notices, harmless
from llamacli.errors import UsageError
from llamacli.server import keys as store
from llamacli.server.keys import Key
from llamacli.server.ledger import FILENAME, Ledger
from llamacli.server.usage import Counts, Line, last_used, report

NONE = "-"
_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"
Table = Sequence[Sequence[str]]


def create(
    data: Path, notices: Notices, *, name: str, rpm: int | None, tokens_per_day: int | None, as_json: bool
) -> None:
    """Print a new key. One that could not be printed is not created."""
    with Ledger(data / FILENAME) as ledger:
        wanted = store.created(ledger, name, now=time.time(), rpm=rpm, tokens_per_day=tokens_per_day)
        with wanted as (key, text):
            _write(_json({"key": text, **_record(key, None)}) if as_json else text + "\n")
    notices.say(
        f"this is the key {key.name!r} (id {key.id}), shown this once: keep it; "
        f"a server takes it within 2 s, and from now on needs a key"
    )


def show(data: Path, notices: Notices, *, as_json: bool) -> None:
    keys, used = _known(data)
    if as_json:
        _write(_json([_record(key, used.get(key.id)) for key in keys]))
    elif not keys:
        notices.say("there are no keys: llamacli keys create --name NAME makes one")
    else:
        heading = ("name", "id", "rpm", "tokens/day", "created (UTC)", "last used (UTC)", "revoked (UTC)")
        rows = [
            (
                key.name,
                key.id,
                _number(key.rpm),
                _number(key.tokens_per_day),
                _minute(key.created),
                _minute(used.get(key.id)),
                _minute(key.revoked),
            )
            for key in keys
        ]
        _write(aligned([heading, *rows], right=(2, 3), is_bold=_is_styled()))


def revoke(data: Path, notices: Notices, reference: str) -> None:
    path = data / FILENAME
    if not path.exists():
        raise store.unknown(reference, [])
    with Ledger(path) as ledger:
        key, is_new = store.revoke(ledger, reference, now=time.time())
    if is_new:
        notices.say(f"the key {key.name!r} (id {key.id}) is revoked; a running server refuses it within 2 s")
    else:
        notices.say(f"the key {key.name!r} (id {key.id}) was revoked already, at {_minute(key.revoked)} UTC")


def usage(data: Path, notices: Notices, *, reference: str | None, n_days: int, as_json: bool) -> None:
    """Print what was used in the last `n_days` UTC days, today included; of one key if `reference` names it."""
    if not 1 <= n_days <= 100_000:
        raise UsageError(f"--days must be a whole number between 1 and 100,000, not {n_days:,}")
    path = data / FILENAME
    keys, _ = _known(data)
    lines: list[Line] = []
    if path.exists():
        with Ledger(path) as ledger:
            lines = report(ledger, time.time(), n_days=n_days)
    if reference is not None:
        wanted = _ids_of(keys, reference)
        lines = [line for line in lines if line.key_id in wanted]
    names = {key.id: key.name for key in keys}
    lines.sort(key=lambda line: (line.day, names.get(line.key_id, line.key_id), line.key_id))
    if as_json:
        _write(_json([_usage_record(line, names) for line in lines]))
    elif not lines:
        notices.say(f"no requests in the last {n_days:,} days (UTC)" if n_days > 1 else "no requests today (UTC)")
    else:
        _write(aligned(_usage_table(lines, names), right=(3, 4, 5, 6), is_bold=_is_styled()))


def aligned(rows: Table, *, right: Sequence[int] = (), is_bold: bool = False) -> str:
    """Lines of text in columns, the first being the heading. `right` are the columns of numbers."""
    rows = [[harmless(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if is_bold:
        lines[0] = _BOLD + lines[0] + _PLAIN
    return "\n".join(lines) + "\n"


def _known(data: Path) -> tuple[list[Key], dict[str, float]]:
    """The keys, and when each was last used. To look is not to create: without a ledger there are none."""
    path = data / FILENAME
    if not path.exists():
        return [], {}
    with Ledger(path) as ledger:
        return store.every(ledger), last_used(ledger)


def _ids_of(keys: list[Key], reference: str) -> set[str]:
    """All that the name stands for, keys of that name that were revoked included."""
    if store.folded(reference) in (store.NO_KEY, store.COMMAND_LINE):
        return {store.folded(reference)}
    found = store.find(keys, reference)
    same = {key.id for key in keys if store.folded(key.name) == store.folded(reference)}
    return same or {found.id}


def _usage_table(lines: Sequence[Line], names: dict[str, str]) -> Table:
    heading = ("day (UTC)", "key", "id", "requests", "errors", "prompt tokens", "completion tokens")
    rows = [
        (
            line.day,
            names.get(line.key_id, line.key_id),
            line.key_id if line.key_id in names else NONE,
            *(f"{n:,}" for n in _counted(line.counts).values()),
        )
        for line in lines
    ]
    return [heading, *rows]


def _usage_record(line: Line, names: dict[str, str]) -> dict[str, object]:
    """`id` is null for requests without a key of the ledger's."""
    return {
        "day": line.day,
        "name": names.get(line.key_id, line.key_id),
        "id": line.key_id if line.key_id in names else None,
        **_counted(line.counts),
    }


def _counted(counts: Counts) -> dict[str, int]:
    return {
        "requests": counts.requests,
        "errors": counts.errors,
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
    }


def _record(key: Key, used: float | None) -> dict[str, object]:
    return {
        "id": key.id,
        "name": key.name,
        "rpm": key.rpm,
        "tokens_per_day": key.tokens_per_day,
        "created": _instant(key.created),
        "last_used": _instant(used),
        "revoked": _instant(key.revoked),
    }


def _instant(seconds: float | None) -> str | None:
    """As ISO 8601 and JavaScript write it."""
    return None if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _minute(seconds: float | None) -> str:
    return NONE if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"


def _number(limit: int | None) -> str:
    return NONE if limit is None else f"{limit:,}"


def _is_styled() -> bool:
    return os.isatty(terminal.STDOUT) and not os.environ.get("NO_COLOR")


def _json(record: object) -> str:
    return json.dumps(record, ensure_ascii=False, indent=2) + "\n"


def _write(text: str) -> None:
    terminal.write_all(terminal.STDOUT, text.encode("utf-8", "replace"))
