"""What serving.py compares: llamacli serve, llama-server, and the server that llama-cpp-python packages."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import HTTPError
from urllib.request import urlopen

from benchmarks.inputs import Inputs
from benchmarks.startup import llamacli

START_SECONDS = 300.0
OURS = "llamacli serve"
LLAMA_SERVER = "llama-server at its defaults"
LLAMA_SERVER_AT_BEST = "llama-server --no-repack"
PACKAGED = "python -m llama_cpp.server"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What every side is told: `n_slots` sequences at once, each of `n_ctx` tokens at most."""

    n_slots: int
    n_ctx: int
    threads: int


@dataclass(frozen=True, slots=True)
class Running:
    port: int
    pid: int

    def peak_bytes(self) -> int:
        """The most memory that the process and its children have held, each at its own peak."""
        return sum(_peak(pid) for pid in [self.pid, *_descendants(self.pid)])


def commands(given: Inputs, load: Load) -> dict[str, list[str]]:
    """How each side is started; the port comes after it. llama-server where its directory is known."""
    threads = str(load.threads)
    ours = [llamacli(), "serve", "-m", given.reference, "--slots", str(load.n_slots), "-c", str(load.n_ctx)]
    sides = {OURS: [*ours, "--threads", threads, "-q", "--no-cache", "--port"]}
    if given.tools:
        n_cells = str(load.n_slots * load.n_ctx)
        plain = [given.tool("llama-server"), "-m", str(given.path), "-np", str(load.n_slots), "-c", n_cells]
        plain += ["-t", threads, "-tb", threads, "-ngl", "0", "--port"]
        sides[LLAMA_SERVER] = plain
        sides[LLAMA_SERVER_AT_BEST] = [*plain[:-1], "--no-repack", "--port"]
    packaged = [sys.executable, "-m", "llama_cpp.server", "--model", str(given.path), "--n_ctx", str(load.n_ctx)]
    # Without this its second request ends the first one's answer.
    packaged += ["--interrupt_requests", "false", "--n_threads", threads, "--n_threads_batch", threads]
    sides[PACKAGED] = [*packaged, "--verbose", "false", "--host", "127.0.0.1", "--port"]
    return sides


@contextmanager
def running(command: Sequence[str]) -> Iterator[Running]:
    """A server that answers, and its end. `command` lacks its last word, the port."""
    port = _free_port()
    with TemporaryDirectory() as home, (Path(home) / "log").open("wb") as log:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LLAMACLI_")}
        process = subprocess.Popen(
            [*command, str(port)],
            env=kept | {"LLAMACLI_HOME": home},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _await_ready(process, port, Path(log.name))
            yield Running(port, process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _await_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Ours says when it is ready; the others list their models once they can answer."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"{process.args!r} ended: {log.read_text(errors='replace')[-2000:]}")
        status = _status(port, "/ready")
        if status == 200 or (status == 404 and _status(port, "/v1/models") == 200):
            return
        time.sleep(0.1)
    raise SystemExit(f"{process.args!r} was not ready after {START_SECONDS:g} s")


def _status(port: int, path: str) -> int:
    """0 while nobody listens."""
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code
    except OSError:
        return 0


def _peak(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def _descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *_descendants(int(child))]
    return found
