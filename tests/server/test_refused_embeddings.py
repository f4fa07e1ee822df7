"""Embeddings that an engine refuses leave nothing behind in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ENGINE = Path(__file__).parent.parent / "engine"
# A worker ends its process when the other end of its channel goes: it has one of its own here.
PROGRAM = """
import os, socket, threading
from llamacli.engine.protocol import Ask, Channel, packed
from llamacli.engine.worker import Worker
from scripted_workshop import workshop

ours, its = socket.socketpair()
worker = Worker(Channel(its), workshop(print))
threading.Thread(target=worker.run, daemon=True).start()
channel = Channel(ours)
channel.receive()
ours.sendall(packed([(Ask.EMBED, number, ["a llama"]) for number in range(100)]))
refused = [channel.receive()[3] for _ in range(100)]
print(set(refused), len(worker._awaited), flush=True)
os._exit(0)
"""


def test_a_refused_embedding_is_awaited_no_longer() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env={"PYTHONPATH": str(ENGINE)}, check=True
    )
    assert ran.stdout.splitlines()[-1] == "{'this server makes no embeddings'} 0"
