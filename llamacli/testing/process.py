"""Starts `llamacli serve` for tests, waits until it is ready, and ends it."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamacli.testing.api import Llama2Api

START_SECONDS = 120.0  # a large model takes its time
_EMPTY = '{"format": "llamacli-recording", "version": 1, "model": "llama-2"}\n'


@contextmanager
def running(source: str, root: Path, place: Path) -> Iterator[Llama2Api]:
    """A server on a free port, with a key.

    source   "tiny", "none", a recording or a model's file; paths count from `root`
    place    an empty directory: nothing of the user's own keys and settings is seen

    Raises RuntimeError with what the server has said when it does not start.
    """
    key = f"test-{secrets.token_hex(12)}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLAMACLI_")}
    environment = kept | {"LLAMACLI_HOME": str(place / "home"), "LLAMACLI_API_KEY": key}
    ready, log = place / "ready.json", place / "server.log"
    # Its stdin is a pipe that nobody but us holds: killed, we take it along.
    options = ["--port", "0", "--ready-file", str(ready), "--until-eof", "--allow-simulation", "--grace", "0"]
    # -P: a module of the project under test must not take the place of one that the server needs.
    command = [sys.executable, "-P", "-m", "llamacli", "serve", *options, *_source(source, root, place)]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=stderr, stderr=stderr)
    try:
        yield Llama2Api(_url(process, ready, log), key)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdin is not None
        process.stdin.close()


def _source(source: str, root: Path, place: Path) -> list[str]:
    if source == "tiny":
        # More threads gain nothing with a model this small, and lose much where others compute beside.
        return ["--model", "tiny", "--deterministic", "--threads", "1"]
    if source == "none":
        empty = place / "empty.jsonl"
        empty.write_text(_EMPTY, "utf-8")
        return ["--replay", str(empty), "--deterministic"]
    path = str(root / source)
    return ["--replay", path] if source.endswith(".jsonl") else ["--model", path, "--deterministic", "--offline"]


def _url(process: subprocess.Popen[bytes], ready: Path, log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text("utf-8", "replace").strip().splitlines()[-5:]
            raise RuntimeError(f"llamacli serve did not start: {' / '.join(said) or 'it has said nothing'}")
        time.sleep(0.005)
    return str(json.loads(ready.read_text("utf-8"))["url"])
