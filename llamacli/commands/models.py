"""The models on this machine and those that can be: pull, list, show, rm, verify."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from time import localtime, strftime
from typing import Any

from llamacli import machine
from llamacli.commands import table
from llamacli.commands.obtain import download, models_in
from llamacli.commands.progress import Bar, size
from llamacli.commands.terminal import STDIN, Notices
from llamacli.config import Directories
from llamacli.errors import ModelError, UsageError
from llamacli.gguf import read_model
from llamacli.models import checksum, store
from llamacli.models.catalog import Entry, Licence, Quantization, catalog
from llamacli.models.facts import Facts, facts, ram_by_context
from llamacli.models.notes import Notes
from llamacli.models.reference import Reference, parse
from llamacli.models.store import ModelFile, NotHere, Places
from llamacli.models.transfer import Progress
from llamacli.prompt import format_of

EXIT_DAMAGED = ModelError.exit_code


@dataclass(frozen=True, slots=True)
class Room:
    """What the commands work with."""

    places: Places
    notes: Notes
    notices: Notices

    @classmethod
    def of(cls, directories: Directories, *, quiet: bool = False, verbose: bool = False) -> Room:
        return cls(models_in(directories), Notes(directories.cache), Notices(quiet=quiet, verbose=verbose))


# -- pull --------------------------------------------------------------------------------------------------------


def pull(text: str, directories: Directories, *, quiet: bool, verbose: bool, offline: bool) -> int:
    """Download a model unless it is here, and print its path. Returns the exit code."""
    room = Room.of(directories, quiet=quiet, verbose=verbose)
    if text == store.TINY:
        table.write(str(store.bundled()))
        return 0
    reference = parse(text)
    if reference.path is not None:
        raise ModelError(f"{text} is a path, and only names and ORG/REPO:QUANT can be pulled")
    if offline:
        found = store.search(reference, room.places)
        if found is None:
            raise ModelError(f"{NotHere.of(reference)}, but --offline forbids it")
        file = found
    else:
        file = download(reference, room.places, room.notes, room.notices, quiet=quiet)
    table.write(str(file.path))
    return 0


# -- list --------------------------------------------------------------------------------------------------------


def show_list(directories: Directories, *, as_json: bool) -> int:
    room = Room.of(directories)
    usable = machine.memory().usable
    found = [(file, facts(file, room.notes)) for file in store.on_this_machine(room.places)]
    if as_json:
        table.write(json.dumps([_described(file, fact, usable) for file, fact in found], indent=2))
        return 0
    rows = [
        (
            file.name,
            size(file.size),
            fact.quantization or "?",
            f"{fact.context_length:,}" if fact.context_length else "?",
            _ago(room.notes.last_used(file.path)),
            _verdict(fact.ram, usable) if fact.problem is None else "damaged",
            file.home,
        )
        for file, fact in found
    ]
    header = ("NAME", "SIZE", "QUANTIZATION", "CONTEXT", "LAST USED", "FITS IN MEMORY", "WHERE")
    table.show(header, rows, right=(1, 3))
    return 0


def show_catalog(directories: Directories, *, as_json: bool) -> int:
    """What can be pulled by name, and in which quantization it fits into this machine's memory."""
    room = Room.of(directories)
    usable = machine.memory().usable
    if as_json:
        listed = [
            _published(entry, quantization, usable, room.places)
            for entry in catalog().entries
            for quantization in entry.quantizations.values()
        ]
        table.write(json.dumps(listed, indent=2))
        return 0
    rows = []
    for entry in catalog().entries:
        default = entry.quantizations[catalog().default(entry)]
        rows.append(
            (
                entry.name,
                f"{entry.parameters / 1e9:.1f} B" if entry.parameters >= 1e8 else f"{entry.parameters / 1e6:.1f} M",
                default.name,
                size(default.about) if default.about else "?",
                size(default.ram) if default.ram and entry.repo_id else "",
                _best_that_fits(entry, usable),
                entry.licence.name.partition(" License")[0],
            )
        )
    header = ("NAME", "PARAMETERS", "DEFAULT", "SIZE", "MEMORY", "LARGEST THAT FITS HERE", "LICENCE")
    table.show(header, rows, right=(1, 3, 4))
    return 0


def _best_that_fits(entry: Entry, usable: int) -> str:
    fitting = [each for each in entry.quantizations.values() if _ram(entry, each) <= usable]
    return max(fitting, key=lambda each: each.about or 0).name if fitting else "none"


def _ram(entry: Entry, quantization: Quantization) -> float:
    if entry.repo_id is None:
        return 0
    return quantization.ram or float("inf")


def _verdict(ram: int | None, usable: int) -> str:
    if ram is None:
        return "?"
    return "yes" if ram <= usable else f"no, needs {size(ram)}"


def _ago(when: float | None) -> str:
    return "never" if when is None else strftime("%Y-%m-%d %H:%M", localtime(when))


def _described(file: ModelFile, fact: Facts, usable: int) -> dict[str, Any]:
    """A model on this machine, for --json."""
    licence = _licence(file)
    return {
        "name": file.name,
        "repo_id": file.repo_id,
        "filename": file.filename or file.path.name,
        "revision": file.revision,
        "path": str(file.path),
        "size": file.size,
        "sha256": file.sha256,
        "quantization": fact.quantization,
        "context_length": fact.context_length,
        "licence": licence.name if licence else None,
        "ram": fact.ram,
        "fits": fact.ram is not None and fact.ram <= usable,
    }


def _published(entry: Entry, quantization: Quantization, usable: int, places: Places) -> dict[str, Any]:
    """A model of the catalogue, for --json."""
    name = store.name_of(entry, quantization.name)
    found = store.tiny() if entry.repo_id is None else store.search(parse(name), places)
    ram = _ram(entry, quantization)
    return {
        "name": name,
        "repo_id": entry.repo_id,
        "filename": entry.filename(quantization.name),
        "revision": entry.revision,
        "path": str(found.path) if found else None,
        "size": quantization.size,
        "sha256": quantization.sha256,
        "quantization": quantization.name,
        "context_length": entry.context_length,
        "licence": entry.licence.name,
        "ram": quantization.ram if entry.repo_id else None,
        "fits": ram <= usable,
    }


def _entry_of(file: ModelFile) -> Entry | None:
    if file.is_bundled:
        return catalog().find(store.TINY)
    if file.repo_id is not None:
        return catalog().of_repository(file.repo_id)
    return next((e for e in catalog().entries for q in e.quantizations if e.filename(q) == file.path.name), None)


def _licence(file: ModelFile) -> Licence | None:
    entry = _entry_of(file)
    return entry.licence if entry else None


# -- show --------------------------------------------------------------------------------------------------------


def show(text: str, directories: Directories, *, as_json: bool) -> int:
    """The card of a model, on this machine or not."""
    room = Room.of(directories)
    try:
        file = store.find(text, room.places)
    except NotHere as error:
        entry = error.reference.entry
        if entry is None:
            raise
        return _show_entry(entry, error.reference, room, as_json=as_json)
    return _show_file(file, room, as_json=as_json)


def _show_file(file: ModelFile, room: Room, *, as_json: bool) -> int:
    usable = machine.memory().usable
    header = read_model(file.path)
    fact = facts(file, room.notes)
    licence = _licence(file)
    template = format_of(header, file.format)
    rams = ram_by_context(header)
    if as_json:
        card = _described(file, fact, usable) | {
            "architecture": fact.architecture,
            "title": fact.title,
            "parameters": fact.parameters,
            "template": str(template),
            "licence_url": licence.url if licence else None,
            "acceptable_use": licence.acceptable_use if licence else None,
            "ram_by_context": rams,
        }
        table.write(json.dumps(card, indent=2))
        return 0
    _lines(
        {
            "name": file.name,
            "title": fact.title or "",
            "architecture": fact.architecture or "",
            "parameters": f"{fact.parameters:,}" if fact.parameters else "?",
            "quantization": fact.quantization or "?",
            "context": f"{fact.context_length:,} tokens" if fact.context_length else "not said",
            "prompt format": str(template),
            "size": f"{size(file.size)} ({file.size:,} bytes)",
            "sha256": file.sha256 or "not known; llamacli verify computes it",
            "from": "/".join(filter(None, (file.repo_id, file.filename))) if file.repo_id else "",
            "revision": file.revision or "",
            "path": str(file.path),
            **_licence_lines(licence),
        }
    )
    table.write("")
    rows = [
        (f"{n:,}", size(ram["f16"]), size(ram["q8_0"]), "yes" if ram["f16"] <= usable else "no")
        for n, ram in rams.items()
    ]
    table.show(("CONTEXT", "MEMORY, KV IN F16", "MEMORY, KV IN Q8_0", "FITS HERE"), rows, right=(0, 1, 2))
    return 0


def _show_entry(entry: Entry, reference: Reference, room: Room, *, as_json: bool) -> int:
    usable = machine.memory().usable
    chosen = entry.quantizations.get(reference.quantization or "")
    if chosen is None:
        known = ", ".join(entry.quantizations)
        raise ModelError(f"{reference.text} is not in the catalogue; {entry.name} is known in {known}")
    if as_json:
        card = _published(entry, chosen, usable, room.places) | {
            "architecture": "llama",
            "title": entry.title,
            "parameters": entry.parameters,
            "template": entry.format,
            "licence_url": entry.licence.url,
            "acceptable_use": entry.licence.acceptable_use,
        }
        table.write(json.dumps(card, indent=2))
        return 0
    _lines(
        {
            "name": entry.name,
            "title": entry.title,
            "parameters": f"{entry.parameters:,}",
            "context": f"{entry.context_length:,} tokens",
            "prompt format": entry.format,
            "from": entry.repo_id or "",
            "revision": entry.revision or "",
            **_licence_lines(entry.licence),
            "state": f"not on this machine: llamacli pull {reference.text}",
        }
    )
    table.write("")
    rows = [
        (
            store.name_of(entry, each.name) if each is not chosen else f"{store.name_of(entry, each.name)} *",
            each.name,
            size(each.about) if each.about else "?",
            size(each.ram) if each.ram else "?",
            _verdict(each.ram, usable),
        )
        for each in entry.quantizations.values()
    ]
    table.show(("NAME", "QUANTIZATION", "SIZE", "MEMORY", "FITS HERE"), rows, right=(2, 3))
    return 0


def _licence_lines(licence: Licence | None) -> dict[str, str]:
    if licence is None:
        return {}
    lines = {"licence": f"{licence.name} ({licence.url})"}
    if licence.acceptable_use:
        lines["acceptable use"] = f"see Meta's policy at {licence.acceptable_use}"
    return lines


def _lines(card: dict[str, str]) -> None:
    from llamacli.commands.terminal import harmless

    for name, value in card.items():
        if value:
            table.write(f"{name:<14}  {harmless(value)}")


# -- rm ----------------------------------------------------------------------------------------------------------


def remove(text: str, directories: Directories, *, yes: bool, quiet: bool) -> int:
    """Delete a model, or what an interrupted download has left of it."""
    room = Room.of(directories, quiet=quiet)
    try:
        file = store.find(text, room.places)
    except NotHere as error:
        paths = store.leftovers(error.reference, room.places)
        if not paths:
            raise ModelError(f"{text} is not on this machine: there is nothing to remove") from None
    else:
        if file.is_bundled:
            raise UsageError("the bundled model is part of llamacli and cannot be removed")
        if file.home == "path":
            raise UsageError(f"{file.path} is not in llamacli's care: remove it as any other file")
        paths = store.files_of(file)
    total = sum(path.lstat().st_size for path in paths)
    _confirm(f"remove {text}, {size(total)} in {paths[0].parent}?", yes=yes)
    try:
        for path in paths:
            path.unlink(missing_ok=True)
            room.notes.forget(path)
    except OSError as error:
        raise ModelError(f"{text} cannot be removed: {error.strerror} ({error.filename})") from None
    store.prune(paths, room.places)
    room.notices.say(f"removed {text}: {size(total)} are free again")
    return 0


def _confirm(question: str, *, yes: bool) -> None:
    if yes:
        return
    if not os.isatty(STDIN):
        raise UsageError(f"{question} Say -y where nobody can be asked")
    sys.stderr.write(f"llamacli: {question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was removed")


# -- verify ------------------------------------------------------------------------------------------------------


def verify(text: str | None, directories: Directories, *, as_json: bool, quiet: bool) -> int:
    """Hash models again. Exit code 5 when one of them is damaged."""
    room = Room.of(directories, quiet=quiet)
    files = [store.find(text, room.places)] if text else store.on_this_machine(room.places)
    results = [_verified(file, path, room, quiet=quiet) for file in files for path in file.files]
    if as_json:
        table.write(json.dumps(results, indent=2))
    else:
        table.show(
            ("STATE", "NAME", "SHA256", "CHECKED AGAINST"),
            [(r["state"], r["name"], r["sha256"] or "", r["against"] or "") for r in results],
        )
    damaged = [result for result in results if result["state"] in ("damaged", "missing")]
    for result in damaged:
        room.notices.say(f"{result['path']} is {result['state']}: llamacli rm {result['name']}, then pull it again")
    return EXIT_DAMAGED if damaged else 0


def _verified(file: ModelFile, path: Path, room: Room, *, quiet: bool) -> dict[str, Any]:
    expected, against = _expected(file, path)
    state, found = "missing", None
    if path.exists():
        found = _digest(path, room, quiet=quiet)
        room.notes.add(path, sha256=found)
        state = "unknown" if expected is None else "whole" if found == expected else "damaged"
    return {
        "state": state,
        "name": file.name,
        "path": str(path),
        "sha256": found,
        "expected": expected,
        "against": against,
    }


def _expected(file: ModelFile, path: Path) -> tuple[str | None, str | None]:
    """The checksum that a file must have, and who says so."""
    if path != file.path:
        record = store.read_record(path)
        return (record.sha256, "its record") if record else (None, None)
    if file.sha256 is not None:
        sources = {"bundled": "the package", "pulled": "its record", "hub cache": "its name in the cache"}
        return file.sha256, sources.get(file.home, "")
    entry = _entry_of(file)
    if entry is not None:
        for quantization in entry.quantizations.values():
            if quantization.sha256 and entry.filename(quantization.name) == path.name:
                return quantization.sha256, "the catalogue"
    return None, None


def _digest(path: Path, room: Room, *, quiet: bool) -> str:
    total = path.stat().st_size
    if total <= checksum.SMALL:
        return checksum.digest(path)
    bar = Bar(room.notices, quiet=quiet, what="reading")
    report = bar.begin(path.name, total)
    done = 0

    def count(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        report(Progress(done, total))

    try:
        return checksum.digest(path, count)
    finally:
        bar.end()
