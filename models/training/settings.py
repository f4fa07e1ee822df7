"""The settings of a training run as values; settings.toml holds those of the published file."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

PUBLISHED = Path(__file__).with_name("settings.toml")


@dataclass(frozen=True)
class Shape:
    """The size of the transformer."""

    dim: int
    layers: int
    heads: int
    ff: int
    context: int


@dataclass(frozen=True)
class Phase:
    """A part of a stage: what is trained on until this share of it is done."""

    until: float
    mix: str
    longest: int
    accumulate: int


@dataclass(frozen=True)
class Stage:
    """One run through the schedule of the learning rate."""

    steps: int
    minutes: float
    learning_rate: float
    warmup: int
    phases: tuple[Phase, ...]

    def phase(self, progress: float) -> Phase:
        """The phase at this share of the stage."""
        return next((phase for phase in self.phases if progress < phase.until), self.phases[-1])


@dataclass(frozen=True)
class Settings:
    seed: int
    license: str
    batch_tokens: int
    negatives: int
    bf16: bool
    check_every: int
    examples_per_task: int
    shape: Shape
    mixes: dict[str, dict[str, int]]
    stages: tuple[Stage, ...]


def read_settings(path: Path = PUBLISHED) -> Settings:
    """The settings of a file. Raises TypeError for one that is missing or misspelt."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    shape = Shape(**table.pop("shape"))
    stages = []
    for stage in table.pop("stages"):
        phases = tuple(Phase(**phase) for phase in stage.pop("phases"))
        stages.append(Stage(phases=phases, **stage))
    return Settings(shape=shape, stages=tuple(stages), **table)
