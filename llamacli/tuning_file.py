"""Where measured rates are kept: a JSON file for each machine, model, library version and number format of the cache.

Readable by people, written whole or not at all, for nobody else's eyes. A file that is damaged, is of a later version
or is about something else counts as not there, and whoever asks is told why.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from llamacli import machine
from llamacli.engine.bindings import VERSION
from llamacli.errors import ResourceError
from llamacli.models.notes import Notes
from llamacli.models.store import ModelFile
from llamacli.tuning import Attention, Rates, Weights

FORMAT = 1
MAX_BYTES = 1 << 16
MAX_THREADS = 512  # ggml.h: GGML_MAX_N_THREADS, beyond which llama.cpp ends the process
MAX_SECONDS = 1e9
MAX_ROWS = 1 << 20  # of a step, and tokens before it


class Unusable(Exception):
    """A file that tells nothing of its subject, and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What rates hold for.

    name, size   of the model's file; bytes, all shards together
    sha256       where the store or our notes know it
    gpu_layers   on a GPU, as llama.cpp counts: -1 is all of them
    """

    cpu: str
    features: tuple[str, ...]
    logical: int
    physical: int
    cgroup_limit: float | None
    memory_gib: int
    library: str
    name: str
    size: int
    sha256: str | None
    kv_type: str
    gpu_layers: int

    @property
    def filename(self) -> str:
        """Two subjects have the same one only if rates of one hold for the other."""
        told = json.dumps({**asdict(self), "sha256": None}, sort_keys=True)
        return f"{_stem(self.name)}{sha256(told.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}.json"


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of a subject: rates, or why there are none."""

    rates: Rates | None
    why: str
    path: Path


def subject(file: ModelFile, kv_type: str, gpu_layers: int, notes: Notes | None) -> Subject:
    """This machine with this model. Under a millisecond. Raises OSError for a file that has gone."""
    cores = machine.usable_cores()
    name, features = machine.cpu()
    known = file.sha256 or (notes.read(file.path).get("sha256") if notes else None)
    return Subject(
        cpu=name,
        features=features,
        logical=cores.affinity,
        physical=cores.physical,
        cgroup_limit=cores.cgroup_limit,
        memory_gib=round(machine.total_memory() / (1 << 30)),
        library=f"llama-cpp-python {VERSION}",
        name=file.path.name,
        size=sum(path.stat().st_size for path in file.files),
        sha256=known if isinstance(known, str) else None,
        kv_type=kv_type,
        gpu_layers=gpu_layers,
    )


def find(directory: Path, file: ModelFile, kv_type: str, gpu_layers: int, notes: Notes | None) -> Found:
    """The rates of this machine with this model. Where nothing was ever measured, that is all that is looked at."""
    stem = _stem(file.path.name)
    try:
        alike = [name for name in os.listdir(directory) if name.startswith(stem)]  # noqa: PTH208
    except FileNotFoundError:
        alike = []
    except OSError as error:
        return Found(None, f"{directory} cannot be read: {error.strerror}", directory)
    if not alike:
        return Found(None, "nothing was measured", directory)
    path = directory
    try:
        wanted = subject(file, kv_type, gpu_layers, notes)
        path = directory / wanted.filename
        return Found(read(path, wanted)[1], f"measured, see {path}", path)
    except FileNotFoundError:
        return Found(
            None,
            "measured on another machine only, of another file of this name, or with another version or --kv-type",
            directory,
        )
    except OSError as error:
        return Found(None, f"{error.filename} cannot be read: {error.strerror}", directory)
    except Unusable as error:
        return Found(None, f"{path} {error}", path)


def known(directory: Path, file: ModelFile, kv_type: str, notes: Notes | None) -> Rates | None:
    """The same for whom layers on a GPU do not matter: the rates that were measured last."""
    found = []
    with suppress(OSError):
        wanted = subject(file, kv_type, 0, notes)
        for path in entries(directory):
            with suppress(OSError, Unusable):
                found.append(read(path, replace(wanted, gpu_layers=read(path)[0].gpu_layers))[1])
    return max(found, key=lambda rates: rates.measured, default=None)


def read(path: Path, wanted: Subject | None = None) -> tuple[Subject, Rates]:
    """A file's subject and rates. Raises OSError or Unusable; also if it is about something else than is wanted."""
    with path.open("rb") as stream:
        raw = stream.read(MAX_BYTES + 1)
    try:
        if len(raw) > MAX_BYTES:
            raise ValueError
        found = json.loads(raw)
        version = found["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Unusable("is damaged") from None
    if version != FORMAT:
        raise Unusable("was written by another version of llamacli")
    try:
        about, rates = _subject(found), _rates(found)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise Unusable("is damaged") from None
    if wanted is not None and about.filename != wanted.filename:
        raise Unusable("is about another machine, model or version")
    if wanted is not None and about.sha256 and wanted.sha256 and about.sha256 != wanted.sha256:
        raise Unusable("is about another model with the same name and size")
    return about, rates


def prepare(directory: Path) -> None:
    """Make the directory, for us alone. Raises ResourceError where nothing could be kept in it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
    except OSError as error:
        raise _not_kept(directory, error.strerror) from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise _not_kept(directory, "it cannot be written to")


def _not_kept(directory: Path, why: str | None) -> ResourceError:
    return ResourceError(f"what is measured cannot be kept in {directory}: {why}")


def write(directory: Path, about: Subject, rates: Rates) -> Path:
    """Keep rates, in place of older ones of the same subject. Returns where. Raises ResourceError."""
    path = directory / about.filename
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    prepare(directory)
    try:
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(json.dumps(as_object(about, rates), indent=2) + "\n")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise _not_kept(directory, error.strerror) from None
    return path


def entries(directory: Path) -> Iterator[Path]:
    """All files, in the order of their names. Raises OSError for a directory that cannot be read."""
    with suppress(FileNotFoundError):
        yield from sorted(path for path in directory.iterdir() if path.suffix == ".json")


def clear(directory: Path, name: str | None = None) -> int:
    """Remove what was measured, of the models with this file name or of all. Returns how many. Raises OSError."""
    doomed = [path for path in entries(directory) if name is None or path.name.startswith(_stem(name))]
    for path in doomed:
        path.unlink(missing_ok=True)
    return len(doomed)


def as_object(about: Subject, rates: Rates) -> dict[str, Any]:
    """The file's content."""
    whose = asdict(about)
    model = {"name": whose.pop("name"), "size": whose.pop("size"), "sha256": whose.pop("sha256")}
    library, kv_type, gpu_layers = whose.pop("library"), whose.pop("kv_type"), whose.pop("gpu_layers")
    return {
        "version": FORMAT,
        "machine": whose,
        "library": library,
        "model": model,
        "kv_type": kv_type,
        "gpu_layers": gpu_layers,
        **asdict(rates),
    }


def _stem(name: str) -> str:
    """How the names of all files about a model begin."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name.removesuffix(".gguf"))[:80].lstrip(".") + "@"


def _subject(found: Mapping[str, Any]) -> Subject:
    about = Subject(
        **{**found["machine"], "features": tuple(found["machine"]["features"])},
        library=found["library"],
        kv_type=found["kv_type"],
        gpu_layers=found["gpu_layers"],
        **found["model"],
    )
    texts = (about.cpu, about.library, about.name, about.kv_type, *about.features, about.sha256 or "")
    if not all(isinstance(each, str) for each in texts):
        raise ValueError("text")
    return about


def _rates(found: Mapping[str, Any]) -> Rates:
    rewritten, attention, others = found["rewritten"], found["attention"], found["others"]
    return Rates(
        stored=_weights(found["stored"]),
        rewritten=None if rewritten is None else _weights(rewritten),
        why_not=str(found["why_not"]),
        attention=None if attention is None else _attention(attention),
        cores=int(_number(found["cores"], least=0, most=MAX_THREADS)),
        others=None if others is None else _number(others, least=0),
        spread=_number(found["spread"], least=0),
        seconds=_number(found["seconds"], least=0),
        measured=str(found["measured"]),
    )


def _weights(found: Mapping[str, Any]) -> Weights:
    steps = _by_number(found["steps"], MAX_ROWS)
    if 1 not in steps:
        raise ValueError("no step of one row")
    return Weights(
        _number(found["load"], least=0),
        _by_number(found["threads"], MAX_THREADS),
        _by_number(found["threads_batch"], MAX_THREADS),
        steps,
    )


def _attention(found: Mapping[str, Any]) -> Attention:
    depth = found["depth"]
    if type(depth) is not int or not 1 <= depth <= MAX_ROWS:
        raise ValueError("depth")
    return Attention(depth, *(_number(found[name]) for name in Attention.__slots__[1:]))


def _by_number(found: Mapping[str, Any], most: int) -> dict[int, float]:
    """Seconds by a count, in rising order. JSON has only text for keys."""
    if not found or not all(key.isascii() and key.isdecimal() and 0 < int(key) <= most for key in found):
        raise ValueError("count")
    return {int(key): _number(found[key]) for key in sorted(found, key=int)}


def _number(value: object, least: float = 1e-9, most: float = MAX_SECONDS) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError("number")
    return float(value)
