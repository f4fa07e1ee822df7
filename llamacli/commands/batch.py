"""`llamacli batch`: a file of prompts through one engine, and its answers into another file.

The engine has a thread of its own; this one writes each line as soon as its turn has come.
"""

from __future__ import annotations

import io
import json
import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any, BinaryIO

from llamacli import launch as launching
from llamacli import machine
from llamacli.batch import lines as reading
from llamacli.batch.lines import Coming, Feed, Line, Patient, Ready
from llamacli.batch.output import Output, begin, has_failed, opened
from llamacli.batch.request import Defaults, id_of
from llamacli.batch.template import Template
from llamacli.batch.work import Result, Work
from llamacli.commands import question, terminal
from llamacli.commands.obtain import models_in, obtain, obtain_draft
from llamacli.commands.pace import Pace
from llamacli.commands.question import RunOptions
from llamacli.commands.terminal import Notices
from llamacli.config import Directories, Settings
from llamacli.errors import UsageError
from llamacli.launch import Launch, ServeOptions
from llamacli.models.notes import Notes
from llamacli.prompt import PromptBuilder
from llamacli.together import Together

EXIT_FAILED = 9  # some lines have failed; the output says which
MAX_SAID = 20  # failed lines that are named on stderr
# That the cache has cells for. Most prompts need a small part of one; of those that do not, few are computed at once,
# which is faster: see mapreduce.worth_together().
FULL_CONTEXTS = 2
_END = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What `batch` wants beside the settings. `run` holds the options that it shares with `run`."""

    source: str
    output: str
    resume: bool = False
    force: bool = False
    template: str | None = None
    format: str | None = None
    slots: int = 16
    run: RunOptions = field(default_factory=RunOptions)


def run(settings: Settings, wishes: Wishes, places: Directories) -> int:
    """Answer all lines. Returns the exit code: 9 where some have failed."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    notices = Notices(quiet=settings.quiet, verbose=settings.verbose)
    options = served(wishes.slots)
    defaults = _defaults(settings, wishes)
    source = _Source(wishes, defaults.template)
    output = _output(wishes)
    feed = source.feed()
    _skip(feed, output, wishes)
    total = source.total()
    if total is not None and total == len(output.done):
        begin(output)
        notices.say(f"all {total:,} lines are done already")
        return EXIT_FAILED if output.n_failed else 0
    notes = Notes(places.cache)
    file = obtain(settings, models_in(places), notes, notices)
    draft = obtain_draft(settings, models_in(places), notes, notices)
    launch = launching.prepare(settings, file, notices.say, notes, draft)
    engine = _Engine(launch, options, feed, replace(defaults, model=file.name), notices)
    return _write(engine.results(), output, total, notices, quiet=settings.quiet)


def served(slots: int) -> ServeOptions:
    """An engine for as many answers as soon as possible, in which nobody waits for a stream.

    Where nothing was measured weights stay as they are in the file: in this CPU's own order, prompts and full batches
    of most files take longer. Raises UsageError.
    """
    return ServeOptions(slots=slots, guess=False, contexts=min(slots, FULL_CONTEXTS), prefixes=2, step_seconds=None)


def _defaults(settings: Settings, wishes: Wishes) -> Defaults:
    if settings.on_overflow == "map-reduce":
        raise UsageError("--on-overflow map-reduce is for one answer: choose head, tail or middle for a batch")
    if settings.quiet and settings.verbose:
        raise UsageError("--quiet and --verbose contradict each other")
    question.check_machine(settings)
    return Defaults(
        params=question.sampling(settings, wishes.run),
        system=question.system_prompt(settings.system),
        form=question.form(wishes.run),
        template=None if wishes.template is None else Template(wishes.template),
    )


# -- the input ----------------------------------------------------------------------------------------------------


class _Source:
    """The input, which is opened at once. Raises UsageError."""

    def __init__(self, wishes: Wishes, template: Template | None) -> None:
        self._name = wishes.source
        self._template = template
        name = self._name.lower()
        self._is_csv = wishes.format == "csv" or (wishes.format is None and name.endswith(".csv"))
        if wishes.format not in (None, "jsonl", "csv"):
            raise UsageError(f"--format must be jsonl or csv, not {wishes.format[:40]}")
        self._file = self._opened()
        # Whether all of it is there, and can be read twice. Found out now: who reads it to its end closes it.
        self._is_file = self._name != "-" and stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)

    def _opened(self) -> BinaryIO:
        if self._name == "-":
            return io.BufferedReader(Patient(os.dup(terminal.STDIN)))
        try:
            return Path(self._name).expanduser().open("rb")
        except (OSError, RuntimeError) as error:
            why = error.strerror if isinstance(error, OSError) else "there is no such user"
            raise UsageError(f"the input cannot be read from {self._name[:200]}: {why}") from None

    def feed(self) -> Feed:
        lines = self._lines(self._file)
        return Ready(lines) if self._is_file else Coming(lines)

    def _lines(self, file: BinaryIO) -> Iterator[Line]:
        if not self._is_csv:
            return reading.jsonl(file)
        return reading.rows(file, self._check_columns)

    def _check_columns(self, names: list[str]) -> None:
        if self._template is not None:
            self._template.check(names)
        elif "prompt" not in names:
            raise UsageError(f'no column is called prompt: say --template "... {{{names[0]}}}"')

    def total(self) -> int | None:
        """How many lines there are; None for a pipe."""
        if not self._is_file:
            return None
        with self._opened() as file:
            return sum(1 for _ in self._lines(file))


def _output(wishes: Wishes) -> Output:
    if wishes.output == "-":
        if wishes.resume or wishes.force:
            raise UsageError("--resume and --force are for a file: name it with -o")
        return Output(terminal.STDOUT)
    path = Path(wishes.output)
    with suppress(OSError):
        if wishes.source != "-" and path.samefile(wishes.source):
            raise UsageError(f"{path} is the input: name another file with -o")
    return opened(path, resume=wishes.resume, force=wishes.force)


def _skip(feed: Feed, output: Output, wishes: Wishes) -> None:
    """Pass over the lines that are done, and see that they are the same ones."""
    for i, done in enumerate(output.done, 1):
        line = feed.take(wait=True)
        if line is None:
            raise UsageError(f"{wishes.output} has {len(output.done):,} lines and {wishes.source} only {i - 1:,}")
        if done not in (id_of(line), None):
            raise UsageError(
                f"{wishes.output} was not written from {wishes.source}: its line {i:,} answers {str(done)[:60]!r}, "
                f"where {str(id_of(line))[:60]!r} was asked"
            )


# -- the engine's thread ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Engine:
    launch: Launch
    options: ServeOptions
    feed: Feed
    defaults: Defaults
    notices: Notices
    _out: Queue[Any] = field(default_factory=partial(Queue, 1000))  # who reads slowly slows the engine

    def results(self) -> Iterator[Result]:
        """What comes out of the engine's thread, a daemon: when nobody waits any more it ends with the process."""
        threading.Thread(target=self._work, name="engine", daemon=True).start()
        while (item := self._out.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item

    def _work(self) -> None:
        try:
            launch = self.launch
            engine = launching.serve(launch, self.options, self.notices.say, usable=machine.memory().usable)
            assert launch.weights is not None
            for name, choice in launch.choices.items():
                self.notices.detail(f"{name} = {choice.value} ({choice.why})")
            builder = PromptBuilder(launch.header, launch.weights.vocabulary, known=launch.file.format)
            together = Together(engine, builder.tokenizer)
            work = Work(together, builder, self.options.slots, launch.settings.on_overflow)
            for result in work.results(self.feed, self.defaults):
                self._out.put(result)
            self._out.put(_END)
        except BaseException as error:
            self._out.put(error)


# -- the output ---------------------------------------------------------------------------------------------------


def _write(results: Iterator[Result], output: Output, total: int | None, notices: Notices, *, quiet: bool) -> int:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    n_done = len(output.done)
    n_failed = output.n_failed
    pace = Pace("prompts", total, notices, done=n_done, quiet=quiet)
    try:
        for i, result in enumerate(results):
            if i == 0:
                begin(output)
            raw = json.dumps(result.line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
            terminal.write_all(output.descriptor, raw)
            n_failed += has_failed(result.line)
            if result.problem:
                _say_failed(result, n_failed - output.n_failed, pace)
            pace.count(n_tokens=result.n_tokens)
        if pace.done == n_done:
            begin(output)
    except KeyboardInterrupt:
        pace.end()
        of = "" if total is None else f" of {total:,}"
        goes_on = "" if output.descriptor == terminal.STDOUT else "; the same command with --resume goes on"
        notices.say(f"interrupted: {pace.done:,}{of} lines are done{goes_on}")
        raise
    finally:
        pace.end()
    if output.descriptor != terminal.STDOUT:
        with suppress(OSError):  # a pipe, or a device
            os.fsync(output.descriptor)
    notices.say(_summary(pace, n_done, n_failed))
    return EXIT_FAILED if n_failed else 0


def _say_failed(result: Result, n_failed: int, pace: Pace) -> None:
    if n_failed <= MAX_SAID:
        at = "" if result.problem.startswith("line ") else f"line {result.number:,}: "
        pace.say(f"{at}{result.problem}")
    elif n_failed == MAX_SAID + 1:
        pace.say("further lines have failed; the output says which")


def _summary(pace: Pace, n_before: int, n_failed: int) -> str:
    before = f", {n_before:,} of them before" if n_before else ""
    failed = f", {n_failed:,} of them failed" if n_failed else ""
    lines = "1 line" if pace.done == 1 else f"{pace.done:,} lines"
    return f"{lines}{before}{failed}; {pace.n_tokens:,} tokens in {pace.seconds:.1f} s ({pace.rate})"
