"""Models that are known by name: where they are published, how large they are, how they want to be spoken to.

The facts are data, in catalog.toml beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# What a model needs beside its weights, in bytes: the publisher's figure for a small context on the CPU.
BESIDE_WEIGHTS = 2_500_000_000


@dataclass(frozen=True, slots=True)
class Licence:
    name: str
    url: str
    acceptable_use: str | None = None


@dataclass(frozen=True, slots=True)
class Quantization:
    """One file of a model. What nobody has established is None.

    size     bytes, where they are known exactly
    about    bytes, from the publisher's rounded figure where they are not
    parts    endings of raw pieces that are to be joined, empty for a whole file
    """

    name: str
    size: int | None
    about: int | None
    sha256: str | None
    parts: Sequence[str] = ()

    @property
    def ram(self) -> int | None:
        """Bytes of memory to run it in, roughly."""
        return self.about + BESIDE_WEIGHTS if self.about else None


@dataclass(frozen=True, slots=True)
class Projector:
    """The part of a vision model that turns pictures into embeddings."""

    filename: str
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Entry:
    """A published model. `repo_id` is None for the bundled one; `file` has {} where the quantization stands."""

    name: str
    aliases: Sequence[str]
    title: str
    repo_id: str | None
    file: str
    revision: str | None
    parameters: int
    context_length: int
    format: str
    licence: Licence
    quantizations: Mapping[str, Quantization]
    projector: Projector | None = None

    def filename(self, quantization: str) -> str:
        return self.file.format(quantization)


@dataclass(frozen=True, slots=True)
class Catalog:
    entries: Sequence[Entry]
    default_quantization: str

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self.entries]

    def find(self, name: str) -> Entry | None:
        """The model of this name or alias, however it is capitalised."""
        wanted = name.lower()
        return next((entry for entry in self.entries if wanted in (entry.name, *entry.aliases)), None)

    def of_repository(self, repo_id: str) -> Entry | None:
        return next((each for each in self.entries if each.repo_id and each.repo_id.lower() == repo_id.lower()), None)

    def default(self, entry: Entry) -> str:
        """The quantization that is meant when none is named."""
        return self.default_quantization if self.default_quantization in entry.quantizations else "Q8_0"


@cache
def catalog() -> Catalog:
    import tomllib

    text = Path(__file__).with_name("catalog.toml").read_text("utf-8")
    return parse(tomllib.loads(text))


def parse(found: Mapping[str, Any]) -> Catalog:
    """Raises KeyError or TypeError for a catalogue that is not one."""
    licences = {name: Licence(**values) for name, values in found["licence"].items()}
    entries = tuple(_entry(values, licences) for values in found["model"])
    return Catalog(entries, found["default_quantization"])


def _entry(values: Mapping[str, Any], licences: Mapping[str, Licence]) -> Entry:
    projector = values.get("projector")
    return Entry(
        name=values["name"],
        aliases=tuple(values["aliases"]),
        title=values["title"],
        repo_id=values.get("repo_id"),
        file=values["file"],
        revision=values.get("revision"),
        parameters=values["parameters"],
        context_length=values["context_length"],
        format=values["format"],
        licence=licences[values["licence"]],
        quantizations={name: _quantization(name, **each) for name, each in values["quantizations"].items()},
        projector=Projector(projector["file"], projector.get("sha256")) if projector else None,
    )


def _quantization(
    name: str,
    *,
    size: int | None = None,
    gigabytes: float | None = None,
    sha256: str | None = None,
    parts: Sequence[str] = (),
) -> Quantization:
    about = size or (round(gigabytes * 1e9) if gigabytes else None)
    return Quantization(name, size, about, sha256, tuple(parts))
