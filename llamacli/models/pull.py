"""Gets a model onto this machine: resolved at the hub, room made sure of, fetched, checked, recorded.

Whatever interrupts it, the next call goes on where this one stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llamacli.errors import ResourceError
from llamacli.models import checksum, hub, store, transfer
from llamacli.models.lock import locked
from llamacli.models.notes import Notes
from llamacli.models.partial import cannot_write
from llamacli.models.ranges import Source
from llamacli.models.reference import Reference
from llamacli.models.resolve import Download, Target, resolve
from llamacli.models.store import ModelFile, Places, Record
from llamacli.models.transfer import Patience, Piece, Report

SPARE = 64 << 20  # bytes of disk to be left over: other programs write too

Notice = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Watcher:
    """What the one who pulls is told.

    notice   a line worth knowing
    began    a download of this many bytes begins, under this name; returns what its progress goes to
    ended    it is over, however
    """

    notice: Notice
    began: Callable[[str, int], Report]
    ended: Callable[[], None]


def pull(reference: Reference, places: Places, notes: Notes, watcher: Watcher, patience: Patience) -> ModelFile:
    """The model, downloaded if it is not here yet in its newest form, or in the one that the reference pins.

    Raises ModelError, or ResourceError when the disk has no room.
    """
    assert reference.repo_id is not None
    if hub.is_commit(reference.revision):
        present = store.search(reference, places)
        if present is not None and present.home == "pulled" and not _extra_is_missing(reference, present):
            return present
    download = resolve(reference)
    _compare(reference, download, watcher.notice)
    present = _present(reference, download, places, notes, watcher.notice)
    if present is not None:
        return present
    for target in (*download.targets, *download.extras):
        _get(target, download, reference, places, notes, watcher, patience)
    path = store.target(places.models, download.repo_id, download.revision, download.filename)
    record = store.read_record(path)
    assert record is not None
    return store.pulled_file(path, record)


def _extra_is_missing(reference: Reference, present: ModelFile) -> bool:
    projector = reference.entry.projector if reference.entry else None
    return projector is not None and not present.path.with_name(projector.filename).exists()


def _compare(reference: Reference, download: Download, notice: Notice) -> None:
    """What the hub says decides; a catalogue that says something else is worth a warning."""
    entry = reference.entry.quantizations.get(reference.quantization or "") if reference.entry else None
    known, found = entry.sha256 if entry else None, download.targets[0].sha256
    if known and found and known != found:
        notice(
            f"warning: the hub's {download.filename} is another file than the one known as {reference.text}: its "
            f"sha256 is {found}, not {known}"
        )


def _present(
    reference: Reference, download: Download, places: Places, notes: Notes, notice: Notice
) -> ModelFile | None:
    """The same content on this machine already: pulled at this commit or an earlier one, or in the hub cache."""
    if _extra_is_missing_everywhere(download, places):
        return None
    for file in store.on_this_machine(places):
        if file.home != "pulled" or not _is_same(file, download):
            continue
        record = store.read_record(file.path)
        if record is not None and file.size == download.size - sum(each.size for each in download.extras):
            if download.revision not in record.revisions:
                newer = Record(
                    record.repo_id,
                    record.filename,
                    [*record.revisions, download.revision],
                    record.size,
                    record.sha256,
                    reference.text,
                )
                with suppress(OSError):
                    store.write_record(file.path, newer)
            return file
    cached = store.in_hub_cache(places.hub_cache, download.repo_id, download.revision, download.filename)
    if cached is None or len(download.targets) > 1 or cached.size != download.targets[0].size:
        return None
    notice(f"checking the Hugging Face cache's copy of {download.filename}")
    if checksum.sha256(cached.path, notes) == download.targets[0].sha256:
        return cached
    notice("the Hugging Face cache's copy is damaged: downloading another")
    return None


def _extra_is_missing_everywhere(download: Download, places: Places) -> bool:
    paths = [
        store.target(places.models, download.repo_id, download.revision, each.filename) for each in download.extras
    ]
    return any(not path.exists() for path in paths)


def _is_same(file: ModelFile, download: Download) -> bool:
    if file.repo_id != download.repo_id or file.filename != download.filename:
        return False
    sha256 = download.targets[0].sha256
    return file.revision == download.revision or (sha256 is not None and file.sha256 == sha256)


def _get(
    target: Target,
    download: Download,
    reference: Reference,
    places: Places,
    notes: Notes,
    watcher: Watcher,
    patience: Patience,
) -> None:
    """Fetch one file unless it is there, and write its record."""
    path = store.target(places.models, download.repo_id, download.revision, target.filename)
    with locked(path, watcher.notice):
        if store.read_record(path) is not None and path.exists():
            return  # by the process that we have waited for
        pieces = _pieces(target)
        _check_disk(path, transfer.missing(pieces, path))
        report = watcher.began(target.filename, target.size)
        try:
            sha256 = transfer.fetch(pieces, path, report, patience=patience)
        finally:
            watcher.ended()
        record = Record(download.repo_id, target.filename, [download.revision], target.size, sha256, reference.text)
        try:
            store.write_record(path, record)
        except OSError as error:
            raise cannot_write(path, error) from None
        notes.add(path, sha256=sha256)


def _pieces(target: Target) -> Sequence[Piece]:
    headers = hub.headers()
    return [Piece(Source(part.url, part.size, headers), part.sha256) for part in target.parts]


def _check_disk(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed + SPARE > free:
        raise ResourceError(
            f"{path.name} needs {needed / 1e9:.2f} GB of disk, and {path.parent} has {free / 1e9:.2f} GB free: "
            "free some space, choose a smaller quantization, or another place with LLAMACLI_HOME"
        )
