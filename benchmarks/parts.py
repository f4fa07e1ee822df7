"""`--on-overflow map-reduce` over a text of 100 pages, beside what one would do without it.

    python -m benchmarks.parts --model tiny

Beside a shell loop: `llamacli run` for each of its parts, and once more for their answers. Beside the same parts one
after another in the same engine: what computing some of them together brings on this machine and with this model.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from time import perf_counter

from benchmarks.inputs import Inputs, inputs, parser
from benchmarks.sideways import Row, at_most_times, in_turn, load_average, report
from llamacli import machine
from llamacli.config import Settings
from llamacli.engine.engine import Engine
from llamacli.engine.sequence import SamplingParams
from llamacli.launch import Launch, ServeOptions, prepare, serve
from llamacli.mapreduce import COMBINE, MOST, MapReduce, worth_together
from llamacli.models.store import ModelFile
from llamacli.prompt import Prompt, PromptBuilder
from llamacli.schema.form import Form
from llamacli.together import Key, Together

N_PAGES, WORDS_PER_PAGE = 100, 450
INSTRUCTION = "Summarise"
WHOLE, LOOP = "llamacli --on-overflow map-reduce", "a shell loop of run over its parts"
SENTENCE = (
    "the model reads a text of many pages and answers what was asked of it while others wait for their turn in the "
    "batch that a server makes of all prompts which have come since it began"
)
PARAMS = SamplingParams(seed=1, temperature=0)


def main() -> None:
    own_parser = parser(__doc__)
    own_parser.add_argument("--threads", type=int, default=machine.usable_cores().threads, help="[one per core]")
    own_parser.add_argument("--pages", type=int, default=N_PAGES, help=f"[{N_PAGES}]")
    options = own_parser.parse_args()
    options.runs = options.runs or 3
    given = inputs(options)
    load = load_average()
    text = pages(options.pages)
    engine, launch = _engine(given, options.threads)
    builder = _builder(launch)
    parts = _parts(engine, builder, text)
    with TemporaryDirectory() as directory:
        rows = [_processes(given, options.threads, text, parts, Path(directory))]
    rows += _in_one_engine(engine, builder, launch, text, given.n_runs)
    engine.close()
    subject = f"{given.subject}, {options.pages} pages in {len(parts)} parts, {options.threads} threads"
    print(report(subject, rows, given.n_runs, load))


def pages(n: int) -> str:
    """Sentences of no sense, in paragraphs."""
    rng, vocabulary = Random(1), SENTENCE.split()
    paragraphs = []
    n_words = 0
    while n_words < n * WORDS_PER_PAGE:
        words = [rng.choices(vocabulary, k=rng.randint(6, 18)) for _ in range(rng.randint(2, 6))]
        paragraphs.append(" ".join(f"{' '.join(sentence).capitalize()}." for sentence in words))
        n_words += sum(map(len, words))
    return "\n\n".join(paragraphs)


def _engine(given: Inputs, threads: int) -> tuple[Engine, Launch]:
    launch = prepare(Settings(threads=threads), ModelFile(given.reference, given.path), lambda _: None)
    options = ServeOptions(slots=MOST, repack=False, prefixes=1, step_seconds=None)
    return serve(launch, options, lambda _: None, usable=machine.memory().usable), launch


def _builder(launch: Launch) -> PromptBuilder:
    assert launch.weights is not None
    return PromptBuilder(launch.header, launch.weights.vocabulary, known=launch.file.format)


class _Listening(Together):
    """Remembers the prompts of the parts."""

    def __init__(self, engine: Engine, builder: PromptBuilder) -> None:
        super().__init__(engine, builder.tokenizer)
        self.prompts: list[Prompt] = []

    def ask(self, key: Key, prompt: Prompt, params: SamplingParams, form: Form | None = None) -> None:
        if key is not None and key[0] == 0:
            self.prompts.append(prompt)
        super().ask(key, prompt, params, form)


def _parts(engine: Engine, builder: PromptBuilder, text: str) -> list[str]:
    """The parts as map-reduce reads them: what stands in their fences."""
    listening = _Listening(engine, builder)
    list(MapReduce(listening, builder, INSTRUCTION, None, PARAMS).answer(text))
    spelt = [builder.tokenizer.detokenize(prompt.tokens).decode() for prompt in listening.prompts]
    return [each.partition("```\n")[2].rpartition("\n```")[0] for each in spelt]


def _processes(given: Inputs, threads: int, text: str, parts: list[str], directory: Path) -> Row:
    environment = os.environ | {
        "LLAMACLI_MODEL": given.reference,
        "LLAMACLI_THREADS": str(threads),
        "LLAMACLI_SEED": "1",
        "LLAMACLI_TEMPERATURE": "0",
        "LLAMACLI_LOCAL": "1",
        "LLAMACLI_LOG": "0",
    }
    program = [sys.executable, "-m", "llamacli", "-q"]
    (directory / "whole.txt").write_text(text)
    for i, part in enumerate(parts):
        (directory / f"part-{i:04}.txt").write_text(part)
    loop = (
        'for part in part-*.txt; do "$@" "$INSTRUCTION" < "$part"; echo; done > answers.md; '
        '"$@" --on-overflow head "$COMBINE" < answers.md'
    )
    environment |= {"INSTRUCTION": INSTRUCTION, "COMBINE": COMBINE + INSTRUCTION}
    whole = f'"$@" --on-overflow map-reduce {INSTRUCTION} < whole.txt'

    def timed(script: str) -> float:
        started = perf_counter()
        command = ["bash", "-c", script, "bash", *program]
        subprocess.run(command, cwd=directory, env=environment, check=True, stdout=subprocess.DEVNULL)
        return perf_counter() - started

    sides: dict[str, Callable[[], float]] = {WHOLE: partial(timed, whole), LOOP: partial(timed, loop)}
    ours, other = in_turn(sides, given.n_runs).values()
    return Row(what=f"{WHOLE}, against {LOOP}", unit="s", ours=ours, other=other, goal=at_most_times(0.5))


def _in_one_engine(engine: Engine, builder: PromptBuilder, launch: Launch, text: str, n_runs: int) -> list[Row]:
    cell = launch.header.kv_bytes_per_token("f16", "f16")
    chosen = worth_together(launch.header.file_size, cell, launch.n_limit)

    def timed(at_once: int) -> float:
        engine.kv.clear()
        started = perf_counter()
        together = Together(engine, builder.tokenizer)
        list(MapReduce(together, builder, INSTRUCTION, None, PARAMS, at_once=at_once).answer(text))
        return perf_counter() - started

    numbers = sorted({1, chosen, 2, 4})
    found = in_turn({f"{n} at once": partial(timed, n) for n in numbers}, n_runs)
    one = found["1 at once"]
    return [
        Row(
            what=f"the same engine, {n} parts at once{' (chosen)' if n == chosen else ''}, against one after another",
            unit="s",
            ours=found[f"{n} at once"],
            other=one,
            goal=at_most_times(1) if n == chosen else None,
        )
        for n in numbers
        if n > 1
    ]


if __name__ == "__main__":
    main()
