"""`run -f`: files, directories and pages as the document of a question, in real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Run
from loopback_web import LoopbackWeb
from papers import pdf
from test_pipes import one_line
from test_remote import serving

GREEDY = ("--temperature", "0")
CARD = "name: Ada\nage: 36\ncity: London\ncolour: blue\n"
CITY = "What is the city?"


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A directory in which a question can be asked about some files."""
    place = tmp_path / "desk"
    place.mkdir()
    (place / "card.txt").write_text(CARD)
    (place / "paper.pdf").write_bytes(pdf(CARD))
    (place / "other.txt").write_text("nothing of note\n")
    (place / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    return place


def shown(llamacli: Run, desk: Path, *arguments: str, text: str = "") -> str:
    """The prompt that the model gets."""
    done = llamacli("--show-prompt", "-n", "1", *arguments, cwd=desk, input=text)
    assert done.returncode == 0, done.stderr
    return str(done.stderr).partition("[INST] ")[2].partition(" [/INST]")[0]


@pytest.mark.parametrize("name", ["card.txt", "paper.pdf"])
def test_a_file_is_a_document_like_what_is_piped_in(name: str, llamacli: Run, desk: Path) -> None:
    done = llamacli(*GREEDY, "-f", name, CITY, cwd=desk)
    assert (done.stdout, done.stderr, done.returncode) == ("London\n", "", 0)
    assert shown(llamacli, desk, "-f", name, CITY) == shown(llamacli, desk, CITY, text=CARD)


def test_several_stand_in_order_with_their_names_and_stdin_is_the_last(llamacli: Run, desk: Path) -> None:
    prompt = shown(llamacli, desk, "-f", "other.txt", "-f", "card.txt", "Compare", text="from a pipe\n")
    assert prompt == (
        "```\n==> other.txt <==\nnothing of note\n\n"
        f"==> card.txt <==\n{CARD}\n==> standard input <==\nfrom a pipe\n```\n\nCompare"
    )
    named = shown(llamacli, desk, "-f", "-", "-f", "other.txt", "Compare", text="from a pipe\n")
    assert named == "```\n==> standard input <==\nfrom a pipe\n\n==> other.txt <==\nnothing of note\n```\n\nCompare"


def test_without_an_argument_stdin_says_what_to_do_and_without_that_the_file_does(llamacli: Run, desk: Path) -> None:
    asked = shown(llamacli, desk, "-f", "other.txt", text="What is {stdin}?\n")
    assert asked.replace("\u200b", "") == "```\nnothing of note\n```\n\nWhat is {stdin}?"
    assert shown(llamacli, desk, "-f", "other.txt") == "nothing of note"
    assert shown(llamacli, desk, "-f", "other.txt", "-", text="Why?") == "```\nnothing of note\n```\n\nWhy?"


def test_a_place_for_stdin_takes_stdin_and_the_files_stay_in_front(llamacli: Run, desk: Path) -> None:
    prompt = shown(llamacli, desk, "-f", "other.txt", "Is {stdin} in it?", text="note")
    assert prompt == "```\nnothing of note\n```\n\nIs note in it?"
    refused = llamacli("-f", "other.txt", "Is {stdin} in it?", cwd=desk)
    assert refused.returncode == 2 and "nothing came on standard input" in one_line(refused.stderr)


def test_json_says_what_was_read(llamacli: Run, desk: Path) -> None:
    done = llamacli(*GREEDY, "--json", "-f", "card.txt", "-f", "paper.pdf", CITY, cwd=desk)
    record = json.loads(done.stdout)
    assert record["input"]["files"] == [
        {"name": "card.txt", "kind": "text", "characters": len(CARD) - 1},
        {"name": "paper.pdf", "kind": "pdf", "characters": len(CARD) - 1},
    ]
    assert record["input"]["tokens"] == record["input"]["kept"] > 40


def test_another_question_about_the_same_files_reads_only_the_question(llamacli: Run, desk: Path) -> None:
    def cached(*question: str) -> tuple[int, int]:
        done = llamacli("--json", "-n", "1", "-f", "card.txt", "-f", "more", *question, cwd=desk)
        usage = json.loads(done.stdout)["usage"]
        return usage["cached_tokens"], usage["prompt_tokens"]

    (desk / "more").mkdir()
    for name in ("b.md", "a.md"):
        (desk / "more" / name).write_text("The lighthouse keeper sails along the coast. " * 8)
    assert cached("Who is it?")[0] == 0
    n_cached, n_prompt = cached("Where does she live, and with whom?")
    assert n_prompt - 20 < n_cached < n_prompt


def test_files_that_do_not_fit_are_cut_or_read_in_parts_if_that_was_asked_for(llamacli: Run, desk: Path) -> None:
    (desk / "long.txt").write_text("\n\n".join(f"Paragraph {i}. It goes on to the next." for i in range(150)))
    alone = llamacli("-f", "long.txt", "Sum up", cwd=desk)
    assert alone.returncode == 4 and "--on-overflow" in one_line(alone.stderr)
    head = llamacli("-n", "2", "-f", "long.txt", "--on-overflow", "head", "Sum up", cwd=desk)
    assert head.returncode == 0 and "were kept" in one_line(head.stderr)
    command = ("-n", "12", "--seed", "1", "--json", "-f", "card.txt", "-f", "long.txt", "--on-overflow", "map-reduce")
    parts = llamacli(*command, "Sum up", cwd=desk)
    record = json.loads(parts.stdout)
    assert parts.returncode == 0 and record["input"]["parts"] > 1
    assert [each["name"] for each in record["input"]["files"]] == ["card.txt", "long.txt"]
    form = llamacli(*GREEDY, "-f", "card.txt", "--choices", "London,Paris", CITY, cwd=desk)
    assert form.stdout == "London\n"


def test_a_server_is_sent_what_was_read_here(
    llamacli: Run, desk: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    here = dict(environment)
    with serving(environment | {"LLAMACLI_HOME": str(tmp_path / "other")}, "-m", "tiny", "--no-cache") as server:
        done = llamacli("--remote", server.url, *GREEDY, "--json", "-f", "paper.pdf", CITY, cwd=desk, env=here)
        record = json.loads(done.stdout)
        assert (record["answer"], record["device"]) == ("London", "remote")
        assert record["input"]["files"][0]["name"] == "paper.pdf"
        attached = environment | {"LLAMACLI_HOME": str(tmp_path / "other")}
        same = llamacli("-v", "--temperature", "0.01", "--json", "-f", "card.txt", CITY, cwd=desk, env=attached)
        assert "answered by the running server" in same.stderr
        assert json.loads(same.stdout)["input"]["files"][0]["name"] == "card.txt"
        task = llamacli("-v", "@summarise", "-n", "1", "-f", "card.txt", cwd=desk, env=attached)
        assert "answered by the running server" in task.stderr, "it need not be read in parts"
        asked = llamacli("@summarise", "--remote", server.url, "-n", "1", "-f", "card.txt", cwd=desk, env=here)
        assert (asked.returncode, asked.stderr) == (0, "")


def test_a_page_is_fetched_and_its_failures_are_exit_code_eight(llamacli: Run, desk: Path) -> None:
    web = LoopbackWeb()
    try:
        prompt = shown(llamacli, desk, "-f", f"{web.url}/page", "-f", "other.txt", "What is it about?")
        assert f"==> {web.url}/page <==\n# Llamas of the Andes\n" in prompt
        gone = llamacli("-f", f"{web.url}/gone", "What?", cwd=desk)
        assert (gone.returncode, gone.stdout) == (8, "") and "answered 404" in one_line(gone.stderr)
        bomb = llamacli("-f", f"{web.url}/bomb", "What?", cwd=desk)
        assert bomb.returncode == 4 and "16 MiB" in one_line(bomb.stderr)
        offline = llamacli("--offline", "-f", f"{web.url}/page", "What?", cwd=desk)
        assert offline.returncode == 2 and "--offline" in one_line(offline.stderr)
    finally:
        web.stop()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "no-such-model", "-f", "missing.txt", "Q"], "missing.txt cannot be read: No such file"),
        (["-f", "photo.png", "Q"], "photo.png is a PNG image: only text, HTML and PDF can be read"),
        (["-f", "/dev/null", "Q"], "/dev/null is a device"),
        (["-f", "-", "-f", "-", "Q"], "can be read once"),
        (["-f", "-", "-"], "contradict"),
        (["-f", "", "Q"], "names no file"),
        (["-f", "card.txt", "other.txt", "Q"], "; -f takes one name: repeat it, or name the directory"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_exit_code_two(
    arguments: list[str], said: str, llamacli: Run, desk: Path
) -> None:
    done = llamacli(*arguments, cwd=desk)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in one_line(done.stderr)


def test_a_directory_says_what_it_left_out(llamacli: Run, desk: Path) -> None:
    done = llamacli("-n", "1", "-f", ".", "What is it?", cwd=desk)
    assert one_line(done.stderr) == ".: 3 files were read; left out: 1 binary (-v names them)"
    assert "left out: photo.png (binary)" in llamacli("-v", "-n", "1", "-f", ".", "What?", cwd=desk).stderr


@pytest.mark.parametrize(("library", "name"), [("pypdf", "paper.pdf"), ("trafilatura", "page.html")])
def test_where_the_extra_is_missing_its_command_is_said(
    library: str, name: str, llamacli: Run, desk: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"  # stands before the real library, and is none
    bare.mkdir()
    (bare / f"{library}.py").write_text("raise ModuleNotFoundError")
    (desk / "page.html").write_text("<html><p>Hello")
    done = llamacli("-f", name, "What?", cwd=desk, env=environment | {"PYTHONPATH": str(bare)})
    assert done.returncode == 2
    assert one_line(done.stderr).endswith("takes one thing more to read: pip install 'llamacli[documents]'")
    there = llamacli("-n", "1", "-f", ".", "What?", cwd=desk, env=environment | {"PYTHONPATH": str(bare)})
    assert "1 for want of pip install 'llamacli[documents]' (-v names them)" in one_line(there.stderr)
