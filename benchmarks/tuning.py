"""What `tune` is worth: its choices against the best that llama-bench can be told, and against llama.cpp's defaults.

    LLAMA_CPP_BIN=llama.cpp/build/bin python -m benchmarks.tuning --model 7b

The machine is tuned first. Reading and writing are measured each with the settings that its rates say are the best for
it; llama-bench tries all of its own once, and its best for each then takes turns with ours. Then whole processes: 512
tokens read and 128 written, ours as tuned, llama-completion at its defaults.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from benchmarks.inputs import Inputs, inputs, parser
from benchmarks.sides import OurEngine, Work
from benchmarks.sideways import Row, at_least_times, at_most_times, below, in_turn, load_average, report
from benchmarks.startup import llamacli
from llamacli import launch as launching
from llamacli import machine, tuner, tuning_file
from llamacli.config import TUNING, Settings
from llamacli.engine.llama import ContextOptions, LlamaWeights, LoadOptions
from llamacli.launch import Launch
from llamacli.models import store
from llamacli.models.store import ModelFile
from llamacli.tuning import OneAnswer, Rates, Weights, choose

N_READ, N_WRITTEN = 512, 128
N_CTX = 1024
READING, WRITING = "reading", "writing"
SMALL = 100 << 20  # bytes of a model of which long prompts are read in no time
WORD = "la"  # its likeliest continuation does not end


@dataclass(frozen=True, slots=True)
class Setting:
    """What llama-bench was told, and the tokens/s it came to."""

    told: str
    speed: float
    options: tuple[str, ...]


def main() -> None:
    given = inputs(parser(__doc__).parse_args())
    load = load_average()
    launch = _prepared(given)
    rates = _tuned(launch)
    rows = [Row(what="tune itself", unit="s", ours=[rates.seconds], goal=below(90, "s"))]
    if given.tools:
        rows += _speeds(given, rates)
    with TemporaryDirectory() as home:
        rows.append(_whole(given, launch, rates, Path(home)))
    print(report(f"{given.subject}, tuned", rows, given.n_runs, load))


def _prepared(given: Inputs) -> Launch:
    file = store.tiny() if given.reference == store.TINY else ModelFile(given.reference, given.path)
    return launching.prepare(Settings(model=given.reference), file, lambda _: None)


def _tuned(launch: Launch) -> Rates:
    said: list[str] = []

    def say(share: float, what: str) -> None:
        if what and what not in said:
            said.append(what)
            print(f"tuning: {share:.0%}, {what}", file=sys.stderr, flush=True)

    return tuner.measure(launch, lambda _: None, say)


# -- against llama-bench ------------------------------------------------------------------------------------------


def _speeds(given: Inputs, rates: Rates) -> list[Row]:
    n_read, n_written = (256, 32) if given.path.stat().st_size > SMALL else (N_READ, 256)
    work = Work(path=given.path, threads=1, n_ctx=N_CTX, n_prefill=n_read, n_decode=n_written)
    best = _best_of_llama_bench(given, work)
    with ExitStack() as stack:
        sides: dict[str, Callable[[], float]] = {}
        for task in (READING, WRITING):
            engine = stack.enter_context(closing(_ours(given, rates, work, task, stack)))
            sides[f"ours, {task}"] = partial(_our_speed, engine, work, task)
            sides[f"llama-bench, {task}"] = partial(_bench_speed, given, work, task, best[task])
        found = in_turn(sides, given.n_runs)
    goal = at_least_times(0.98) if given.is_large else None
    return [
        Row(
            what=f"{task} {n} tokens, against the best of llama-bench ({best[task].told})",
            unit="tokens/s",
            ours=found[f"ours, {task}"],
            other=found[f"llama-bench, {task}"],
            goal=goal,
        )
        for task, n in ((READING, n_read), (WRITING, n_written))
    ]


def _ours(given: Inputs, rates: Rates, work: Work, task: str, stack: ExitStack) -> OurEngine:
    """An engine with the settings that the rates say are the best for one thing alone, loading not counted."""

    def seconds(weights: Weights) -> float:
        return weights.read(work.n_prefill) if task == READING else weights.step(1)

    repack = rates.rewritten is not None and seconds(rates.rewritten) < seconds(rates.stored)
    chosen = choose(rates, OneAnswer(work.n_prefill), repack=repack)
    print(f"ours, {task}: {chosen}", file=sys.stderr, flush=True)
    weights = stack.enter_context(closing(LlamaWeights(given.path, LoadOptions(repack=repack))))
    options = ContextOptions(
        n_cells=work.n_ctx,
        n_batch=chosen.batch,
        threads=chosen.threads,
        threads_batch=chosen.threads_batch,
        flash_attention=chosen.flash_attention,
    )
    return OurEngine(weights, work, options=options)


def _our_speed(engine: OurEngine, work: Work, task: str) -> float:
    if task == READING:
        return work.n_prefill / engine.prefill([1, *range(1000, 999 + work.n_prefill)])
    return engine.decode([1, *range(1000, 1008)], work.n_decode)


def _best_of_llama_bench(given: Inputs, work: Work) -> dict[str, Setting]:
    """The best of each task. Each combination is tried once, and other sizes of batches with the best of those."""
    threads = ",".join(map(str, tuner.thread_counts(machine.usable_cores())))
    grid = ("--repack", "0,1", "-t", threads, "-fa", "on,off")
    best = {}
    for task in (READING, WRITING):
        best[task] = _best(given, work, task, grid)
    # A step of one row does not care how many a batch may have.
    best[READING] = max(
        best[READING],
        _best(given, work, READING, (*best[READING].options[:-2], "-ub", "128,256")),
        key=lambda setting: setting.speed,
    )
    return best


def _best(given: Inputs, work: Work, task: str, options: Sequence[str]) -> Setting:
    print(f"llama-bench, {task}: trying {' '.join(options)}", file=sys.stderr, flush=True)
    settings = []
    for test in _run_llama_bench(given, (*options, *_counts(work, task))):
        attention = "off" if int(test["flash_attn"]) == 0 else "on"
        told: tuple[str, ...] = ("--repack", str(int(test["repack"])), "-t", str(test["n_threads"]), "-fa", attention)
        told = (*told, "-ub", str(test["n_ubatch"]))
        settings.append(Setting(" ".join(told), float(test["avg_ts"]), told))
    return max(settings, key=lambda setting: setting.speed)


def _counts(work: Work, task: str) -> tuple[str, ...]:
    n_read, n_written = (work.n_prefill, 0) if task == READING else (0, work.n_decode)
    return "-p", str(n_read), "-n", str(n_written)


def _bench_speed(given: Inputs, work: Work, task: str, setting: Setting) -> float:
    (test,) = _run_llama_bench(given, (*setting.options, *_counts(work, task)))
    return float(test["avg_ts"])


def _run_llama_bench(given: Inputs, options: Sequence[str]) -> list[dict[str, Any]]:
    command = [given.tool("llama-bench"), "-m", str(given.path), "-ngl", "0", "-r", "1", "-o", "json", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    tests: list[dict[str, Any]] = json.loads(done.stdout)
    return tests


# -- whole processes ----------------------------------------------------------------------------------------------


def _whole(given: Inputs, launch: Launch, rates: Rates, home: Path) -> Row:
    """Seconds from the start of a process to its end, the prompt on stdin or in a file."""
    about = tuning_file.subject(launch.file, launch.settings.kv_type, launch.layers, None)
    tuning_file.write(home / "cache" / TUNING, about, rates)
    prompt = home / "prompt.txt"
    prompt.write_text(_prompt(given))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLAMACLI_")}
    environment["LLAMACLI_HOME"] = str(home)
    ours = [llamacli(), "-m", given.reference, "-n", str(N_WRITTEN), "--temperature", "0", "--raw", "--no-cache", "-q"]
    _check(ours, environment, prompt)
    sides = {"ours": partial(_seconds, ours, environment, prompt)}
    if given.tools:
        theirs = [given.tool("llama-completion"), "-m", str(given.path), "-n", str(N_WRITTEN), "--temp", "0"]
        theirs += ["-no-cnv", "--no-display-prompt", "--ignore-eos", "-f", str(prompt)]
        sides["theirs"] = partial(_seconds, theirs, environment, Path(os.devnull))
    found = in_turn(sides, given.n_runs)
    against = ", against llama-completion at its defaults" if given.tools else ""
    return Row(
        what=f"{N_READ} tokens read and {N_WRITTEN} written, from process start to end{against}",
        unit="s",
        ours=found["ours"],
        other=found.get("theirs", ()),
        goal=at_most_times(0.8) if given.is_large and given.tools else None,
    )


def _prompt(given: Inputs) -> str:
    """A text of so many tokens, BOS among them."""
    weights = LlamaWeights(given.path, LoadOptions(vocab_only=True))
    try:
        n_words = N_READ
        while len(weights.vocabulary.tokenize(" ".join([WORD] * n_words))) >= N_READ:
            n_words -= 1
        return " ".join([WORD] * n_words)
    finally:
        weights.close()


def _check(command: Sequence[str], environment: Mapping[str, str], prompt: Path) -> None:
    """See that the answer is as long as it is to be, and say what was chosen for it."""
    with prompt.open("rb") as text:
        done = subprocess.run([*command, "--json"], env=environment, stdin=text, stdout=subprocess.PIPE, check=True)
    told = json.loads(done.stdout)
    if told["usage"]["completion_tokens"] != N_WRITTEN:
        raise SystemExit(f"the answer ended after {told['usage']['completion_tokens']} tokens: too few to measure")
    print(f"chosen: {told['settings']['repack']['why']}", file=sys.stderr, flush=True)


def _seconds(command: Sequence[str], environment: Mapping[str, str], stdin: Path) -> float:
    started = perf_counter()
    with stdin.open("rb") as text:
        subprocess.run(
            command, env=environment, stdin=text, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True
        )
    return perf_counter() - started


if __name__ == "__main__":
    main()
