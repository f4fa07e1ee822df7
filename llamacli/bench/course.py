"""The course of a benchmark: what is measured, in which order, and who takes turns with whom.

Everything happens in the thread that iterates; it tells of each stage before it begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from llamacli import machine
from llamacli.bench.children import ChildFailed, Children
from llamacli.bench.figures import OURS, Figure, What
from llamacli.bench.ours import Ours
from llamacli.bench.plan import Plan, Wanted, plan
from llamacli.bench.rivals import (
    BATCHED,
    BENCH,
    COMPLETION,
    HIGH_LEVEL,
    TOOLS,
    TOOLS_VARIABLE,
    UNPACKED,
    HighLevel,
    LlamaCpp,
    Tools,
)
from llamacli.engine import memory
from llamacli.launch import Launch, Notice

PROMPT = "[INST] Tell me about llama2 [/INST]"
_N_TOKENS = 4  # a first token may be a space alone
_MOST_STARTS = 3
_N_LOADS = 3
BUSY = 0.25  # load average for each core from which on other programs count as being in the way


@dataclass(frozen=True, slots=True)
class Stage:
    """What is measured next."""

    text: str


@dataclass(frozen=True, slots=True)
class Note:
    """What the user should know about the figures."""

    text: str


Event = Stage | Note | Figure
Measure = Callable[[], float]


@dataclass(slots=True)
class Course:
    """One benchmark of one model.

    tools   llama.cpp's, where others are to be compared; None compares nobody
    load    the machine's load average before it began
    """

    launch: Launch
    wanted: Wanted
    children: Children
    tools: Tools | None
    load: float
    notice: Notice

    def events(self) -> Iterator[Event]:
        """Raises as launch.load() does."""
        yield from self._busy()
        yield Stage("loading the model")
        ours = Ours(self.launch, self.notice, repack=self.wanted.repack)
        yield Stage("a first look")
        chosen = plan(self.wanted, ours.probe(), limit=self.launch.n_limit, cells=self.launch.max_cells)
        high_level = self._high_level(max(chosen.prompt, *chosen.depths) + chosen.steps + 1, chosen.steps)
        if self.tools is not None and high_level is None:
            yield Note(f"{HIGH_LEVEL} was left out: memory does not hold the weights once more")
        if self.tools is not None and self.launch.settings.kv_type != "f16":
            yield Note("the others are measured with a cache of their own default, f16")
        if self.tools is not None and not self.tools.programs:
            yield Note(f"llama.cpp's own tools were not found: {TOOLS_VARIABLE} names their directory")
        try:
            yield from self._all(ours, chosen, high_level)
        finally:
            ours.close()
            if high_level is not None:
                high_level.close()
        yield from (Note(f"left out: {each}") for each in chosen.left_out)

    def _busy(self) -> Iterator[Note]:
        cores = machine.usable_cores().threads
        if self.load >= BUSY * cores:
            yield Note(
                f"this machine is busy: its load average is {self.load:.1f} on {cores} cores, so that all figures are "
                "lower than they could be, and ratios doubtful"
            )

    def _all(self, ours: Ours, chosen: Plan, high_level: HighLevel | None) -> Iterator[Event]:
        tools = self._llama_cpp(chosen.steps)
        loads: dict[str, Measure] = {OURS: ours.load}
        if high_level is not None:
            loads[HIGH_LEVEL] = high_level.load
        yield from self._rounds("load", None, loads, _N_LOADS)
        starts: dict[str, Measure] = {OURS: self._start(ours.command(PROMPT, _N_TOKENS))}
        if high_level is not None:
            starts[HIGH_LEVEL] = self._start(high_level.once(PROMPT, _N_TOKENS))
        starts |= {
            name: self._start(each.once(PROMPT, _N_TOKENS)) for name, each in tools.items() if each.has(COMPLETION)
        }
        yield from self._rounds("first token", None, starts, min(_MOST_STARTS, chosen.rounds))

        ours.prepare(chosen)
        benches = {name: each for name, each in tools.items() if each.has(BENCH)}
        yield from self._read_and_written("prefill", chosen.prompt, ours, high_level, benches, chosen.rounds)
        yield from self._read_and_written("decode", 0, ours, high_level, benches, chosen.rounds)
        batched = {name: each for name, each in tools.items() if each.has(BATCHED)}
        for n in chosen.streams:
            sides: dict[str, Measure] = {OURS: partial(ours.streams, n)}
            sides |= {name: partial(each.streams, n) for name, each in batched.items()}
            yield from self._rounds("streams", n, sides, chosen.rounds)
        depths = chosen.depths[1:]
        if depths:
            ours.prepare_depth(depths[-1])
        for depth in depths:
            # The others read all of it again for each figure: they do it once, where time does not matter.
            is_patient = not self.wanted.seconds
            others = (high_level, benches) if is_patient else (None, {})
            yield from self._read_and_written("decode", depth, ours, *others, 1 if is_patient and self.tools else 2)

    def _read_and_written(
        self,
        what: What,
        n: int,
        ours: Ours,
        high_level: HighLevel | None,
        benches: Mapping[str, LlamaCpp],
        rounds: int,
    ) -> Iterator[Event]:
        sides = {OURS: ours, HIGH_LEVEL: high_level, **benches}
        measures: dict[str, Measure] = {
            name: partial(side.prefill if what == "prefill" else side.decode, n)
            for name, side in sides.items()
            if side is not None
        }
        yield from self._rounds(what, n, measures, rounds)

    def _rounds(self, what: What, n: int | None, sides: Mapping[str, Measure], rounds: int) -> Iterator[Event]:
        """Each side in turn, again and again: what changes in a machine meanwhile changes for all."""
        values: dict[str, list[float]] = {name: [] for name in sides}
        failed: dict[str, str] = {}
        title = Figure(what, n, {}).title
        for i in range(rounds):
            order = list(sides.items())
            for name, measure in order[i % len(order) :] + order[: i % len(order)]:
                if name in failed:
                    continue
                yield Stage(f"{title}, {name}" + (f", {i + 1} of {rounds}" if rounds > 1 else ""))
                try:
                    values[name].append(measure())
                except ChildFailed as error:
                    failed[name] = str(error)
        figure = Figure(what, n, {name: tuple(found) for name, found in values.items() if name not in failed})
        yield figure
        yield from (Note(f"{title}: nothing of {name}: {why}") for name, why in failed.items())

    def _start(self, command: list[str]) -> Measure:
        return partial(self.children.first_byte, command)

    def _high_level(self, n_ctx: int, steps: int) -> HighLevel | None:
        if self.tools is None:
            return None
        needed = memory.plan(self.launch.header, n_ctx).host.total
        if needed > machine.memory().usable:
            return None
        return HighLevel(self.children, self.launch.file.path, n_ctx, steps, self.launch.settings.threads)

    def _llama_cpp(self, steps: int) -> dict[str, LlamaCpp]:
        if self.tools is None or not self.tools.programs:
            return {}
        layers = self.launch.choices["gpu_layers"].value
        gpu_layers = layers if isinstance(layers, int) else 0
        ways = {TOOLS: True} if gpu_layers else {TOOLS: True, UNPACKED: False}
        return {
            name: LlamaCpp(
                self.children,
                self.tools,
                self.launch.file.path,
                repack,
                gpu_layers,
                self.launch.settings.threads,
                steps,
            )
            for name, repack in ways.items()
        }
