"""What HTTP costs: short requests a second to a server whose engine has a scripted model, and whose time they take.

    python -m benchmarks.http_cost

All that `serve` does is done: connections, JSON, the Llama 2 API's checks, the engine's process with its scheduler, the
metrics, a log line for each request (to a file); but the model computes nothing. Each request is answered with one
token. The script is that of the tests.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import uvloop

from benchmarks.short_requests import rate
from benchmarks.sideways import Row, above, in_turn, load_average, report
from llamacli.engine.protocol import Recipe
from llamacli.engine.sequence import SamplingParams
from llamacli.engine.supervisor import EngineProcess
from llamacli.server import listen
from llamacli.server.access import Origins
from llamacli.server.app import App, Served
from llamacli.server.connection import Patience
from llamacli.server.gate import Gate
from llamacli.server.log import Log
from llamacli.server.metrics import Metrics
from llamacli.server.service import Service

SCRIPT = Path(__file__).parents[1] / "tests" / "engine"
N_CONNECTIONS = (1, 8, 32)
SLOTS = 8


class Spent(NamedTuple):
    """rate: requests a second. The others: milliseconds of CPU time for each request."""

    rate: float
    server: float
    engine: float
    client: float


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of each number of connections [5]")
    parser.add_argument("--requests", type=int, default=4000, help="of a run [4000]")
    given = parser.parse_args()
    load = load_average()
    with _serving() as (port, pids):
        sides = {f"{n} connections": partial(_measured, port, pids, given.requests, n) for n in N_CONNECTIONS}
        found = in_turn(sides, given.runs)
    rows = [
        Row(
            what=f"short requests over {name}",
            unit="requests/s",
            ours=[each.rate for each in spent],
            goal=above(1000, "requests/s") if name == f"{N_CONNECTIONS[-1]} connections" else None,
        )
        for name, spent in found.items()
    ]
    last = found[f"{N_CONNECTIONS[-1]} connections"]
    for part in ("server", "engine", "client"):
        times = [getattr(each, part) for each in last]
        rows.append(Row(what=f"CPU time of the {part}'s process for each", unit="ms", ours=times))
    print(report("serve over a scripted model", rows, given.runs, load))


def _measured(port: int, pids: tuple[int, int], n_requests: int, n_connections: int) -> Spent:
    before = [*map(_cpu_seconds, pids), _cpu_seconds(os.getpid())]
    prompts = [f"question {i}" for i in range(10)]
    reached = rate(f"http://127.0.0.1:{port}", prompts, _is_whole, n_requests=n_requests, n_connections=n_connections)
    after = [*map(_cpu_seconds, pids), _cpu_seconds(os.getpid())]
    return Spent(reached, *(1000 * (b - a) / n_requests for a, b in zip(before, after, strict=True)))


def _is_whole(_: int, answer: dict[str, object]) -> bool:
    return answer.get("finish_reason") == "length"


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _serving() -> Iterator[tuple[int, tuple[int, int]]]:
    """A server in a process of its own: (port, (its pid, its engine's))."""
    bound = listen.bind("127.0.0.1", 0)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(bound, theirs))
    process.start()
    try:
        yield bound.getsockname()[1], ours.recv()
    finally:
        ours.send(None)
        process.join(10)
        process.kill()


def _serve(bound: socket.socket, pipe: Pipe) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_until_told(bound, pipe))


async def _until_told(bound: socket.socket, pipe: Pipe) -> None:
    recipe = Recipe("scripted_workshop:workshop", {"slots": SLOTS}, (str(SCRIPT),))
    async with EngineProcess(recipe) as engine:
        with TemporaryFile("w") as file:
            log = Log(file, as_json=True)
            app = App(
                Service(engine, slots=SLOTS, queue=64),
                served=Served(name="scripted", names=frozenset({"scripted"}), piece_of=engine.piece),
                defaults=SamplingParams(),
                origins=Origins(is_loopback=True),
                gate=Gate(None),
                metrics=Metrics(lambda: engine.stats),
                log=log,
                max_body=1 << 20,
                body_seconds=30,
            )
            http = listen.Http(app, Patience())
            serving = asyncio.ensure_future(http.serve(sockets=[bound]))
            assert engine.pid is not None
            pipe.send((os.getpid(), engine.pid))
            await asyncio.to_thread(pipe.recv)
            http.should_exit = True
            await serving
            log.close()


if __name__ == "__main__":
    main()
