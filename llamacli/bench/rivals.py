"""Other programs beside ours: llama_cpp.Llama in a process of its own, and llama.cpp's tools where they are found."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

from llamacli.bench.children import ChildFailed, Children
from llamacli.bench.plan import STREAM_DEPTH
from llamacli.launch import MAX_BATCH

HIGH_LEVEL = "llama_cpp.Llama"
TOOLS = "llama.cpp"
UNPACKED = "llama.cpp --no-repack"
TOOLS_VARIABLE = "LLAMA_CPP_BIN"
BENCH, COMPLETION, BATCHED = "llama-bench", "llama-completion", "llama-batched-bench"

_TRIES = 3
_PROGRAM = [sys.executable, "-m", "llamacli.bench.high_level"]


@dataclass(frozen=True, slots=True)
class Tools:
    """The paths of llama.cpp's programs, by their names; those that were found."""

    programs: Mapping[str, str]

    @classmethod
    def found(cls, environ: Mapping[str, str]) -> Tools:
        """In the directory that LLAMA_CPP_BIN names, else in PATH."""
        named = environ.get(TOOLS_VARIABLE)
        where = named or environ.get("PATH", os.defpath)
        paths = {name: shutil.which(name, path=where) for name in (BENCH, COMPLETION, BATCHED)}
        return cls({name: path for name, path in paths.items() if path})


class HighLevel:
    """llama_cpp.Llama as its documentation shows it: with no option but the context's size. It rewrites the weights.

    steps     tokens that are written for a figure
    threads   None: as many as it takes by itself, one for every other CPU where it writes
    """

    def __init__(self, children: Children, path: Path, n_ctx: int, steps: int, threads: int | None = None) -> None:
        self._children, self._path, self._n_ctx, self._steps = children, path, n_ctx, steps
        self._threads = str(threads or 0)
        self._process: Popen[bytes] | None = None

    def once(self, prompt: str, n_tokens: int) -> list[str]:
        """A one-liner, as a process of its own."""
        return [*_PROGRAM, "once", str(self._path), self._threads, prompt, str(n_tokens)]

    def load(self) -> float:
        """Seconds, anew. All of these raise ChildFailed."""
        self.close()
        return float(self._ask(1, 1)["load"])

    def prefill(self, n: int) -> float:
        """Tokens a second."""
        return n / float(self._ask(n, 1)["prefill"])

    def decode(self, depth: int) -> float:
        """Tokens a second."""
        per_token = self._ask(depth + 1, self._steps)["per_token"]
        if not per_token:
            raise ChildFailed("it has ended its answer at once")
        return 1 / float(per_token)

    def _ask(self, n_prompt: int, n: int) -> dict[str, Any]:
        if self._process is None:
            command = [*_PROGRAM, "ask", str(self._path), self._threads, str(self._n_ctx)]
            self._process = self._children.open(command)
        found: dict[str, Any] = self._children.ask(self._process, {"prompt": n_prompt, "n": n})
        return found

    def close(self) -> None:
        if self._process is not None:
            self._children.end(self._process)
            self._process = None


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """llama.cpp's tools, at their defaults or without rewriting the weights. All methods raise ChildFailed."""

    children: Children
    tools: Tools
    path: Path
    repack: bool
    gpu_layers: int  # -1 is all of them
    threads: int | None  # None: as many as the tool takes by itself
    steps: int  # tokens that are written for a figure

    def has(self, tool: str) -> bool:
        return tool in self.tools.programs

    def once(self, prompt: str, n_tokens: int) -> list[str]:
        """A one-liner: without rewriting also with the smallest context and without a warm-up, its quickest way."""
        command = [self.tools.programs[COMPLETION], "-m", str(self.path), "-n", str(n_tokens), "--temp", "0"]
        command += ["-no-cnv", "--no-display-prompt", "-p", prompt, *self._common()]
        return command if self.repack else [*command, "--no-warmup", "-c", "512"]

    def prefill(self, n: int) -> float:
        """Tokens a second."""
        return self._bench("-p", str(n), "-n", "0")

    def decode(self, depth: int) -> float:
        """Tokens a second. It draws no tokens: it computes random ones."""
        return self._bench("-p", "0", "-n", str(self.steps), "-d", str(depth))

    def _bench(self, *options: str) -> float:
        command = [self.tools.programs[BENCH], "-m", str(self.path), "-r", "1", "-b", str(MAX_BATCH), *options]
        command += ["-ngl", str(self.gpu_layers), "--repack", str(int(self.repack)), "-o", "json"]
        command += ["-t", str(self.threads)] if self.threads else []
        found = _json(self.children.output(command))
        return float(found[0]["avg_ts"])

    def streams(self, n: int) -> float:
        """Tokens a second of all together."""
        n_ctx = n * (STREAM_DEPTH + self.steps + 1)
        command = [self.tools.programs[BATCHED], "-m", str(self.path), "-c", str(n_ctx), "-npp", str(STREAM_DEPTH)]
        command += ["-ntg", str(self.steps), "-npl", str(n), "--output-format", "jsonl", *self._common()]
        for _ in range(_TRIES):  # now and then it ends before its own log has come to the figure
            lines = self.children.output(command).decode("utf-8", "replace").splitlines()
            for line in lines:
                if line.startswith("{"):
                    return float(_json(line)["speed_tg"])
        raise ChildFailed(f"{BATCHED} has printed no figure")

    def _common(self) -> Sequence[str]:
        options = ["-ngl", str(self.gpu_layers)] if self.gpu_layers != -1 else []
        options += ["-t", str(self.threads)] if self.threads else []
        return options if self.repack else [*options, "--no-repack"]


def _json(text: bytes | str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ChildFailed("it has printed something else than figures") from None
