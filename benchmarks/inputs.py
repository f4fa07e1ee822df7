"""What a benchmark is told: the model file, the number of runs, and where llama.cpp's own programs are."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks import synthetic
from llamacli.models import store

TOOLS_VARIABLE = "LLAMA_CPP_BIN"
_LARGE = 1 << 30  # bytes
_N_RUNS, _N_RUNS_OF_LARGE = 11, 3


@dataclass(frozen=True, slots=True)
class Inputs:
    """`reference` is what llamacli -m is given; `tools` is None where llama.cpp's programs are not at hand."""

    reference: str
    path: Path
    n_runs: int
    tools: Path | None

    @property
    def is_large(self) -> bool:
        """Whether a run takes seconds, as with a 7B file."""
        return _is_large(self.path)

    @property
    def subject(self) -> str:
        return f"{self.path.name} ({self.path.stat().st_size:,} bytes)"

    def tool(self, name: str) -> str:
        """The path of one of llama.cpp's programs."""
        assert self.tools is not None
        path = self.tools / name
        if not os.access(path, os.X_OK):
            raise SystemExit(f"{TOOLS_VARIABLE} names {self.tools}, where there is no {name}")
        return str(path)


def at_home(home: Path) -> dict[str, str]:
    """The environment without the user's own settings, and with a home directory of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLAMACLI_")}
    return kept | {"LLAMACLI_HOME": str(home)}


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--model",
        default=store.TINY,
        help="tiny; 1b or 7b, which are written with random weights if they are not there; or a path [tiny]",
    )
    made.add_argument("--directory", type=Path, help="where 1b and 7b are kept [the user's cache]")
    made.add_argument("--runs", type=int, help=f"of each side [{_N_RUNS}; {_N_RUNS_OF_LARGE} for a large model]")
    return made


def inputs(options: argparse.Namespace) -> Inputs:
    path = _file(options.model, options.directory)
    n_runs = options.runs or (_N_RUNS_OF_LARGE if _is_large(path) else _N_RUNS)
    tools = os.environ.get(TOOLS_VARIABLE)
    # By its name the bundled model is checked against its checksum, which is part of a start.
    reference = store.TINY if options.model == store.TINY else str(path)
    return Inputs(reference, path, n_runs, Path(tools) if tools else None)


def _file(reference: str, directory: Path | None) -> Path:
    if reference == store.TINY:
        return store.bundled()
    if reference in synthetic.SHAPES:
        return synthetic.ensure(reference, directory or synthetic.default_directory())
    path = Path(reference).expanduser()
    if not path.is_file():
        raise SystemExit(f"there is no model file {reference}")
    return path


def _is_large(path: Path) -> bool:
    return path.stat().st_size >= _LARGE
