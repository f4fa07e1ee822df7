"""What a model's file says about itself, as lists and cards show it; read once and remembered."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from llamacli.engine import memory
from llamacli.errors import LlamacliError
from llamacli.gguf import Header, read_model
from llamacli.models.notes import Notes
from llamacli.models.store import ModelFile

VERSION = 1


@dataclass(frozen=True, slots=True)
class Facts:
    """Sizes in bytes. `ram` is for the whole context; the file's own faults are `problem`, and the rest is empty."""

    problem: str | None = None
    architecture: str | None = None
    title: str | None = None
    parameters: int | None = None
    quantization: str | None = None
    context_length: int | None = None
    ram: int | None = None


def facts(file: ModelFile, notes: Notes) -> Facts:
    """Of a file that may be anything."""
    known = notes.read(file.path).get("facts")
    if isinstance(known, dict) and known.pop("version", None) == VERSION and set(known) == _NAMES:
        return Facts(**known)
    try:
        found = _read(read_model(file.path))
    except LlamacliError as error:
        return Facts(problem=str(error))  # not remembered: its shards may come
    notes.add(file.path, facts={"version": VERSION} | asdict(found))
    return found


_NAMES = {field.name for field in fields(Facts)}


def _read(header: Header) -> Facts:
    context = header.usual_context
    return Facts(
        architecture=header.architecture,
        title=header.name,
        parameters=header.n_parameters,
        quantization=header.quantization,
        context_length=header.context_length,
        ram=memory.plan(header, context).total,
    )


def ram_by_context(header: Header) -> dict[int, dict[str, int]]:
    """Bytes of memory by tokens of context and type of the KV cache."""
    longest = header.usual_context
    sizes: list[int] = [n for n in (512, 1024, 2048, 4096, 8192, 16384, 32768) if n < longest] + [longest]
    return {
        n: {kind: memory.plan(header, n, type_k=kind, type_v=kind).total for kind in ("f16", "q8_0")} for n in sizes
    }
