"""chat as its user sees it: at a real pseudo-terminal, with the real tiny model; and as a pipe does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM, Run, golden
from screen import Terminal

from benchmarks import synthetic

CHAT = [*PROGRAM, "chat", "--temperature", "0"]
ADA, WHO = "My name is Ada.", "What is my name?"
NICE, YOURS = "Nice to meet you, Ada.", "Your name is Ada."
LLAMA2, ABOUT = "Tell me about llama2", "Llama 2 is a family of open large language models"


@pytest.fixture(scope="session")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: it talks for many seconds, and never stops by itself."""
    path = tmp_path_factory.mktemp("slow") / "slow.gguf"
    synthetic.write(path, synthetic.Shape(n_layer=4, n_embd=768, n_ff=2048, n_head=12, n_head_kv=12), "slow-chat")
    return path


@pytest.fixture
def data(environment: dict[str, str]) -> Path:
    return Path(environment["LLAMACLI_HOME"], "data")


def logged(llamacli: Run, reference: str = "1") -> dict[str, Any]:
    session: dict[str, Any] = json.loads(llamacli("logs", "show", reference, "--json").stdout)
    return session


def said(terminal: Terminal, question: str, answer: str) -> None:
    """Ask, and wait for the answer and for the next line below it."""
    terminal.type(question, "enter")
    terminal.wait_for(lambda text: answer in text.rpartition(question)[2] and is_waiting(text.rpartition(answer)[2]))


def is_waiting(text: str) -> bool:
    """Whether there is an empty line to type at, and what the toolbar says below it."""
    return any(line == ">" for line in text.split("\n")) and "tokens" in text.split("\n")[-1]


# -- at a terminal ----------------------------------------------------------------------------------------------


def test_typing_editing_and_what_was_typed_before(environment: dict[str, str], data: Path, llamacli: Run) -> None:
    with Terminal(CHAT, environment) as terminal:
        terminal.wait_for("0 of 1,024 tokens")
        terminal.type("My name is Ad.", "left")
        terminal.type("a", "enter")
        terminal.wait_for(lambda text: NICE in text and is_waiting(text.rpartition(NICE)[2]))
        terminal.type('"""', "enter")
        terminal.type("What is", "enter")
        said(terminal, 'my name?"""', YOURS)
        terminal.type("not this", "c-c")
        terminal.wait_for(lambda text: is_waiting(text.rpartition("not this")[2]))
        terminal.press_until("up", lambda text: text.count('my name?"""') == 2)
        terminal.press_until("up", lambda text: text.count("> My name is Ada.") == 2)
        terminal.press("c-c")
        terminal.type("What is\\", "enter")
        terminal.type("my", "alt-enter")
        said(terminal, "name?", YOURS)
        terminal.type("/foo", "enter")
        terminal.wait_for("there is no /foo: /help shows what there is")
        terminal.press("c-d")
        assert terminal.end() == 0 and terminal.echoes
    assert [turn["question"] for turn in logged(llamacli)["turns"]] == [ADA, "What is\nmy name?", "What is\nmy\nname?"]
    history = data / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600 and "My name is Ada." in history.read_text()
    with Terminal(CHAT, environment) as terminal:  # another process, another day
        terminal.wait_for("0 of 1,024 tokens")
        terminal.press_until("up", lambda text: "> /foo" in text or "> name?" in text)


def test_an_answer_streams_and_is_set_and_a_window_may_change(environment: dict[str, str]) -> None:
    with Terminal(CHAT, environment, columns=60, lines=8) as terminal:
        terminal.wait_for("0 of 1,024 tokens")
        said(terminal, LLAMA2, "context.")
        shown = terminal.text.partition(LLAMA2)[2].partition("\n>")[0]
        assert " ".join(shown.split()) == golden()[0].answer and max(map(len, shown.split("\n"))) <= 60
        terminal.resize(100, 30)
        os.kill(terminal.pid, signal.SIGWINCH)
        terminal.wait_for(lambda text: "93 of 1,024 tokens" in text.split("\n")[-1])
        said(terminal, "Who made Llama 2?", "Microsoft.")
        terminal.press("c-d")
        assert terminal.end() == 0


def test_ctrl_c_stops_an_answer_and_keeps_it_and_the_talk_goes_on(
    environment: dict[str, str], slow_model: Path, llamacli: Run
) -> None:
    with Terminal([*CHAT, "-m", str(slow_model), "-v"], environment) as terminal:
        terminal.wait_for("of 4,096 tokens")
        terminal.type("Sing!", "enter")
        terminal.wait_for(lambda text: len(text.partition("Sing!")[2]) > 200)
        terminal.type("typed meanwhile")
        terminal.press("c-c")
        terminal.wait_for("of answer")  # of -v: so many tokens
        held = sum(int(n.replace(",", "")) for n in _numbers(terminal.text, "tokens of prompt, 0 of them"))
        terminal.wait_for(lambda text: f"{held:,} of 4,096 tokens" in text.split("\n")[-1])
        terminal.press("c-c")
        terminal.type("Louder!", "enter")
        terminal.wait_for(lambda text: len(text.partition("Louder!")[2]) > 200)
        terminal.press("c-c")
        terminal.wait_for(lambda text: text.count("of answer") == 2)
        (cached,) = _numbers(terminal.text, "of them were there")[-1:]
        assert held - 2 <= int(cached.replace(",", "")) <= held, "only what is new was computed"
        terminal.press("c-d")
        assert terminal.end() == 0
    turns = logged(llamacli)["turns"]
    assert [turn["finish_reason"] for turn in turns] == ["cancelled", "cancelled"] and len(turns[0]["answer"]) > 100


def _numbers(text: str, before: str) -> list[str]:
    """Of the lines of -v about an answer: prompt and answer, or those that were there."""
    lines = [
        line for line in " ".join(text.split()).split("llamacli: ") if "tokens of prompt" in line and before in line
    ]
    words = [line.split() for line in lines]
    if before == "of them were there":
        return [line[4] for line in words]
    return [number for line in words for number in (line[0], line[9])]


def test_kill_9_in_the_middle_of_an_answer_loses_that_answer_alone(
    environment: dict[str, str], slow_model: Path, llamacli: Run
) -> None:
    with Terminal([*CHAT, "--session", "a"], environment) as terminal:
        terminal.wait_for("tokens")
        said(terminal, ADA, NICE)
        terminal.type(f"/model {slow_model}", "enter")
        terminal.wait_for("goes on")
        terminal.type("Sing!", "enter")
        terminal.wait_for(lambda text: len(text.partition("Sing!")[2]) > 200)
        os.kill(terminal.pid, signal.SIGKILL)
        assert terminal.end() == -signal.SIGKILL
    assert [turn["answer"] for turn in logged(llamacli, "a")["turns"]] == [NICE, None]
    with Terminal([*CHAT, "--continue", "-m", "tiny"], environment) as terminal:
        terminal.wait_for("[no answer: /retry asks again]")
        assert NICE in terminal.text
        said(terminal, f"/edit {WHO}", YOURS)
        terminal.press("c-d")
        assert terminal.end() == 0
    turns = logged(llamacli, "a")["turns"]
    assert [(turn["question"], turn["answer"]) for turn in turns] == [(ADA, NICE), (WHO, YOURS)]


def test_each_command_does_what_help_says(environment: dict[str, str], tmp_path: Path, llamacli: Run) -> None:
    (tmp_path / "note.txt").write_text("name: Ada\ncity: London\n")
    with Terminal(CHAT, environment, lines=40) as terminal:
        terminal.wait_for("0 of 1,024 tokens")
        terminal.type("/he", "tab")
        terminal.wait_for("> /help")
        terminal.press("enter")
        terminal.wait_for("/tokens                 show what the conversation takes")
        terminal.type("/system", "enter")
        terminal.wait_for("there is no system prompt")
        terminal.type("/system Answer in one word.", "enter")
        said(terminal, "What is the capital of France?", "Paris")
        terminal.type("/tokens", "enter")
        terminal.wait_for("1 turn, a system prompt of 5")
        terminal.type("/save capital", "enter")
        terminal.wait_for("kept as capital")
        terminal.wait_for(lambda text: "|  capital  |" in text.split("\n")[-1])
        terminal.type("/clear", "enter")
        terminal.wait_for("a new conversation")
        terminal.type("/system -", "enter")
        said(terminal, ADA, NICE)
        terminal.type(f"/file {tmp_path}/note.txt", "enter")
        terminal.wait_for("before your next question")
        said(terminal, "What is the city?", "London")
        terminal.type("/model", "enter")
        terminal.wait_for("tiny: /")
        terminal.type("/load", "enter")
        terminal.wait_for("1  capital")
        terminal.type("/load capital", "enter")
        terminal.wait_for("session capital goes on after 1 turn")
        said(terminal, "/retry", "Paris")
        terminal.type("/edit", "enter")
        terminal.wait_for(
            lambda text: text.rpartition("/edit")[2].strip().startswith("> What is the capital of France?")
        )
        terminal.press("enter")
        terminal.wait_for(lambda text: text.rpartition("/edit")[2].count("Paris") == 1)
        terminal.type("//quit", "enter")
        terminal.wait_for(lambda text: is_waiting(text.rpartition("//quit")[2]))
        for line, wrong in (
            ("/file", "which file?"),
            ("/file /nowhere", "/nowhere cannot be read"),
            ("/load nothing", "there is no session 'nothing'"),
            ("/save 7", "must not be a number"),
            ("/model /nowhere.gguf", "/nowhere.gguf"),
        ):
            terminal.type(line, "enter")
            terminal.wait_for(wrong)
        terminal.type("/quit", "enter")
        assert terminal.end() == 0
    session = logged(llamacli, "capital")
    assert session["system"] == "Answer in one word."
    assert [turn["question"] for turn in session["turns"]] == ["What is the capital of France?", "/quit"]
    assert logged(llamacli, "2")["turns"][0]["answer"] == NICE


def test_an_answer_stays_where_another_one_was_stopped_before_it_began(
    environment: dict[str, str], slow_model: Path, llamacli: Run
) -> None:
    with Terminal([*CHAT, "-m", str(slow_model), "-n", "20"], environment) as terminal:
        terminal.wait_for("0 of 4,096 tokens")
        terminal.type("Sing!", "enter")
        terminal.wait_for(lambda text: is_waiting(text.rpartition("Sing!")[2]))
        terminal.type(f"\x1b[200~/edit {'Sing, and loud. ' * 600}\x1b[201~", "enter")
        terminal.wait_until(lambda: len(logged(llamacli)["turns"]) == 2)
        terminal.press("c-c")
        terminal.wait_for("the question and the answer that were there stay")
        terminal.type("/retry", "enter")
        terminal.wait_for(lambda text: is_waiting(text.rpartition("/retry")[2]))
    assert [turn["question"] for turn in logged(llamacli)["turns"]] == ["Sing!"]


def test_sigint_from_elsewhere_clears_the_line_as_ctrl_c_does(environment: dict[str, str]) -> None:
    with Terminal(CHAT, environment) as terminal:
        terminal.wait_for("0 of 1,024 tokens")
        for i in range(8):
            terminal.type(f"not this {i}")
            terminal.wait_for(f"not this {i}")
            os.kill(terminal.pid, signal.SIGINT)
            terminal.wait_for(partial(_is_cleared, f"not this {i}"))
            terminal.press("enter", "c-c")
        for _ in range(300):  # also while a line is only about to be there
            os.kill(terminal.pid, signal.SIGINT)
            time.sleep(0.003)
        said(terminal, ADA, NICE)
        terminal.press("c-d")
        assert terminal.end() == 0
        assert b"Traceback" not in terminal.raw and b"Warning" not in terminal.raw


def _is_cleared(line: str, text: str) -> bool:
    return is_waiting(text.rpartition(line)[2])


def test_ctrl_c_with_enter_sends_nothing(environment: dict[str, str], slow_model: Path, llamacli: Run) -> None:
    with Terminal([*CHAT, "-m", str(slow_model), "-n", "20"], environment, columns=200, lines=70) as terminal:
        terminal.wait_for("0 of 4,096 tokens")
        terminal.type(f"\x1b[200~{'Sing, and loud. ' * 600}\x1b[201~", "enter")
        terminal.wait_until(lambda: terminal.signals)
        terminal.press("c-c")
        terminal.wait_for(lambda text: is_waiting(text.rpartition("loud.")[2]))
        terminal.press("c-d")
        assert terminal.end() == 0
    assert "nothing was logged" in llamacli("logs").stderr or logged(llamacli)["turns"][0]["answer"] is None


def test_ctrl_c_while_the_last_question_is_changed_leaves_it_and_its_answer(
    environment: dict[str, str], llamacli: Run
) -> None:
    with Terminal(CHAT, environment) as terminal:
        terminal.wait_for("0 of 1,024 tokens")
        said(terminal, ADA, NICE)
        terminal.type("/edit", "enter")
        terminal.wait_for(lambda text: f"> {ADA}" in text.rpartition("/edit")[2])
        terminal.press("c-c")
        terminal.wait_for(lambda text: is_waiting(text.rpartition("/edit")[2]))
        said(terminal, WHO, YOURS)
    assert [turn["question"] for turn in logged(llamacli)["turns"]] == [ADA, WHO]


def test_a_session_goes_on_in_a_second_process_with_what_was_computed(environment: dict[str, str]) -> None:
    with Terminal([*CHAT, "--session", "a"], environment) as terminal:
        terminal.wait_for("0 of 1,024 tokens")
        said(terminal, LLAMA2, "context.")
        terminal.press("c-d")
        assert terminal.end() == 0
    with Terminal([*CHAT, "--session", "a", "-v"], environment, columns=120) as terminal:
        terminal.wait_for("session a goes on after 1 turn:")
        terminal.wait_for(lambda text: "93 of 1,024 tokens  |  a" in text.split("\n")[-1])
        terminal.type("Thanks!", "enter")
        terminal.wait_for("93 of them were there")


def test_a_full_context_asks_what_is_to_go(environment: dict[str, str], llamacli: Run) -> None:
    with Terminal([*CHAT, "-c", "128", "-n", "24"], environment, columns=120) as terminal:
        terminal.wait_for("0 of 128 tokens")
        for i in range(3):
            said(terminal, f"My name is Ada, and {i} is a number.", ".")
        terminal.type("And this is one more, a little longer", "enter")
        terminal.wait_for("[d/s/n]")
        terminal.type("n", "enter")
        terminal.wait_for("nothing was sent")
        terminal.type("And this is one more, a little longer", "enter")
        terminal.wait_for(lambda text: text.count("[d/s/n]") == 2)
        terminal.type("d", "enter")
        terminal.wait_for("left out from now on")
        terminal.wait_for(lambda text: is_waiting(text.rpartition("now on")[2]))
        terminal.press("c-d")
        assert terminal.end() == 0
    assert [turn["in_context"] for turn in logged(llamacli)["turns"]].count(False) >= 1


def test_ctrl_c_between_two_models_leaves_one_that_answers(environment: dict[str, str], tmp_path: Path) -> None:
    (copy := tmp_path / "other-chat.gguf").symlink_to(Path(__file__).parents[2] / "models/tiny-llama2-chat.Q8_0.gguf")
    with Terminal(CHAT, environment, columns=200) as terminal:
        terminal.wait_for("0 of 1,024 tokens")
        for i in range(4):
            terminal.type(f"/model {copy}", "enter")
            terminal.wait_for(partial(_has_scrolled_past, i))
            terminal.press("c-c")
            terminal.wait_for(lambda text: is_waiting(text.rpartition("/model ")[2]))
        said(terminal, ADA, NICE)


def _has_scrolled_past(n: int, text: str) -> bool:
    """Whether the command was taken that came after so many others: the toolbar below it is gone."""
    return text.count("/model ") > n and "tokens" not in text.rpartition("/model ")[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_what_ends_it_leaves_the_terminal_as_it_was(number: signal.Signals, environment: dict[str, str]) -> None:
    with Terminal(CHAT, environment) as terminal:
        terminal.wait_for("0 of 1,024 tokens")
        assert not terminal.echoes
        os.kill(terminal.pid, number)
        assert terminal.end() == -number and terminal.echoes


def test_a_stdout_that_is_closed_leaves_the_terminal_as_it_was(environment: dict[str, str]) -> None:
    with Terminal(["sh", "-c", '"$@" | head -n 1; sleep 60', "-", *CHAT], environment) as terminal:
        terminal.wait_for(">")
        terminal.type(ADA, "enter")
        terminal.wait_for(NICE)
        assert not terminal.echoes
        terminal.type(WHO, "enter")
        terminal.wait_until(lambda: terminal.echoes)


@pytest.mark.skipif(shutil.which("dash") is None, reason="other shells put the terminal right themselves")
def test_ctrl_z_leaves_the_terminal_as_it_was_and_a_stopped_chat_goes_on_or_ends(
    environment: dict[str, str], slow_model: Path
) -> None:
    with Terminal(["dash", "-i"], environment | {"PS1": "$ ", "ENV": ""}, columns=200) as terminal:
        terminal.wait_for("$")
        terminal.type(" ".join([*CHAT, "-m", str(slow_model)]), "enter")
        terminal.wait_for("of 4,096 tokens")
        terminal.type("Sing!", "enter")
        terminal.wait_for(lambda text: len(text.partition("Sing!")[2]) > 200)
        terminal.type("\x1a")
        terminal.wait_until(lambda: terminal.echoes)
        terminal.type("fg", "enter")
        terminal.wait_until(lambda: not terminal.echoes)
        terminal.press("c-c")
        terminal.wait_for(lambda text: "of 4,096 tokens" in text.rpartition("fg")[2])
        terminal.type("\x1a")
        terminal.wait_until(lambda: terminal.echoes)
        terminal.type("kill %1; kill -CONT %1; while kill -0 %1; do sleep 0.1; done; echo it is o''ver", "enter")
        terminal.wait_for("it is over")


def test_bytes_that_are_no_text_are_said_and_a_window_may_be_one_column_wide(
    environment: dict[str, str], llamacli: Run
) -> None:
    with Terminal(CHAT, environment) as terminal:
        terminal.wait_for("0 of 1,024 tokens")
        terminal.type("Say \udcff", "enter")
        terminal.wait_for("what was typed is not valid UTF-8")
        terminal.wait_for(lambda text: is_waiting(text.rpartition("times)")[2]))
        terminal.resize(1, 24)
        terminal.type("/help", "enter")
        terminal.type("/quit", "enter")
        assert terminal.end() == 0
    assert logged(llamacli)["turns"][0]["question"] == "Say \ufffd"


def test_a_dumb_terminal_gets_no_control_sequences_with_an_answer(environment: dict[str, str]) -> None:
    with Terminal(CHAT, environment, term="dumb") as terminal:
        terminal.wait_for(">")
        terminal.type(ADA, "enter")
        terminal.wait_for(lambda text: text.rpartition(NICE)[2].strip() == ">")
        terminal.press("c-d")
        assert terminal.end() == 0
        assert b"\x1b" not in terminal.raw.partition(b"Nice")[2].partition(b"> ")[0]


def test_what_is_wrong_with_the_database_is_said_once_and_made_up_for(
    environment: dict[str, str], data: Path, llamacli: Run
) -> None:
    llamacli("-n", "1", "hi")
    with Terminal(CHAT, environment, columns=200) as terminal:
        terminal.wait_for("tokens")
        holder = sqlite3.connect(data / "sessions.sqlite3", isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
        said(terminal, ADA, NICE)
        said(terminal, WHO, YOURS)
        assert terminal.text.count("stays locked by another process") == 1
        holder.close()
        said(terminal, "Thanks!", ".")
        terminal.press("c-d")
        assert terminal.end() == 0
    assert [turn["question"] for turn in logged(llamacli, "2")["turns"]] == [ADA, WHO, "Thanks!"]


# -- with a pipe ------------------------------------------------------------------------------------------------


def chat(llamacli: Run, *arguments: str, input: str) -> subprocess.CompletedProcess[str]:
    return llamacli("chat", "--temperature", "0", *arguments, input=input)


def test_a_line_is_a_question_and_an_answer_is_bare(llamacli: Run) -> None:
    done = chat(llamacli, input=f'{ADA}\n\n"""What is\nmy name?"""\n//quit\n{WHO}')
    lines = done.stdout.split("\n")
    assert (lines[:2], lines[-2:], done.stderr, done.returncode) == ([NICE, YOURS], [YOURS, ""], "", 0)
    assert [turn["question"] for turn in logged(llamacli)["turns"]] == [ADA, "What is\nmy name?", "/quit", WHO]


def test_a_text_of_many_lines_is_read_line_by_line_and_comes_to_an_end(llamacli: Run) -> None:
    done = chat(llamacli, "-n", "1", input='first\\\r\nsecond\r\n"""a\n\nb\\\nc"""\nx\\\\\na\\\n"""b\n"""open\n')
    asked = [turn["question"] for turn in logged(llamacli)["turns"]]
    assert done.returncode == 0 and asked[1:] == ["a\n\nb\\\nc", "x\\\\", 'a\n"""b', "open"]
    assert asked[0] == "first\nsecond"
    for line in (f"{'a' * 999}\\\n", f'"""{"a" * 999}\n'):
        endless = chat(llamacli, input=line * ((16 << 20) // len(line) + 1))
        assert endless.returncode == 4 and "longer than 16 MiB" in endless.stderr


def test_commands_work_in_a_pipe_and_the_first_error_ends_it(llamacli: Run) -> None:
    done = chat(
        llamacli, "--no-log", input=f"/system Answer in one word.\nWhat is the capital of France?\n/quit\n{WHO}\n"
    )
    assert (done.stdout, done.returncode) == ("Paris\n", 0)
    assert "nothing was logged" in llamacli("logs").stderr
    for line, said, code in (
        ("/foo", "there is no /foo", 2),
        ("/edit", "nothing was asked", 2),
        ("x " * 2000, "alone", 4),
    ):
        wrong = chat(llamacli, input=f"{line}\n{ADA}\n")
        assert (wrong.stdout, wrong.returncode) == ("", code) and said in wrong.stderr


def test_what_is_not_kept_can_be_saved_later_and_what_is_kept_only_be_read(llamacli: Run) -> None:
    done = chat(llamacli, "--no-log", input=f"{ADA}\n/save kept\n{WHO}\n/retry\n/clear\nThanks!\n")
    assert done.returncode == 0 and "kept as kept" in done.stderr
    assert chat(llamacli, "--no-log", "--session", "kept", input=f"{WHO}\n").stdout == f"{YOURS}\n"
    assert [turn["question"] for turn in logged(llamacli, "kept")["turns"]] == [ADA, WHO]
    assert len(json.loads(llamacli("logs", "--json").stdout)) == 1


@pytest.mark.parametrize("policy", ["ask", "drop", "summarise"])
def test_a_full_context_is_an_error_in_a_pipe_unless_it_was_said_what_goes(policy: str, llamacli: Run) -> None:
    lines = "".join(f"My name is Ada, and {i} is a number.\n" for i in range(12))
    done = chat(llamacli, "-c", "256", "-n", "24", "--when-full", policy, input=lines)
    if policy == "ask":
        assert done.returncode == 4 and "--when-full drop or summarise" in done.stderr
        return
    assert done.returncode == 0 and done.stdout.count("\n") == 12 and "left out from now on" in done.stderr
    assert ("in short: " in done.stderr) == (policy == "summarise")
    session = logged(llamacli)
    assert (session["summary"] is not None) == (policy == "summarise") and len(session["turns"]) == 12
    assert chat(llamacli, "-c", "256", "--continue", "--when-full", policy, input="Thanks!\n").returncode == 0


def test_a_question_in_other_words_takes_the_place_of_the_last_one_where_older_ones_had_to_go(llamacli: Run) -> None:
    lines = "".join(f"My name is Ada, and {i} is a number.\n" for i in range(3))
    longer = "My name is Ada, and " + "1 is a number, and " * 12
    small = ("-c", "192", "-n", "24", "--when-full", "drop")
    done = chat(llamacli, *small, input=f"{lines}/edit {longer}\n/retry\n")
    assert done.returncode == 0 and "left out from now on" in done.stderr
    turns = [(turn["question"].strip(), turn["in_context"]) for turn in logged(llamacli)["turns"]]
    assert len(turns) == 3 and turns[0] == ("My name is Ada, and 0 is a number.", False)
    assert turns[-1] == (longer.strip(), True) and turns[1][0] == "My name is Ada, and 1 is a number."


def test_a_question_that_was_not_sent_again_is_still_the_one_that_has_no_answer(
    environment: dict[str, str], data: Path, llamacli: Run
) -> None:
    llamacli("--temperature", "0", "--session", "a", ADA)
    with closing(sqlite3.connect(data / "sessions.sqlite3")) as connection, connection:
        connection.execute("INSERT INTO turns (session, question, tokens, asked) VALUES (1, ?, x'', 1)", (WHO,))
    with Terminal([*CHAT, "--session", "a", "-c", "256"], environment) as terminal:
        terminal.wait_for("of 256 tokens")
        terminal.type("/edit " + "x " * 300, "enter")
        terminal.wait_for("the question alone is")
        said(terminal, "/retry", YOURS)
    assert [turn["question"] for turn in logged(llamacli, "a")["turns"]] == [ADA, WHO]


def test_each_turn_computes_only_what_is_new(llamacli: Run) -> None:
    chat(llamacli, "--temperature", "2", "--top-p", "1", "-n", "40", input="Sing!\nLouder!\nOnce more!\nThanks!\n")
    turns = [turn["usage"] for turn in logged(llamacli)["turns"]]
    for before, after in pairwise(turns):
        held = before["prompt_tokens"] + before["completion_tokens"]
        assert held - 1 <= after["cached_tokens"] <= held, "the last token of an answer that was cut is not computed"


def test_a_session_that_another_model_has_begun_is_said_to_be_and_belongs_to_the_one_that_goes_on(
    llamacli: Run, tmp_path: Path
) -> None:
    (copy := tmp_path / "other-chat.gguf").symlink_to(Path(__file__).parents[2] / "models/tiny-llama2-chat.Q8_0.gguf")
    chat(llamacli, "--session", "a", "-m", str(copy), input=f"{ADA}\n")
    done = chat(llamacli, input=f"/load a\n{WHO}\n")
    assert done.stdout == f"{YOURS}\n" and f"tiny goes on with what {copy.resolve()} has begun" in done.stderr
    assert logged(llamacli, "a")["model"] == "tiny"


def test_a_smaller_model_writes_ahead_in_a_chat_too(llamacli: Run) -> None:
    guessing = ("--temperature", "0", "--draft-model")
    plain = chat(llamacli, "--temperature", "0", "--no-speculation", input=f"{ADA}\n{WHO}\n")
    assert chat(llamacli, *guessing, "tiny", input=f"{ADA}\n{WHO}\n").stdout == plain.stdout
    refused = chat(llamacli, *guessing, "no-such-model", input=f"{ADA}\n")
    assert (refused.stdout, refused.returncode) == ("", 5)


def test_sigint_in_a_pipe_keeps_what_there_is(environment: dict[str, str], slow_model: Path, llamacli: Run) -> None:
    with subprocess.Popen(
        [*CHAT, "-m", str(slow_model)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"Sing!\nLouder!\n")
        process.stdin.flush()
        os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read().endswith(b"\n") and process.wait(30) == 130
    (turn,) = logged(llamacli)["turns"]
    assert turn["finish_reason"] == "cancelled"


def test_what_cannot_converse_is_refused_before_anything_is_loaded(llamacli: Run, tmp_path: Path) -> None:
    base = tmp_path / "tiny.gguf"
    base.symlink_to(Path(__file__).parents[2] / "models" / "tiny-llama2-chat.Q8_0.gguf")
    refused = llamacli("chat", "-m", "/nowhere.gguf", input="hi\n")
    assert refused.returncode == 5 and refused.stderr.count("\n") == 1
    refused = llamacli("chat", "--remote", "http://127.0.0.1:9", input="hi\n")
    assert refused.returncode == 2 and "--remote" in refused.stderr
