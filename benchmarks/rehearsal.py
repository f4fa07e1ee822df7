"""How soon `serve` is ready, from a recording and with the tiny model, and how many short requests a second it replays.

    python -m benchmarks.rehearsal

Ready is when the file of --ready-file is there. The requests come over eight connections that stay open, from one other
process with nothing to do but to send the next one, and ask the ten recorded questions in turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep

from benchmarks.short_requests import rate
from benchmarks.sideways import Row, above, below, in_turn, load_average, report

N_CONNECTIONS = 8
N_QUESTIONS = 10
REPLAY, TINY, RATE = "ready with --replay", "ready with the tiny model", "replayed short requests"


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="of each side [7]")
    parser.add_argument("--requests", type=int, default=4000, help="of a run [4000]")
    given = parser.parse_args()
    load = load_average()
    with TemporaryDirectory() as home:
        place = Path(home)
        recording = _recording(place)
        sides = {
            REPLAY: partial(_until_ready, place, ["--replay", str(recording)]),
            TINY: partial(_until_ready, place, ["--model", "tiny", "--threads", "1"]),
            RATE: partial(_rate, place, recording, given.requests),
        }
        found = in_turn(sides, given.runs)
    rows = [
        Row(what=REPLAY, unit="ms", ours=found[REPLAY], goal=below(500, "ms")),
        Row(what=TINY, unit="ms", ours=found[TINY], goal=below(1500, "ms")),
        Row(what=RATE, unit="requests/s", ours=found[RATE], goal=above(1000, "requests/s")),
    ]
    print(report("serve for testing clients", rows, given.runs, load))


def _recording(place: Path) -> Path:
    path = place / "talk.jsonl"
    lines: list[object] = [{"format": "llamacli-recording", "version": 1, "model": "tiny"}]
    for i in range(N_QUESTIONS):
        answer = {"status": 200, "content-type": "application/json", "response": f"answer {i}", "traceId": f"trace-{i}"}
        response = {"status": 200, "headers": {"content-type": "application/json"}, "json": answer}
        request = {"path": "/v1/getData", "json": {"prompt": f"question {i}", "max_tokens": 1}}
        lines.append({"request": request, "response": response, "traceId": f"trace-{i}"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@contextmanager
def _serving(place: Path, options: list[str]) -> Iterator[tuple[str, float]]:
    """Its URL, and the milliseconds from the start of its process."""
    ready = place / "ready.json"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLAMACLI_")}
    environment |= {"LLAMACLI_HOME": str(place / "home")}
    command = [sys.executable, "-m", "llamacli", "serve", "--port", "0", "--ready-file", str(ready), *options]
    started = perf_counter()
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not ready.exists():
                if process.poll() is not None:
                    raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}")
                sleep(0.001)
            elapsed = 1000 * (perf_counter() - started)
            yield json.loads(ready.read_text())["url"], elapsed
        finally:
            process.terminate()


def _until_ready(place: Path, options: list[str]) -> float:
    with _serving(place, options) as (_, elapsed):
        return elapsed


def _rate(place: Path, recording: Path, n_requests: int) -> float:
    """Requests a second."""
    with _serving(place, ["--replay", str(recording)]) as (url, _):
        questions = [f"question {i}" for i in range(N_QUESTIONS)]
        return rate(url, questions, _is_right, n_requests=n_requests, n_connections=N_CONNECTIONS)


def _is_right(number: int, answer: dict[str, object]) -> bool:
    return answer.get("response") == f"answer {number}"


if __name__ == "__main__":
    main()
