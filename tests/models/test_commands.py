"""list, show, rm and verify as processes: in a pipe, on a terminal, as JSON."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM, Run
from loopback_hub import Fault, LoopbackHub
from test_store import hub_cached

from llamacli.models import store
from llamacli.models.catalog import catalog
from llamacli.models.store import Places

REPO = "org/tiny-llama2-chat-GGUF"
FILE = "tiny-llama2-chat.Q8_0.gguf"
TINY = store.bundled().read_bytes()
KEYS = [
    *("name", "repo_id", "filename", "revision", "path", "size", "sha256"),
    *("quantization", "context_length", "licence", "ram", "fits"),
]


@pytest.fixture
def pulled(hub: LoopbackHub, llamacli: Run) -> Path:
    hub.add(REPO, FILE, TINY)
    return Path(llamacli("pull", f"{REPO}:Q8_0").stdout.strip())


def places(environment: dict[str, str]) -> Places:
    return Places(Path(environment["LLAMACLI_HOME"], "data", "models"), Path(environment["HF_HOME"], "hub"))


def objects(text: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(text)
    return found


def on_a_terminal(environment: dict[str, str], *arguments: str, typed: bytes = b"") -> tuple[str, int]:
    """What a terminal of 100 columns shows, and the exit code."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*PROGRAM, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment | {"COLUMNS": "140", "TERM": "xterm"},
    ) as process:
        os.close(theirs)
        if typed:
            os.write(ours, typed)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # the other end is closed
            pass
        code = process.wait(20)
    os.close(ours)
    return shown.decode(), code


def test_list_is_one_line_for_each_model_in_a_pipe(pulled: Path, llamacli: Run) -> None:
    done = llamacli("list")
    header, tiny, ours = done.stdout.splitlines()
    assert header.split()[:3] == ["NAME", "SIZE", "QUANTIZATION"]
    assert tiny.split()[:4] == ["tiny", "7.9", "MB", "Q8_0"] and "bundled" in tiny
    assert ours.startswith(f"{REPO}:Q8_0") and "never" in ours and ours.endswith("pulled")
    assert "\x1b" not in done.stdout and done.stderr == ""


def test_list_says_when_a_model_was_used_last(pulled: Path, llamacli: Run) -> None:
    llamacli("-m", f"{REPO}:Q8_0", "-n", "1", "hi")
    assert "never" not in llamacli("list").stdout.splitlines()[2]


def test_json_of_list_and_show_have_the_promised_keys(pulled: Path, llamacli: Run) -> None:
    listed = objects(llamacli("list", "--json").stdout)
    assert [list(each) for each in listed] == [KEYS, KEYS]
    assert listed[1]["path"] == str(pulled) and listed[1]["sha256"] == store.TINY_SHA256 and listed[1]["fits"] is True
    catalogued = objects(llamacli("list", "--catalog", "--json").stdout)
    assert all(list(each) == KEYS for each in catalogued)
    assert {each["name"] for each in catalogued} >= set(catalog().names)
    card = json.loads(llamacli("show", "--json", f"{REPO}:Q8_0").stdout)
    assert set(card) >= {*KEYS, "architecture", "parameters", "template", "ram_by_context"}
    absent = json.loads(llamacli("show", "--json", "7b-chat").stdout)
    assert absent["path"] is None and absent["size"] == 4_081_004_224


def test_the_catalogue_names_every_model_with_what_it_needs(llamacli: Run) -> None:
    lines = llamacli("list", "--catalog").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == catalog().names
    assert "4.08 GB" in lines[1] and "6.58 GB" in lines[1] and lines[1].endswith("Llama 2 Community")


def test_show_is_the_model_s_card(pulled: Path, llamacli: Run) -> None:
    card = llamacli("show", f"{REPO}:Q8_0").stdout
    for line in (
        "parameters      6,708,960",
        "context         1,024 tokens",
        "prompt format   llama-2",
        f"path            {pulled}",
    ):
        assert line in card
    absent = llamacli("show", "13b-chat:Q5_K_M").stdout
    assert "https://ai.meta.com/llama/license/" in absent and "https://ai.meta.com/llama/use-policy/" in absent
    assert "llamacli pull 13b-chat:Q5_K_M" in absent and "13b-chat:Q5_K_M *" in absent


def test_show_of_what_nobody_knows_is_exit_code_five(llamacli: Run) -> None:
    for name in ("no-such", "org/repo:Q8_0", "7b-chat:Q9_X", "/no/such/file.gguf"):
        done = llamacli("show", name)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (5, "", 1)


def test_a_terminal_gets_a_drawn_table(pulled: Path, environment: dict[str, str]) -> None:
    shown, code = on_a_terminal(environment, "list")
    assert code == 0 and "─" in shown and f"{REPO}:Q8_0" in shown
    drawn, _ = on_a_terminal(environment, "list", "--catalog")
    assert "70b-chat" in drawn and "─" in drawn


def test_no_colour_where_none_is_wanted(pulled: Path, environment: dict[str, str]) -> None:
    shown, _ = on_a_terminal(environment | {"NO_COLOR": "1"}, "list")
    assert "\x1b[3" not in shown


def test_rm_asks_on_a_terminal_and_does_what_it_is_told(pulled: Path, environment: dict[str, str]) -> None:
    shown, code = on_a_terminal(environment, "rm", f"{REPO}:Q8_0", typed=b"n\n")
    assert "remove org/tiny-llama2-chat-GGUF:Q8_0, 7.9 MB" in shown and "[y/N]" in shown
    assert code == 2 and pulled.exists()
    _, code = on_a_terminal(environment, "rm", f"{REPO}:Q8_0", typed=b"y\n")
    assert code == 0 and not pulled.exists()
    assert not (places(environment).models / "hub" / "org--tiny-llama2-chat-GGUF").exists()


def test_rm_asks_nobody_in_a_script(pulled: Path, llamacli: Run) -> None:
    refused = llamacli("rm", f"{REPO}:Q8_0")
    assert refused.returncode == 2 and "Say -y" in refused.stderr and pulled.exists()
    assert llamacli("rm", "-y", f"{REPO}:Q8_0").returncode == 0
    again = llamacli("rm", "-y", f"{REPO}:Q8_0")
    assert again.returncode == 5 and "nothing to remove" in again.stderr


def test_rm_keeps_what_is_not_ours(llamacli: Run, tmp_path: Path) -> None:
    path = tmp_path / "own.gguf"
    path.write_bytes(TINY)
    refused = llamacli("rm", "-y", str(path))
    assert refused.returncode == 2 and "not in llamacli's care" in refused.stderr and path.exists()
    assert llamacli("rm", "-y", "tiny").returncode == 2 and store.bundled().exists()


def test_rm_takes_a_model_out_of_the_hugging_face_cache(llamacli: Run, environment: dict[str, str]) -> None:
    here = places(environment)
    one = hub_cached(here, REPO, FILE, "a" * 40, TINY)
    two = hub_cached(here, REPO, FILE, "b" * 40, TINY)
    blob = one.resolve()
    assert llamacli("rm", "-y", f"{REPO}@{'a' * 40}:Q8_0").returncode == 0
    assert not one.is_symlink() and blob.exists() and two.exists(), "another snapshot has it too"
    assert llamacli("rm", "-y", f"{REPO}:Q8_0").returncode == 0
    assert not blob.exists() and not two.is_symlink()


def test_rm_clears_what_an_interrupted_pull_has_left(
    hub: LoopbackHub, llamacli: Run, environment: dict[str, str]
) -> None:
    hub.add(REPO, FILE, TINY)
    hub.fault("body", Fault(how="flip", after=9), Fault(how="cut", after=1_000_000), Fault(status=404))
    assert llamacli("pull", REPO).returncode == 5
    left = list(places(environment).models.rglob("*.part*"))
    assert left
    assert llamacli("rm", "-y", f"{REPO}:Q8_0").returncode == 0
    assert not list(places(environment).models.rglob("*.part*"))


def test_verify_reads_everything_again(pulled: Path, llamacli: Run) -> None:
    done = llamacli("verify")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["whole", "whole"]


def test_a_damaged_model_is_found_and_not_run_any_more(pulled: Path, llamacli: Run) -> None:
    damaged = bytearray(TINY)
    damaged[5_000_000] ^= 1
    state = pulled.stat()
    pulled.write_bytes(damaged)
    os.utime(pulled, ns=(state.st_atime_ns, state.st_mtime_ns))  # as a failing disk does it
    found = llamacli("verify", f"{REPO}:Q8_0")
    assert found.returncode == 5 and found.stdout.splitlines()[1].startswith("damaged")
    assert "then pull it again" in found.stderr
    refused = llamacli("-m", f"{REPO}:Q8_0", "hi")
    assert (refused.returncode, refused.stdout) == (5, "") and "is damaged" in refused.stderr


def test_a_file_of_nobody_knows_what_has_no_verdict(llamacli: Run, tmp_path: Path) -> None:
    path = tmp_path / "own.gguf"
    path.write_bytes(TINY)
    (found,) = objects(llamacli("verify", "--json", str(path)).stdout)
    assert (found["state"], found["sha256"], found["expected"]) == ("unknown", store.TINY_SHA256, None)


def test_a_model_that_is_none_is_listed_as_damaged(llamacli: Run, environment: dict[str, str]) -> None:
    here = places(environment).models
    here.mkdir(parents=True)
    (here / "cut.gguf").write_bytes(TINY[:1000])
    assert "damaged" in llamacli("list").stdout.splitlines()[2]
    assert llamacli("list", "--json").returncode == 0
