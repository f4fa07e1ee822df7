"""What a benchmark finds: seconds or tokens a second, of us and of others, and how many times as fast we are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

OURS = "llamacli"
UNSTEADY = 0.25  # a spread from here on is mentioned: such a figure is worth little

What = Literal["load", "first token", "prefill", "decode", "streams"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that was measured.

    what     load and first token in seconds, the others in tokens a second
    n        tokens that were read, that stood before those written, or streams at once
    values   of each side, by its name, in the order they were taken
    """

    what: What
    n: int | None
    values: Mapping[str, Sequence[float]]

    @property
    def unit(self) -> str:
        return "s" if self.what in ("load", "first token") else "tokens/s"

    @property
    def title(self) -> str:
        return {
            "load": "load",
            "first token": "first token, from process start",
            "prefill": f"prefill of {self.n:,} tokens" if self.n else "prefill",
            "decode": f"decode after {self.n:,} tokens" if self.n else "decode",
            "streams": "1 stream" if self.n == 1 else f"{self.n} streams together",
        }[self.what]

    def of(self, side: str) -> float | None:
        """Its median; None where it has none."""
        values = self.values.get(side)
        return median(values) if values else None

    def speedup(self, side: str) -> float | None:
        """How many times as fast as that side we are."""
        ours, theirs = self.of(OURS), self.of(side)
        if not ours or not theirs:
            return None
        return theirs / ours if self.unit == "s" else ours / theirs

    def is_unsteady(self, side: str) -> bool:
        """Whether the largest and the smallest lie far apart."""
        values = self.values[side]
        return max(values) - min(values) >= UNSTEADY * median(values)

    def record(self) -> dict[str, object]:
        """For JSON."""
        others = {
            side: {"median": self.of(side), "values": list(values), "speedup": self.speedup(side)}
            for side, values in self.values.items()
            if side != OURS
        }
        ours = {"median": self.of(OURS), "values": list(self.values.get(OURS, ()))}
        return {"what": self.what, "n": self.n, "unit": self.unit, "ours": ours, "others": others}
