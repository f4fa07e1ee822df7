"""The model that a command is to run: the one on this machine, or else downloaded first, with its progress shown."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from llamacli.commands.terminal import Notices
from llamacli.config import Directories, Settings
from llamacli.errors import ModelError
from llamacli.models import store
from llamacli.models.catalog import BESIDE_WEIGHTS
from llamacli.models.notes import Notes
from llamacli.models.reference import Reference
from llamacli.models.store import ModelFile, NotHere, Places


def models_in(places: Directories) -> Places:
    """Where models are looked for."""
    return Places(places.models, store.hub_cache(os.environ))


def obtain(settings: Settings, places: Places, notes: Notes, notices: Notices) -> ModelFile:
    """The model of the settings. Raises ModelError, ResourceError when there is no room for it."""
    try:
        file = store.find(settings.model, places)
    except NotHere as error:
        if settings.offline:
            raise ModelError(f"{error}, but --offline forbids it") from None
        file = download(error.reference, places, notes, notices, quiet=settings.quiet)
    notes.use(file.path)
    return file


def obtain_draft(settings: Settings, places: Places, notes: Notes, notices: Notices) -> ModelFile | None:
    """The smaller model that writes ahead, if there is to be one. Raises as obtain() does."""
    if settings.draft_model is None or settings.no_speculation:
        return None
    return obtain(replace(settings, model=settings.draft_model), places, notes, notices)


def download(reference: Reference, places: Places, notes: Notes, notices: Notices, *, quiet: bool) -> ModelFile:
    """Pull a model. Raises ModelError or ResourceError; Ctrl-C leaves what has come for the next time."""
    from llamacli.commands.progress import Bar
    from llamacli.models.pull import Watcher, pull
    from llamacli.models.transfer import Patience, Report

    bar = Bar(notices, quiet=quiet)

    def begin(name: str, total: int) -> Report:
        mention_licence(reference, places.models.parent, notices.say)
        _warn_of_memory(name, total, notices)
        return bar.begin(name, total)

    with _interruptible():
        try:
            return pull(reference, places, notes, Watcher(notices.say, begin, bar.end), Patience())
        except KeyboardInterrupt:
            bar.end()
            notices.say("interrupted; what has come is kept, and the same command goes on from there")
            raise


def _warn_of_memory(name: str, total: int, notices: Notices) -> None:
    from llamacli import machine

    needed, usable = total + BESIDE_WEIGHTS, machine.memory().usable
    if needed > usable:
        notices.say(
            f"warning: {name} needs about {needed / 1e9:.1f} GB of memory, and {usable / 1e9:.1f} GB can be used here: "
            "it may not run. llamacli list --catalog shows what fits"
        )


def mention_licence(reference: Reference, data: Path, notice: Callable[[str], None]) -> None:
    """Say once on this machine under which licence Llama 2 comes."""
    from llamacli.models.catalog import catalog

    if not reference.is_llama2:
        return
    licence = catalog().entries[0].licence if reference.entry is None else reference.entry.licence
    mark = data / "licences" / "llama-2"
    if mark.exists():
        return
    notice(f"Llama 2 comes under the {licence.name}: {licence.url}")
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError:
        return  # then it is said again the next time


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt here, unless it is to be ignored."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
