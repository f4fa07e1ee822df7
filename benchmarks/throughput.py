"""Tokens per second: our engine beside a bare loop, llama_cpp.Llama and llama-bench.

    python -m benchmarks.throughput --model tiny
    LLAMA_CPP_BIN=llama.cpp/build/bin python -m benchmarks.throughput --model 7b

All sides have the same file, threads and context size. llama_cpp.Llama always repacks the weights; ours and the
bare loop's stay as they are in the file, unless --repack is given.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from string import ascii_lowercase

from benchmarks.inputs import Inputs, inputs, parser
from benchmarks.sides import BareLoop, HighLevel, OurEngine, Speed, Work, llama_bench, speed
from benchmarks.sideways import Row, against_each, at_least_times, below, in_turn, load_average, report
from llamacli import machine
from llamacli.engine.llama import LlamaWeights, LoadOptions
from llamacli.models import store

OURS = "our engine"
BARE = "a bare loop"
HIGH_LEVEL = "llama_cpp.Llama"
UNIT = "tokens/s"
BENCH = {False: "llama-bench --repack 0", True: "llama-bench at its defaults"}
AS_FAST = at_least_times(0.98)

PROMPT = "la la la la la la la la"  # the likeliest continuation does not end
N_STREAMS = 16
N_STREAM_TOKENS = 48  # 16 prompts with their answers fit into the context that one stream has


def main() -> None:
    own_parser = parser(__doc__)
    own_parser.add_argument("--threads", type=int, default=machine.usable_cores().threads, help="[one per core]")
    own_parser.add_argument("--repack", action="store_true", help="repack our weights too")
    options = own_parser.parse_args()
    given = inputs(options)
    load = load_average()
    work = _work(given, options.threads)
    with closing(HighLevel(work)) as high_level, closing(_weights(given, options.repack)) as weights:
        rows = _one_stream(given, work, weights, high_level, repack=options.repack)
        if given.reference == store.TINY:
            rows.append(_many_streams(given.n_runs, work, weights, high_level))
    subject = f"{given.subject}, {work.threads} threads, {work.n_ctx} tokens of context"
    print(report(subject + (", our weights repacked" if options.repack else ""), rows, given.n_runs, load))


def _work(given: Inputs, threads: int) -> Work:
    n_prefill, n_decode = (256, 32) if given.is_large else (512, 256)
    return Work(path=given.path, threads=threads, n_ctx=1024, n_prefill=n_prefill, n_decode=n_decode)


def _weights(given: Inputs, repack: bool) -> LlamaWeights:
    return LlamaWeights(given.path, LoadOptions(repack=repack))


def _one_stream(given: Inputs, work: Work, weights: LlamaWeights, high_level: HighLevel, *, repack: bool) -> list[Row]:
    prompt = _prompt(weights, PROMPT)
    with closing(OurEngine(weights, work)) as engine, closing(BareLoop(weights, work)) as bare:
        sides: dict[str, Callable[[], Speed]] = {
            OURS: partial(speed, engine, work, prompt),
            BARE: partial(speed, bare, work, prompt),
            HIGH_LEVEL: partial(speed, high_level, work, prompt),
        }
        if given.tools:
            bench = partial(llama_bench, given.tool("llama-bench"), work)
            sides |= {name: partial(bench, repack=each) for each, name in BENCH.items()}
        speeds = in_turn(sides, given.n_runs)
        own_times = [1000 * engine.own_time(prompt, work.n_decode) for _ in range(given.n_runs)]
    goals = {BARE: AS_FAST}
    if given.is_large:
        # llama-bench is a measure of ours where its weights are stored as ours are. It draws no tokens, which
        # a model of a few megabytes would show.
        goals[BENCH[repack]] = AS_FAST
    decode = {name: [each.decode for each in found] for name, found in speeds.items()}
    prefill = {name: [each.prefill for each in found] for name, found in speeds.items()}
    return [
        *against_each(OURS, f"decode {work.n_decode} tokens, one stream", UNIT, decode, goals),
        *against_each(OURS, f"prefill {work.n_prefill} tokens", UNIT, prefill, goals),
        Row(what="own time for each token, drawing it included", unit="ms", ours=own_times, goal=below(0.1, "ms")),
    ]


def _many_streams(n_runs: int, work: Work, weights: LlamaWeights, high_level: HighLevel) -> Row:
    prompts = [_prompt(weights, f"{letter} {PROMPT}") for letter in ascii_lowercase[:N_STREAMS]]
    with closing(OurEngine(weights, work, n_slots=N_STREAMS)) as engine:
        sides = {
            f"{N_STREAMS} streams of {OURS}": partial(engine.whole, prompts, N_STREAM_TOKENS),
            f"one stream of {HIGH_LEVEL}": partial(high_level.whole, prompts[0], N_STREAM_TOKENS),
        }
        ours, other = in_turn(sides, n_runs).values()
    what = f"{N_STREAMS} streams together, against one stream of {HIGH_LEVEL}"
    return Row(what=what, unit=UNIT, ours=ours, other=other, goal=at_least_times(4))


def _prompt(weights: LlamaWeights, text: str) -> list[int]:
    return [weights.vocabulary.bos, *weights.vocabulary.tokenize(text)]


if __name__ == "__main__":
    main()
