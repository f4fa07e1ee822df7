"""Our own side of a benchmark: the weights as `run` would load them, and what is measured on them."""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter

from llamacli import launch as launching
from llamacli import machine
from llamacli.bench.plan import STREAM_DEPTH, Plan, Probe
from llamacli.engine import memory
from llamacli.engine.llama import ContextOptions, LlamaModel, LlamaWeights, LoadOptions
from llamacli.errors import ResourceError
from llamacli.launch import MAX_BATCH, Choice, Launch, Notice
from llamacli.rates import Meter, Timing

_PROBE = 64  # tokens


def speed(steps: Timing, streams: int = 1) -> float:
    """Tokens a second, moments that held a step up included: the others count to the end of all of theirs."""
    return streams / steps.mean


class Ours:
    """One thread owns it. Raises as launch.load() does.

    repack   measure with weights that are rewritten for this CPU; a process of its own has those that `run` chooses
    """

    def __init__(self, launch: Launch, notice: Notice, *, repack: bool = False) -> None:
        self._launch = launch
        self._weights = launching.load(launch, notice)
        if repack:
            self._weights = self._rewritten()
        self.threads = launch.settings.threads or machine.usable_cores().threads
        self._meter: Meter | None = None
        self._steps = 0

    def _rewritten(self) -> LlamaWeights:
        """Raises ResourceError where memory has no room for them."""
        launch = self._launch
        host, usable = memory.plan(launch.header, memory.CELLS).host, machine.memory().usable
        needed = host.total + host.weights
        if needed > usable:
            raise ResourceError(
                f"--repack on needs a second copy of the weights: {needed / 2**30:.1f} GiB of memory in all, "
                f"{usable / 2**30:.1f} GiB can be used. Leave it out"
            )
        launch.choices["repack"] = Choice(True, "as set")
        return LlamaWeights(launch.file.path, self._options())

    def _options(self) -> LoadOptions:
        layers, repack = (self._launch.choices[name].value for name in ("gpu_layers", "repack"))
        return LoadOptions(gpu_layers=layers if isinstance(layers, int) else 0, repack=bool(repack))

    def load(self) -> float:
        """Seconds to load the weights, and a context of 512 tokens with them."""
        started = perf_counter()
        weights = LlamaWeights(self._launch.file.path, self._options())
        self._model(512, 1, weights).close()
        seconds = perf_counter() - started
        weights.close()
        return seconds

    def probe(self) -> Probe:
        """A first look, which also brings the whole file into memory."""
        meter = self._meter_of(256, 1)
        step = meter.decode(repeats=1)
        n = min(_PROBE, self._launch.n_limit - 1)
        read = meter.prefill(n, repeats=1).median
        return Probe(n / read, min(step.median, meter.decode(repeats=2).median))

    def prepare(self, plan: Plan) -> None:
        """A context for what is measured in rounds."""
        n_streams = max(plan.streams, default=1)
        self._meter_of(max(plan.prompt, n_streams * (STREAM_DEPTH + plan.steps)), n_streams)
        self._steps = plan.steps

    def prepare_depth(self, deepest: int) -> None:
        self._meter_of(deepest + self._steps, 1)

    def prefill(self, n: int) -> float:
        """Tokens a second."""
        return n / self.meter.prefill(n, repeats=1).median

    def decode(self, depth: int) -> float:
        """Tokens a second, drawing them included, after so many others."""
        return speed(self.meter.answer(depth=depth, n=self._steps))

    def streams(self, n: int) -> float:
        """Tokens a second of all together."""
        return speed(self.meter.answer(n, depth=STREAM_DEPTH, n=self._steps), n)

    @property
    def meter(self) -> Meter:
        assert self._meter is not None
        return self._meter

    def command(self, prompt: str, n_tokens: int) -> list[str]:
        """A one-liner like this, as a process of its own."""
        settings = self._launch.settings
        chosen = ["--gpu-layers", settings.gpu_layers, "--kv-type", settings.kv_type, "--threads", str(self.threads)]
        ours = ["--temperature", "0", "--raw", "--no-cache", "--local", "--offline", "-n", str(n_tokens), *chosen]
        return [sys.executable, "-m", "llamacli", "run", "-m", _reference(self._launch), *ours, prompt]

    def close(self) -> None:
        if self._meter is not None:
            self._meter.model.close()
            self._meter = None

    def _meter_of(self, n_cells: int, n_slots: int) -> Meter:
        """One context at a time: memory may hold no second one."""
        self.close()
        self._meter = Meter(self._model(n_cells, n_slots, self._weights))
        return self._meter

    def _model(self, n_cells: int, n_slots: int, weights: LlamaWeights) -> LlamaModel:
        kv = self._launch.settings.kv_type
        options = ContextOptions(
            n_cells=n_cells,
            n_slots=n_slots,
            n_batch=min(MAX_BATCH, n_cells),
            threads=self.threads,
            threads_batch=self.threads,
            type_k=kv,
            type_v=kv,
        )
        return LlamaModel(weights, options)


def _reference(launch: Launch) -> str:
    """The bundled model goes by its name: its checksum is part of a start."""
    return launch.file.name if launch.file.is_bundled else str(Path(launch.file.path).absolute())
