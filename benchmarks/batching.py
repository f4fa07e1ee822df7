"""`llamacli batch` beside a shell loop of `llamacli run`, and beside the bare engine with the same prompts.

    python -m benchmarks.batching --model tiny

The loop and the batch are whole processes. The engine's own rate is compared with that of the batch's rooms in this
process, over an engine made in the same way: lines are read, prompts built, answers written to a file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from benchmarks.inputs import Inputs, inputs, parser
from benchmarks.sideways import Row, at_least_times, in_turn, load_average, report
from llamacli import machine
from llamacli.batch.lines import Ready, jsonl
from llamacli.batch.request import Defaults
from llamacli.batch.work import Work
from llamacli.commands.batch import served
from llamacli.config import Settings
from llamacli.engine.engine import Engine
from llamacli.engine.sequence import SamplingParams
from llamacli.launch import Launch, prepare, serve
from llamacli.models.store import ModelFile
from llamacli.prompt import Message, PromptBuilder
from llamacli.together import Together

N_PROMPTS, N_TOKENS, SLOTS = 200, 32, 16
LOOP, BATCH, ROOMS, ENGINE = "a shell loop of run", "llamacli batch", "batch's rooms", "the bare engine"
PARAMS = SamplingParams(max_tokens=N_TOKENS, seed=1)


def main() -> None:
    own_parser = parser(__doc__)
    own_parser.add_argument("--threads", type=int, default=machine.usable_cores().threads, help="[one per core]")
    own_parser.add_argument("--prompts", type=int, default=N_PROMPTS, help=f"[{N_PROMPTS}]")
    options = own_parser.parse_args()
    options.runs = options.runs or 3
    given = inputs(options)
    load = load_average()
    texts = [f"Tell me about llama2 and the number {i}" for i in range(options.prompts)]
    with TemporaryDirectory() as directory:
        source = Path(directory, "in.jsonl")
        source.write_text("".join(json.dumps({"id": i, "prompt": text}) + "\n" for i, text in enumerate(texts)))
        rows = [_processes(given, options.threads, source, texts), _rates(given, options.threads, source, texts)]
    subject = f"{given.subject}, {len(texts)} prompts, {N_TOKENS} tokens at most, {options.threads} threads"
    print(report(subject, rows, given.n_runs, load))


def _processes(given: Inputs, threads: int, source: Path, texts: list[str]) -> Row:
    environment = os.environ | {
        "LLAMACLI_MODEL": given.reference,
        "LLAMACLI_THREADS": str(threads),
        "LLAMACLI_MAX_TOKENS": str(N_TOKENS),
        "LLAMACLI_SEED": "1",
        "LLAMACLI_LOCAL": "1",
        "LLAMACLI_LOG": "0",
    }
    program = [sys.executable, "-m", "llamacli"]
    loop = 'while IFS= read -r text; do "$@" "$text" </dev/null; done'

    def timed(command: list[str], text: str = "") -> float:
        started = perf_counter()
        subprocess.run(command, input=text, env=environment, check=True, encoding="utf-8", stdout=subprocess.DEVNULL)
        return len(texts) / (perf_counter() - started)

    sides: dict[str, Callable[[], float]] = {
        BATCH: partial(timed, [*program, "batch", "-q", "--slots", str(SLOTS), str(source)]),
        LOOP: partial(timed, ["bash", "-c", loop, "bash", *program, "run"], "\n".join(texts) + "\n"),
    }
    ours, other = in_turn(sides, given.n_runs).values()
    what = f"{BATCH} of {len(texts)} prompts, against {LOOP}"
    return Row(what=what, unit="prompts/s", ours=ours, other=other, goal=at_least_times(4))


def _rates(given: Inputs, threads: int, source: Path, texts: list[str]) -> Row:
    settings = Settings(threads=threads, max_tokens=N_TOKENS, seed=1)
    launch = prepare(settings, ModelFile(given.reference, given.path), lambda _: None)
    engine = serve(launch, served(SLOTS), lambda _: None, usable=machine.memory().usable)
    sides: dict[str, Callable[[], float]] = {
        ROOMS: partial(_through_rooms, engine, launch, source),
        ENGINE: partial(_bare, engine, _prompts(launch, texts)),
    }
    ours, other = in_turn(sides, max(given.n_runs, 5)).values()
    engine.close()
    return Row(what=f"{ROOMS}, against {ENGINE}", unit="tokens/s", ours=ours, other=other, goal=at_least_times(0.95))


def _builder(launch: Launch) -> PromptBuilder:
    assert launch.weights is not None
    return PromptBuilder(launch.header, launch.weights.vocabulary, known=launch.file.format)


def _prompts(launch: Launch, texts: list[str]) -> list[list[int]]:
    builder = _builder(launch)
    return [list(builder.build([Message("user", text)]).tokens) for text in texts]


def _through_rooms(engine: Engine, launch: Launch, source: Path) -> float:
    """Tokens per second, from the opening of the input to the last line of the output."""
    engine.kv.clear()
    started = perf_counter()
    builder = _builder(launch)
    work = Work(Together(engine, builder.tokenizer), builder, SLOTS)
    n_tokens = 0
    with source.open("rb") as file, source.with_suffix(".out").open("wb", buffering=0) as out:
        for result in work.results(Ready(jsonl(file)), Defaults(params=PARAMS)):
            out.write(json.dumps(result.line, ensure_ascii=False).encode() + b"\n")
            n_tokens += result.n_tokens
    return n_tokens / (perf_counter() - started)


def _bare(engine: Engine, prompts: list[list[int]]) -> float:
    """Tokens per second of the engine with token ids for prompts and nobody who looks at the answers."""
    engine.kv.clear()
    started = perf_counter()
    for prompt in prompts:
        engine.add(prompt, PARAMS, trim=True)
    n_tokens = 0
    while not engine.is_idle:
        n_tokens += sum(delta.usage.completion_tokens for delta in engine.step() if delta.usage is not None)
    return n_tokens / (perf_counter() - started)


if __name__ == "__main__":
    main()
