"""How long the first byte of an answer about a document takes that was asked about before, in a new process each time.

    python -m benchmarks.prefixes --model tiny
    python -m benchmarks.prefixes --model 7b

Every run begins with a store of its own: an empty one, or one that holds the first question and nothing else. The
model file is in the page cache; the stored prefix is, too, except where it says so.
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
from benchmarks.sideways import Row, at_most_times, in_turn, load_average, report
from benchmarks.startup import first_answer_byte, llamacli

FIRST, SECOND = "What is item 7?", "How many items are there?"
N_ITEMS, N_ITEMS_OF_LARGE = 45, 95  # the tiny model's context is 1,024 tokens
BLOCK = 1 << 24


@dataclass(frozen=True, slots=True)
class _Bench:
    """Asks llamacli in a home directory whose prefixes are put there before each run."""

    given: Inputs
    home: Path
    document: Path
    kept: Path  # the prefixes after the first question

    @property
    def _store(self) -> Path:
        return self.home / "cache" / "prefixes"

    def prepare(self) -> int:
        """Ask the first question and keep what is stored of it. Returns the tokens of the prompt."""
        command = [*self._command(FIRST), "--json"]
        with self.document.open("rb") as text:
            done = subprocess.run(command, env=at_home(self.home), stdin=text, stdout=subprocess.PIPE, check=True)
        shutil.copytree(self._store, self.kept)
        n_tokens: int = json.loads(done.stdout)["usage"]["prompt_tokens"]
        return n_tokens

    def ask(self, question: str, *, is_known: bool = True, is_cold: bool = False, is_short: bool = False) -> float:
        """Milliseconds to the first byte.

        is_known   the first question about the document has been asked before
        is_cold    what is stored of it is on the disk and not in memory
        is_short   the question alone, without the document
        """
        shutil.rmtree(self._store, ignore_errors=True)
        if is_known:
            shutil.copytree(self.kept, self._store, copy_function=os.link)
        if is_cold:
            self._drop()
        stdin = Path(os.devnull) if is_short else self.document
        return first_answer_byte(self._command(question), at_home(self.home), self.given.path, stdin)

    def read(self, *, is_cold: bool = False) -> float:
        """Milliseconds to read what is stored, and nothing else."""
        if is_cold:
            self._drop()
        block = bytearray(BLOCK)
        started = perf_counter()
        for path in self.kept.iterdir():
            with path.open("rb", buffering=0) as file:
                while file.readinto(block):
                    pass
        return 1000 * (perf_counter() - started)

    def _command(self, question: str) -> list[str]:
        return [llamacli(), "-m", self.given.reference, "-n", "4", "--temperature", "0", "-q", question]

    def _drop(self) -> None:
        for path in self.kept.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    given = inputs(parser(__doc__).parse_args())
    load = load_average()
    with TemporaryDirectory() as directory:
        place = Path(directory)
        bench = _Bench(given, place / "home", place / "document", place / "kept")
        n_items = N_ITEMS_OF_LARGE if given.is_large else N_ITEMS
        bench.document.write_text("".join(f"Item {i} is {i * 7919 % 100} years old.\n" for i in range(n_items)))
        n_tokens = bench.prepare()
        n_bytes = sum(path.stat().st_size for path in bench.kept.iterdir())
        times = in_turn(_sides(bench), given.n_runs)
    subject = f"{given.subject}, first answer byte of a prompt of {n_tokens:,} tokens, {n_bytes / 1e6:,.0f} MB stored"
    print(report(subject, _rows(times, is_large=given.is_large), given.n_runs, load))


def _sides(bench: _Bench) -> dict[str, Callable[[], float]]:
    return {
        "first": partial(bench.ask, FIRST, is_known=False),
        "second": partial(bench.ask, SECOND),
        "second, cold": partial(bench.ask, SECOND, is_cold=True),
        "again": partial(bench.ask, FIRST),
        "short": partial(bench.ask, SECOND, is_short=True),
        "read": bench.read,
        "read, cold": partial(bench.read, is_cold=True),
    }


def _rows(times: dict[str, list[float]], *, is_large: bool) -> list[Row]:
    """With a small model only the programs are compared, so there are no goals."""

    def row(what: str, ours: str, other: str, limit: float | None = None) -> Row:
        goal = at_most_times(limit) if limit and is_large else None
        return Row(what=what, unit="ms", ours=times[ours], other=times[other], goal=goal)

    return [
        row("second question, against the first", "second", "first", 0.1),
        row("the same question again, against the first", "again", "first", 0.1),
        row("second question, against the question without the document", "second", "short"),
        row("the same question again, against reading what is stored", "again", "read", 2),
        row("second question, against reading what is stored", "second", "read", 2),
        row(
            "second question, nothing of it in memory, against reading it from the disk",
            "second, cold",
            "read, cold",
            2,
        ),
    ]


if __name__ == "__main__":
    main()
