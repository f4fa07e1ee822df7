"""One answer: computed here, by a server elsewhere, or by one on this machine that has the model loaded already."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from llamacli.commands import question, terminal
from llamacli.commands.deliver import deliver
from llamacli.commands.journal import Answering, Heard, Journal
from llamacli.commands.question import RunOptions
from llamacli.commands.terminal import Notices
from llamacli.config import Directories, Resolved, Settings
from llamacli.engine.sequence import draw_seed
from llamacli.errors import SchemaError

if TYPE_CHECKING:
    from llamacli.commands.question import Texts
    from llamacli.engine.sequence import SamplingParams
    from llamacli.models.notes import Notes
    from llamacli.models.store import ModelFile
    from llamacli.schema.form import Form


def run(resolved: Resolved, options: RunOptions, places: Directories, *, started: float) -> int:
    """Answer one prompt. Returns the exit code.

    started   perf_counter() when the program began

    Raises LlamacliError for everything that can be expected to go wrong.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # stderr may go before stdout; terminal.write_all minds stdout
    notices = Notices(quiet=resolved.settings.quiet, verbose=resolved.settings.verbose)
    reads_stdin = terminal.stdin_has_text(asked_for="-" in (options.prompt, *options.files))
    question.check(resolved.settings, options, reads_stdin)
    form = question.form(options)
    is_remote = question.asks_remote(resolved, options)
    journal = Journal(resolved, options, places, notices)
    if is_remote:
        return _remote(resolved, options, form, reads_stdin, journal, notices, started)
    question.check_machine(resolved.settings)
    settings = replace(resolved.settings, system=question.system_prompt(resolved.settings.system))
    return _here(journal.settings(settings), options, form, places, reads_stdin, journal, notices, started)


def _remote(
    resolved: Resolved,
    options: RunOptions,
    form: Form | None,
    reads_stdin: bool,
    journal: Journal,
    notices: Notices,
    started: float,
) -> int:
    from llamacli.commands.remote import Remote

    remote = Remote(resolved, options, form, notices, started=started)  # a wrong address is said before stdin is read
    texts = question.read_texts(options, reads_stdin, notices)
    remote.ask(texts)
    system = question.system_prompt(resolved.settings.system)
    return _delivered(remote, options, form, journal, texts, system)


def _delivered(
    source: Answering, options: RunOptions, form: Form | None, journal: Journal, texts: Texts, system: str | None
) -> int:
    """Write the answer to stdout, and then into the log. Returns the exit code."""
    heard = Heard(source)
    try:
        code = deliver(heard, as_json=options.as_json, stream=options.stream, form=form, files=texts.files)
    except BaseException as error:
        journal.write(heard, source, texts, system, is_over=isinstance(error, SchemaError))
        raise
    journal.write(heard, source, texts, system, is_over=True)
    return code


def _here(
    settings: Settings,
    options: RunOptions,
    form: Form | None,
    places: Directories,
    reads_stdin: bool,
    journal: Journal,
    notices: Notices,
    started: float,
) -> int:
    from llamacli.commands.obtain import models_in, obtain, obtain_draft
    from llamacli.models.notes import Notes

    notes = Notes(places.cache)
    file = obtain(settings, models_in(places), notes, notices)
    draft = obtain_draft(settings, models_in(places), notes, notices)
    journal.meet(file)
    params = question.sampling(settings, options)
    params = replace(params, seed=draw_seed()) if params.seed is None else params
    texts = None
    if settings.on_overflow == "map-reduce":
        texts = question.read_texts(options, reads_stdin, notices)
        parts = _parts(settings, options, params, form, texts, file, draft, notices, notes, started)
        if parts is not None:
            return _delivered(parts, options, form, journal, texts, settings.system)
    if _has_neighbours(places):
        from llamacli.commands import attach

        # What may be read in parts, but need not be, is asked as it is.
        whole = settings if texts is None else replace(settings, on_overflow="error")
        server = attach.choose(places.run, whole, options, file, notices)
        if server is not None:
            texts = texts or question.read_texts(options, reads_stdin, notices)
            attached = attach.Attached(server, file, settings, params, notices, notes, texts, started=started)
            if attach.begun(attached, notices):
                return _delivered(attached, options, None, journal, texts, settings.system)
    from llamacli import launch as launching
    from llamacli.commands.local import Earlier, Local

    launch = launching.prepare(settings, file, notices.say, notes, draft)
    earlier = None if journal.session is None else Earlier(journal.session, journal.turns, journal.writes)
    local = Local(launch, params, options, notices, notes, places.prefixes, form, earlier, started=started)
    texts = texts or question.read_texts(options, reads_stdin, notices)
    local.ask(texts)
    code = _delivered(local, options, form, journal, texts, settings.system)
    with suppress(KeyboardInterrupt):  # the answer is there: only its prompt is not kept then
        local.store()
    return code


def _parts(
    settings: Settings,
    options: RunOptions,
    params: SamplingParams,
    form: Form | None,
    texts: Texts,
    file: ModelFile,
    draft: ModelFile | None,
    notices: Notices,
    notes: Notes,
    started: float,
) -> Answering | None:
    """Where the answer comes from if the input has to be read in parts."""
    from llamacli import launch as launching
    from llamacli.commands import parts

    silent = launching.prepare(settings, file, lambda _: None, notes)
    if not parts.do_not_fit(silent, texts, options):
        return None
    if options.show_prompt:
        notices.say("--show-prompt shows nothing of an input that is read in parts")
    launch = launching.prepare(settings, file, notices.say, notes, draft)
    return parts.Parts(launch, params, options, texts, form, notices, notes, started=started)


def _has_neighbours(places: Directories) -> bool:
    """Whether any server of this user may be running. Nothing is imported to find out: most often there is none."""
    with suppress(OSError):
        return bool(os.listdir(places.run))  # noqa: PTH208
    return False
