"""Which files of a repository are meant, as the hub lists them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llamacli.errors import ModelError
from llamacli.models import hub
from llamacli.models.catalog import catalog
from llamacli.models.hub import RemoteFile
from llamacli.models.reference import Reference
from llamacli.models.store import has_quantization, shards

_LATER_SHARD = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
_RAW_PART = re.compile(r"(?P<name>.+\.gguf)-split-(?P<letter>[a-z])")


@dataclass(frozen=True, slots=True)
class Target:
    """A file on this machine that is made of one remote file, or of several raw parts joined."""

    filename: str
    parts: Sequence[RemoteFile]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def sha256(self) -> str | None:
        return self.parts[0].sha256 if len(self.parts) == 1 else None


@dataclass(frozen=True, slots=True)
class Download:
    """A model at one commit: its file, or its shards, the first one first. `extras` belong to it (a projector)."""

    repo_id: str
    revision: str
    targets: Sequence[Target]
    extras: Sequence[Target] = ()

    @property
    def filename(self) -> str:
        return self.targets[0].filename

    @property
    def size(self) -> int:
        return sum(target.size for target in (*self.targets, *self.extras))


def resolve(reference: Reference) -> Download:
    """Ask the hub. Raises ModelError: no such repository, revision or file, or several files that fit."""
    assert reference.repo_id is not None
    parts = _catalogued_parts(reference)
    if reference.filename is not None and not parts:
        names: Sequence[str] = [reference.filename]
        revision = reference.revision
    elif parts:
        names, revision = parts, reference.revision
    else:
        listing = hub.listing(reference.repo_id, reference.revision)
        names, revision = _chosen(reference, [each.filename for each in listing.files]), listing.revision
    raw = _RAW_PART.fullmatch(names[0])
    if raw:
        remote = _files(reference.repo_id, names, revision)
        targets = [Target(raw["name"], remote)]
    else:
        targets = [Target(each.filename, [each]) for each in _files(reference.repo_id, _with_shards(names), revision)]
    commit = targets[0].parts[0].revision
    return Download(reference.repo_id, commit, targets, _extras(reference, commit))


def _files(repo_id: str, names: Sequence[str], revision: str | None) -> list[RemoteFile]:
    """All at the commit of the first: a branch may move between two questions."""
    first = hub.file(repo_id, names[0], revision)
    return [first, *(hub.file(repo_id, name, first.revision) for name in names[1:])]


def _with_shards(names: Sequence[str]) -> list[str]:
    directory, slash, name = names[0].rpartition("/")
    return [directory + slash + each for each in shards(name)]


def _catalogued_parts(reference: Reference) -> list[str]:
    """Names of the raw parts that a file of the catalogue is published in."""
    entry = reference.entry
    known = entry.quantizations.get(reference.quantization or "") if entry else None
    return [f"{reference.filename}{ending}" for ending in known.parts] if known else []


def _extras(reference: Reference, commit: str) -> list[Target]:
    projector = reference.entry.projector if reference.entry else None
    if projector is None or reference.repo_id is None:
        return []
    return [Target(projector.filename, [hub.file(reference.repo_id, projector.filename, commit)])]


def _chosen(reference: Reference, listed: Sequence[str]) -> list[str]:
    """The file's name, or those of its raw parts."""
    models: dict[str, list[str]] = {}
    for name in sorted(listed):
        raw = _RAW_PART.fullmatch(name)
        is_model = name.endswith(".gguf") and not _LATER_SHARD.search(name)
        if (raw or is_model) and "mmproj" not in name.lower():
            models.setdefault(raw["name"] if raw else name, []).append(name)
    if not models:
        raise ModelError(f"{reference.repo_id} has no GGUF file: look for a repository whose name ends in -GGUF")
    wanted = reference.quantization
    if wanted is None and len(models) == 1:
        return next(iter(models.values()))
    quantization = wanted or catalog().default_quantization
    fitting = [name for name in models if has_quantization(name, quantization)]
    if len(fitting) == 1:
        return models[fitting[0]]
    what = f"{len(fitting)} files with {quantization}" if fitting else f"no file with {quantization}"
    raise ModelError(
        f"{reference.repo_id} has {what}: name one as {reference.repo_id}/FILE: {', '.join(fitting or models)}"
    )
