"""Pulling as users do it: the program as a process, the real huggingface_hub, a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import PROGRAM, Run, golden
from loopback_hub import Fault, LoopbackHub
from test_store import hub_cached

from llamacli import machine
from llamacli.models import store
from llamacli.models.store import Places

REPO = "org/tiny-llama2-chat-GGUF"
FILE = "tiny-llama2-chat.Q8_0.gguf"
TINY = store.bundled().read_bytes()
ANSWER = golden()[0].answer
QUESTION = ("--temperature", "0", "Tell me about llama2")


@pytest.fixture
def published(hub: LoopbackHub) -> LoopbackHub:
    hub.add(REPO, FILE, TINY)
    hub.add(REPO, "README.md", b"# about it", lfs=True)
    return hub


def home(environment: dict[str, str]) -> Path:
    return Path(environment["LLAMACLI_HOME"])


def models(environment: dict[str, str]) -> list[Path]:
    return sorted((home(environment) / "data" / "models").rglob("*.gguf"))


def errors(stderr: str) -> list[str]:
    """What is said beside the progress."""
    lines = stderr.splitlines()
    assert all(line.startswith("llamacli: ") for line in lines), stderr
    said = [line.removeprefix("llamacli: ") for line in lines]
    return [line for line in said if not line.startswith("downloading ") and "comes under the" not in line]


def test_pull_prints_the_path_of_a_whole_file_and_nothing_else(
    published: LoopbackHub, llamacli: Run, environment: dict[str, str]
) -> None:
    done = llamacli("pull", f"{REPO}:q8_0")
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    path = Path(done.stdout.rstrip("\n"))
    assert path.read_bytes() == TINY and path == models(environment)[0]
    assert "downloading tiny-llama2-chat.Q8_0.gguf: 7.9 MB" in done.stderr


def test_a_model_that_is_here_is_not_fetched_again(published: LoopbackHub, llamacli: Run) -> None:
    first = llamacli("pull", f"{REPO}:Q8_0", "-q")
    assert first.stderr == ""
    n_bodies = len(published.of("body"))
    again = llamacli("pull", REPO)
    assert (again.stdout, again.stderr, again.returncode) == (first.stdout, "", 0)
    assert len(published.of("body")) == n_bodies


def test_a_pinned_revision_that_is_here_asks_nobody(published: LoopbackHub, llamacli: Run) -> None:
    reference = f"{REPO}@{published.repositories[REPO].commit}:Q8_0"
    llamacli("pull", reference)
    published.requests.clear()
    assert llamacli("pull", reference).returncode == 0
    assert llamacli("-m", reference, *QUESTION).stdout == ANSWER + "\n"
    assert published.requests == []


def test_a_new_commit_with_the_same_file_is_not_fetched(published: LoopbackHub, llamacli: Run) -> None:
    first = llamacli("pull", REPO)
    published.add(REPO, "README.md", b"# more about it")
    published.requests.clear()
    assert llamacli("pull", REPO).stdout == first.stdout
    assert published.of("body") == []
    pinned = f"{REPO}@{published.repositories[REPO].commit}:Q8_0"
    assert llamacli("pull", "--offline", pinned).stdout == first.stdout


def test_a_new_commit_with_another_file_is_fetched_beside_the_old(
    published: LoopbackHub, llamacli: Run, environment: dict[str, str]
) -> None:
    old = llamacli("pull", REPO).stdout
    pinned = f"{REPO}@{published.repositories[REPO].commit}:Q8_0"
    published.add(REPO, FILE, TINY + b"\0" * 32)
    new = llamacli("pull", REPO).stdout
    assert new != old and len(models(environment)) == 2
    assert llamacli("pull", pinned).stdout == old


def test_run_pulls_what_it_needs_and_answers(published: LoopbackHub, llamacli: Run) -> None:
    done = llamacli("-m", f"{REPO}:Q8_0", *QUESTION)
    assert (done.stdout, done.returncode) == (ANSWER + "\n", 0)
    assert "7.9 MB" in done.stderr
    published.stop()
    again = llamacli("-m", f"{REPO}:Q8_0", *QUESTION)
    assert (again.stdout, again.stderr) == (ANSWER + "\n", "")
    record = json.loads(llamacli("-m", f"{REPO}:Q8_0", "--json", *QUESTION).stdout)["model"]
    assert record["sha256"] == store.TINY_SHA256 and record["revision"] == published.repositories[REPO].commit


def test_the_hub_may_be_switched_off_half_way(published: LoopbackHub, environment: dict[str, str]) -> None:
    published.fault("body", Fault(how="slow", seconds=0.005))
    with subprocess.Popen(
        [*PROGRAM, "-m", f"{REPO}:Q8_0", *QUESTION], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        while published.sent < len(TINY) // 2:
            time.sleep(0.01)
        published.stop()
        time.sleep(0.3)
        published.start()
        stdout, stderr = process.communicate(timeout=60)
    assert stdout.decode() == ANSWER + "\n", stderr
    assert published.of("body")[-1].start > 0


def test_offline_names_what_would_have_to_be_pulled(published: LoopbackHub, llamacli: Run) -> None:
    for arguments in (["-m", f"{REPO}:Q8_0", "--offline", "hi"], ["pull", "--offline", f"{REPO}:Q8_0"]):
        done = llamacli(*arguments)
        assert done.returncode == 5 and done.stdout == ""
        assert "llamacli pull org/tiny-llama2-chat-GGUF:Q8_0 downloads it, but --offline" in errors(done.stderr)[0]
    assert published.requests == []


def test_the_licence_is_named_once_on_a_machine(published: LoopbackHub, llamacli: Run) -> None:
    published.add("org/other-llama2-GGUF", "x.Q8_0.gguf", TINY)
    assert "https://ai.meta.com/llama/license/" in llamacli("pull", REPO).stderr
    assert "license" not in llamacli("pull", "org/other-llama2-GGUF").stderr


# -- which file --------------------------------------------------------------------------------------------------


def test_several_files_that_fit_are_listed(published: LoopbackHub, llamacli: Run) -> None:
    published.add("org/two", "a.Q4_K_M.gguf", b"GGUF")
    published.add("org/two", "b.Q4_K_M.gguf", b"GGUF")
    published.add("org/two", "mmproj.Q4_K_M.gguf", b"GGUF")
    done = llamacli("pull", "org/two:Q4_K_M")
    assert (done.returncode, done.stdout) == (5, "")
    assert "2 files with Q4_K_M: name one as org/two/FILE: a.Q4_K_M.gguf, b.Q4_K_M.gguf" in errors(done.stderr)[0]
    assert llamacli("pull", "org/two/b.Q4_K_M.gguf").returncode == 0


def test_no_file_that_fits_lists_those_that_are_there(published: LoopbackHub, llamacli: Run) -> None:
    done = llamacli("pull", f"{REPO}:Q2_K")
    assert done.returncode == 5 and f"no file with Q2_K: name one as {REPO}/FILE: {FILE}" in errors(done.stderr)[0]
    published.add("org/none-GGUF", "model.safetensors", b"x")
    assert "has no GGUF file" in errors(llamacli("pull", "org/none-GGUF").stderr)[0]


def test_shards_come_together_and_raw_parts_are_joined(
    hub: LoopbackHub, llamacli: Run, environment: dict[str, str]
) -> None:
    for i in (1, 2):
        hub.add("org/big", f"q8/m.Q8_0-0000{i}-of-00002.gguf", b"GGUF%d" % i)
    done = llamacli("pull", "org/big:Q8_0")
    assert done.stdout.endswith("/q8/m.Q8_0-00001-of-00002.gguf\n")
    assert [path.read_bytes() for path in models(environment)] == [b"GGUF1", b"GGUF2"]
    hub.add("org/split", "m.Q6_K.gguf-split-a", TINY[:4_000_000])
    hub.add("org/split", "m.Q6_K.gguf-split-b", TINY[4_000_000:])
    assert llamacli("-m", "org/split:Q6_K", *QUESTION).stdout == ANSWER + "\n"


# -- what stands in the way --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_pull_that_is_interrupted_goes_on_the_next_time(
    number: signal.Signals, published: LoopbackHub, environment: dict[str, str], llamacli: Run
) -> None:
    published.fault("body", Fault(how="slow", seconds=0.005))
    with subprocess.Popen(
        [*PROGRAM, "pull", REPO], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        while published.sent < len(TINY) // 3:
            time.sleep(0.01)
        began = time.monotonic()
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=20)
        assert time.monotonic() - began < 2
    assert stdout == b"" and b"Traceback" not in stderr
    assert process.returncode == (130 if number is signal.SIGINT else -number)
    if number is signal.SIGINT:
        assert b"the same command goes on from there" in stderr
    assert models(environment) == []
    assert llamacli("pull", REPO).returncode == 0
    assert published.of("body")[-1].start >= len(TINY) // 4


def test_two_pulls_at_once_are_one_transfer(published: LoopbackHub, environment: dict[str, str]) -> None:
    published.fault("body", Fault(how="slow", seconds=0.002))
    command = [*PROGRAM, "pull", REPO]
    with (
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as first,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as second,
    ):
        ends = [process.communicate(timeout=60) for process in (first, second)]
    assert ends[0][0] == ends[1][0] != b""
    assert sum(b"another process is downloading" in stderr for _, stderr in ends) == 1
    assert len(published.of("body")) == 1


def test_a_file_in_the_hugging_face_cache_is_used(
    published: LoopbackHub, environment: dict[str, str], llamacli: Run
) -> None:
    places = Places(home(environment) / "data" / "models", Path(environment["HF_HOME"]) / "hub")
    path = hub_cached(places, REPO, FILE, published.repositories[REPO].commit, TINY)
    assert llamacli("pull", REPO).stdout == f"{path}\n"
    assert llamacli("-m", f"{REPO}:Q8_0", *QUESTION).stdout == ANSWER + "\n"
    assert published.of("body") == []


def test_a_damaged_file_in_the_hugging_face_cache_is_neither_used_nor_run(
    published: LoopbackHub, environment: dict[str, str], llamacli: Run
) -> None:
    places = Places(home(environment) / "data" / "models", Path(environment["HF_HOME"]) / "hub")
    path = hub_cached(places, REPO, FILE, published.repositories[REPO].commit, TINY)
    path.resolve().write_bytes(TINY[:-1] + bytes([TINY[-1] ^ 1]))
    refused = llamacli("-m", f"{REPO}:Q8_0", *QUESTION)
    assert (refused.returncode, refused.stdout) == (5, "") and "is damaged" in refused.stderr
    done = llamacli("pull", REPO)
    assert Path(done.stdout.strip()).read_bytes() == TINY and "the Hugging Face cache's copy is damaged" in done.stderr


def test_wrong_bytes_are_exit_code_five_and_leave_no_model(
    published: LoopbackHub, environment: dict[str, str], llamacli: Run
) -> None:
    published.fault("body", *[Fault(how="flip", after=5_000_000)] * 2)
    done = llamacli("pull", REPO)
    assert (done.returncode, done.stdout, models(environment)) == (5, "", [])
    assert "is damaged, and has been removed" in errors(done.stderr)[-1]


def test_a_gated_model_says_where_its_licence_is(hub: LoopbackHub, llamacli: Run, environment: dict[str, str]) -> None:
    hub.add("meta/gated-GGUF", FILE, TINY, token="right")
    without = llamacli("pull", "meta/gated-GGUF")
    assert without.returncode == 5 and f"{hub.url}/meta/gated-GGUF" in errors(without.stderr)[0]
    wrong = llamacli("pull", "meta/gated-GGUF", env=environment | {"HF_TOKEN": "wrong"})
    assert wrong.returncode == 5 and "HF_TOKEN" in errors(wrong.stderr)[0]
    right = llamacli("pull", "meta/gated-GGUF", env=environment | {"HF_TOKEN": "right"})
    assert right.returncode == 0
    assert {seen.token for seen in hub.of("body")} == {None}


def test_a_disk_without_room_is_refused_before_the_first_byte(hub: LoopbackHub, llamacli: Run) -> None:
    """The hub announces more than any disk has."""
    hub.add(REPO, FILE, TINY)
    hub.announced[FILE] = 1 << 60
    done = llamacli("pull", REPO)
    assert done.returncode == 6 and hub.of("body") == []
    (said,) = errors(done.stderr)
    assert "needs 1152921504.61 GB of disk" in said and "GB free" in said


def test_a_model_that_will_not_fit_in_memory_is_warned_of(hub: LoopbackHub, environment: dict[str, str]) -> None:
    size = machine.memory().usable + 1_000_000_000
    if shutil.disk_usage(Path(environment["LLAMACLI_HOME"]).parent).free < size + (1 << 30):
        pytest.skip("the disk would be refused first")
    hub.add(REPO, FILE, TINY)
    hub.announced[FILE] = size
    with subprocess.Popen([*PROGRAM, "pull", REPO], env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("it may not run" in line for line in process.stderr)
        process.kill()


def test_a_directory_that_may_not_be_written_is_one_line(
    published: LoopbackHub, llamacli: Run, environment: dict[str, str]
) -> None:
    home(environment).mkdir()
    (home(environment) / "data").write_text("a file where a directory should be")
    done = llamacli("pull", REPO)
    assert done.returncode == 5 and "LLAMACLI_HOME chooses another place" in errors(done.stderr)[0]


def test_an_unreachable_hub_is_one_line_within_ten_seconds(hub: LoopbackHub, llamacli: Run) -> None:
    hub.stop()
    began = time.monotonic()
    done = llamacli("-m", "7b-chat", "hi")
    assert time.monotonic() - began < 10
    assert done.returncode == 5 and len(done.stderr.splitlines()) == 1


def test_what_cannot_be_pulled_is_said(published: LoopbackHub, llamacli: Run) -> None:
    assert "is a path" in errors(llamacli("pull", "./x.gguf").stderr)[0]
    assert llamacli("pull", "tiny").stdout.strip() == str(store.bundled())
    assert "did you mean 7b-chat" in errors(llamacli("pull", "7b-caht").stderr)[0]


def test_a_checksum_that_the_catalogue_does_not_know_is_a_warning(hub: LoopbackHub, llamacli: Run) -> None:
    """The catalogue pins a revision; the stand-in has another file under it."""
    repo_id, filename = "TheBloke/Llama-2-7B-Chat-GGUF", "llama-2-7b-chat.Q4_K_M.gguf"
    hub.add(repo_id, filename, TINY)
    pinned = "191239b3e26b2882fb562ffccdd1cf0f65402adb"
    repository = hub.repositories[repo_id]
    repository.commit = pinned
    hub.history[repo_id][pinned] = repository
    done = llamacli("pull", "7b-chat")
    assert done.returncode == 0
    assert "warning: the hub's llama-2-7b-chat.Q4_K_M.gguf is another file than the one known as 7b-chat" in done.stderr
    assert hashlib.sha256(Path(done.stdout.strip()).read_bytes()).hexdigest() == store.TINY_SHA256


@pytest.mark.slow
def test_a_pipe_gets_lines_now_and_then(published: LoopbackHub, environment: dict[str, str]) -> None:
    published.fault("body", Fault(how="slow", seconds=0.013))
    done = subprocess.run([*PROGRAM, "pull", REPO], env=environment, capture_output=True, encoding="utf-8", timeout=60)
    lines = [line for line in done.stderr.splitlines() if "downloading" in line]
    assert 3 <= len(lines) <= 6 and "%" in lines[1] and "left" in lines[1] and "done" in lines[-1]
    assert "\x1b" not in done.stderr
