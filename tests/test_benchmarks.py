"""The benchmarks print what they promise. No test here judges a speed."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks import synthetic
from benchmarks.sideways import (
    Goal,
    Row,
    at_least_times,
    at_most_more,
    at_most_times,
    below,
    in_turn,
    report,
    table,
    wide_spreads,
)
from llamacli.engine.devices import gpu_devices
from llamacli.gguf import read_header

ROOT = Path(__file__).parents[1]


def printed_rows(benchmark: str, *options: str) -> list[list[str]]:
    """The cells below the table's head, from a real run of the program on the tiny model."""
    environment = {name: value for name, value in os.environ.items() if name != "LLAMA_CPP_BIN"}
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", *(options or ("--model", "tiny")), "--runs", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_sides_are_measured_in_turn_after_a_warm_up_that_does_not_count() -> None:
    calls: list[str] = []

    def side(name: str) -> int:
        calls.append(name)
        return len(calls)

    found = in_turn({name: partial(side, name) for name in "abc"}, 4)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert [sorted(each) for each in rounds] == [["a", "b", "c"]] * 5
    assert len({tuple(each) for each in rounds}) > 1, "nobody always follows the same neighbour"
    assert sorted(i for each in found.values() for i in each) == list(range(4, 16))


def test_a_row_quotes_medians_and_the_ratio_of_the_two() -> None:
    row = Row(what="decode", unit="tokens/s", ours=[90, 1, 1000], other=[60, 50, 40], goal=at_least_times(2))
    assert row.cells() == ("decode", "90.0 tokens/s", "50.0 tokens/s", "1.80x", "≥ 2x", "no")


def test_a_row_with_nothing_to_compare_with_has_no_ratio() -> None:
    row = Row(what="own time", unit="ms", ours=[0.05], goal=below(0.1, "ms"))
    assert row.cells() == ("own time", "0.050 ms", "", "", "< 0.1 ms", "yes")


@pytest.mark.parametrize(
    ("goal", "met", "missed"),
    [
        (at_least_times(0.98), (98, 100), (97, 100)),
        (at_most_times(0.12), (12, 100), (13, 100)),
        (at_most_more(120, "ms"), (135, 15), (136, 15)),
        (below(0.1, "ms"), (0.09, math.nan), (0.1, math.nan)),
    ],
    ids=["at least", "at most", "more", "below"],
)
def test_a_goal_is_met_up_to_its_limit(goal: Goal, met: tuple[float, float], missed: tuple[float, float]) -> None:
    assert goal.is_met(*met)
    assert not goal.is_met(*missed)


def test_the_table_is_markdown_with_a_cell_for_every_column() -> None:
    lines = table([Row(what="a", unit="ms", ours=[1]), Row(what="b", unit="ms", ours=[1], other=[2])]).splitlines()
    assert lines[:2] == ["| what | ours | other | ratio | goal | met |", "| --- | --- | --- | --- | --- | --- |"]
    assert lines[2:] == ["| a | 1.00 ms |  |  |  |  |", "| b | 1.00 ms | 2.00 ms | 0.50x |  |  |"]


def test_a_series_that_varies_much_is_noted_once_however_many_rows_share_it() -> None:
    wide, steady = [50.0, 100.0, 80.0], [100.0, 101.0]
    rows = [Row(what=name, unit="ms", ours=wide, other=steady) for name in ("a", "b")]
    assert list(wide_spreads(rows)) == ["a: our runs lie between 50.0 and 100 ms"]


def test_a_busy_machine_is_noted_and_an_idle_one_is_not() -> None:
    row = Row(what="a", unit="ms", ours=[1.0])
    assert "load average was 99.00" in report("a model", [row], 1, load=99)
    assert "load average" not in report("a model", [row], 1, load=0)


def test_the_synthetic_7b_has_the_size_of_the_published_file(tmp_path: Path) -> None:
    path, shape = tmp_path / "head.gguf", synthetic.SHAPES["7b"]
    synthetic.start(path, shape, "synthetic-llama2-7b").close()
    sizes = [path.stat().st_size, *(tensor.n_bytes for tensor in synthetic.tensors(shape))]
    assert sum(map(synthetic.padded, sizes)) == 4_081_004_224


@pytest.mark.slow
def test_a_synthetic_model_of_one_layer_answers(tmp_path: Path) -> None:
    path = tmp_path / "one.gguf"
    synthetic.write(path, synthetic.Shape(n_layer=1, n_embd=256, n_ff=512, n_head=4, n_head_kv=2), "one layer")
    assert read_header(path).quantization == "Q4_K_M"
    command = [sys.executable, "-m", "llamacli", "-m", str(path), "-n", "3", "--no-log", "--json", "Hi"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 3


@pytest.mark.slow
def test_the_startup_benchmark_prints_every_row() -> None:
    rows = printed_rows("startup")
    assert [row[0] for row in rows] == [
        "llamacli --version, against python -c pass",
        "llamacli --help, against python -c pass",
        "first answer byte, against llama_cpp.Llama at its defaults",
        "peak memory, against the file, 10 % of it, and its KV cache",
    ]
    assert all(row[1] and row[2] and row[3] for row in rows)


@pytest.mark.slow
def test_the_throughput_benchmark_prints_every_row() -> None:
    rows = printed_rows("throughput")
    assert [row[0] for row in rows] == [
        "decode 256 tokens, one stream, against a bare loop",
        "decode 256 tokens, one stream, against llama_cpp.Llama",
        "prefill 512 tokens, against a bare loop",
        "prefill 512 tokens, against llama_cpp.Llama",
        "own time for each token, drawing it included",
        "16 streams together, against one stream of llama_cpp.Llama",
    ]
    assert all(row[1] for row in rows)
    assert [row[5] != "" for row in rows] == [True, False, True, False, True, True]


def test_the_gpu_benchmark_says_that_there_is_none_and_can_be_tried_without() -> None:
    if not gpu_devices():
        command = [sys.executable, "-m", "benchmarks.gpu", "--model", "tiny"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and done.stdout == ""
        assert "nothing was measured" in done.stderr and "-DGGML_CUDA=on" in done.stderr
    rows = printed_rows("gpu", "--model", "tiny", "--layers", "0")
    assert [row[0] for row in rows] == [
        "prefill of 512 tokens",
        "decode, one stream",
        "decode, 32 streams together",
        "our own time of a step, 1 stream",
        "its share of the step, 1 stream",
        "our own time of a step, 32 streams",
        "its share of the step, 32 streams",
    ]
    assert all(row[1] for row in rows)


@pytest.mark.slow
def test_the_prefixes_benchmark_prints_every_row() -> None:
    rows = printed_rows("prefixes")
    assert len(rows) == 6 and rows[0][0] == "second question, against the first"
    assert all(row[1] and row[2] and row[3] for row in rows)


@pytest.mark.slow
def test_the_speculation_benchmark_prints_what_guesses_bring_and_cost() -> None:
    rows = printed_rows("speculation")
    assert rows[0][4] == "> 2 tokens" and rows[1][4] == "≥ 1x"
    assert [row[0] for row in rows[2::2]] == [f"a step of {n} rows, against one of a single row" for n in (2, 4, 8, 16)]


def test_a_session_is_measured_with_and_without_what_was_computed() -> None:
    rows = printed_rows("sessions")
    assert len(rows) == 4 and all(row[1] and row[2] and row[3] for row in rows)
    assert [row[4] for row in rows] == ["", "", "≤ 20 ms more", "≤ 50 ms more"]


def test_the_transfer_is_measured_with_its_memory() -> None:
    rows = printed_rows("transfer", "--megabytes", "2")
    assert [row[2:] for row in rows][1] == ["", "", "< 100 MB", rows[1][5]]
    assert rows[0][0] == "1 GB over loopback, against hf_hub_download" and rows[0][3].endswith("x")


@pytest.mark.slow
def test_the_batch_and_the_parts_are_measured_against_shell_loops_and_the_bare_engine() -> None:
    batching = printed_rows("batching", "--prompts", "8")
    assert [row[4] for row in batching] == ["≥ 4x", "≥ 0.95x"] and all(row[3] for row in batching)
    parts = printed_rows("parts", "--pages", "4")
    assert parts[0][4] == "≤ 0.5x" and all(row[3] for row in parts)


@pytest.mark.slow
def test_what_tuning_is_worth_is_measured() -> None:
    rows = printed_rows("tuning")
    assert [row[0].split(",")[0] for row in rows] == ["tune itself", "512 tokens read and 128 written"]
    assert all(row[1] for row in rows)


@pytest.mark.slow
def test_the_list_and_the_second_pull_are_measured() -> None:
    rows = printed_rows("listing", "--runs", "1")
    assert [row[0] for row in rows][:2] == ["llamacli list of 52 models", "llamacli pull of a model that is here"]


def test_readiness_and_replay_are_measured() -> None:
    rows = printed_rows("rehearsal", "--requests", "80")
    assert [row[0] for row in rows] == ["ready with --replay", "ready with the tiny model", "replayed short requests"]
    assert all(row[1] for row in rows)
