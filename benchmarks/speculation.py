"""Prompt lookup: what copying gains by it on the tiny model, and what a batch of guesses costs on any.

    python -m benchmarks.speculation --model tiny
    python -m benchmarks.speculation --model 7b

The tiny model copies texts, with guesses and without, and says the same. How many tokens a step brings then depends on
the rows it may have; what so many rows cost is measured on the model that is named. The gain there is computed from
both: no file of random weights copies anything.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from statistics import median
from time import perf_counter

from benchmarks.inputs import Inputs, inputs, parser
from benchmarks.sideways import Row, above, at_least_times, in_turn, load_average, report
from llamacli import machine
from llamacli.engine.engine import Engine
from llamacli.engine.llama import ContextOptions, LlamaModel, LlamaWeights, LoadOptions
from llamacli.engine.sequence import Chunk, SamplingParams, Sequence
from llamacli.engine.speculation import Speculation, StepCosts
from llamacli.gguf import read_model
from llamacli.launch import MAX_GUESSED
from llamacli.models import store
from llamacli.prompt import Message, PromptBuilder

ROWS = (2, 4, 8, 16)  # of one sequence: a token that is known, and guesses
DEPTH = 64  # tokens of context before them
FREE = {1: 1.0, 2: 1.001}  # every guess is worth its row
GREEDY = SamplingParams(temperature=0, max_tokens=160)
_TEXT = (
    "the small red boat went down river past green hills and quiet farms while old people on bank talked about rain "
    "bread music winter horses letters songs that nobody had written before morning came over water"
)
_WORDS = _TEXT.split()


def main() -> None:
    own_parser = parser(__doc__)
    own_parser.add_argument("--threads", type=int, default=machine.usable_cores().threads, help="[one per core]")
    options = own_parser.parse_args()
    given = inputs(options)
    load = load_average()
    tiny = LlamaWeights(store.bundled(), LoadOptions())
    copies = _copies(tiny)
    rows, by_rows = _copying(tiny, copies, options.threads, given.n_runs)
    rows += _costs(given, by_rows, options.threads)
    print(report(f"{given.subject}, {options.threads} threads", rows, given.n_runs, load))


def _copies(weights: LlamaWeights) -> list[array[int]]:
    """Prompts that ask for a copy of a text which nobody has learned by heart."""
    builder = PromptBuilder(read_model(weights.path), weights.vocabulary)
    forms = ("Repeat: {}", "Repeat after me: {}", "```\n{}\n```\n\nRepeat the text.")
    texts = [" ".join(Random(i).sample(_WORDS, 14)) for i in range(6)]
    return [builder.build([Message("user", form.format(text))]).tokens for text in texts for form in forms]


@dataclass(frozen=True, slots=True)
class _Told:
    answers: list[array[int]]
    n_steps: int
    seconds: float

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.answers))


def _engine(weights: LlamaWeights, threads: int, n_guessed: int, costs: StepCosts | None) -> Engine:
    options = ContextOptions(n_cells=1024, n_batch=512, threads=threads, threads_batch=threads, n_guessed=n_guessed)
    speculation = None if costs is None else Speculation(costs)
    return Engine(LlamaModel(weights, options), step_seconds=None, keeps=False, speculation=speculation)


def _told(engine: Engine, prompts: list[array[int]]) -> _Told:
    answers, n_steps, started = [], 0, perf_counter()
    for prompt in prompts:
        sequence = engine.add(prompt, GREEDY)
        while not engine.is_idle:
            engine.step()
            n_steps += 1
        answers.append(sequence.tokens[sequence.n_prompt :])
    return _Told(answers, n_steps - len(prompts), perf_counter() - started)  # a step each reads the prompt


def _copying(
    weights: LlamaWeights, prompts: list[array[int]], threads: int, n_runs: int
) -> tuple[list[Row], dict[int, float]]:
    """The rows, and how many tokens a step brings by the rows that it may have."""
    table = {n: median(times) for n, times in _steps(weights, threads, max(n_runs, 5)).items()}
    plain = _engine(weights, threads, 0, None)
    ours = _engine(weights, threads, MAX_GUESSED, StepCosts(table))
    sides: dict[str, Callable[[], _Told]] = {
        "with guesses": partial(_told, ours, prompts),
        "without": partial(_told, plain, prompts),
    }
    found = in_turn(sides, n_runs)
    by_rows = {}
    for n in ROWS:
        engine = _engine(weights, threads, n - 1, StepCosts(FREE))
        told = _told(engine, prompts)
        by_rows[n] = told.n_tokens / told.n_steps
        _check(told, found["without"][0])
        engine.close()
    for told in found["with guesses"]:
        _check(told, found["without"][0])
    rates = {name: [each.n_tokens / each.seconds for each in runs] for name, runs in found.items()}
    rows = [
        Row(
            what=f"tiny copies texts, all the same: right guesses of a step with up to {max(ROWS) - 1}",
            unit="tokens",
            ours=[by_rows[max(ROWS)] - 1],
            goal=above(2, "tokens"),
        ),
        Row(
            what="the same with as many as pay by what steps were measured to take, against no guesses",
            unit="tokens/s",
            ours=rates["with guesses"],
            other=rates["without"],
            goal=at_least_times(1),
        ),
    ]
    ours.close()
    plain.close()
    return rows, by_rows


def _check(told: _Told, plain: _Told) -> None:
    if told.answers != plain.answers:
        raise SystemExit("with guesses the answers are others than without")


def _steps(weights: LlamaWeights, threads: int, n_runs: int) -> dict[int, list[float]]:
    """Milliseconds of a step by its rows: one token that is known, and guesses."""
    options = ContextOptions(n_cells=256, threads=threads, threads_batch=threads, n_guessed=max(ROWS))
    model = LlamaModel(weights, options)
    known = Sequence(0, [1, *range(100, 100 + DEPTH)])
    known.slot = 0
    model.run([Chunk(known, 0, DEPTH)])

    def step(n_rows: int) -> float:
        model.seq_rm(0, DEPTH, -1)
        guessed = array("i", range(200, 200 + n_rows - 1))
        started = perf_counter()
        model.run([Chunk(known, DEPTH, n_rows, guessed)])
        return 1000 * (perf_counter() - started)

    found = in_turn({str(n): partial(step, n) for n in (1, *ROWS)}, n_runs)
    model.close()
    return {int(n): times for n, times in found.items()}


def _costs(given: Inputs, by_rows: dict[int, float], threads: int) -> list[Row]:
    times = _steps(LlamaWeights(given.path, LoadOptions()), threads, max(given.n_runs, 5))
    one = median(times[1])
    rows = []
    for n in ROWS:
        gains = [by_rows[n] * one / each for each in times[n]]
        rows += [
            Row(what=f"a step of {n} rows, against one of a single row", unit="ms", ours=times[n], other=times[1]),
            Row(what=f"so copying with {n} rows is that many times as fast (computed)", unit="times", ours=gains),
        ]
    return rows


if __name__ == "__main__":
    main()
