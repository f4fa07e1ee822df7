"""How long `list` takes with 50 models, and `pull` of a model that is here already.

    python -m benchmarks.listing

The hub is the tests' stand-in, on this machine. Both are whole processes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from benchmarks.sideways import Row, below, in_turn, load_average, report
from llamacli.models import store
from llamacli.models.store import Record

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from loopback_hub import LoopbackHub

N_MODELS = 50
REPO, FILE = "org/tiny-GGUF", "tiny.Q8_0.gguf"
LIST, PULL, PASS = "llamacli list", "llamacli pull", "python -c pass"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=11, help="of each side [11]")
    n_runs = parser.parse_args().runs
    load = load_average()
    hub = LoopbackHub()
    hub.add(REPO, FILE, store.bundled().read_bytes())
    with TemporaryDirectory() as home:
        environment = os.environ | {"LLAMACLI_HOME": home, "HF_ENDPOINT": hub.url, "HF_HOME": f"{home}/hf"}
        _fill(Path(home, "data", "models"))
        llamacli = [sys.executable, "-m", "llamacli"]
        sides = {
            LIST: partial(_milliseconds, [*llamacli, "list"], environment),
            PULL: partial(_milliseconds, [*llamacli, "pull", REPO], environment),
            PASS: partial(_milliseconds, [sys.executable, "-c", "pass"], environment),
        }
        found = in_turn(sides, n_runs)
    n_bodies = len(hub.of("body"))
    hub.stop()
    rows = [
        Row(what=f"{LIST} of {N_MODELS + 2} models", unit="ms", ours=found[LIST], goal=below(300, "ms")),
        Row(what=f"{PULL} of a model that is here", unit="ms", ours=found[PULL], goal=below(1500, "ms")),
        Row(what="python -c pass", unit="ms", ours=found[PASS]),
    ]
    print(report(f"{N_MODELS} pulled models, {n_bodies} download in all", rows, n_runs, load))


def _fill(models: Path) -> None:
    for i in range(N_MODELS):
        path = store.target(models, f"org/model-{i}", f"{i:040x}", f"model-{i}.Q8_0.gguf")
        path.parent.mkdir(parents=True)
        shutil.copyfile(store.bundled(), path)
        record = Record(f"org/model-{i}", path.name, [f"{i:040x}"], path.stat().st_size, store.TINY_SHA256, f"m{i}")
        store.write_record(path, record)


def _milliseconds(command: list[str], environment: dict[str, str]) -> float:
    started = perf_counter()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return 1000 * (perf_counter() - started)


if __name__ == "__main__":
    main()
