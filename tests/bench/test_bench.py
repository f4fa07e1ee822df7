"""`bench`: what is measured, what is left out, and that it ends cleanly. No test here judges a speed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from conftest import PROGRAM, Run

from llamacli.bench.children import ChildFailed, Children
from llamacli.bench.figures import Figure
from llamacli.bench.ours import speed
from llamacli.bench.plan import Probe, Wanted, plan
from llamacli.bench.rivals import BENCH, HighLevel, LlamaCpp, Tools
from llamacli.models import store
from llamacli.rates import Timing

FAST, SLOW = Probe(prefill=5000, step=0.001), Probe(prefill=20, step=0.4)


# -- the plan -----------------------------------------------------------------------------------------------------


def test_a_fast_model_is_measured_in_full() -> None:
    chosen = plan(Wanted(), FAST, limit=4096, cells=4096)
    assert (chosen.prompt, chosen.depths, chosen.streams, chosen.left_out) == (512, (0, 1024, 3000), (1, 2, 4, 8), ())


def test_a_slow_model_is_measured_in_part_and_it_is_said() -> None:
    chosen = plan(Wanted(), SLOW, limit=4096, cells=4096)
    assert chosen.prompt == 128 and chosen.rounds == 1
    assert chosen.depths == (0, 384)
    assert len(chosen.left_out) == 1 and "1,024 tokens" in chosen.left_out[0] and "--time 0" in chosen.left_out[0]


def test_without_a_limit_of_time_nothing_is_left_out() -> None:
    chosen = plan(Wanted(seconds=0), SLOW, limit=4096, cells=4096)
    assert (chosen.prompt, chosen.depths, chosen.left_out) == (512, (0, 1024, 3000), ())


def test_what_the_user_names_is_measured_however_long_it_takes_if_there_is_room() -> None:
    chosen = plan(Wanted(prompt=300, depths=(0, 2000, 500, 9000)), SLOW, limit=4096, cells=4096)
    assert (chosen.prompt, chosen.depths) == (300, (0, 500, 2000))
    assert "9,000" in chosen.left_out[0]


def test_a_prompt_that_there_is_no_room_for_is_said() -> None:
    chosen = plan(Wanted(prompt=5000), FAST, limit=4096, cells=4096)
    assert chosen.prompt == 4096 - chosen.steps
    assert chosen.left_out == (f"prefill of 5,000 tokens: there is room for {chosen.prompt:,}",)


def test_a_short_context_is_measured_near_its_end() -> None:
    chosen = plan(Wanted(), FAST, limit=1024, cells=1024)
    assert chosen.depths == (0, 720) and chosen.left_out == ()


def test_memory_bounds_the_streams_and_the_depths() -> None:
    chosen = plan(Wanted(), FAST, limit=4096, cells=512)
    assert chosen.streams == (1, 2, 4)
    assert max(chosen.depths) + chosen.steps <= 512 and chosen.prompt + chosen.steps <= 512
    assert any("8 streams" in each for each in chosen.left_out)


# -- figures ------------------------------------------------------------------------------------------------------


def test_a_speedup_is_above_one_where_we_are_faster_in_either_unit() -> None:
    seconds = Figure("first token", None, {"llamacli": (1.0, 2.0, 9.0), "other": (4.0,)})
    rates = Figure("prefill", 512, {"llamacli": (50.0,), "other": (25.0,), "silent": ()})
    assert (seconds.speedup("other"), rates.speedup("other"), rates.speedup("silent")) == (2.0, 2.0, None)
    assert seconds.is_unsteady("llamacli") and not seconds.is_unsteady("other")


def test_a_moment_that_holds_us_up_counts_as_it_does_for_the_others() -> None:
    assert speed(Timing((0.1, 0.1, 0.4))) == pytest.approx(5)
    assert speed(Timing((0.1, 0.1, 0.4)), 4) == pytest.approx(20)


# -- other processes ----------------------------------------------------------------------------------------------


def test_a_first_byte_is_one_that_is_no_white_space() -> None:
    code = "import time; print(' ', end='', flush=True); time.sleep(0.3); print('x')"
    assert 0.3 < Children().first_byte([sys.executable, "-c", code]) < 30


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ([sys.executable, "-c", "raise SystemExit(3)"], "exit code 3"),
        ([sys.executable, "-c", "print()"], "empty answer"),
        (["/no/such/program"], "program does not start: No such file"),
    ],
)
def test_a_program_that_fails_is_one_line(command: list[str], why: str) -> None:
    with pytest.raises(ChildFailed, match=why):
        Children().first_byte(command)


# -- the command --------------------------------------------------------------------------------------------------


def test_json_has_every_figure_and_how_it_came_about(llamacli: Run) -> None:
    done = llamacli("bench", "--json", "-q", "--time", "1", "--streams", "1,3", "--repack", "on")
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    found = [(figure["what"], figure["n"]) for figure in record["figures"]]
    assert found[:4] == [("load", None), ("first token", None), ("prefill", 512), ("decode", 0)]
    assert found[4:] == [("streams", 1), ("streams", 3), ("decode", 720)]
    assert all(figure["ours"]["median"] > 0 and figure["others"] == {} for figure in record["figures"])
    assert record["settings"]["repack"] == {"value": True, "why": "as set"}
    assert record["model"]["quantization"] == "Q8_0"


@pytest.mark.slow
def test_others_are_measured_beside_ours(llamacli: Run, environment: dict[str, str], tmp_path: Path) -> None:
    bench = tmp_path / "llama-bench"  # says what llama.cpp's would, and fails at generating
    bench.write_text('#!/bin/sh\ncase "$*" in *"-p 0"*) exit 1;; esac\necho \'[{"avg_ts": 123.5}]\'\n')
    bench.chmod(0o755)
    environment["LLAMA_CPP_BIN"] = str(tmp_path)
    record = json.loads(llamacli("bench", "--json", "--compare", "--time", "1", "--streams", "1", timeout=120).stdout)
    others = {(figure["what"], figure["n"]): figure["others"] for figure in record["figures"]}
    assert set(others["first token", None]) == set(others["load", None]) == {"llama_cpp.Llama"}
    assert set(others["prefill", 512]) == {"llama_cpp.Llama", "llama.cpp", "llama.cpp --no-repack"}
    assert others["prefill", 512]["llama.cpp"]["median"] == 123.5
    assert set(others["decode", 0]) == {"llama_cpp.Llama"}
    assert any("nothing of llama.cpp: llama-bench has failed" in note for note in record["notes"])


def test_threads_that_are_set_hold_for_the_others_too(tmp_path: Path) -> None:
    tool = tmp_path / "llama-bench"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/told\necho \'[{{"avg_ts": 1.5}}]\'\n')
    tool.chmod(0o755)
    tools = Tools({BENCH: str(tool)})
    for threads in (3, None):
        high_level = HighLevel(Children(), store.bundled(), 256, 4, threads)
        with closing(high_level):
            assert high_level.prefill(8) > 0
            assert len(children_of(os.getpid(), f"high_level ask {store.bundled()} {threads or 0} 256")) == 1
        assert Children().first_byte(high_level.once("hi", 2)) > 0
        LlamaCpp(Children(), tools, store.bundled(), repack=True, gpu_layers=0, threads=threads, steps=4).prefill(8)
        assert ("-t 3" in (tmp_path / "told").read_text()) is (threads == 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--streams", "1,x"], "--streams takes numbers between 1 and 128, separated by commas, not '1,x'"),
        (["--depths", "-5"], "--depths takes numbers"),
        (["--prompt", "1"], "--prompt must be 2 or more"),
        (["--time", "-1"], "--time must be between 0 and 86400"),
        (["--repack", "maybe"], "--repack must be on or off, not 'maybe'"),
        (["-m", "nothing"], "there is no model 'nothing'"),
    ],
)
def test_wrong_wishes_are_one_line(arguments: list[str], said: str, llamacli: Run) -> None:
    done = llamacli("bench", *arguments)
    assert done.returncode in (2, 5) and done.stdout == ""
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_ctrl_c_shows_what_was_measured_and_leaves_no_process(environment: dict[str, str]) -> None:
    command = [*PROGRAM, "bench", "--time", "0", "--compare"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, encoding="utf-8", process_group=0
    ) as process:
        deadline = time.monotonic() + 60
        while not children_of(process.pid, "high_level") and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)  # to it alone, as `kill -INT` does
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr and "interrupted before all was measured" in stderr
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_it_ends_the_other_programs_too(
    number: signal.Signals, environment: dict[str, str], tmp_path: Path
) -> None:
    tool = tmp_path / "llama-completion"
    tool.write_text("#!/bin/sh\nexec sleep 600\n")
    tool.chmod(0o755)
    environment["LLAMA_CPP_BIN"] = str(tmp_path)
    command = [*PROGRAM, "bench", "--time", "1", "--compare"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        deadline = time.monotonic() + 60
        while not (sleeping := children_of(process.pid, "sleep 600")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == -number
    (child,) = sleeping
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def children_of(pid: int, wanted: str) -> list[int]:
    """The processes that one has started in whose command lines something stands."""
    shown = subprocess.run(
        ["ps", "-ww", "-o", "pid=", "-o", "args=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    return [int(line.split()[0]) for line in shown.stdout.splitlines() if wanted in line]
