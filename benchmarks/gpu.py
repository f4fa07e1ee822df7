"""On a GPU: decode and prefill beside llama-bench, 32 streams beside llama-batched-bench, and what our Python takes.

    LLAMA_CPP_BIN=llama.cpp/build/bin python -m benchmarks.gpu --model 7b

Ours and llama.cpp's tools must be compiled for the same GPU. Where there is none, --layers 0 tries the benchmark on the
CPU; its figures then say nothing of a GPU.
"""

from __future__ import annotations

from contextlib import closing
from functools import partial

from benchmarks.inputs import Inputs, inputs, parser
from benchmarks.sides import OurEngine, Work
from benchmarks.sideways import Row, against_each, at_least_times, in_turn, load_average, report
from llamacli import machine
from llamacli.bench.children import Children
from llamacli.bench.plan import STREAM_DEPTH
from llamacli.bench.rivals import BATCHED, BENCH, TOOLS_VARIABLE, LlamaCpp, Tools
from llamacli.engine.bindings import VERSION
from llamacli.engine.devices import gpu_devices, placed_on
from llamacli.engine.llama import LlamaWeights, LoadOptions
from llamacli.placing import GPU_BUILD

OURS = "our engine"
N_STREAMS = 32
N_PREFILL, N_DECODE = 512, 64
AS_FAST = at_least_times(0.98)
UNIT = "tokens/s"


def main() -> None:
    own_parser = parser(__doc__)
    own_parser.add_argument("--layers", type=int, default=-1, help="on the GPU; 0 is none [all]")
    options = own_parser.parse_args()
    given, load = inputs(options), load_average()
    devices = placed_on(gpu_devices())
    if options.layers and not devices:
        remedy = GPU_BUILD.format(backend="CUDA", version=VERSION)
        raise SystemExit(
            "there is no GPU that this build of llama.cpp can use, so nothing was measured. "
            f"If there is one, {remedy}; --layers 0 tries this benchmark on the CPU"
        )
    rows = _measured(given, options.layers)
    where = ", ".join(each.description for each in devices) if options.layers else "the CPU alone"
    print(report(f"{given.subject} on {where}", rows, given.n_runs, load))


def _measured(given: Inputs, layers: int) -> list[Row]:
    threads = machine.usable_cores().threads
    n_ctx = N_STREAMS * (STREAM_DEPTH + 2 * N_DECODE)
    work = Work(path=given.path, threads=threads, n_ctx=n_ctx, n_prefill=N_PREFILL, n_decode=N_DECODE)
    tools = Tools.found({TOOLS_VARIABLE: str(given.tools)}) if given.tools else Tools({})
    rival = LlamaCpp(Children(), tools, given.path, repack=False, gpu_layers=layers, threads=threads, steps=N_DECODE)
    with closing(LlamaWeights(given.path, LoadOptions(gpu_layers=layers))) as weights:
        with closing(OurEngine(weights, work, n_slots=N_STREAMS)) as engine:
            return _rows(given.n_runs, engine, weights, rival)


def _rows(n_runs: int, engine: OurEngine, weights: LlamaWeights, rival: LlamaCpp) -> list[Row]:
    # As many different tokens as the tools read, and no two prompts that begin alike.
    bos = weights.vocabulary.bos
    long = [bos, *range(1000, 999 + N_PREFILL)]
    many = [[bos, *range(1000 + 100 * i, 999 + 100 * i + STREAM_DEPTH)] for i in range(N_STREAMS)]
    prefill = {OURS: lambda: N_PREFILL / engine.prefill(long)}
    decode = {OURS: lambda: engine.decode([bos], N_DECODE)}
    streams = {OURS: lambda: N_STREAMS / engine.steps(many, N_DECODE)[0]}
    if rival.has(BENCH):
        prefill[BENCH], decode[BENCH] = partial(rival.prefill, N_PREFILL), partial(rival.decode, 0)
    if rival.has(BATCHED):
        streams[BATCHED] = partial(rival.streams, N_STREAMS)
    rows = []
    for what, sides in (
        (f"prefill of {N_PREFILL} tokens", prefill),
        ("decode, one stream", decode),
        (f"decode, {N_STREAMS} streams together", streams),
    ):
        found = in_turn(sides, n_runs)
        compared = against_each(OURS, what, UNIT, found, dict.fromkeys((BENCH, BATCHED), AS_FAST))
        rows += compared or [Row(what=what, unit=UNIT, ours=found[OURS])]
    for prompts in ([[bos]], many):
        steps = [engine.steps(prompts, N_DECODE) for _ in range(n_runs)]
        n = "1 stream" if len(prompts) == 1 else f"{len(prompts)} streams"
        rows.append(Row(what=f"our own time of a step, {n}", unit="ms", ours=[1000 * own for _, own in steps]))
        rows.append(Row(what=f"its share of the step, {n}", unit="%", ours=[100 * own / all_ for all_, own in steps]))
    return rows


if __name__ == "__main__":
    main()
