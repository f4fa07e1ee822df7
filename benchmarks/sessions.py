"""How long the first byte of an answer takes that goes on with a conversation, in a new process; what logging costs.

    python -m benchmarks.sessions --model tiny
    python -m benchmarks.sessions --model 1b

A conversation is had once, turn after turn. Then the same next question is asked again and again: with what is stored
of the conversation and without, and each time the conversation stays as it was.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from benchmarks.inputs import Inputs, at_home, inputs, parser
from benchmarks.sideways import Row, at_most_more, at_most_times, in_turn, load_average, report
from benchmarks.startup import first_answer_byte, llamacli
from llamacli.models import store

N_TOKENS, N_TOKENS_OF_TINY = 1000, 800  # of the conversation; the tiny model's context is 1,024 tokens
SESSION, NEXT, SHORT = "talk", "And how many were there?", "Hello"


@dataclass(frozen=True, slots=True)
class _Bench:
    """Asks llamacli in a home directory whose prefixes are put there before each run."""

    model: str
    path: Path
    home: Path
    kept: Path  # the prefixes after the conversation

    @property
    def _store(self) -> Path:
        return self.home / "cache" / "prefixes"

    def converse(self, n_tokens: int) -> int:
        """Have a conversation of so many tokens. Returns how many there are."""
        n = i = 0
        while n < n_tokens:
            ages = " ".join(f"Item {i + j} is {(i + j) * 7919 % 100} years old." for j in range(8))
            command = [*self._command(f"{ages} Which is the oldest?"), "--session", SESSION, "-n", "16", "--json"]
            done = subprocess.run(
                command, env=at_home(self.home), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True
            )
            usage = json.loads(done.stdout)["usage"]
            n, i = usage["prompt_tokens"] + usage["completion_tokens"], i + 8
        shutil.copytree(self._store, self.kept)
        return n

    def go_on(self, *, is_kept: bool) -> float:
        """Milliseconds to the first byte of the next answer. `is_kept`: what was computed is on the disk."""
        shutil.rmtree(self._store, ignore_errors=True)
        if is_kept:
            shutil.copytree(self.kept, self._store, copy_function=os.link)
        cache = [] if is_kept else ["--no-cache"]
        command = [*self._command(NEXT), "-n", "4", "--session", SESSION, "--no-log", *cache]
        return first_answer_byte(command, at_home(self.home), self.path)

    def alone(self, *arguments: str) -> float:
        """Milliseconds to the first byte of an answer to a short question."""
        return first_answer_byte([*self._command(SHORT), "-n", "4", *arguments], at_home(self.home), self.path)

    def whole(self, *arguments: str) -> float:
        """Milliseconds that a process takes for a short question, from its start to its end."""
        started = perf_counter()
        subprocess.run(
            [*self._command(SHORT), "-n", "4", *arguments],
            env=at_home(self.home),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return 1000 * (perf_counter() - started)

    def _command(self, question: str) -> list[str]:
        return [llamacli(), "-m", self.model, "--temperature", "0", "-q", question]


def main() -> None:
    given = inputs(parser(__doc__).parse_args())
    load, is_tiny = load_average(), given.reference == store.TINY
    with TemporaryDirectory() as directory:
        place = Path(directory)
        bench = _Bench(*_chat_model(given, place), place / "home", place / "kept")
        n_tokens = bench.converse(N_TOKENS_OF_TINY if is_tiny else N_TOKENS)
        times = in_turn(_sides(bench), given.n_runs)
    subject = f"{given.subject}, a conversation of {n_tokens:,} tokens"
    print(report(subject, _rows(times, has_goal=not is_tiny), given.n_runs, load))


def _chat_model(given: Inputs, place: Path) -> tuple[str, Path]:
    """What -m is given, and the file: a file of random weights counts as a chat model if its name says so."""
    if given.reference == store.TINY:
        return given.reference, given.path
    link = place / "synthetic-chat.gguf"
    link.symlink_to(given.path.resolve())
    return str(link), given.path


def _sides(bench: _Bench) -> dict[str, Callable[[], float]]:
    return {
        "kept": partial(bench.go_on, is_kept=True),
        "computed": partial(bench.go_on, is_kept=False),
        "alone, logged": partial(bench.alone, "--log"),
        "alone": partial(bench.alone, "--no-log"),
        "whole, logged": partial(bench.whole, "--log"),
        "whole": partial(bench.whole, "--no-log"),
    }


def _rows(times: dict[str, list[float]], *, has_goal: bool) -> list[Row]:
    """With the tiny model little is computed at all, so that the first has no goal."""
    return [
        Row(
            what="first byte of an answer that goes on with it, in a new process, against computing it again",
            unit="ms",
            ours=times["kept"],
            other=times["computed"],
            goal=at_most_times(0.1) if has_goal else None,
        ),
        Row(
            what="the same, against a short question without a conversation",
            unit="ms",
            ours=times["kept"],
            other=times["alone"],
        ),
        Row(
            what="first byte of a short answer that is logged, against one that is not",
            unit="ms",
            ours=times["alone, logged"],
            other=times["alone"],
            goal=at_most_more(20, "ms"),
        ),
        Row(
            what="the whole process, logged, against not logged",
            unit="ms",
            ours=times["whole, logged"],
            other=times["whole"],
            goal=at_most_more(50, "ms"),
        ),
    ]


if __name__ == "__main__":
    main()
