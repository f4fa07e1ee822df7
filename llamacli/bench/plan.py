"""What can be measured in the time and the cells that there are. Knows no model, only how fast one was at first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PROMPTS = (512, 256, 128, 64, 32)  # tokens that are read
DEPTHS = (1024, 3000)  # tokens that stand before the one that is computed
LEAST_DEPTH = 128
STREAMS = (1, 2, 4, 8)
STREAM_DEPTH = 64  # tokens that each of several streams has before it
LEAST_STEPS, MOST_STEPS = 8, 64  # that a round takes
SECONDS = 60.0
MAX_ROUNDS = 5
_STEPS_SECONDS = 0.5  # that they may take
_SHARE = 0.5  # of the time, for what is measured in rounds; depths get the rest
_SLOWER = 1.3  # tokens are read more slowly behind others


@dataclass(frozen=True, slots=True)
class Probe:
    """What a first look has found: tokens read in a second, and seconds of a step that adds one token."""

    prefill: float
    step: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the user asked for; None is left to the plan.

    seconds   0 is as long as it takes
    repack    with weights rewritten for this CPU, as for long answers
    """

    prompt: int | None = None
    depths: tuple[int, ...] | None = None
    streams: tuple[int, ...] = STREAMS
    seconds: float = SECONDS
    repack: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """`depths` ascend and begin with 0; `steps` are those of a round. `left_out` are sentences for the user."""

    prompt: int
    steps: int
    rounds: int
    depths: tuple[int, ...]
    streams: tuple[int, ...]
    left_out: tuple[str, ...]


def plan(wanted: Wanted, probe: Probe, *, limit: int, cells: int) -> Plan:
    """What a benchmark does.

    limit   tokens of the model's context
    cells   what memory holds of the KV cache
    """
    left_out: list[str] = []
    steps = max(LEAST_STEPS, min(MOST_STEPS, int(_STEPS_SECONDS / probe.step)))
    room = min(limit, cells) - steps
    fitting = tuple(n for n in wanted.streams if n * (STREAM_DEPTH + steps) <= cells)
    left_out += [f"{n} streams: memory holds no cache for them" for n in wanted.streams if n not in fitting]
    prompt = min(wanted.prompt or _prompt(wanted, probe), room)
    if wanted.prompt and wanted.prompt > room:
        left_out.append(f"prefill of {wanted.prompt:,} tokens: there is room for {room:,}")
    depths = _depths(wanted, probe, room, left_out)
    return Plan(prompt, steps, _rounds(wanted, probe, prompt, fitting), (0, *depths), fitting, tuple(left_out))


def _prompt(wanted: Wanted, probe: Probe) -> int:
    """As long as is usual, but no longer than a sixth of the time takes to read."""
    if not wanted.seconds:
        return PROMPTS[0]
    return next((n for n in PROMPTS if n / probe.prefill <= wanted.seconds / 6), PROMPTS[-1])


def _rounds(wanted: Wanted, probe: Probe, prompt: int, streams: Sequence[int]) -> int:
    if not wanted.seconds:
        return MAX_ROUNDS
    # A step of several streams takes about as long as their tokens take to be read.
    steps = LEAST_STEPS * sum(probe.step + (n - 1) / probe.prefill for n in (1, *streams))
    round_seconds = prompt / probe.prefill + steps
    return max(1, min(MAX_ROUNDS, int(_SHARE * wanted.seconds / round_seconds)))


def _depths(wanted: Wanted, probe: Probe, room: int, left_out: list[str]) -> list[int]:
    """Those that memory holds and, unless the user has named them, the time."""
    if wanted.depths is not None:
        asked = sorted({n for n in wanted.depths if n})
        left_out += [f"decode after {n:,} tokens: there is room for {room:,}" for n in asked if n > room]
        return [n for n in asked if n <= room]
    depths: list[int] = []
    seconds = (1 - _SHARE) * wanted.seconds
    for n in [n for n in DEPTHS if n <= room] or [room * 3 // 4]:
        needed = _SLOWER * (n - max(depths, default=0)) / probe.prefill + LEAST_STEPS * probe.step
        if wanted.seconds and needed > seconds:
            left_out.append(f"decode after {n:,} tokens: to read them takes about {needed:,.0f} s; --time 0 does it")
            n_less = int(seconds * probe.prefill / _SLOWER) // LEAST_DEPTH * LEAST_DEPTH
            return depths or [n_less] * bool(n_less)
        seconds -= needed
        depths.append(n)
    return depths
