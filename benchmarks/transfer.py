"""A download of 1 GB from this machine, checked by sha256: ours beside hf_hub_download, which checks nothing.

    python -m benchmarks.transfer

Both sides fetch the same file from the tests' stand-in of the hub, in a process of its own, over plain HTTP. Every
run is a new process, so that its peak memory is its own. Times are of the whole call, imports excluded.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from benchmarks.sideways import Row, at_least_times, below, in_turn, load_average, report

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from loopback_hub import LoopbackHub

REPO, FILE = "org/model-GGUF", "model.Q4_K_M.gguf"
OURS, THEIRS, BARE = "ours, with sha256", "hf_hub_download, without", "ours, imports alone"

_MEASURE = """
import resource, sys, time
from pathlib import Path
{prepare}
started = time.perf_counter()
{work}
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(seconds, peak * (1 if sys.platform == "darwin" else 1024))
"""
_OURS = (
    "from llamacli.models import hub, transfer\nfrom llamacli.models.ranges import Source\n"
    "import truststore, urllib.request, huggingface_hub.file_download, httpx2",
    "file = hub.file({repo!r}, {file!r})\n"
    "transfer.fetch([transfer.Piece(Source(file.url, file.size, hub.headers()), file.sha256)], Path(sys.argv[1]))",
)
_THEIRS = (
    "from huggingface_hub import hf_hub_download\nimport huggingface_hub.file_download, httpx2",
    "hf_hub_download({repo!r}, {file!r}, local_dir=sys.argv[1])",
)


class Run(NamedTuple):
    seconds: float
    peak_bytes: int


def main() -> None:
    options = _parser().parse_args()
    if options.serve:
        _serve(options.megabytes)
        return
    load = load_average()
    size = options.megabytes << 20
    server = [sys.executable, "-m", "benchmarks.transfer", "--serve", "--megabytes", str(options.megabytes)]
    with subprocess.Popen(server, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as hub:
        assert hub.stdout is not None
        endpoint = hub.stdout.readline().strip()
        measure = partial(_run, endpoint)
        sides: dict[str, Callable[[], Run]] = {
            OURS: partial(measure, _OURS),
            THEIRS: partial(measure, _THEIRS),
            BARE: partial(measure, (_OURS[0], "pass")),
        }
        found = in_turn(sides, options.runs)
        hub.kill()
    rates = {name: [size / run.seconds / 1e6 for run in runs] for name, runs in found.items() if name != BARE}
    extra = [(run.peak_bytes - bare.peak_bytes) / 1e6 for run, bare in zip(found[OURS], found[BARE], strict=True)]
    rows = [
        Row(
            what="1 GB over loopback, against hf_hub_download",
            unit="MB/s",
            ours=rates[OURS],
            other=rates[THEIRS],
            goal=at_least_times(0.9),
        ),
        Row(what="peak memory beside the imports", unit="MB", ours=extra, goal=below(100, "MB")),
    ]
    print(report(f"{size / 1e9:.2f} GB", rows, options.runs, load))


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--runs", type=int, default=5, help="of each side [5]")
    made.add_argument("--megabytes", type=int, default=954, help="size of the file [954, which is 1 GB]")
    made.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return made


def _serve(megabytes: int) -> None:
    hub = LoopbackHub()
    hub.add(REPO, FILE, os.urandom(1 << 20) * megabytes)
    print(hub.url, flush=True)
    sys.stdin.read()


def _run(endpoint: str, side: tuple[str, str]) -> Run:
    prepare, work = (text.format(repo=REPO, file=FILE) for text in side)
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with TemporaryDirectory() as directory:
        target = Path(directory, "model.gguf")
        code = _MEASURE.format(prepare=prepare, work=work)
        done = subprocess.run(
            [sys.executable, "-c", code, str(target)],
            env=environment | {"HF_HOME": directory, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    seconds, peak = done.stdout.split()
    return Run(float(seconds), int(peak))


if __name__ == "__main__":
    main()
