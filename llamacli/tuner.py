"""Measures this machine with a model, in about a minute: both orders of its weights, threads, batches, attention.

The sides of a comparison take turns, so that whatever else the machine does hits all of them; medians count; who is
clearly slower drops out early. Time goes where a choice hangs on it: a large model gets fewer repeats and shorter
prompts. Says nothing itself: `report` is told how far it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from os import times
from statistics import median
from time import perf_counter

from llamacli import machine
from llamacli.engine import memory
from llamacli.engine.devices import gpu_devices
from llamacli.engine.llama import ContextOptions, LlamaModel, LlamaWeights, LoadOptions
from llamacli.launch import Launch, Notice
from llamacli.models import checksum
from llamacli.placing import place
from llamacli.rates import Meter, Timing
from llamacli.tuning import ROWS, Attention, Rates, Weights

SECONDS = 60.0  # that it is to take
STREAMS = (2, 4, 8, 16)  # rows of a step that writes several answers
DEPTH = 16  # tokens before each of them
LONG = (64, 128, 256, 512)  # rows of a step that reads a prompt,
SIZES = (LONG, (128, 256), (128,), (64,))  # of which a large model gets fewer
N_CELLS = memory.MAX_ROWS + memory.CELLS
N_SLOTS = STREAMS[-1]
SAMPLE_SECONDS = 0.02  # a step that is shorter is repeated for so long
MAX_ROUNDS = 7
MAX_LOADS = 3
HOPELESS = (2.5, 1.4, 1.15)  # times the best median: who is slower drops out after the first round, the second, ...

Report = Callable[[float, str], None]  # which share is done, and what comes now
Sides = Mapping[tuple[int, int], Callable[[], float]]


def race(
    sides: Sides,
    *,
    seconds: float,
    drops_out: bool = False,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[tuple[int, int], Timing]:
    """What each side takes. They take turns, in one order and then in the other, until the time is used up.

    sides      (group, which of it) → a function that returns the seconds that it took
    seconds    of all of them together: the last round may be a part more, and the first is always run
    drops_out  who is hopelessly slower than the best of its group runs no further rounds
    """
    found: dict[tuple[int, int], Timing] = {}
    running = list(sides)
    used = 0.0
    for i in range(MAX_ROUNDS):
        before = used
        for name in running if i % 2 == 0 else reversed(running):
            took = sides[name]()
            found[name] = Timing((*(found[name].seconds if name in found else ()), took))
            used += took
            progress(min(1.0, used / seconds))
        if drops_out:
            running = [name for name in running if not _is_hopeless(name, found, HOPELESS[min(i, len(HOPELESS) - 1)])]
        if used + (used - before) / 2 > seconds:
            break
    return found


def _is_hopeless(name: tuple[int, int], found: Mapping[tuple[int, int], Timing], factor: float) -> bool:
    best = min(timing.median for other, timing in found.items() if other[0] == name[0])
    return min(found[name].seconds) > factor * best


@dataclass(slots=True)
class _Side:
    """A model with its weights in one order, and what was measured of it."""

    weights: LlamaWeights
    model: LlamaModel
    load: float = 0.0
    threads: dict[int, float] = field(default_factory=dict)
    threads_batch: dict[int, float] = field(default_factory=dict)
    steps: dict[int, float] = field(default_factory=dict)
    meter: Meter = field(init=False)

    def __post_init__(self) -> None:
        self.meter = Meter(self.model)

    def close(self) -> None:
        self.model.close()
        self.weights.close()

    def step(self, rows: int, threads: int) -> Callable[[], float]:
        """To take a step of one token for each of `rows` streams: seconds, of the median where it is short."""

        def sample() -> float:
            self.model.set_threads(threads, threads)
            first = self.meter.decode(rows, depth=DEPTH, repeats=1).median  # threads may have to be started for it
            if first >= SAMPLE_SECONDS:
                return first
            return self.meter.decode(
                rows, depth=DEPTH, repeats=min(20, math.ceil(SAMPLE_SECONDS / max(first, 1e-4)))
            ).median

        return sample

    def read(self, rows: int, threads: int) -> Callable[[], float]:
        def sample() -> float:
            self.model.set_threads(threads, threads)
            return self.meter.prefill(rows, repeats=1).median

        return sample

    def result(self) -> Weights:
        return Weights(self.load, self.threads, self.threads_batch, dict(sorted(self.steps.items())))


def _fastest(seconds: Mapping[int, float]) -> int:
    return min(seconds, key=lambda threads: seconds[threads])


def measure(launch: Launch, notice: Notice, report: Report, *, usable: int | None = None) -> Rates:
    """Measure a model that was prepared. Nothing of it stays loaded.

    usable   bytes of memory; by default as many as the machine has to give

    Raises ResourceError where there is no room for it, ModelError for a file that cannot be loaded.
    """
    return _Tuner(launch, report, machine.memory().usable if usable is None else usable).measure(notice)


def thread_counts(cores: machine.Cores, wanted: int | None = None) -> list[int]:
    """The numbers of threads that are worth trying: all cores that we really have, half of them, and hyperthreads."""
    limit = cores.affinity if cores.cgroup_limit is None else math.ceil(cores.cgroup_limit)
    counts = {cores.threads, max(1, cores.threads // 2), max(1, min(cores.affinity, limit))}
    return sorted(counts | {wanted} if wanted else counts)


class _Tuner:
    def __init__(self, launch: Launch, report: Report, usable: int) -> None:
        self._launch = launch
        self._report = report
        self._usable = usable
        self._spreads: list[float] = []
        self._counts = thread_counts(machine.usable_cores(), launch.settings.threads)
        self._why_not = ""
        self._layers = 0

    def measure(self, notice: Notice) -> Rates:
        began, others = perf_counter(), _Others()
        launch = self._launch
        checksum.check(launch.file, launch.notes)
        self._layers = launch.layers = place(launch, gpu_devices(), machine.gpus(), notice)
        memory.check(self._plan(), self._usable)
        self._report(0.0, "loading the model as it is in the file")
        with self._opened(repack=False) as stored:
            with self._rewritten() as rewritten:
                sides = [stored, *([rewritten] if rewritten else [])]
                self._threads(sides)
                self._streams(sides)
                self._reading(sides)
            attention = self._attention(stored) if perf_counter() - began < SECONDS else None
        took = perf_counter() - began
        self._report(1.0, "")
        return Rates(
            stored=stored.result(),
            rewritten=rewritten.result() if rewritten else None,
            why_not=self._why_not,
            attention=attention,
            cores=machine.usable_cores().threads,
            others=others.cpus(),
            spread=round(median(self._spreads), 3) if self._spreads else 0.0,
            seconds=round(took, 1),
            measured=datetime.now().astimezone().isoformat(timespec="seconds"),
        )

    # -- loading --

    def _plan(self) -> memory.MemoryPlan:
        kv = self._launch.settings.kv_type
        return memory.plan(
            self._launch.header,
            N_CELLS,
            n_ubatch=memory.MAX_ROWS,
            gpu_layers=self._layers,
            n_outputs=N_SLOTS,
            type_k=kv,
            type_v=kv,
        )

    @contextmanager
    def _opened(self, *, repack: bool) -> Iterator[_Side]:
        """A side that is loaded, its loads timed. The file is in the page cache then, as it is for most programs."""
        options = LoadOptions(gpu_layers=self._layers, repack=repack)
        loads: list[float] = []
        if not repack:
            self._open(options)[0].close()
        side, seconds = self._open(options)
        loads.append(seconds)
        while len(loads) < MAX_LOADS and sum(loads) < SECONDS / 20:
            side.close()
            side, seconds = self._open(options)
            loads.append(seconds)
        side.load = Timing(tuple(loads)).median
        try:
            yield side
        finally:
            side.close()

    def _open(self, options: LoadOptions) -> tuple[_Side, float]:
        """Load the model. Returns the seconds, with those that its first step takes longer than the next."""
        began = perf_counter()
        weights = LlamaWeights(self._launch.file.path, options)
        loaded = perf_counter() - began
        side = _Side(weights, LlamaModel(weights, self._context()))
        first = side.meter.decode(repeats=1).median
        return side, loaded + max(0.0, first - side.meter.decode(repeats=2).median)

    def _context(self, flash_attention: bool | None = None) -> ContextOptions:
        kv, threads = self._launch.settings.kv_type, machine.usable_cores().threads
        return ContextOptions(
            n_cells=N_CELLS,
            n_slots=N_SLOTS,
            n_batch=memory.MAX_ROWS,
            threads=threads,
            threads_batch=threads,
            type_k=kv,
            type_v=kv,
            flash_attention=flash_attention,
        )

    @contextmanager
    def _rewritten(self) -> Iterator[_Side | None]:
        """The side with rewritten weights, where there is such a thing and memory for it."""
        host = self._plan().host
        if self._layers == -1 or host.weights == 0:
            self._why_not = "all layers are on the GPU"
        elif 2 * host.total > self._usable:
            self._why_not = f"a second copy of the weights does not fit: {self._usable / 2**30:.1f} GiB can be used"
        if self._why_not:
            yield None
            return
        self._report(0.05, "loading it rewritten for this CPU")
        with self._opened(repack=True) as side:
            if side.weights.is_rewritten:
                yield side
            else:
                self._why_not = "llama.cpp has no other order for these weights on this CPU"
                yield None

    # -- measuring --

    def _threads(self, sides: Sequence[_Side]) -> None:
        """Which threads are best for a token alone, and which for several; and what these steps take."""
        for at, share, what, rows in ((0.15, 0.08, "a token alone", 1), (0.25, 0.12, "several tokens", ROWS)):
            steps = {
                (i, threads): side.step(1, threads) if rows == 1 else side.read(rows, threads)
                for i, side in enumerate(sides)
                for threads in self._counts
            }
            found = self._race(steps, at, share, f"threads for {what}", drops_out=True)
            for i, side in enumerate(sides):
                by_threads = {threads: timing.median for (j, threads), timing in found.items() if i == j}
                side.steps[rows] = min(by_threads.values())
                if rows == 1:
                    side.threads = by_threads
                else:
                    side.threads_batch = by_threads

    def _streams(self, sides: Sequence[_Side]) -> None:
        steps = {
            (i, rows): side.step(rows, _fastest(side.threads_batch)) for i, side in enumerate(sides) for rows in STREAMS
        }
        self._keep(sides, self._race(steps, 0.4, 0.15, "several answers at once"))

    def _reading(self, sides: Sequence[_Side]) -> None:
        steps = {
            (i, rows): side.read(rows, _fastest(side.threads_batch))
            for i, side in enumerate(sides)
            for rows in self._sizes(sum(side.steps[ROWS] / ROWS for side in sides))
        }
        self._keep(sides, self._race(steps, 0.55, 0.35, "reading prompts"))

    def _sizes(self, seconds: float) -> tuple[int, ...]:
        """Which steps are measured if a token costs so much: as many as there is time for two rounds of."""
        affordable = (sizes for sizes in SIZES if 2 * seconds * sum(sizes) <= 0.35 * SECONDS)
        return next(affordable, SIZES[-1])

    def _attention(self, stored: _Side) -> Attention | None:
        """None where a quantized cache leaves no choice."""
        if self._launch.settings.kv_type not in ("f16", "f32"):
            return None
        sizes = [rows for rows in stored.steps if rows in LONG]
        depth = max((rows for rows in sizes if 4 * stored.steps[rows] <= 0.07 * SECONDS), default=min(sizes))
        model = LlamaModel(stored.weights, self._context(flash_attention=False))
        plain = Meter(model)
        for each in (stored.model, model):
            each.set_threads(_fastest(stored.threads), _fastest(stored.threads_batch))

        def read(meter: Meter) -> float:
            return meter.prefill(depth, repeats=1).median

        def step(meter: Meter) -> float:
            return meter.decode(depth=depth, repeats=3).median

        try:
            flash_read, plain_read = self._pair(partial(read, stored.meter), partial(read, plain), 0.9, 0.07)
            flash_step, plain_step = self._pair(partial(step, stored.meter), partial(step, plain), 0.97, 0.03)
        finally:
            model.close()
        return Attention(depth, flash_read, flash_step, plain_read, plain_step)

    def _pair(
        self, flash: Callable[[], float], plain: Callable[[], float], at: float, share: float
    ) -> tuple[float, float]:
        found = self._race({(0, 0): flash, (0, 1): plain}, at, share, "flash attention")
        return found[0, 0].median, found[0, 1].median

    def _race(
        self, sides: Sides, at: float, share: float, what: str, *, drops_out: bool = False
    ) -> dict[tuple[int, int], Timing]:
        """at, share   where the work stands when it begins, and which part of all it is"""
        self._report(at, what)
        found = race(
            sides,
            seconds=share * SECONDS,
            drops_out=drops_out,
            progress=lambda done: self._report(at + share * done, what),
        )
        self._spreads += [timing.spread for timing in found.values() if len(timing.seconds) > 1]
        return found

    def _keep(self, sides: Sequence[_Side], found: Mapping[tuple[int, int], Timing]) -> None:
        for (i, rows), timing in found.items():
            sides[i].steps[rows] = timing.median


class _Others:
    """What other programs take of the CPUs that are open to us, from now on."""

    def __init__(self) -> None:
        self._began = self._now()

    def cpus(self) -> float | None:
        """How many they have kept busy; None where nobody counts."""
        (all_before, own_before, at), (every, own, now) = self._began, self._now()
        if all_before is None or every is None or now <= at:
            return None
        return round(max(0.0, (every - all_before - (own - own_before)) / (now - at)), 2)

    @staticmethod
    def _now() -> tuple[float | None, float, float]:
        own = times()
        return machine.cpu_seconds(), own.user + own.system, perf_counter()
