"""`llamacli tune` by real processes, and what `run` and a server make of the rates it keeps."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAM, Run

from llamacli import launch as launching
from llamacli import tuning_file
from llamacli.commands.batch import served
from llamacli.config import Settings
from llamacli.launch import ServeOptions
from llamacli.models import store
from llamacli.models.notes import Notes
from llamacli.tuning import Attention, Rates, Weights

GIB = 1 << 30
ONE = {1: 1.0, 2: 0.5}
# Made up: A reads and writes at the same pace in both orders; B is slow but for rewritten weights.
SLOW = Weights(0.1, ONE, ONE, {1: 1.0, 16: 1.2, 512: 10.0})
A = Rates(SLOW, replace(SLOW, load=2.0, steps={1: 0.5, 16: 3.0, 512: 40.0}))
B = Rates(SLOW, replace(SLOW, load=90.0, steps={1: 0.5, 16: 0.4, 512: 4.0}))


@pytest.fixture
def tuning(environment: dict[str, str]) -> Path:
    del environment["LLAMACLI_THREADS"]
    return Path(environment["LLAMACLI_HOME"], "cache", "tuning")


def keep(tuning: Path, rates: Rates) -> Path:
    """As if they had been measured of the tiny model here."""
    return tuning_file.write(tuning, tuning_file.subject(store.tiny(), "f16", 0, None), rates)


def settings_of(llamacli: Run, *arguments: str) -> dict[str, Any]:
    done = llamacli("--json", "--temperature", "0", *arguments)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["settings"]
    return found


def served_choices(tuning: Path, options: ServeOptions) -> dict[str, launching.Choice]:
    launch = launching.prepare(Settings(model="tiny"), store.tiny(), lambda _: None, Notes(tuning.parent))
    launching.serve(launch, options, lambda _: None, usable=8 * GIB).close()
    return launch.choices


def test_two_settings_files_show_different_choices_for_a_one_liner_and_for_a_server(
    llamacli: Run, tuning: Path
) -> None:
    keep(tuning, A)
    assert settings_of(llamacli, "-n", "20", "hi")["repack"]["value"] is True
    assert served_choices(tuning, ServeOptions(slots=16))["repack"].value is False
    assert served_choices(tuning, served(16))["repack"].value is False
    keep(tuning, B)
    assert settings_of(llamacli, "-n", "20", "hi")["repack"]["value"] is False
    assert served_choices(tuning, ServeOptions(slots=16))["repack"].value is True
    assert served_choices(tuning, served(16))["repack"].value is True


def test_the_reason_names_the_numbers_that_were_measured(llamacli: Run, tuning: Path) -> None:
    path = keep(tuning, A)
    settings = settings_of(llamacli, "-n", "20", "hi")
    assert "20 written 20.00 s" in settings["repack"]["why"] and "load 2.00 s" in settings["repack"]["why"]
    assert settings["threads"] == {"value": 2, "why": "measured: a token alone takes 1,000 ms with 1, 500 ms with 2"}
    assert settings["threads_batch"]["value"] == 2
    assert settings["tuned"]["value"] is True and str(path) in settings["tuned"]["why"]
    assert "16 at once" in served_choices(tuning, ServeOptions(slots=16))["repack"].why


def test_attention_and_the_size_of_batches_are_told_with_their_numbers_too(llamacli: Run, tuning: Path) -> None:
    weights = replace(SLOW, steps={1: 1.0, 128: 2.0, 512: 10.0})
    keep(tuning, Rates(weights, attention=Attention(64, 1.0, 9.0, 1.0, 1.0)))  # that is: better without the flash
    settings = settings_of(llamacli, "-n", "2", "word " * 200)
    why = "measured: flash attention costs 776% of the time after 64 tokens"
    assert settings["flash_attention"] == {"value": False, "why": why}
    assert settings["batch"] == {"value": 128, "why": "measured: prompts are read at 64 tokens/s"}
    assert settings_of(llamacli, "-n", "2", "hi")["batch"]["why"].endswith(" tokens of prompt")
    assert served_choices(tuning, ServeOptions(slots=2))["batch"].why.startswith("measured: prompts are read at 64")
    shown = llamacli("tune", "--show").stdout
    assert shown.endswith(f"flash attention, for one answer: off\n    {why}\n")


def test_an_answer_that_is_one_of_some_words_is_short_whatever_it_may_take(llamacli: Run, tuning: Path) -> None:
    keep(tuning, replace(A, rewritten=replace(A.rewritten or SLOW, load=30.0)))
    assert settings_of(llamacli, "-n", "100", "hi")["repack"]["value"] is True
    settings = settings_of(llamacli, "-n", "100", "--choices", "yes,no", "hi")
    assert settings["repack"]["value"] is False and " 8 written " in settings["repack"]["why"]


def test_what_is_set_wins_over_what_was_measured(llamacli: Run, tuning: Path) -> None:
    keep(tuning, A)
    assert settings_of(llamacli, "-n", "2", "--threads", "1", "hi")["threads"] == {"value": 1, "why": "as set"}
    assert served_choices(tuning, ServeOptions(slots=16, repack=True))["repack"] == launching.Choice(True, "as set")


def test_a_deterministic_server_does_not_depend_on_what_was_measured(tuning: Path) -> None:
    keep(tuning, A)
    choices = served_choices(tuning, ServeOptions(slots=1, repack=False, is_alike=True))
    assert "tuned" not in choices and "threads_batch" not in choices


def test_an_untuned_machine_is_told_how_to_tune_it_with_v_alone(llamacli: Run, tuning: Path) -> None:
    assert llamacli("-n", "1", "hi").stderr == ""
    shown = llamacli("-v", "-n", "1", "hi").stderr
    assert shown.count("llamacli tune -m tiny measures") == 1
    assert "llamacli tune -m tiny --kv-type q8_0" in llamacli("-v", "--kv-type", "q8_0", "-n", "1", "hi").stderr
    assert "repack = False (a single answer" in shown, "what was chosen before there was anything measured"
    assert not tuning.exists()


def test_a_damaged_file_is_said_with_v_and_is_not_used(llamacli: Run, tuning: Path) -> None:
    keep(tuning, A).write_text("{")
    assert llamacli("-n", "1", "hi").stderr == ""
    shown = llamacli("-v", "-n", "1", "hi")
    assert shown.returncode == 0 and "is damaged; llamacli tune -m tiny" in shown.stderr


def test_prefixes_on_disk_are_of_use_for_their_own_kind_of_attention_only(llamacli: Run, tuning: Path) -> None:
    document = "Llama 2 is a family of open large language models. " * 12

    def n_cached() -> int:
        done = llamacli("--json", "--temperature", "0", "-n", "4", "Who made it?", input=document)
        assert done.returncode == 0, done.stderr
        found: int = json.loads(done.stdout)["usage"]["cached_tokens"]
        return found

    keep(tuning, replace(A, attention=Attention(64, 1.0, 9.0, 1.0, 1.0)))  # that is: better without the flash
    assert n_cached() == 0
    assert n_cached() > 100
    tuning_file.clear(tuning)
    assert n_cached() == 0
    assert n_cached() > 100, "what the other kind left there is not in its way"


def test_what_is_stored_of_a_prompt_counts_when_the_order_of_the_weights_is_chosen(llamacli: Run, tuning: Path) -> None:
    document = "Llama 2 is a family of open large language models. " * 12
    ask = ("--json", "--temperature", "0", "-n", "200", "Who made it?")
    keep(tuning, replace(A, rewritten=replace(A.rewritten or SLOW, steps={1: 1.5, 16: 1.2, 512: 10.0})))
    first = json.loads(llamacli(*ask, input=document).stdout)
    assert first["settings"]["repack"]["value"] is False
    # Now rewriting pays by a little, but not if the prompt has to be read again for it.
    tokens = first["usage"]["prompt_tokens"]
    keep(tuning, replace(A, rewritten=replace(SLOW, load=0.1, steps={1: 0.99, 16: 15.84, tokens: 0.99 * tokens})))
    second = json.loads(llamacli(*ask, input=document).stdout)
    assert second["settings"]["repack"]["value"] is False
    assert "load 0.10 s + 1 tokens read" in second["settings"]["repack"]["why"]


# -- the command ----------------------------------------------------------------------------------------------------


def test_it_measures_keeps_shows_and_forgets(llamacli: Run, tuning: Path) -> None:
    done = llamacli("tune")
    assert done.returncode == 0, done.stderr
    (path,) = tuning.iterdir()
    assert str(path) in done.stderr and "%, flash attention" in done.stderr
    assert "a token alone" in done.stdout and "serve, the same for 4 at once: " in done.stdout
    shown = llamacli("tune", "--show", "-m", "tiny")
    assert (shown.returncode, shown.stdout) == (0, done.stdout)
    told = json.loads(llamacli("tune", "--show", "--json").stdout)
    kept = json.loads(path.read_text())
    assert {name: told[name] for name in kept} == kept
    assert {name: told["chosen"][name]["repack"]["value"] for name in ("run", "serve", "batch")}
    assert "tuned = True" in llamacli("-v", "-n", "1", "hi").stderr
    doctor = llamacli("doctor").stdout
    assert f"yes, {kept['measured'][:10]}" in doctor
    assert llamacli("tune", "--clear", "-m", "tiny").stderr == "llamacli: forgot 1 measurement\n"
    assert list(tuning.iterdir()) == []
    assert llamacli("tune", "--clear").stderr == "llamacli: there was nothing to forget\n"
    assert "no: llamacli tune" in llamacli("doctor").stdout


def test_nothing_measured_is_nothing_to_show(llamacli: Run, tuning: Path) -> None:
    done = llamacli("tune", "--show")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "llamacli tune -m tiny" in done.stderr
    both = llamacli("tune", "--show", "--clear")
    assert both.returncode == 2 and "contradict" in both.stderr


def test_json_is_one_object_and_quiet_says_nothing(llamacli: Run, tuning: Path) -> None:
    done = llamacli("tune", "--json", "-q")
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["model"]["name"] == store.TINY_FILENAME


def test_a_missing_model_is_exit_5_but_may_be_forgotten(llamacli: Run, tuning: Path) -> None:
    for options in ([], ["--show"]):
        assert llamacli("tune", "-m", "./none.gguf", *options).returncode == 5
    assert llamacli("tune", "-m", "./none.gguf", "--clear").returncode == 0


def test_where_nothing_can_be_kept_nothing_is_measured(llamacli: Run, tuning: Path) -> None:
    tuning.parent.mkdir(parents=True)
    tuning.write_text("in the way")
    done = llamacli("tune")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (6, "", 1)
    assert f"cannot be kept in {tuning}: File exists" in done.stderr
    assert llamacli("-n", "1", "hi").stderr == "", "what is in the way is nobody else's problem"


@pytest.mark.parametrize("contradiction", [("-q", "-v"), ("--gpu-layers", "0")])
def test_what_contradicts_itself_is_not_measured(
    contradiction: tuple[str, ...], llamacli: Run, environment: dict[str, str], tuning: Path
) -> None:
    environment["LLAMACLI_REQUIRE_GPU"] = str("-q" not in contradiction).lower()
    done = llamacli("tune", *contradiction)
    assert done.returncode == 2 and "contradict" in done.stderr and not tuning.exists()


def test_ctrl_c_leaves_what_was_kept_before_and_nothing_half_written(environment: dict[str, str], tuning: Path) -> None:
    path = keep(tuning, A)
    before = path.read_bytes()
    with subprocess.Popen([*PROGRAM, "tune"], env=environment, stderr=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stderr is not None
        assert "loading" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(20) == 130
    assert rest.endswith("llamacli: interrupted: nothing was kept\n") and "Traceback" not in rest
    assert [each.name for each in tuning.iterdir()] == [path.name] and path.read_bytes() == before


def test_on_a_terminal_there_is_a_bar(environment: dict[str, str], tuning: Path) -> None:
    ours, theirs = pty.openpty()
    environment |= {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [*PROGRAM, "tune"], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                piece = os.read(ours, 4096)
            except OSError:
                break
            if not piece:
                break
            shown += piece
        assert process.wait() == 0
    os.close(ours)
    assert "━".encode() in shown and b"flash attention" in shown
