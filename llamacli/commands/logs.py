"""`llamacli logs`: what was asked and answered, to be listed, searched, shown and removed."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from llamacli.commands import table, terminal
from llamacli.commands.terminal import Notices, harmless
from llamacli.errors import UsageError
from llamacli.sessions.archive import Archive, Listing
from llamacli.sessions.session import Session, Turn

_EXCERPT = 60  # characters of a question, or around what was found


def show_list(path: Path, notices: Notices, *, limit: int, text: str | None, as_json: bool) -> int:
    """A row for each session, the one used last first."""
    if limit < 1:
        raise UsageError(f"--limit must be 1 or more, not {limit}")
    if text is not None and not text.strip():
        raise UsageError("--search looks for a text: it is empty")
    text = text and terminal.decoded(text.encode("utf-8", "surrogateescape"), "--search", notices)
    listings: list[Listing] = []
    if path.exists():
        with Archive(path) as archive:
            listings = archive.listed(limit, text)
    if as_json:
        table.write(json.dumps([_as_object(each) for each in listings], ensure_ascii=False))
    elif not listings:
        notices.say("no session has that text in it" if text is not None else "nothing was logged so far")
    else:
        header = ("ID", "NAME", "LAST USED", "TURNS", "MODEL", "FOUND" if text is not None else "FIRST QUESTION")
        table.show(header, [_row(each, text) for each in listings], right=(0, 3))
    return 0


def show(path: Path, reference: str, *, as_json: bool) -> int:
    """A whole conversation."""
    with closing(_there(path, reference)) as archive:
        session = archive.find(reference)
        turns = archive.turns(session)
    if as_json:
        table.write(json.dumps(_whole(session, turns), ensure_ascii=False))
        return 0
    lines = [
        f"session {session.id}{f' ({session.name})' if session.name else ''}, {session.model or 'a remote server'}"
    ]
    if session.system:
        lines.append(f"system prompt: {session.system}")
    first = next((turn for turn in turns if turn.id >= session.start), None)
    for turn in turns:
        if turn is first and turn is not turns[0]:
            before = f"; in short: {session.summary}" if session.summary else ""
            lines += ["", f"[what stands above had no room in the context any more{before}]"]
        lines += ["", f"[{_time(turn.asked)}]", shown_turn(turn)]
    _write("\n".join(lines))
    return 0


def shown_turn(turn: Turn) -> str:
    """The question behind a mark, and the answer."""
    return f"> {turn.question}\n\n{_said(turn)}"


def titles(listings: list[Listing]) -> str:
    """A line for each session."""
    rows = (_row(each, None) for each in listings)
    lines = (f"  {number:>4}  {name:<12}  {used}  {said}" for number, name, used, _, _, said in rows)
    return "\n".join(lines) or "none is kept"


def rename(path: Path, reference: str, name: str) -> int:
    with closing(_there(path, reference)) as archive:
        archive.keep(archive.find(reference), name)
    return 0


def remove(path: Path, references: list[str], notices: Notices, *, yes: bool) -> int:
    with closing(_there(path, references[0])) as archive:
        sessions = [archive.find(reference) for reference in references]
        names = ", ".join(session.reference for session in sessions)
        confirm(f"remove {'session' if len(sessions) == 1 else 'sessions'} {names}?", yes=yes)
        for session in sessions:
            archive.remove(session)
    notices.say(f"removed {names}")
    return 0


def clear(path: Path, notices: Notices, *, yes: bool) -> int:
    if not path.exists():
        notices.say("there was nothing to remove")
        return 0
    confirm("remove all sessions?", yes=yes)
    with Archive(path) as archive:
        n = archive.clear()
    notices.say("removed 1 session" if n == 1 else f"removed {n:,} sessions")
    return 0


def confirm(question: str, *, yes: bool) -> None:
    """Raises UsageError unless the user agrees."""
    if yes:
        return
    if not os.isatty(terminal.STDIN):
        raise UsageError(f"{question} Say -y where nobody can be asked")
    sys.stderr.write(f"llamacli: {question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was removed")


def _there(path: Path, reference: str) -> Archive:
    """Without a file there is no session, and none is made to find that out."""
    if not path.exists():
        raise UsageError(f"there is no session {reference!r}: nothing was logged so far")
    return Archive(path)


def _row(listing: Listing, text: str | None) -> tuple[str, ...]:
    session = listing.session
    shown = _excerpt(listing.found or listing.first or "", text)
    model = Path(session.model).name if session.model else "-"
    return str(session.id), session.name or "-", _time(session.updated), str(listing.n_turns), model, shown


def _excerpt(text: str, needle: str | None) -> str:
    """One line, around what was looked for."""
    text = " ".join(text.split())
    at = text.casefold().find(needle.casefold()) if needle else -1
    start = max(0, at - _EXCERPT // 3)
    end = start + _EXCERPT
    return f"{'...' if start else ''}{text[start:end]}{'...' if len(text) > end else ''}"


def _said(turn: Turn) -> str:
    if turn.answer is None:
        return "[no answer: it was ended before there was one]"
    return turn.answer + {"cancelled": " [interrupted]", "context": " [cut]"}.get(turn.finish_reason or "", "")


def _as_object(listing: Listing) -> dict[str, object]:
    return _described(listing.session) | {"turns": listing.n_turns, "first": listing.first, "found": listing.found}


def _whole(session: Session, turns: list[Turn]) -> dict[str, object]:
    return _described(session) | {
        "summary": session.summary,
        "turns": [
            {
                "id": turn.id,
                "question": turn.question,
                "answer": turn.answer,
                "model": turn.model,
                "asked": _stamp(turn.asked),
                "answered": None if turn.answered is None else _stamp(turn.answered),
                "finish_reason": turn.finish_reason,
                "usage": {
                    "prompt_tokens": turn.prompt_tokens,
                    "completion_tokens": turn.completion_tokens,
                    "cached_tokens": turn.cached_tokens,
                },
                "seed": turn.seed,
                "in_context": turn.id >= session.start,
            }
            for turn in turns
        ],
    }


def _described(session: Session) -> dict[str, object]:
    return {
        "id": session.id,
        "name": session.name,
        "model": session.model,
        "system": session.system,
        "created": _stamp(session.created),
        "updated": _stamp(session.updated),
    }


def _write(text: str) -> None:
    if os.isatty(terminal.STDOUT):
        text = harmless(text)
    terminal.write_all(terminal.STDOUT, f"{text}\n".encode("utf-8", "replace"))


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


def _stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
