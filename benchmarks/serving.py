"""Servers beside one another: many clients, one client, a shared system prompt, a long prompt among streams, memory.

    LLAMA_CPP_BIN=llama.cpp/build/bin python -m benchmarks.serving --model 1b
    LLAMA_CPP_BIN=llama.cpp/build/bin python -m benchmarks.serving --model 7b --only alone --only memory

All sides have the same file, threads, slots and room for each slot, and are asked the same at /v1/completions. They
run beside one another, idle but for the one that is asked. No prompt comes twice. The tiny model's context is smaller,
and so are its prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from random import Random
from statistics import median

from benchmarks.inputs import inputs, parser
from benchmarks.load import Ask, Crowd, Heard, Unanswered, crowd, interrupted
from benchmarks.servers import (
    LLAMA_SERVER,
    LLAMA_SERVER_AT_BEST,
    OURS,
    PACKAGED,
    Load,
    Running,
    commands,
    running,
)
from benchmarks.sideways import (
    Goal,
    Row,
    against_each,
    at_least_times,
    at_most_times,
    below,
    in_turn,
    load_average,
    report,
)
from llamacli import machine
from llamacli.gguf import read_header
from llamacli.launch import STEP_SECONDS

N_WORDS, N_TOKENS = 48, 32
N_STREAMS = 4
N_CTX = 2560  # for each slot; a model may have less
WORDLESS = range(259)  # of Llama 2's vocabulary: control tokens and single bytes, which may bring no text by themselves
N_RUNS = 3
RATE = "tokens/s"

_TEXT = (
    "the river carried a small boat past green hills and quiet farms while people on the bank talked about rain "
    "bread music winter horses letters and old songs that nobody had written down before morning came"
)
_WORDS = _TEXT.split()


@dataclass(slots=True)
class Prompts:
    """Texts of words in an order of their own: no two of them begin alike.

    n_shared, n_long   tokens of a shared system prompt, and of a long one
    """

    n_shared: int
    n_long: int
    _numbers: Iterator[int] = field(default_factory=count)

    def of_words(self, n: int) -> str:
        number = next(self._numbers)
        return " ".join([f"Note {number}:", *Random(number).choices(_WORDS, k=n - 2)])

    def of_tokens(self, n: int) -> str:
        """About so many: some words are two tokens."""
        return self.of_words(n * 9 // 10)

    def asks(self, n_clients: int, n_requests: int, before: str = "") -> list[list[Ask]]:
        return [[Ask(before + self.of_words(N_WORDS), N_TOKENS) for _ in range(n_requests)] for _ in range(n_clients)]


PARTS = ("distinct", "shared", "alone", "late", "memory")


def main() -> None:
    own_parser = parser(__doc__)
    own_parser.add_argument("--clients", type=int, default=8, help="and slots [8]")
    own_parser.add_argument("--requests", type=int, default=2, help="of each client, one after the other [2]")
    own_parser.add_argument("--threads", type=int, default=machine.usable_cores().threads, help="[one per core]")
    own_parser.add_argument("--only", choices=PARTS, action="append", help="repeatable [all of them]")
    options = own_parser.parse_args()
    options.runs = options.runs or N_RUNS
    given = inputs(options)
    load = load_average()
    n_ctx = min(read_header(given.path).context_length or N_CTX, N_CTX)
    limits = Load(n_slots=options.clients, n_ctx=n_ctx, threads=options.threads)
    prompts = Prompts(n_shared=2 * n_ctx // 5, n_long=4 * n_ctx // 5)
    with ExitStack() as stack:
        sides = {name: stack.enter_context(running(command)) for name, command in commands(given, limits).items()}
        wanted = [part for part in PARTS if part in (options.only or PARTS)]
        try:
            rows = list(_rows(sides, prompts, wanted, given.n_runs, options))
        except Unanswered as error:
            raise SystemExit(str(error)) from None
    subject = f"{given.subject}, {options.clients} clients and slots, {limits.threads} threads"
    print(report(subject, rows, given.n_runs, load))


def _rows(
    sides: Mapping[str, Running], prompts: Prompts, wanted: Sequence[str], n_runs: int, options: argparse.Namespace
) -> Iterator[Row]:
    n_clients = options.clients

    def everybody(measure: Callable[[Running], Crowd], *, warms_up: bool = True) -> dict[str, list[Crowd]]:
        return in_turn({name: partial(measure, side) for name, side in sides.items()}, n_runs, warms_up=warms_up)

    if "distinct" in wanted:
        yield from _distinct(everybody(lambda side: crowd(side.port, prompts.asks(n_clients, options.requests))))
    if "shared" in wanted:
        what = f"{n_clients} clients, new system prompt of {prompts.n_shared:,} tokens"
        yield from _sharing_rows(what, everybody(lambda side: _sharing(side, prompts, n_clients), warms_up=False))
    if "alone" in wanted:
        yield from _alone(everybody(lambda side: _one_client(side, prompts)))
    if "late" in wanted:
        what = f"longest gap of {N_STREAMS} streams while a prompt of {prompts.n_long:,} tokens comes"
        yield from _late(what, everybody(lambda side: _among_streams(side, prompts), warms_up=False))
    if "memory" in wanted:
        yield from _memory(sides, prompts)


def _distinct(found: Mapping[str, list[Crowd]]) -> Iterator[Row]:
    what = "distinct prompts of 48 words, 32 tokens"
    goals = {LLAMA_SERVER: at_least_times(1.2), PACKAGED: at_least_times(2)}
    yield from against_each(OURS, what, RATE, _rates(found), goals)
    firsts = {name: [1000 * median(h.first for h in each.answers) for each in runs] for name, runs in found.items()}
    yield from against_each(OURS, "their first token, p50", "ms", firsts, {LLAMA_SERVER: at_most_times(1)})


def _sharing(side: Running, prompts: Prompts, n_clients: int) -> Crowd:
    """One request of each: what a server computes once for all shows in full."""
    system = prompts.of_tokens(prompts.n_shared)
    return crowd(side.port, prompts.asks(n_clients, 1, f"{system}\n\n"))


def _sharing_rows(what: str, found: Mapping[str, list[Crowd]]) -> Iterator[Row]:
    goals = {LLAMA_SERVER: at_least_times(4), LLAMA_SERVER_AT_BEST: at_least_times(2.5)}
    yield from against_each(OURS, what, RATE, _rates(found), goals)


def _rates(found: Mapping[str, list[Crowd]]) -> dict[str, list[float]]:
    return {name: [each.tokens_per_second for each in runs] for name, runs in found.items()}


def _one_client(side: Running, prompts: Prompts) -> Crowd:
    """Several answers one after the other: a single one is too short to tell 2 % apart."""
    return crowd(side.port, [[Ask(prompts.of_words(11), 2 * N_TOKENS) for _ in range(3)]])


def _alone(found: Mapping[str, list[Crowd]]) -> Iterator[Row]:
    goals: dict[str, Goal] = {LLAMA_SERVER_AT_BEST: at_most_times(1.02)}
    per_token = _medians(found, lambda heard: heard.per_token)
    yield from against_each(OURS, "one client, time for each token", "ms", per_token, goals)
    firsts = _medians(found, lambda heard: heard.first)
    goals = {LLAMA_SERVER_AT_BEST: at_most_times(1)}
    yield from against_each(OURS, "one client, first token after 15", "ms", firsts, goals)


def _medians(found: Mapping[str, list[Crowd]], measure: Callable[[Heard], float]) -> dict[str, list[float]]:
    return {name: [1000 * median(map(measure, each.answers)) for each in runs] for name, runs in found.items()}


def _among_streams(side: Running, prompts: Prompts) -> Crowd:
    """Every token of a stream brings text, so that a gap between two events is a gap between two tokens."""
    streams = [Ask(prompts.of_words(8), 8 * N_TOKENS, WORDLESS) for _ in range(N_STREAMS)]
    late = Ask(prompts.of_tokens(prompts.n_long), 2)
    return interrupted(side.port, streams, late)[0]


def _late(what: str, found: Mapping[str, list[Crowd]]) -> Iterator[Row]:
    gaps = {name: [1000 * max(max(h.gaps) for h in each.answers) for each in runs] for name, runs in found.items()}
    yield Row(what=what, unit="ms", ours=gaps[OURS], goal=below(2000 * STEP_SECONDS, "ms"))
    yield from against_each(OURS, what, "ms", gaps, {})


def _memory(sides: Mapping[str, Running], prompts: Prompts) -> Iterator[Row]:
    for side in sides.values():
        crowd(side.port, [[Ask(prompts.of_words(N_WORDS), 4)]])
    peaks = {name: [side.peak_bytes() / 2**20] for name, side in sides.items()}
    yield from against_each(OURS, "peak memory", "MiB", peaks, {LLAMA_SERVER_AT_BEST: at_most_times(1.05)})


if __name__ == "__main__":
    main()
