"""What a chat keeps while it goes on, with a real file that another process holds for a while."""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from llamacli.commands.minutes import Minutes
from llamacli.commands.terminal import Notices
from llamacli.sessions.archive import Archive
from llamacli.sessions.session import Session, Turn


class Kept:
    """A session's minutes, and what has come of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.said = io.StringIO()
        self.minutes = Minutes(path, Notices(stream=self.said), Session(name="a"), writes=True)

    def answered(self, question: str) -> Turn:
        turn = replace(self.minutes.asked(question, "tiny"), answer=f"{question}!", answered=1.0)
        self.minutes.answered(turn)
        return turn

    @property
    def turns(self) -> list[tuple[str, str | None]]:
        with Archive(self.path) as archive:
            return [(turn.question, turn.answer) for turn in archive.turns(archive.find("a"))]

    @contextmanager
    def locked(self) -> Iterator[None]:
        holder = sqlite3.connect(self.path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        yield
        holder.close()


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path / "sessions.sqlite3")


def test_an_answer_that_could_not_be_written_behind_its_question_is_written_with_the_next_turn(kept: Kept) -> None:
    turn = replace(kept.minutes.asked("one", "tiny"), answer="one!", answered=1.0)
    with kept.locked():
        kept.minutes.answered(turn)
        assert kept.turns == [("one", None)] and "tried again with the next turn" in kept.said.getvalue()
    kept.answered("two")
    assert kept.turns == [("one", "one!"), ("two", "two!")]


def test_a_conversation_that_was_removed_in_the_middle_of_an_answer_goes_on_in_one_piece(kept: Kept) -> None:
    kept.minutes.change(name=None)
    turn = replace(kept.minutes.asked("one", "tiny"), answer="one!", answered=1.0)
    with Archive(kept.path) as archive:
        archive.clear()
        kept.minutes.answered(turn)
        kept.answered("two")
        assert [each.n_turns for each in archive.listed(10)] == [2]
        kept.minutes.withdrawn(turn)
        assert [each.n_turns for each in archive.listed(10)] == [1]


def test_a_turn_that_was_replaced_while_the_file_was_locked_is_so_in_the_file_too(kept: Kept) -> None:
    turn = kept.answered("one")
    with kept.locked():
        kept.minutes.withdrawn(turn)
    kept.answered("two")
    assert kept.turns == [("two", "two!")]


def test_where_a_conversation_begins_is_known_of_turns_that_were_written_later(kept: Kept) -> None:
    silent = Minutes(kept.path, Notices(stream=kept.said), Session(), writes=False)
    turns = [replace(silent.asked(str(i), "tiny"), answer="!", answered=1.0) for i in range(3)]
    for turn in turns:
        silent.answered(turn)
    silent.begins_behind(turns[1], "They counted.")
    silent.begin_writing("a")
    with Archive(kept.path) as archive:
        session = archive.find("a")
        assert [turn.id >= session.start for turn in archive.turns(session)] == [False, False, True]
    assert session.summary == "They counted."


def test_at_its_end_a_conversation_is_written_whole_or_what_is_lost_is_said(kept: Kept) -> None:
    kept.answered("one")
    with kept.locked():
        kept.answered("two")
    kept.minutes.end()
    assert kept.turns == [("one", "one!"), ("two", "two!")]
    with kept.locked():
        kept.answered("three")
        kept.answered("four")
        kept.minutes.turn_to(Session())
    assert "the last 2 answers are not kept" in kept.said.getvalue()
