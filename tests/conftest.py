"""The real parts that tests share: the bundled model, its golden answers, and the program as a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import LoopbackHub

from llamacli.engine.llama import ContextOptions, LlamaModel, LlamaWeights, LoadOptions
from llamacli.gguf import read_header
from llamacli.models import store
from llamacli.prompt import Message, PromptBuilder

TESTS = Path(__file__).parent
collect_ignore = ["sample"]  # projects of their own: test_sample_projects.py runs them
PROGRAM = [sys.executable, "-m", "llamacli"]

# Whoever runs the tests in the background ignores Ctrl-C for all that they start; some of them want to hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)

Run = Callable[..., subprocess.CompletedProcess[Any]]


@dataclass(frozen=True)
class Golden:
    """A conversation and the greedy answer the tiny model has given to it."""

    messages: tuple[Message, ...]
    answer: str
    ended: bool


def golden() -> list[Golden]:
    cases: list[dict[str, Any]] = json.loads((TESTS / "golden.json").read_text("utf-8"))
    return [
        Golden(
            messages=tuple(
                [Message("system", case["system"])] * bool(case["system"])
                + [Message(m["role"], m["content"]) for m in case["messages"]]
            ),
            answer=case["greedy"],
            ended=case["ended"],
        )
        for case in cases
    ]


@pytest.fixture(scope="session")
def weights() -> Iterator[LlamaWeights]:
    loaded = LlamaWeights(store.bundled(), LoadOptions())
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def builder(weights: LlamaWeights) -> PromptBuilder:
    return PromptBuilder(read_header(store.bundled()), weights.vocabulary)


MakeModel = Callable[..., LlamaModel]


@pytest.fixture
def make_model(weights: LlamaWeights) -> Iterator[MakeModel]:
    """Contexts over the tiny model, closed after the test."""
    made: list[LlamaModel] = []

    def make(**options: Any) -> LlamaModel:
        made.append(LlamaModel(weights, ContextOptions(**{"threads": 1, "threads_batch": 1, **options})))
        return made[-1]

    yield make
    for model in made:
        model.close()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment in which nothing of this machine's own llamacli shows."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("LLAMACLI_")}
    ours = {name: value for name, value in ours.items() if not name.startswith("HF_")}
    ours |= {"HF_HOME": str(tmp_path / "huggingface"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    return ours | {"LLAMACLI_HOME": str(tmp_path / "home"), "LLAMACLI_MODEL": "tiny", "LLAMACLI_THREADS": "1"}


@pytest.fixture
def hub(environment: dict[str, str]) -> Iterator[LoopbackHub]:
    """A hub on this machine, to which the program's environment points."""
    running = LoopbackHub()
    environment["HF_ENDPOINT"] = running.url
    yield running
    running.stop()


@pytest.fixture
def llamacli(environment: dict[str, str]) -> Run:
    """Runs the program as a process. stdin is empty unless `input` is given."""

    def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[Any]:
        if "input" not in options:
            options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.run(
            [*PROGRAM, *arguments],
            **{"capture_output": True, "encoding": "utf-8", "env": environment, "timeout": 60, **options},
        )

    return run
