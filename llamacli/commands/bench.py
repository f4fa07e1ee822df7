"""`bench`: how fast a model is on this machine, as a table or as JSON; other programs beside it with --compare."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from queue import SimpleQueue
from types import FrameType
from typing import Any

from llamacli import __version__, machine
from llamacli import launch as launching
from llamacli.bench.children import Children
from llamacli.bench.course import Course, Event, Note, Stage
from llamacli.bench.figures import OURS, Figure
from llamacli.bench.plan import Wanted
from llamacli.bench.rivals import Tools
from llamacli.commands import question, table, terminal
from llamacli.commands.obtain import models_in, obtain
from llamacli.commands.progress import Stages
from llamacli.commands.terminal import Notices
from llamacli.config import Directories, Settings
from llamacli.errors import UsageError
from llamacli.launch import Launch
from llamacli.models.notes import Notes


@dataclass(frozen=True, slots=True)
class Wishes:
    wanted: Wanted
    compares: bool = False
    as_json: bool = False


@dataclass(slots=True)
class _Found:
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def wanted(prompt: int | None, depths: str | None, streams: str | None, seconds: float, repack: str) -> Wanted:
    """What to measure, as the command line says it. Raises UsageError."""
    if prompt is not None and prompt < 2:
        raise UsageError(f"--prompt must be 2 or more tokens, not {prompt}")
    if not 0 <= seconds <= 86400:
        raise UsageError(f"--time must be between 0 and 86400 seconds, not {seconds:g}")
    if repack not in ("on", "off"):
        raise UsageError(f"--repack must be on or off, not {repack[:40]!r}")
    default = Wanted()
    return Wanted(
        prompt=prompt,
        depths=None if depths is None else _numbers("--depths", depths, 0, 1 << 20),
        streams=default.streams if streams is None else _numbers("--streams", streams, 1, launching.MAX_SERVED),
        seconds=seconds,
        repack=repack == "on",
    )


def _numbers(option: str, written: str, low: int, high: int) -> tuple[int, ...]:
    parts = [part.strip() for part in written.split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 and low <= int(part) <= high for part in parts):
        raise UsageError(f"{option} takes numbers between {low} and {high}, separated by commas, not {written[:60]!r}")
    return tuple(sorted({int(part) for part in parts}))


def run(settings: Settings, wishes: Wishes, places: Directories) -> int:
    """Measure, and print what was found. Returns the exit code: 130 where Ctrl-C came before all was measured."""
    if settings.quiet and settings.verbose:
        raise UsageError("--quiet and --verbose contradict each other")
    question.check_machine(settings)
    load = os.getloadavg()[0]
    notices = Notices(quiet=settings.quiet, verbose=settings.verbose)
    notes = Notes(places.cache)
    file = obtain(settings, models_in(places), notes, notices)
    launch = launching.prepare(settings, file, notices.say, notes)
    tools = Tools.found(os.environ) if wishes.compares else None
    course = Course(launch, wishes.wanted, Children(), tools, load, notices.say)
    found, is_whole = _Found(), False
    try:
        _collect(course, found, Stages(f"measuring {file.name}", notices, quiet=settings.quiet))
        is_whole = True
    except KeyboardInterrupt:
        course.children.kill()
    except _Ended as ended:
        course.children.kill()
        terminal.die_of(ended.number)
    for name, choice in launch.choices.items():
        notices.detail(f"{name} = {choice.value} ({choice.why})")
    found.notes += _unsteady(found.figures)
    if wishes.as_json and is_whole:
        text = json.dumps(_record(launch, found), ensure_ascii=False) + "\n"
        terminal.write_all(terminal.STDOUT, text.encode("utf-8", "backslashreplace"))
    elif not wishes.as_json and found.figures:
        _show(launch, found, notices)
    if not is_whole:
        notices.say("interrupted before all was measured")
    return 0 if is_whole else 130


class _Ended(BaseException):
    """A signal that ends this process: the others that it has started would go on without it."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise _Ended(signal.Signals(number))


def _collect(course: Course, found: _Found, stages: Stages) -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    ends = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    for number in ends:
        signal.signal(number, _end)
    try:
        for event in _from_a_thread(course):
            if isinstance(event, Stage):
                stages.report(None, event.text)
            elif isinstance(event, Note):
                found.notes.append(event.text)
            else:
                found.figures.append(event)
    finally:
        for number in ends:
            signal.signal(number, signal.SIG_DFL)
        stages.end()


def _from_a_thread(course: Course) -> Iterator[Event]:
    """The course runs in a daemon thread, so that Ctrl-C is heard in the middle of a step of the model."""
    out: SimpleQueue[Any] = SimpleQueue()  # events; None at the end; or an exception

    def work() -> None:
        try:
            for event in course.events():
                out.put(event)
            out.put(None)
        except BaseException as error:
            out.put(error)

    threading.Thread(target=work, name="engine", daemon=True).start()
    while (item := out.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item


def _record(launch: Launch, found: _Found) -> dict[str, object]:
    """The object that --json prints."""
    cores, header = machine.usable_cores(), launch.header
    return {
        "version": __version__,
        "model": {
            "name": launch.file.name,
            "path": str(launch.file.path.resolve()),
            "quantization": header.quantization,
            "parameters": header.n_parameters,
            "bytes": header.file_size,
        },
        "machine": {"cpu": machine.cpu_name(), "cores": cores.physical, "device": launch.device},
        "settings": {name: asdict(choice) for name, choice in launch.choices.items()},
        "figures": [figure.record() for figure in found.figures],
        "notes": found.notes,
    }


def _show(launch: Launch, found: _Found, notices: Notices) -> None:
    header, threads = launch.header, launch.settings.threads or machine.usable_cores().threads
    size = f"{header.file_size / 1e9:.2f} GB" if header.file_size >= 1e9 else f"{header.file_size / 1e6:.1f} MB"
    where = launch.device if launch.device != "CPU" else f"{machine.cpu_name()}, {threads} threads"
    table.write(terminal.harmless(f"{launch.file.name} ({header.quantization}, {size}) on {where}"))
    others = list(dict.fromkeys(side for figure in found.figures for side in figure.values if side != OURS))
    names = ["", OURS, *others]
    rows = [[figure.title, _ours(figure), *(_theirs(figure, side) for side in others)] for figure in found.figures]
    table.show(names, rows, right=range(1, len(names)))
    for note in found.notes:
        notices.say(note)
    if others:
        notices.say(f"in brackets: how many times as fast {OURS} is")


def _unsteady(figures: Sequence[Figure]) -> list[str]:
    """One line for all figures that are worth little."""
    ranges = [
        f"{figure.title}, {side}: {_number(min(values))} to {_number(max(values))}"
        for figure in figures
        for side, values in figure.values.items()
        if figure.is_unsteady(side)
    ]
    return [f"these vary from one time to the next: {'; '.join(ranges)}"] if ranges else []


def _ours(figure: Figure) -> str:
    value = figure.of(OURS)
    return "" if value is None else f"{_number(value)} {figure.unit}"


def _theirs(figure: Figure, side: str) -> str:
    value, speedup = figure.of(side), figure.speedup(side)
    return "" if value is None or speedup is None else f"{_number(value)} ({speedup:.2f}x)"


def _number(value: float) -> str:
    """Three digits, or all that stand before the point."""
    n_decimals = next((n for n, least in enumerate((100, 10, 1)) if value >= least), 3)
    return f"{value:,.{n_decimals}f}"
