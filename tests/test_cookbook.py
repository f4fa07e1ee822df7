"""The README's cookbook: every line of it is run as it is printed, on the tiny model."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import PROGRAM, golden
from papers import pdf

from llamacli.presets.library import library

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
ANSWER = golden()[0].answer
BOAT = (
    "The old lighthouse keeper found a small wooden boat near the harbour.\n"
    "He painted it green. Every summer the children of the village sail with it."
)
SUMMARY = "The old lighthouse keeper found a small wooden boat near the harbour.\n"


def recipes() -> dict[str, str]:
    """The commands, by what the README says of them."""
    (section,) = re.findall(r"^## Cookbook\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    (block,) = re.findall(r"^```\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    return dict(re.findall(r"^# (.+)\n(.+)$", block, re.MULTILINE))


@pytest.fixture
def desk(tmp_path: Path, environment: dict[str, str]) -> Path:
    """A directory with the files that the recipes name, and `llamacli` on the PATH."""
    desk, programs = tmp_path / "desk", tmp_path / "bin"
    (desk / "notes").mkdir(parents=True)
    programs.mkdir()
    (programs / "llamacli").write_text(f'#!/bin/sh\nexec {shlex.join(PROGRAM)} "$@"\n')
    (programs / "llamacli").chmod(0o755)
    environment["PATH"] = f"{programs}:{environment['PATH']}"
    environment |= {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "HOME": str(tmp_path)}
    for who in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{who}_NAME": "Ada", f"GIT_{who}_EMAIL": "ada@example.org"}
    (desk / "report.pdf").write_bytes(pdf(BOAT))
    (desk / "Makefile").write_text("all:\n\tcat no-such-file\n")
    (desk / "reviews.txt").write_text("The best lamp I ever had.\nIt's broken after a day, what a waste.\n")
    (desk / "letter.txt").write_text("Peter from Hamburg is 52.\n")
    (desk / "mails.csv").write_text('id,text\n1,"I want to order 3 lamps, please"\n2,Win a million now!\n')
    (desk / "book.txt").write_text(f"{BOAT}\n\n" * 28)
    (desk / "note.txt").write_text("The cat is black.\n")
    (desk / "card.txt").write_text("name: Ada\nage: 36\ncity: London\ncolour: blue\n")
    (desk / "notes" / "a.md").write_text("# Lamps\n\nThey are blue.\n")
    (desk / "notes" / "b.md").write_text("# Boats\n\nThey are green.\n")
    return desk


Done = subprocess.CompletedProcess[str]


def shell(script: str, desk: Path, environment: dict[str, str]) -> Done:
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", script],
        cwd=desk,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
    )


def a_commit_was_made(done: Done, desk: Path, environment: dict[str, str]) -> None:
    log = shell("git log --format=%s%n%an -p", desk, environment).stdout.splitlines()
    assert log[0].strip() and log[1] == "Ada" and "+    return w * h" in log


def the_summary_is_the_papers(done: Done, desk: Path, _: dict[str, str]) -> None:
    assert done.stdout == SUMMARY


def the_log_is_kept_and_explained(done: Done, desk: Path, _: dict[str, str]) -> None:
    assert "no-such-file" in (desk / "make.log").read_text() and done.stdout.strip()


def each_line_has_its_label(done: Done, desk: Path, _: dict[str, str]) -> None:
    assert len(done.stdout.splitlines()) == 2 and set(done.stdout.splitlines()) <= {"positive", "negative"}


def the_city_is_found(done: Done, desk: Path, _: dict[str, str]) -> None:
    assert done.stdout == "Hamburg\n"


def each_row_has_its_label(done: Done, desk: Path, _: dict[str, str]) -> None:
    lines = [json.loads(line) for line in (desk / "labels.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["1", "2"]
    assert {line["answer"] for line in lines} <= {"spam", "order", "question"}


def the_book_was_read_in_parts(done: Done, desk: Path, _: dict[str, str]) -> None:
    assert (desk / "plot.txt").read_text().strip() and "parts, whose answers are combined" in done.stderr


def the_translation_is_seen_and_kept(done: Done, desk: Path, _: dict[str, str]) -> None:
    assert done.stdout == (desk / "note.fr.txt").read_text() == "Le chat est noir.\n"


def the_files_answer(done: Done, desk: Path, _: dict[str, str]) -> None:
    assert "London" in done.stdout


def the_map_is_there(done: Done, desk: Path, _: dict[str, str]) -> None:
    assert (desk / "map.mmd").read_text().strip() and done.stdout == ""


def both_answers_are_the_same(done: Done, desk: Path, _: dict[str, str]) -> None:
    first, second = done.stdout.splitlines()
    assert first == second == json.loads((desk / "run.json").read_text())["answer"]
    assert "Llama 2" in first


def the_server_answers(done: Done, desk: Path, _: dict[str, str]) -> None:
    assert "Llama 2" in done.stdout


CHECKS: dict[str, Callable[[Done, Path, dict[str, str]], None]] = {
    "The commit message of what is staged": a_commit_was_made,
    "A PDF in a few points": the_summary_is_the_papers,
    "What an error means, the log kept": the_log_is_kept_and_explained,
    "A label for each line": each_line_has_its_label,
    "JSON out of prose, and one field of it": the_city_is_found,
    "A label for each row of a CSV file": each_row_has_its_label,
    "A book that is longer than the context, read in parts": the_book_was_read_in_parts,
    "A translation, seen and kept": the_translation_is_seen_and_kept,
    "A question about several files": the_files_answer,
    "A mind map for a Markdown page": the_map_is_there,
    "An answer once more, by the seed that --json tells": both_answers_are_the_same,
    "A running `llamacli serve --uds llama.sock`, asked by curl": the_server_answers,
}
FAILS = {"What an error means, the log kept": 2}  # as make does, for a shell with pipefail


@contextmanager
def circumstances(recipe: str, desk: Path, environment: dict[str, str]) -> Iterator[None]:
    """What a recipe takes for granted: a change that is staged, a server that runs."""
    if "git" in recipe:
        old, new = "def area(w, h):\n    return w + h\n", "def area(w, h):\n    return w * h\n"
        (desk / "shape.py").write_text(old)
        assert shell("git init -q && git add shape.py && git commit -qm 'Areas'", desk, environment).returncode == 0
        (desk / "shape.py").write_text(new)
        shell("git add shape.py", desk, environment)
        yield
    elif "--unix-socket" in recipe:
        command = [*PROGRAM, "serve", "--uds", "llama.sock", "--ready-file", "ready.json", "-q"]
        with subprocess.Popen(command, cwd=desk, env=environment) as server:
            try:
                while server.poll() is None and not (desk / "ready.json").exists():
                    time.sleep(0.02)
                yield
            finally:
                server.send_signal(signal.SIGTERM)
    else:
        yield


def test_there_are_twelve_and_each_is_checked() -> None:
    assert len(recipes()) == 12 and recipes().keys() == CHECKS.keys()


@pytest.mark.parametrize("what", CHECKS)
def test_a_recipe_works_as_printed(what: str, desk: Path, environment: dict[str, str]) -> None:
    recipe, programs = recipes()[what], ("git", "jq", "curl", "make", "xargs")
    missing = [name for name in programs if f"{name} " in recipe and not shutil.which(name)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    if "seed" not in recipe:
        environment["LLAMACLI_SEED"] = "7"  # no test of luck
    with circumstances(recipe, desk, environment):
        done = shell(recipe, desk, environment)
    assert done.returncode == FAILS.get(what, 0), done.stderr
    assert "Traceback" not in done.stderr
    CHECKS[what](done, desk, environment)


def test_the_presets_file_of_the_readme_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```toml\n(\[review\]\n.*?)^```", README, re.DOTALL | re.MULTILINE)
    (tmp_path / "presets.toml").write_text(text)
    review = library(tmp_path / "presets.toml")["review"]
    task = review.task({"language": "de"})
    assert task.instruction == "Review the change above as a colleague. Answer in German."
    assert review.settings == {"max_tokens": 400} and review.stop == ("---",) and review.needs_text
