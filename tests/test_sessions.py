"""What run has asked and answered, by real processes: it is kept, found again, and gone on with where it was."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM, Run, golden

GREEDY = ("--temperature", "0")
WILD = ("--temperature", "2", "--top-p", "1", "--top-k", "0", "-n", "60", "--seed", "3")
ADA = ("My name is Ada.", "Nice to meet you, Ada.\n")
WHO = ("What is my name?", "Your name is Ada.\n")


@pytest.fixture
def database(environment: dict[str, str]) -> Path:
    return Path(environment["LLAMACLI_HOME"], "data", "sessions.sqlite3")


def usage_of(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    assert done.returncode == 0, done.stderr
    usage: dict[str, int] = json.loads(done.stdout)["usage"]
    return usage


def logged(llamacli: Run, reference: str = "1") -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = json.loads(llamacli("logs", "show", reference, "--json").stdout)["turns"]
    return turns


def one_line(stderr: str) -> str:
    assert stderr.startswith("llamacli: ") and stderr.count("\n") == 1, stderr
    return stderr


def test_continue_goes_on_with_the_last_answer_and_a_session_with_its_own(llamacli: Run, database: Path) -> None:
    assert llamacli(*GREEDY, ADA[0]).stdout == ADA[1]
    assert llamacli(*GREEDY, "--session", "other", "Hello").returncode == 0
    assert llamacli(*GREEDY, "--session", "other", WHO[0]).stdout != WHO[1]
    assert llamacli(*GREEDY, "--session", "other", ADA[0]).returncode == 0
    done = llamacli(*GREEDY, "--continue", WHO[0])
    assert (done.stdout, done.stderr) == (WHO[1], "")
    assert len(logged(llamacli)) == 1 and len(logged(llamacli, "other")) == 4
    assert (database.stat().st_mode & 0o777, database.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_only_what_is_new_is_computed_by_another_process_token_for_token(llamacli: Run) -> None:
    """At a high temperature: such answers would be tokenized otherwise than they were written."""
    held = 0
    for question in ("Sing a song of sixpence!", "Louder, please!", "Once more, with feeling!"):
        usage = usage_of(llamacli(*WILD, "--json", "--session", "song", question))
        assert usage["cached_tokens"] == (held if held >= 64 else 0)
        held = usage["prompt_tokens"] + usage["completion_tokens"]
        held -= usage["completion_tokens"] == 60  # the last token of an answer that was cut is not computed
    assert held > 150
    assert usage_of(llamacli(*WILD, "--json", "--no-cache", "--session", "song", "More?"))["cached_tokens"] == 0


def test_what_is_logged_is_what_was_said(llamacli: Run) -> None:
    done = llamacli(*GREEDY, "-s", "Answer in one word.", "--seed", "7", "What is the capital of France?")
    assert (done.stdout, done.stderr) == ("Paris\n", "")
    assert llamacli("Repeat: {stdin}", "-n", "1", input="hello world").returncode == 0
    first = json.loads(llamacli("logs", "show", "1", "--json").stdout)
    assert (first["system"], first["model"], first["name"]) == ("Answer in one word.", "tiny", None)
    (turn,) = first["turns"]
    assert (turn["question"], turn["answer"]) == ("What is the capital of France?", "Paris")
    assert (turn["finish_reason"], turn["seed"], turn["usage"]["completion_tokens"]) == ("stop", 7, 2)
    (turn,) = logged(llamacli, "2")
    assert (turn["question"], turn["finish_reason"]) == ("Repeat: hello world", "length")


def test_logs_lists_searches_names_and_removes(llamacli: Run) -> None:
    assert "nothing was logged" in one_line(llamacli("logs").stderr)
    for question in ("Tell me about llama2", "What is a token?"):
        llamacli("-n", "3", question)
    assert llamacli("logs").stdout.splitlines()[0].split()[:3] == ["ID", "NAME", "LAST"]
    assert [line.split()[0] for line in llamacli("logs").stdout.splitlines()[1:]] == ["2", "1"]
    assert len(llamacli("logs", "-n", "1").stdout.splitlines()) == 2
    assert "llama2" in llamacli("logs", "--search", "LLAMA2").stdout.splitlines()[1]
    none = llamacli("logs", "--search", "xyzzy")
    assert (none.returncode, none.stdout) == (0, "") and "no session has that text" in one_line(none.stderr)
    none = llamacli("logs", "--search", "token\udcff")
    assert (none.returncode, none.stdout) == (0, "") and "--search is not valid UTF-8" in none.stderr
    assert json.loads(llamacli("logs", "--json").stdout)[0]["first"] == "What is a token?"
    assert llamacli("logs", "name", "1", "llama").returncode == 0
    assert "> Tell me about llama2" in llamacli("logs", "show", "llama").stdout
    refused = llamacli("logs", "rm", "llama")
    assert refused.returncode == 2 and "Say -y" in one_line(refused.stderr)
    assert "removed llama" in llamacli("logs", "rm", "-y", "llama").stderr
    assert llamacli("logs", "show", "llama").returncode == 2
    assert "removed 1 session" in llamacli("logs", "clear", "-y").stderr
    assert json.loads(llamacli("logs", "--json").stdout) == []


@pytest.mark.parametrize("refusal", [["--no-log"], []])
def test_who_wants_no_log_leaves_no_trace(
    refusal: list[str], llamacli: Run, environment: dict[str, str], database: Path
) -> None:
    if not refusal:
        environment["LLAMACLI_LOG"] = "false"
    assert llamacli(*refusal, "-n", "2", "hi").returncode == 0
    assert not database.exists()


def test_a_session_that_is_asked_for_is_kept_whatever_the_settings_say_and_read_only_with_no_log(
    llamacli: Run, environment: dict[str, str]
) -> None:
    environment["LLAMACLI_LOG"] = "0"
    llamacli(*GREEDY, "--session", "a", ADA[0])
    assert llamacli(*GREEDY, "--session", "a", "--no-log", WHO[0]).stdout == WHO[1]
    assert len(logged(llamacli, "a")) == 1
    refused = llamacli("--session", "b", "--no-log", "hi")
    assert refused.returncode == 2 and "--no-log forbids" in one_line(refused.stderr)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--continue", "hi"], "there is no session to go on with"),
        (["--continue", "--session", "a", "hi"], "contradict each other"),
        (["--session", "7", "hi"], "there is no session '7'"),
        (["--session", " ", "hi"], "1 to 100 printable characters"),
        (["--session", "a", "--raw", "hi"], "no place for the turns of a session"),
        (["--session", "a", "--on-overflow", "map-reduce", "hi"], "leave one of them out"),
        (["--session", "a", "--remote", "http://127.0.0.1:9", "hi"], "cannot be had of a remote server"),
        (["logs", "show", "7"], "nothing was logged so far"),
        (["logs", "--search", ""], "it is empty"),
        (["logs", "-n", "0"], "--limit must be 1 or more"),
    ],
)
def test_what_cannot_be_meant_is_one_line(arguments: list[str], said: str, llamacli: Run, database: Path) -> None:
    done = llamacli(*arguments)
    assert done.returncode == 2 and said in one_line(done.stderr)


def test_a_session_that_no_longer_fits_is_an_error_until_it_is_said_what_goes(llamacli: Run) -> None:
    small = ("-c", "192", "-n", "20", *GREEDY, "--session", "a")
    for i in range(4):
        assert llamacli(*small, f"My name is Ada, and this is message {i}.").returncode == 0
    question = "What is my name, once more and once more and once more?"
    full = llamacli(*small, question + " Tell me" * 35)
    assert (full.returncode, full.stdout) == (4, "")
    assert "the session's 4 earlier turns take" in one_line(full.stderr) and "--on-overflow tail" in full.stderr
    cut = llamacli(*small, "--on-overflow", "tail", question + " Tell me" * 35)
    assert cut.returncode == 0 and "oldest turn" in one_line(cut.stderr) and "left out from now on" in cut.stderr
    turns = logged(llamacli, "a")
    assert [turn["in_context"] for turn in turns] == sorted(turn["in_context"] for turn in turns)
    assert not turns[0]["in_context"] and turns[-1]["in_context"] and len(turns) == 5
    assert "[what stands above had no room" in llamacli("logs", "show", "a").stdout
    assert llamacli(*small, "Thanks!").stderr == "", "what is left fits by itself"


def test_another_model_may_go_on_and_so_may_another_system_prompt(llamacli: Run, tmp_path: Path) -> None:
    copy = tmp_path / "other-chat.gguf"
    copy.symlink_to(Path(__file__).parents[1] / "models" / "tiny-llama2-chat.Q8_0.gguf")
    llamacli(*GREEDY, "--session", "a", ADA[0])
    done = llamacli(*GREEDY, "--session", "a", "-m", str(copy), WHO[0])
    assert done.stdout == WHO[1] and "goes on with what tiny has begun" in one_line(done.stderr)
    assert llamacli(*GREEDY, "--session", "a", WHO[0]).stderr == "", "the session's own model from now on"
    shouted = llamacli(*GREEDY, "--session", "a", "-s", "Answer in upper case.", WHO[0])
    assert "the system prompt is another one from now on" in one_line(shouted.stderr)
    assert json.loads(llamacli("logs", "show", "a", "--json").stdout)["system"] == "Answer in upper case."


def test_a_session_whose_model_is_gone_says_so_and_another_may_be_named(llamacli: Run, tmp_path: Path) -> None:
    (model := tmp_path / "gone-chat.gguf").write_bytes(
        (Path(__file__).parents[1] / "models" / "tiny-llama2-chat.Q8_0.gguf").read_bytes()
    )
    llamacli(*GREEDY, "--session", "a", "-m", str(model), ADA[0])
    model.unlink()
    for arguments in (("--continue", WHO[0]), ("chat", "--session", "a")):
        gone = llamacli(*arguments)
        assert gone.returncode == 5
        assert f"session a needs {model}, which does not exist any more" in one_line(gone.stderr)
    assert llamacli(*GREEDY, "--session", "a", "-m", "tiny", WHO[0]).stdout == WHO[1]


def test_processes_that_write_at_once_lose_nothing(environment: dict[str, str], llamacli: Run) -> None:
    runs = [
        subprocess.Popen(
            [*PROGRAM, "-n", "2", "--session", "all", f"Question {i}"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for i in range(6)
    ]
    assert [run.communicate()[1] for run in runs] == [b""] * 6
    assert sorted(turn["question"] for turn in logged(llamacli, "all")) == [f"Question {i}" for i in range(6)]


def test_ctrl_c_keeps_what_there_is_of_an_answer(environment: dict[str, str], llamacli: Run) -> None:
    endless = ("--temperature", "2", "--top-p", "1", "--top-k", "0", "--seed", "1", "--session", "a")
    with subprocess.Popen(
        [*PROGRAM, *endless, "Sing!"], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        begun = os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        said = (begun + process.stdout.read()).decode()
        assert process.wait(30) == 130
    (turn,) = logged(llamacli, "a")
    assert turn["answer"].strip() == said.strip() and turn["finish_reason"] == "cancelled"


# -- the database is not what it should be -----------------------------------------------------------------------


def broken_answers(llamacli: Run, said: str) -> None:
    """The answer comes whole, and one line says that it was not logged; who asks for a session gets an error."""
    done = llamacli(*GREEDY, "Tell me about llama2")
    assert (done.stdout, done.returncode) == (golden()[0].answer + "\n", 0)
    assert "this answer was not logged" in one_line(done.stderr) and said in done.stderr


def test_a_locked_database_costs_the_log_and_not_the_answer(llamacli: Run, database: Path) -> None:
    llamacli("-n", "2", "--session", "a", "hi")
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    began = time.monotonic()
    broken_answers(llamacli, "stays locked by another process")
    assert time.monotonic() - began < 20
    holder.close()
    assert llamacli("-n", "2", "--session", "a", "hi").stderr == ""


def test_a_damaged_database_costs_the_log_and_not_the_answer(llamacli: Run, database: Path) -> None:
    llamacli("-n", "2", "hi")
    database.write_bytes(b"no database " * 1000)
    broken_answers(llamacli, "is damaged: move it")
    for arguments in (["--continue", "hi"], ["--session", "a", "hi"], ["logs"]):
        refused = llamacli(*arguments)
        assert (refused.returncode, refused.stdout) == (6, "") and "is damaged" in one_line(refused.stderr)


def test_a_newer_database_costs_the_log_and_not_the_answer(llamacli: Run, database: Path) -> None:
    llamacli("-n", "2", "hi")
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("PRAGMA user_version = 99")
    broken_answers(llamacli, "install a newer llamacli")
    refused = llamacli("--continue", "hi")
    assert refused.returncode == 2 and "layout 99" in one_line(refused.stderr)


def test_a_data_directory_that_cannot_be_written_costs_the_log_and_not_the_answer(
    llamacli: Run, environment: dict[str, str]
) -> None:
    home = Path(environment["LLAMACLI_HOME"])
    home.mkdir()
    (home / "data").write_text("in the way")
    broken_answers(llamacli, "cannot be written")


def test_a_full_disk_costs_the_log_and_not_the_answer(environment: dict[str, str]) -> None:
    limited = ["bash", "-c", 'ulimit -f 4 && exec "$@"', "-", *PROGRAM, *GREEDY, "Tell me about llama2"]
    done = subprocess.run(
        limited,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        env=environment | {"PYTHONDONTWRITEBYTECODE": "1"},
        timeout=60,
    )
    assert (done.stdout, done.returncode) == (golden()[0].answer + "\n", 0)
    assert "this answer was not logged" in one_line(done.stderr) and "cannot be written" in done.stderr
