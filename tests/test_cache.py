"""Computed prompts on disk, by real processes: the second question starts where the first one was."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM, Run, golden

DOCUMENT = "Llama 2 is a family of open large language models. " * 12
GREEDY = ("--temperature", "0", "-n", "12")


@pytest.fixture
def prefixes(environment: dict[str, str]) -> Path:
    return Path(environment["LLAMACLI_HOME"], "cache", "prefixes")


def asked(llamacli: Run, *arguments: str) -> tuple[str, dict[str, int]]:
    """Answer and usage, both about the document."""
    done = llamacli("--json", *GREEDY, *arguments, input=DOCUMENT)
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout)
    return record["answer"], record["usage"]


def test_a_second_question_about_a_document_and_the_same_one_again(llamacli: Run, prefixes: Path) -> None:
    _, first = asked(llamacli, "Who made it?")
    answer, second = asked(llamacli, "Who made it, and when?")
    again, third = asked(llamacli, "Who made it, and when?")
    assert first["cached_tokens"] == 0
    assert 0.9 * first["prompt_tokens"] < second["cached_tokens"] < second["prompt_tokens"]
    assert third["cached_tokens"] == third["prompt_tokens"]
    assert again == answer
    assert {stat.S_IMODE(path.stat().st_mode) for path in prefixes.iterdir()} == {0o600}
    assert stat.S_IMODE(prefixes.stat().st_mode) == 0o700


def test_a_golden_answer_is_the_same_from_the_disk(llamacli: Run) -> None:
    case = next(c for c in golden() if c.messages[0].role == "system" and len(c.messages) == 2)
    words = ("-s", case.messages[0].content + " Be kind." * 30, case.messages[1].content)
    computed, stored = (llamacli("-v", "--temperature", "0", *words) for _ in range(2))
    assert stored.stdout == computed.stdout
    assert "came from the disk" in stored.stderr and "came from the disk" not in computed.stderr
    assert "stored the" in computed.stderr and "stored the" not in stored.stderr


@pytest.mark.parametrize("refusal", [["--no-cache"], ["--cache-size", "0"]])
def test_who_wants_no_cache_neither_reads_nor_writes(refusal: list[str], llamacli: Run, prefixes: Path) -> None:
    asked(llamacli, "Who made it?", *refusal)
    assert not prefixes.exists()
    asked(llamacli, "Who made it?")
    assert asked(llamacli, "Who made it?", *refusal)[1]["cached_tokens"] == 0


def test_a_short_prompt_leaves_no_trace(llamacli: Run, prefixes: Path) -> None:
    assert llamacli(*GREEDY, "Tell me about llama2").returncode == 0
    assert not prefixes.exists()


def test_a_number_format_of_its_own_has_prefixes_of_its_own(llamacli: Run) -> None:
    asked(llamacli, "Who made it?")
    assert asked(llamacli, "--kv-type", "q8_0", "Who made it?")[1]["cached_tokens"] == 0
    assert asked(llamacli, "--kv-type", "q8_0", "Who made it?")[1]["cached_tokens"] > 64


def test_a_disk_that_is_full_costs_nothing_but_the_prefix(environment: dict[str, str], prefixes: Path) -> None:
    limited = ["bash", "-c", 'ulimit -f 200 && exec "$@"', "-", *PROGRAM, *GREEDY, "Who made it?"]  # KiB for each file
    done = subprocess.run(limited, input=DOCUMENT, capture_output=True, encoding="utf-8", env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip()
    assert list(prefixes.iterdir()) == []


def test_damage_is_a_miss_and_is_mended(llamacli: Run, prefixes: Path) -> None:
    answer, usage = asked(llamacli, "Who made it?")
    (path,) = prefixes.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2] + b"\xff" + whole[len(whole) // 2 + 1 :], b""):
        path.write_bytes(damaged)
        assert asked(llamacli, "Who made it?") == (answer, usage)
    assert asked(llamacli, "Who made it?")[1]["cached_tokens"] == usage["prompt_tokens"]


def test_many_at_once_answer_alike_and_leave_whole_files_only(llamacli: Run, prefixes: Path) -> None:
    answers: list[str] = []

    def ask() -> None:
        answers.append(llamacli(*GREEDY, "--cache-size", "2MB", "Who made it?", input=DOCUMENT).stdout)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4 and len(set(answers)) == 1 and answers[0].strip()
    assert [path.suffix for path in prefixes.iterdir()] == [".kv"]
    assert asked(llamacli, "Who made it?")[1]["cached_tokens"] > 64


def test_a_signal_after_the_answer_ends_the_process_at_once_and_spoils_nothing(
    llamacli: Run, environment: dict[str, str], prefixes: Path
) -> None:
    with subprocess.Popen(
        [*PROGRAM, *GREEDY, "-v", "Who made it?"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(DOCUMENT.encode())
        process.stdin.close()
        assert process.stdout.read().endswith(b"\n")
        process.send_signal(signal.SIGTERM)  # while it stores, or has stored
        assert process.wait(10) in (-signal.SIGTERM, 0)
    answer, usage = asked(llamacli, "Who made it?")
    assert answer and usage["cached_tokens"] in (0, usage["prompt_tokens"])


def test_cache_shows_what_is_kept_and_clears_it(llamacli: Run, prefixes: Path) -> None:
    asked(llamacli, "Who made it?")
    asked(llamacli, "Who made it, and when?")
    shown = llamacli("cache", "show")
    assert shown.stdout.splitlines()[0].split() == ["MODEL", "TOKENS", "KEPT", "FROM", "SIZE", "LAST", "USED"]
    assert shown.stdout.count("tiny ") == 2 and str(prefixes) in shown.stdout and "made" not in shown.stdout
    record = json.loads(llamacli("cache", "show", "--json").stdout)
    sizes = [path.stat().st_size for path in prefixes.iterdir()]
    assert record["size"] == sum(sizes) == sum(entry["size"] for entry in record["entries"])
    assert sorted(entry["from"] > 0 for entry in record["entries"]) == [False, True]
    assert set(record) == {"directory", "budget", "size", "entries"}
    cleared = llamacli("cache", "clear")
    assert (cleared.stdout, cleared.returncode) == ("", 0) and "removed 2 prefixes" in cleared.stderr
    assert list(prefixes.iterdir()) == []
    assert llamacli("cache", "show").stdout.startswith("0 bytes of ")
    assert "nothing to remove" in llamacli("cache", "clear").stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cache-size", "lots", "hi"], "--cache-size must be a size such as 4GB or 500MB (0: none), not 'lots'"),
        (["--cache-size", "-1", "hi"], "--cache-size must be a size"),
        (["--kv-type", "q4_0", "hi"], "--kv-type must be f16 or q8_0"),
    ],
)
def test_a_size_that_is_none_is_one_line(arguments: list[str], said: str, llamacli: Run) -> None:
    done = llamacli(*arguments)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_a_size_in_the_environment_counts(llamacli: Run, environment: dict[str, str]) -> None:
    environment["LLAMACLI_CACHE_SIZE"] = "1.5 GB"
    assert json.loads(llamacli("cache", "show", "--json").stdout)["budget"] == 1_500_000_000
