"""The models on this machine: pulled ones with their records, plain files, the Hugging Face cache. Never asks the hub.

MODELS/*.gguf                              files that somebody has put there
MODELS/hub/ORG--NAME/COMMIT/FILE           pulled ones, each with FILE.json beside it: its record
HF_HUB_CACHE/models--ORG--NAME/...         what huggingface_hub has downloaded; used in place
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from llamacli.errors import ModelError
from llamacli.models.catalog import Entry, catalog
from llamacli.models.reference import Reference, is_there, parse

TINY = "tiny"
TINY_FILENAME = "tiny-llama2-chat.Q8_0.gguf"
TINY_SHA256 = "577186b6078d9e10e84afcee78ab5c93d47eae69641be1ca1dbd4b80c5bca99e"
RECORD_VERSION = 1
_SHARD = re.compile(r"(?P<stem>.+)-(?P<i>\d{5})-of-(?P<n>\d{5})\.gguf")
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)

Home = Literal["bundled", "pulled", "directory", "hub cache", "path"]


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model on this machine.

    name      what the user called it, or what may be said for it after -m
    sha256    the checksum that it must have; None where none is known
    home      who looks after the file
    format    how it wants to be spoken to, where that is known of its name
    """

    name: str
    path: Path
    sha256: str | None = None
    home: Home = "path"
    repo_id: str | None = None
    filename: str | None = None
    revision: str | None = None
    format: str | None = None

    @property
    def is_bundled(self) -> bool:
        return self.home == "bundled"

    @property
    def files(self) -> list[Path]:
        """The file, or all shards of it."""
        return [self.path.with_name(name) for name in shards(self.path.name)]

    @property
    def size(self) -> int:
        """Bytes of all that is there."""
        return sum(path.stat().st_size for path in self.files if path.exists())


@dataclass(frozen=True, slots=True)
class Places:
    """Where models are.

    models      llamacli's own directory of them
    hub_cache   huggingface_hub's; None reads none
    """

    models: Path
    hub_cache: Path | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a pulled file. `revisions` are the commits at which it was found unchanged."""

    repo_id: str
    filename: str
    revisions: Sequence[str]
    size: int
    sha256: str | None
    name: str


class NotHere(ModelError):
    """A model that could be pulled, and is not on this machine."""

    def __init__(self, message: str, reference: Reference | None = None) -> None:
        super().__init__(message)
        self._reference = reference

    @property
    def reference(self) -> Reference:
        assert self._reference is not None
        return self._reference

    @classmethod
    def of(cls, reference: Reference) -> NotHere:
        name = reference.text
        return cls(f"{name} is not on this machine: llamacli pull {name} downloads it", reference)


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps its files, found as it finds it."""
    cache_home = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or os.path.join(cache_home, "huggingface")  # noqa: PTH118
    named = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(named or os.path.join(home, "hub")).expanduser()  # noqa: PTH118


def bundled() -> Path:
    """The tiny model: beside this file in an installed package, in models/ at the top of a checkout."""
    installed = Path(__file__).parent / "bundled" / TINY_FILENAME
    return installed if installed.exists() else Path(__file__).parents[2] / "models" / TINY_FILENAME


def tiny() -> ModelFile:
    return ModelFile(TINY, bundled(), TINY_SHA256, "bundled", filename=TINY_FILENAME, format="llama-2")


def shards(name: str) -> list[str]:
    """All file names of a model whose first shard's name this is; the name alone for a whole file."""
    match = _SHARD.fullmatch(name)
    if not match:
        return [name]
    return [f"{match['stem']}-{i:05d}-of-{match['n']}.gguf" for i in range(1, int(match["n"]) + 1)]


def find(text: str, places: Places) -> ModelFile:
    """The file that a reference means. Whether there is a model in it is said by whoever reads it.

    Raises NotHere for what can be pulled, ModelError for a name that nothing has.
    """
    if text == TINY:
        return tiny()
    reference = parse(text)
    if reference.path is not None:
        return ModelFile(text, reference.path)
    found = search(reference, places)
    if found is None:
        raise NotHere.of(reference)
    return found


def search(reference: Reference, places: Places) -> ModelFile | None:
    """A published model on this machine: a file put into the directory, a pulled one, or the hub cache's.

    Without a revision, of several the one that was pulled last.
    """
    entry_format = reference.entry.format if reference.entry else None
    if reference.entry is not None and reference.filename is not None:
        path = places.models / reference.filename
        if is_there(path):
            return ModelFile(reference.text, path, home="directory", filename=reference.filename, format=entry_format)
    repo_id = reference.repo_id
    candidates = [*_pulled(places.models, repo_id), *_in_hub_cache(places.hub_cache, repo_id)]
    fitting = [each for each in candidates if is_meant(each, reference)]
    if not fitting:
        return None
    best = max(fitting, key=lambda file: file.path.stat().st_mtime)
    return ModelFile(
        reference.text,
        best.path,
        best.sha256,
        best.home,
        best.repo_id,
        best.filename,
        best.revision,
        best.format or entry_format,
    )


def is_meant(file: ModelFile, reference: Reference) -> bool:
    if file.repo_id is None or file.filename is None or file.repo_id.lower() != (reference.repo_id or "").lower():
        return False
    if reference.filename is not None and file.filename != reference.filename:
        return False
    if reference.filename is None and not has_quantization(file.filename, reference.quantization or _default()):
        return False
    # A name of the catalogue means the model, at whatever revision it was pulled.
    wanted = None if reference.entry else reference.revision
    return wanted is None or wanted in _revisions(file)


def _default() -> str:
    return catalog().default_quantization


def _revisions(file: ModelFile) -> Sequence[str]:
    record = read_record(file.path) if file.home == "pulled" else None
    if record is not None:
        return record.revisions
    return [file.revision] if file.revision else []


def has_quantization(filename: str, quantization: str) -> bool:
    """Whether a file's name says that it is quantized so, in whatever letters."""
    name = filename.rpartition("/")[2]
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(quantization)}(?![A-Za-z0-9_])", name, re.IGNORECASE) is not None


def on_this_machine(places: Places) -> list[ModelFile]:
    """Every model: the bundled one, plain files, pulled ones, and the hub cache's that are not among those."""
    plain = [_plain(path) for path in sorted(places.models.glob("*.gguf"))] if places.models.is_dir() else []
    found = [tiny(), *plain, *_pulled(places.models), *_in_hub_cache(places.hub_cache)]
    return [file for file in found if not _is_later_shard(file.path.name) and not _is_projector(file.path.name)]


def _is_later_shard(name: str) -> bool:
    match = _SHARD.fullmatch(name)
    return match is not None and int(match["i"]) != 1


def _is_projector(name: str) -> bool:
    return "mmproj" in name.lower()


def _plain(path: Path) -> ModelFile:
    """A file in the directory: under its published name if it has one."""
    for entry in catalog().entries:
        for quantization in entry.quantizations if entry.repo_id else ():
            if entry.filename(quantization) == path.name:
                name = name_of(entry, quantization)
                return ModelFile(name, path, home="directory", filename=path.name, format=entry.format)
    return ModelFile(str(path), path, home="directory", filename=path.name)


def name_of(entry: Entry, quantization: str) -> str:
    """What the user has to say for it."""
    return entry.name if quantization == catalog().default(entry) else f"{entry.name}:{quantization}"


# -- pulled ------------------------------------------------------------------------------------------------------


def target(models: Path, repo_id: str, revision: str, filename: str) -> Path:
    """Where a pulled file lies."""
    return models / "hub" / repo_id.replace("/", "--") / revision[:12] / filename


def write_record(path: Path, record: Record) -> None:
    """Beside a file that is whole: what has no record is not taken for a model. Raises OSError."""
    place = _record_path(path)
    draft = place.with_name(f".{place.name}.{os.getpid()}")
    draft.write_text(json.dumps({"version": RECORD_VERSION} | asdict(record), indent=1) + "\n", "utf-8")
    draft.replace(place)


def read_record(path: Path) -> Record | None:
    """The record of a pulled file. None for one that is missing, damaged or of a later version."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found: dict[str, Any] = json.loads(_record_path(path).read_text("utf-8"))
        if found.pop("version") == RECORD_VERSION:
            return Record(**found)
    return None


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _pulled(models: Path, repo_id: str | None = None) -> Iterator[ModelFile]:
    """Of one repository, or of all."""
    for repository in _directories(models / "hub", repo_id, ""):
        for place in sorted(repository.glob("*/**/*.gguf.json")):
            path = place.with_suffix("")
            record = read_record(path)
            if record is not None and path.exists():
                yield pulled_file(path, record)


def _directories(parent: Path, repo_id: str | None, prefix: str) -> list[Path]:
    """Those of a repository, however it is capitalised; or of all repositories."""
    if not parent.is_dir():
        return []
    wanted = None if repo_id is None else prefix + repo_id.replace("/", "--").lower()
    found = (path for path in parent.iterdir() if path.name.startswith(prefix) and path.is_dir())
    return sorted(path for path in found if wanted is None or path.name.lower() == wanted)


def pulled_file(path: Path, record: Record) -> ModelFile:
    entry = catalog().of_repository(record.repo_id)
    return ModelFile(
        record.name,
        path,
        record.sha256,
        "pulled",
        record.repo_id,
        record.filename,
        record.revisions[-1],
        entry.format if entry else None,
    )


# -- the Hugging Face cache --------------------------------------------------------------------------------------


def _in_hub_cache(cache: Path | None, repo_id: str | None = None) -> Iterator[ModelFile]:
    """GGUF files that huggingface_hub has downloaded: snapshots/COMMIT/FILE is a link to blobs/SHA256."""
    for repository in _directories(cache, repo_id, "models--") if cache is not None else ():
        name = repository.name.removeprefix("models--").replace("--", "/", 1)
        for path in sorted(repository.glob("snapshots/*/**/*.gguf")):
            if path.exists():
                yield _hub_cached(repository, name, path)


def _hub_cached(repository: Path, repo_id: str, path: Path) -> ModelFile:
    revision, _, filename = path.relative_to(repository / "snapshots").as_posix().partition("/")
    blob = path.resolve().name
    sha256 = blob if _SHA256.fullmatch(blob) else None
    entry = catalog().of_repository(repo_id)
    name = f"{repo_id}/{filename}"
    if entry is not None:
        for quantization in entry.quantizations:
            if entry.filename(quantization) == filename:
                name = name_of(entry, quantization)
    return ModelFile(name, path, sha256, "hub cache", repo_id, filename, revision, entry.format if entry else None)


def in_hub_cache(cache: Path | None, repo_id: str, revision: str, filename: str) -> ModelFile | None:
    """The hub cache's copy of one file at one commit."""
    if cache is None:
        return None
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    path = repository / "snapshots" / revision / filename
    return _hub_cached(repository, repo_id, path) if path.exists() else None


# -- what is to be removed ---------------------------------------------------------------------------------------


def files_of(file: ModelFile) -> list[Path]:
    """Everything on the disk that is this model, the records of pulled files and the hub cache's blobs included."""
    if file.home == "pulled":
        return [each for path in file.files for each in (path, _record_path(path), *_around(path)) if each.exists()]
    if file.home == "hub cache":
        return [each for path in file.files for each in _with_blob(path)]
    return [path for path in file.files if path.exists()]


def leftovers(reference: Reference, places: Places) -> list[Path]:
    """What an interrupted download has left."""
    directory = places.models / "hub" / (reference.repo_id or "").replace("/", "--")
    found = sorted(directory.glob("*/**/*.part")) if directory.is_dir() else []
    names = shards(reference.filename.rpartition("/")[2]) if reference.filename else []
    wanted = [
        path
        for path in found
        if path.name.removesuffix(".part") in names
        or (not names and has_quantization(path.name, reference.quantization or _default()))
    ]
    return [each for path in wanted for each in (path, *_around(path.with_suffix(""))) if each.exists()]


def _around(path: Path) -> list[Path]:
    return [path.with_name(f"{path.name}.part.journal"), path.with_name(f".{path.name}.lock")]


def _with_blob(path: Path) -> list[Path]:
    """A file of the hub cache, and its blob where no other snapshot needs it."""
    blob = path.resolve()
    snapshots = next((parent for parent in path.parents if parent.name == "snapshots"), path.parent)
    others = [
        each for each in snapshots.glob("*/**/*") if each != path and each.is_symlink() and each.resolve() == blob
    ]
    return [path] if others or blob == path else [path, blob]


def prune(paths: Sequence[Path], places: Places) -> None:
    """Remove directories that have become empty, within those that are for models."""
    roots = {places.models, places.models / "hub", places.hub_cache}
    for parent in {path.parent for path in paths}:
        while parent not in roots and parent != parent.parent:
            try:
                parent.rmdir()
            except OSError:
                break
            parent = parent.parent
