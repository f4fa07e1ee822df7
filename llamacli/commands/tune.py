"""`llamacli tune`: measure this machine with a model and keep it, show what was measured, forget it.

The measuring has a thread of its own; this one waits for it, so that Ctrl-C is heard in the middle of a native call.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from queue import SimpleQueue

from llamacli import launch as launching
from llamacli import machine, tuning_file
from llamacli.choices import how_to_tune
from llamacli.commands import question, table
from llamacli.commands.obtain import models_in, obtain
from llamacli.commands.progress import Stages
from llamacli.commands.terminal import Notices
from llamacli.config import Directories, Settings
from llamacli.engine.devices import gpu_devices
from llamacli.errors import ResourceError, UsageError
from llamacli.launch import Launch
from llamacli.models import store
from llamacli.models.notes import Notes
from llamacli.placing import place
from llamacli.tuning import ROWS, USUAL_ANSWER, USUAL_PROMPT, ManyAnswers, OneAnswer, Rates, Weights, choose
from llamacli.tuning_file import Subject

BUSY = 0.2  # CPUs that others may keep busy before it is said,
UNSTEADY = 0.5  # and of their median by which repeats may differ
JOBS: dict[str, OneAnswer | ManyAnswers] = {
    "run": OneAnswer(USUAL_PROMPT, USUAL_ANSWER),
    "serve": ManyAnswers(4),
    "batch": ManyAnswers(16),
}
TOLD = {
    "run": f"{USUAL_PROMPT} tokens read and {USUAL_ANSWER} written",
    "serve": "the same for 4 at once",
    "batch": "the same for 16 at once",
}


def run(settings: Settings, places: Directories, *, as_json: bool) -> int:
    """Measure, keep and print. Raises LlamacliError; what was kept before stays until all is measured."""
    if settings.quiet and settings.verbose:
        raise UsageError("--quiet and --verbose contradict each other")
    question.check_machine(settings)
    notices = Notices(quiet=settings.quiet, verbose=settings.verbose)
    notes = Notes(places.cache)
    file = obtain(settings, models_in(places), notes, notices)
    launch = launching.prepare(settings, file, notices.say, notes)
    tuning_file.prepare(places.tuning)  # rather than find out after a minute that nothing can be kept
    rates = _measured(launch, notices, quiet=settings.quiet)
    about = tuning_file.subject(file, settings.kv_type, launch.layers, notes)
    path = tuning_file.write(places.tuning, about, rates)
    _print(about, rates, as_json=as_json)
    for line in warnings(rates):
        notices.say(line)
    notices.say(f"kept in {path}; run, batch and serve choose by it from now on")
    return 0


def show(settings: Settings, places: Directories, *, as_json: bool) -> int:
    """Print what was measured of a model on this machine. Raises UsageError where nothing was."""
    notices = Notices(quiet=settings.quiet)
    notes = Notes(places.cache)
    file = store.find(settings.model, models_in(places))
    launch = launching.prepare(settings, file, notices.say, notes)
    layers = place(launch, gpu_devices(), machine.gpus(), lambda _: None)
    found = tuning_file.find(places.tuning, file, settings.kv_type, layers, notes)
    if found.rates is None:
        raise UsageError(f"{file.name} is not tuned for this machine ({found.why}): {how_to_tune(launch)}")
    about, rates = tuning_file.read(found.path)
    _print(about, rates, as_json=as_json)
    for line in warnings(rates):
        notices.say(line)
    return 0


def clear(settings: Settings, places: Directories, *, of_all: bool) -> int:
    """Forget what was measured, of one model or of all. Raises ResourceError for what cannot be removed."""
    name = None if of_all else store.find(settings.model, models_in(places)).path.name
    try:
        n_removed = tuning_file.clear(places.tuning, name)
    except OSError as error:
        raise ResourceError(f"{error.filename} cannot be removed: {error.strerror}") from None
    said = "there was nothing to forget" if not n_removed else f"forgot {n_removed} measurement{'s' * (n_removed > 1)}"
    Notices(quiet=settings.quiet).say(said)
    return 0


def warnings(rates: Rates) -> Iterator[str]:
    """What makes the numbers doubtful."""
    again = "llamacli tune again when it is quiet"
    if rates.others is not None and rates.others > BUSY:
        yield f"warning: other programs kept {rates.others:.1f} CPUs busy meanwhile, which makes all slower; {again}"
    elif rates.spread > UNSTEADY:
        yield f"warning: repeats of a step differ by {rates.spread:.0%}: the machine was busy, or throttled; {again}"
    if rates.rewritten is None:
        yield f"weights were measured as they are in the file only: {rates.why_not}"


def _measured(launch: Launch, notices: Notices, *, quiet: bool) -> Rates:
    from llamacli import tuner

    out: SimpleQueue[tuple[float, str] | Rates | BaseException] = SimpleQueue()

    def work() -> None:
        try:
            out.put(tuner.measure(launch, notices.say, lambda share, what: out.put((share, what))))
        except BaseException as error:
            out.put(error)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    stages = Stages(f"measuring {launch.file.name}", notices, quiet=quiet)
    threading.Thread(target=work, name="engine", daemon=True).start()
    try:
        while True:
            item = out.get()
            if isinstance(item, Rates):
                return item
            if isinstance(item, BaseException):
                raise item
            stages.report(*item)
    except KeyboardInterrupt:
        stages.end()
        notices.say("interrupted: nothing was kept")
        raise
    finally:
        stages.end()


# -- tables -------------------------------------------------------------------------------------------------------


def _print(about: Subject, rates: Rates, *, as_json: bool) -> None:
    if as_json:
        told = tuning_file.as_object(about, rates) | {"chosen": chosen(rates)}
        table.write(json.dumps(told, indent=2, ensure_ascii=False))
        return
    cores = "1 core" if about.physical == 1 else f"{about.physical} cores"
    table.write(f"{about.name} on {about.cpu}, {cores}, {about.memory_gib} GiB; {about.library}, {about.kv_type} cache")
    table.write(f"measured {rates.measured[:16].replace('T', ' ')}, in {rates.seconds:.0f} s")
    table.write("")
    sides = [rates.stored, *([rates.rewritten] if rates.rewritten else [])]
    header = ("", "AS IN THE FILE", "REWRITTEN FOR THIS CPU")[: 1 + len(sides)]
    table.show(header, _rows(sides), right=(1, 2))
    table.write("")
    for name, job in JOBS.items():
        choice = choose(rates, job)
        order = "rewritten weights" if choice.repack else "weights as in the file"
        threads = f"threads {choice.threads} and {choice.threads_batch}"
        table.write(f"{name}, {TOLD[name]}: {order}, {threads}, batches of {choice.batch}")
        table.write(f"    {choice.why['repack']}")
    choice = choose(rates, JOBS["run"])  # with many at once it was not measured
    table.write(f"flash attention, for one answer: {'off' if choice.flash_attention is False else 'on'}")
    table.write(f"    {choice.why['flash_attention']}")


def chosen(rates: Rates) -> dict[str, object]:
    """What usual jobs get, for --json."""
    found: dict[str, object] = {}
    for name, job in JOBS.items():
        choice = choose(rates, job)
        found[name] = {each: {"value": getattr(choice, each), "why": why} for each, why in choice.why.items()}
    return found


def _rows(sides: Sequence[Weights]) -> list[tuple[str, ...]]:
    first = sides[0]
    rows = [("load", *(_duration(side.load) for side in sides))]
    for n in first.steps:
        what = "a token alone" if n == 1 else f"a token to each of {n} answers" if n <= 16 else f"{n} tokens read"
        rows.append((what, *(_speed(n, side.step(n)) for side in sides)))
    for what, name, n in (("a token alone", "threads", 1), (f"{ROWS} tokens", "threads_batch", ROWS)):
        for threads in getattr(first, name):
            label = f"{what}, {threads} thread{'s' * (threads > 1)}"
            rows.append((label, *(_speed(n, getattr(side, name).get(threads)) for side in sides)))
    return rows


def _speed(n: int, seconds: float | None) -> str:
    return "" if seconds is None else f"{_duration(seconds)} ({n / seconds:,.1f}/s)"


def _duration(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1000 * seconds:.{0 if seconds >= 0.1 else 2}f} ms"
