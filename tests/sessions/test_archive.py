"""The file of all conversations: what is written is found again, and what is wrong with it is said in one line."""

from __future__ import annotations

import sqlite3
import stat
import threading
from array import array
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from llamacli.errors import LlamacliError, ResourceError, UsageError
from llamacli.sessions.archive import VERSION, Archive
from llamacli.sessions.session import LONGEST_NAME, Session, Turn, checked_name, packed, unpacked

QUESTION = Turn(question="Who made Llama 2?", answer="Meta.", tokens=array("i", [4, 5, 31_999]), finish_reason="stop")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "sessions.sqlite3"


def test_a_turn_comes_back_as_it_was_written(path: Path) -> None:
    turn = replace(
        QUESTION, model="tiny", asked=1.5, answered=2.5, prompt_tokens=9, completion_tokens=3, seed=2**32 - 2
    )
    with Archive(path) as archive:
        session, written = archive.add(Session(name="trip", model="tiny", system="Be brief."), turn)
        assert archive.turns(session) == [written] == [replace(turn, id=written.id)]
        found = archive.find("TRIP")
    assert (found.id, found.name, found.system, found.model) == (session.id, "trip", "Be brief.", "tiny")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_last_session_is_the_one_used_last_and_a_name_goes_on(path: Path) -> None:
    with Archive(path) as archive:
        first, _ = archive.add(Session(name="a"), QUESTION)
        second, _ = archive.add(Session(), QUESTION)
        assert archive.last() == second
        again, _ = archive.add(Session(name="A"), QUESTION)  # begun by two processes at once
        last = archive.last()
        assert last is not None and last.id == first.id == again.id
        assert len(archive.turns(first)) == 2


def test_a_question_is_kept_before_its_answer_and_what_is_replaced_is_gone_from_the_conversation(path: Path) -> None:
    with Archive(path) as archive:
        session, asked = archive.add(Session(), Turn(question="Why?"))
        assert archive.turns(session)[0].answer is None
        archive.answer(session, replace(asked, answer="Because.", tokens=array("i", [1])))
        _, other = archive.add(session, replace(QUESTION, question="Why not?"))
        archive.replaced(asked)
        assert archive.turns(session) == [other]


def test_a_session_that_was_removed_meanwhile_does_not_cost_the_answer(path: Path) -> None:
    with Archive(path) as archive:
        session, _ = archive.add(Session(name="a"), QUESTION)
        archive.remove(session)
        archive.add(session, QUESTION)
        assert [turn.answer for turn in archive.turns(archive.find("a"))] == ["Meta."]


def test_an_answer_to_a_question_that_was_removed_meanwhile_is_kept_with_it(path: Path) -> None:
    with Archive(path) as archive:
        session, turn = archive.add(Session(name="a"), Turn(question="Why?"))
        archive.clear()
        archive.answer(session, replace(turn, answer="Because."))
        assert [(each.question, each.answer) for each in archive.turns(archive.find("a"))] == [("Why?", "Because.")]


def of_a_file_that_was_moved_away(path: Path) -> tuple[Session, Turn]:
    with Archive(path) as archive:
        session, turn = archive.add(Session(), Turn(question="Why?"))
    path.rename(path.with_suffix(".old"))
    return session, turn


def test_in_a_file_that_was_put_in_the_place_of_theirs_conversations_do_not_mix(path: Path) -> None:
    session, turn = of_a_file_that_was_moved_away(path)
    with Archive(path) as archive:
        other, others = archive.add(Session(name="b"), QUESTION)
        assert (other.id, others.id) == (session.id, turn.id)
        archive.answer(session, replace(turn, answer="Because."))
        session, _ = archive.add(session, QUESTION)
        assert archive.turns(other) == [others] and archive.find("b").id == other.id != session.id


def test_what_a_conversation_was_before_its_file_was_replaced_changes_nothing_of_another_one(path: Path) -> None:
    session, turn = of_a_file_that_was_moved_away(path)
    with Archive(path) as archive:
        other, others = archive.add(Session(name="b"), QUESTION)
        archive.replaced(turn)
        session = archive.keep(replace(session, start=50), "a")
        assert (session.name, session.start, archive.turns(session)) == ("a", 0, [])
        assert archive.find("b").id == other.id != session.id and archive.turns(other) == [others]
        joined, _ = archive.add(Session(name="a", id=99, start=50), QUESTION)
        assert (joined.id, joined.start) == (session.id, 0)


def test_a_name_that_was_given_or_taken_meanwhile_stays_and_does_not_cost_the_answer(path: Path) -> None:
    with Archive(path) as archive:
        session, _ = archive.add(Session(name="a"), QUESTION)
        archive.keep(archive.find("a"), "b")
        other, _ = archive.add(Session(name="a"), QUESTION)
        session, _ = archive.add(session, QUESTION)
        archive.keep(session)
        assert (session.name, len(archive.turns(archive.find("b"))), len(archive.turns(archive.find("a")))) == (
            "b",
            2,
            1,
        )
        archive.remove(session)
        again, _ = archive.add(replace(session, name="a"), QUESTION)
        assert again.id == other.id and len(archive.turns(other)) == 2


def test_search_finds_any_case_of_any_script_in_all_that_was_said(path: Path) -> None:
    with Archive(path) as archive:
        archive.add(Session(), replace(QUESTION, question="Grüße an ÖZGÜR 100%"))
        archive.add(Session(name="Straße"), replace(QUESTION, answer="nothing of it"))
        archive.add(Session(), Turn(question="left without an answer"))
        for text, n in (("özgür", 1), ("STRASSE", 1), ("LLAMA", 1), ("Meta", 1), ("100%", 1), ("0_%", 0), ("left", 1)):
            assert len(archive.listed(9, text)) == n, text
        (found,) = archive.listed(9, "özgür")
        assert found.found == found.first == "Grüße an ÖZGÜR 100%" and found.n_turns == 1
        assert len(archive.listed(2)) == 2


def test_what_is_removed_is_gone_from_the_file_too(path: Path) -> None:
    with Archive(path) as archive:
        session, _ = archive.add(Session(), replace(QUESTION, question="my secret recipe"))
        archive.add(Session(), QUESTION)
        archive.remove(session)
        assert b"secret" not in path.read_bytes()
        assert archive.clear() == 1 and archive.listed(9) == []


@pytest.mark.parametrize("name", ["", "  ", "12", "a\nb", "\x1b[2J", "x" * (LONGEST_NAME + 1)])
def test_a_name_that_cannot_be_told_from_an_id_or_read_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        checked_name(name)


def test_a_name_that_is_taken_and_a_session_that_is_not_there_are_refused(path: Path) -> None:
    with Archive(path) as archive:
        archive.add(Session(name="a"), QUESTION)
        session, _ = archive.add(Session(), QUESTION)
        with pytest.raises(UsageError, match="already"):
            archive.keep(session, "A")
        for reference in ("b", "99", "9" * 30, ""):
            with pytest.raises(UsageError, match="there is no session"):
                archive.find(reference)


def test_a_name_is_the_same_however_it_is_typed(path: Path) -> None:
    with Archive(path) as archive:
        first, _ = archive.add(Session(name="caf\u00e9"), QUESTION)
        again, _ = archive.add(Session(name="CAFE\u0301"), QUESTION)
        assert first.id == again.id == archive.find("cafe\u0301").id


def test_a_limit_may_be_any_number(path: Path) -> None:
    with Archive(path) as archive:
        archive.add(Session(name="a"), QUESTION)
        assert len(archive.listed(10**30)) == 1


def test_a_models_path_that_is_no_text_is_kept_as_far_as_it_goes(path: Path) -> None:
    with Archive(path) as archive:
        session, _ = archive.add(Session(model="/m/\udcff.gguf"), QUESTION)
        assert archive.find(str(session.id)).model == "/m/?.gguf"


def test_tokens_are_little_endian_wherever_they_are_written() -> None:
    assert packed(array("i", [1, 256])) == b"\1\0\0\0\0\1\0\0"
    assert unpacked(b"\1\0\0\0\0\1\0\0") == array("i", [1, 256])


def test_many_writers_at_once_lose_nothing(path: Path) -> None:
    def write(i: int) -> None:
        for j in range(10):
            with Archive(path, patience=30) as archive:
                archive.add(Session(name="all"), replace(QUESTION, question=f"{i} {j}"))

    threads = [threading.Thread(target=write, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Archive(path) as archive:
        asked = [turn.question for turn in archive.turns(archive.find("all"))]
    assert sorted(asked) == sorted(f"{i} {j}" for i in range(6) for j in range(10))


def locked(path: Path) -> sqlite3.Connection:
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    return holder


def test_a_file_that_stays_locked_is_said_to_be_and_can_still_be_read(path: Path) -> None:
    with Archive(path, patience=0.1) as archive:
        archive.add(Session(name="a"), QUESTION)
        holder = locked(path)
        with pytest.raises(ResourceError, match=f"{path} stays locked by another process"):
            archive.add(Session(), QUESTION)
        assert archive.find("a").name == "a"
        holder.close()
        archive.add(Session(), QUESTION)


@pytest.mark.parametrize(
    "damage", [lambda raw: b"not a database" * 99, lambda raw: raw[:100] + b"\xff" * (len(raw) - 100)]
)
def test_a_damaged_file_is_one_line_that_says_what_to_do(path: Path, damage: object) -> None:
    assert callable(damage)
    with Archive(path) as archive:
        archive.add(Session(), QUESTION)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(LlamacliError, match=r"is damaged: move it and its -wal and -shm files away"):
        with Archive(path) as archive:
            archive.add(Session(), QUESTION)


def test_a_newer_file_and_one_of_another_program_are_refused(path: Path) -> None:
    Archive(path).close()
    with closing(sqlite3.connect(path)) as other, other:
        other.execute(f"PRAGMA user_version = {VERSION + 1}")
    with pytest.raises(UsageError, match=f"has layout {VERSION + 1}.*install a newer llamacli"):
        Archive(path)
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("PRAGMA application_id = 7")
    with pytest.raises(ResourceError, match="another program"):
        Archive(path)


def test_a_directory_that_cannot_be_written_is_said_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(ResourceError, match=r"cannot be written.*LLAMACLI_HOME"):
        Archive(tmp_path / "data" / "sessions.sqlite3")
