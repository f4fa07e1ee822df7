"""Says what this machine and this installation are, and what is wrong with them; as text or as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from llamacli.commands import terminal
from llamacli.diagnosis import Diagnosis, Model, examine
from llamacli.problems import Problem, problems

UNKNOWN = "cannot be read"
NO_LIMIT = "no cgroup limit"
WIDEST = 32  # a label longer than this (a model's name) pushes its own text to the right, not everybody's
_COLOURS = {"error": "\x1b[31m", "warning": "\x1b[33m"}
_PLAIN = "\x1b[0m"

Rows = Iterator[tuple[str, str]]


def run(environ: Mapping[str, str], *, as_json: bool) -> int:
    """Print facts and problems; the exit code is that of the first error, 0 without one."""
    diagnosis = examine(environ)
    found = problems(diagnosis)
    is_coloured = os.isatty(terminal.STDOUT) and not environ.get("NO_COLOR")
    text = as_object(diagnosis, found) if as_json else as_lines(diagnosis, found, is_coloured=is_coloured)
    terminal.write_all(terminal.STDOUT, text.encode("utf-8", "backslashreplace"))
    return next((problem.exit_code for problem in found if problem.exit_code), 0)


def as_object(diagnosis: Diagnosis, found: Sequence[Problem]) -> str:
    listed = [{"severity": each.severity, "what": each.what, "remedy": each.remedy} for each in found]
    return json.dumps({**asdict(diagnosis), "problems": listed}, indent=2, default=str) + "\n"


def as_lines(diagnosis: Diagnosis, found: Sequence[Problem], *, is_coloured: bool = False) -> str:
    sections = {
        "installation": _installation(diagnosis),
        "machine": _machine(diagnosis),
        f"models in {diagnosis.models.directory}": _models(diagnosis),
        "settings": _settings(diagnosis),
    }
    lines = []
    for title, facts in sections.items():
        rows = [(_safe(label), _safe(text)) for label, text in facts]
        width = min(WIDEST, max((len(label) for label, _ in rows), default=0))
        lines += [_safe(title), *(f"  {label:<{width}}  {text}".rstrip() for label, text in rows), ""]
    for problem in found:
        colour, plain = (_COLOURS[problem.severity], _PLAIN) if is_coloured else ("", "")
        lines.append(f"{colour}{problem.severity}{plain}: {_safe(problem.what)} -> {_safe(problem.remedy)}")
    return "\n".join(lines if found else [*lines, "everything is in order"]) + "\n"


def _installation(diagnosis: Diagnosis) -> Rows:
    here, library = diagnosis.installation, diagnosis.bindings
    yield "llamacli", here.version
    yield "python", f"{here.python}, {here.bits}-bit, {here.executable or UNKNOWN}"
    yield "environment", here.virtual_environment or "the system's own, not a virtual one"
    installed = f"llama-cpp-python {library.installed}" if library.installed else "llama-cpp-python is not installed"
    pinned = "as pinned" if library.installed == library.wanted else f"pinned is {library.wanted}"
    state = "cannot be used" if library.problem else "loads and passes the ABI check"
    yield "bindings", f"{installed}, {pinned}; {state}"
    yield "library", library.library or UNKNOWN
    yield "built with", _listed(library.features)
    yield "backends", _listed(diagnosis.gpus.backends)


def _machine(diagnosis: Diagnosis) -> Rows:
    processor, threads, memory, gpus = diagnosis.processor, diagnosis.threads, diagnosis.memory, diagnosis.gpus
    yield "system", diagnosis.installation.system
    yield "cpu", processor.name
    yield "cpu features", _listed(processor.features or None)
    limit = NO_LIMIT if threads.cgroup_limit is None else f"cgroup limit {threads.cgroup_limit:g}"
    yield "cores", f"{threads.logical} logical, {threads.affinity} open to us, {threads.physical} physical, {limit}"
    yield "threads", f"{threads.used} are used"
    for name, value in threads.variables.items():
        yield "", f"{name}={value}"
    yield "load", UNKNOWN if threads.load is None else f"{threads.load:.2f}"
    room = NO_LIMIT if memory.cgroup_limit is None else f"cgroup limit {_size(memory.cgroup_limit)}"
    yield (
        "memory",
        f"{_size(memory.total or None)}, {_size(memory.available)} available, {room}, {_size(memory.usable)} usable",
    )
    for fit in memory.fits:
        verdict = f"fits with a context of {fit.context:,}" if fit.context else "does not fit"
        yield f"{fit.name} Q4_K_M", f"{_size(fit.n_bytes)}, {verdict}"
    yield "gpus", "; ".join(f"{gpu.name} ({gpu.device or 'no device file'})" for gpu in gpus.shown) or "none"
    yield "usable gpus", UNKNOWN if gpus.devices is None else f"llama.cpp sees {len(gpus.devices) or 'none'}"
    for device in gpus.devices or ():
        free = f"{_size(device.free)} of {_size(device.total)} free"
        yield "", f"{device.name}: {device.description}, {device.backend}, {free}"
    disk = diagnosis.disk
    yield "disk", f"{_size(disk.free)} of {_size(disk.total)} free at {disk.path}"


def _models(diagnosis: Diagnosis) -> Rows:
    for model in diagnosis.models.files:
        yield model.name, _described(model)
    if diagnosis.models.directory_problem:
        yield "", UNKNOWN


def _described(model: Model) -> str:
    parts = [_size(model.n_bytes)]
    if model.is_header_whole:
        parts += [model.quantization or UNKNOWN, f"context {_count(model.context_length)}"]
    if model.context_that_fits is not None:
        parts.append(f"fits with {model.context_that_fits:,}" if model.context_that_fits else "does not fit")
    if model.is_verified:
        parts.append("checksum right")
    elif model.is_header_whole:
        parts.append("checksum not known")
    if model.problem and model.context_that_fits is None:
        parts.append("cannot be used")
    return ", ".join([*parts, *["the default model"] * model.is_default])


def _settings(diagnosis: Diagnosis) -> Rows:
    configuration = diagnosis.configuration
    state = "has problems" if configuration.file_problem else "is read" if configuration.is_there else "absent"
    yield "config file", f"{configuration.file} ({state})"
    missing = " (not on this machine)" if diagnosis.models.default_problem else ""
    yield "default model", configuration.model + missing
    measured = diagnosis.models.default_tuned
    yield "tuned", f"yes, {measured[:10]}" if measured else "no: llamacli tune measures it here in about a minute"


def _listed(names: Sequence[str] | None) -> str:
    return UNKNOWN if names is None else " ".join(names) or "none"


def _count(n: int | None) -> str:
    return "not said" if n is None else f"{n:,}"


def _size(n_bytes: int | None) -> str:
    if n_bytes is None:
        return UNKNOWN
    return f"{n_bytes / 2**30:,.1f} GiB" if n_bytes >= 1 << 30 else f"{n_bytes / 2**20:,.1f} MiB"


def _safe(text: str) -> str:
    """One line that a terminal shows and does not obey."""
    return terminal.harmless(" ".join(text.splitlines()))
