"""What this machine and this installation are: the facts that `doctor` reports. Judges nothing, prints nothing.

A frozen section for each thing looked at, in which None stands for what cannot be read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llamacli import __version__, launch, machine, tuning_file
from llamacli.config import TUNING, directories, resolve
from llamacli.engine import memory
from llamacli.engine.bindings import VERSION, bindings, installed_version
from llamacli.engine.devices import Device, backends, build_features, gpu_devices, placed_on
from llamacli.errors import EngineError, LlamacliError, ModelError, ResourceError, UsageError
from llamacli.gguf import Header, read_model
from llamacli.machine import Gpu
from llamacli.models import checksum, store
from llamacli.models.notes import Notes
from llamacli.models.store import ModelFile, Places

# Llama 2 in Q4_K_M: bytes of the file, and of one token's keys and values in f16.
PUBLISHED = {"7B": (4_080_000_000, 512 << 10), "13B": (7_870_000_000, 800 << 10), "70B": (41_400_000_000, 320 << 10)}
SMALLEST_FILE = PUBLISHED["7B"][0]
WORK_SPACE = 256 << 20  # about what a model takes beside its weights and its context


_THREAD_VARIABLES = re.compile("(OMP|GOMP|KMP)_.*")
_LATER_SHARD = re.compile(r".*-(?!00001)\d{5}-of-\d{5}")

_PROBE_SECONDS = 120  # the first look at a GPU may compile its kernels


@dataclass(frozen=True, slots=True)
class Installation:
    version: str
    python: str
    bits: int
    executable: str
    virtual_environment: str | None
    system: str


@dataclass(frozen=True, slots=True)
class Configuration:
    """`is_model_chosen` tells a model somebody set from the one that is ours by default."""

    file: Path
    is_there: bool
    file_problem: UsageError | None
    environment_problem: UsageError | None
    model: str
    is_model_chosen: bool
    threads: int | None
    require_gpu: bool
    kv_type: str = "f16"


@dataclass(frozen=True, slots=True)
class Bindings:
    installed: str | None
    wanted: str = VERSION
    problem: EngineError | None = None
    library: str | None = None
    features: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Gpus:
    """`shown` by the operating system; `backends` and `devices` are llama.cpp's, None when it does not load."""

    shown: tuple[Gpu, ...]
    backends: tuple[str, ...] | None = None
    devices: tuple[Device, ...] | None = None

    @property
    def free(self) -> int:
        return sum(device.free for device in placed_on(self.devices or ()))


@dataclass(frozen=True, slots=True)
class Processor:
    name: str
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Threads:
    """`best` is what this machine is worth, `used` what the settings make of it."""

    logical: int
    affinity: int
    physical: int
    cgroup_limit: float | None
    best: int
    used: int
    load: float | None
    variables: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Fit:
    """A published model and the longest context it can have here; 0 when it does not fit."""

    name: str
    n_bytes: int
    context: int


@dataclass(frozen=True, slots=True)
class Memory:
    """In bytes."""

    total: int
    available: int
    cgroup_limit: int | None
    usable: int
    fits: tuple[Fit, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """What could be learnt of a model file before a problem ended it."""

    name: str
    path: Path
    is_default: bool
    n_bytes: int | None = None
    is_header_whole: bool = False
    quantization: str | None = None
    context_length: int | None = None
    is_verified: bool = False
    context_that_fits: int | None = None
    problem: LlamacliError | None = None


@dataclass(frozen=True, slots=True)
class Models:
    """`default_tuned` is when the default model was measured here with `tune`; None: it was not."""

    directory: Path
    files: tuple[Model, ...]
    default_problem: ModelError | None = None
    directory_problem: str | None = None
    default_tuned: str | None = None


@dataclass(frozen=True, slots=True)
class Disk:
    """Where the data directory is, or would be made."""

    path: Path
    total: int | None = None
    free: int | None = None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    installation: Installation
    configuration: Configuration
    bindings: Bindings
    processor: Processor
    gpus: Gpus
    threads: Threads
    memory: Memory
    models: Models
    disk: Disk


def examine(environ: Mapping[str, str], root: Path = machine.ROOT) -> Diagnosis:
    """Look at everything. What is broken becomes a fact; nothing expected is raised."""
    places = directories(environ)
    configuration = read_configuration(environ, places.config_file)
    library, gpus = read_library(environ, machine.gpus(root))
    room = read_memory(machine.memory(root), gpus)
    return Diagnosis(
        installation=read_installation(),
        configuration=configuration,
        bindings=library,
        processor=Processor(machine.cpu_name(root), machine.cpu_features(root)),
        gpus=gpus,
        threads=read_threads(machine.usable_cores(root), configuration, environ),
        memory=room,
        models=read_models(Places(places.models, store.hub_cache(environ)), configuration, room, gpus, places.cache),
        disk=read_disk(places.data),
    )


def read_installation() -> Installation:
    system = os.uname()
    return Installation(
        version=__version__,
        python=sys.version.split()[0],
        bits=8 * struct.calcsize("P"),
        executable=sys.executable,
        virtual_environment=sys.prefix if sys.prefix != sys.base_prefix else None,
        system=f"{system.sysname} {system.release} {system.machine}",
    )


def read_configuration(environ: Mapping[str, str], file: Path) -> Configuration:
    """File and environment one by one, so that both can be wrong; a source that is wrong does not count."""
    in_file, in_environment = _complaint({}, file), _complaint(environ, None)
    resolved = resolve({}, {} if in_environment else environ, None if in_file else file)
    is_there = False
    with suppress(OSError):
        is_there = file.exists()
    return Configuration(
        file=file,
        is_there=is_there,
        file_problem=in_file,
        environment_problem=in_environment,
        model=resolved.settings.model,
        is_model_chosen=resolved.sources["model"].kind != "default",
        threads=resolved.settings.threads,
        require_gpu=resolved.settings.require_gpu,
        kv_type=resolved.settings.kv_type,
    )


def _complaint(environ: Mapping[str, str], file: Path | None) -> UsageError | None:
    try:
        resolve({}, environ, file)
    except UsageError as error:
        return error
    return None


def read_library(environ: Mapping[str, str], shown: tuple[Gpu, ...]) -> tuple[Bindings, Gpus]:
    try:
        told = _ask_library(environ)
    except EngineError as error:
        return Bindings(installed_version(), problem=error), Gpus(shown)
    features = tuple(re.findall(r"(\w+) = 1\b", told["build"]))
    devices = tuple(Device(**device) for device in told["devices"])
    return (
        Bindings(installed_version(), library=told["library"], features=features),
        Gpus(shown, tuple(told["backends"]), devices),
    )


def _ask_library(environ: Mapping[str, str]) -> dict[str, Any]:
    """What tell() prints in a process of its own: a library built for another CPU, or a GPU's driver, may end it."""
    command = [sys.executable, "-P", "-c", "from llamacli.diagnosis import tell; tell()"]
    ours = {**environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, env=ours, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_SECONDS, check=False
        )
    except OSError as error:
        raise EngineError(f"llama.cpp cannot be tried: {sys.executable} does not start ({error.strerror})") from None
    except subprocess.TimeoutExpired:
        raise EngineError(f"llama.cpp's library has not answered within {_PROBE_SECONDS} s of loading") from None
    lines = (done.stderr if done.returncode else done.stdout).decode("utf-8", "replace").splitlines()
    last = lines[-1] if lines else "it said nothing"
    if done.returncode < 0:
        number = -done.returncode
        why = "built for another CPU" if number == signal.SIGILL else last
        raise EngineError(f"llama.cpp's library ends the process: {signal.strsignal(number)} ({why})")
    if done.returncode:
        raise EngineError(f"llama.cpp's bindings fail: {last}")
    told: dict[str, Any] = json.loads(last)
    if "error" in told:
        raise EngineError(told["error"])
    return told


def tell() -> None:
    """Print what llama.cpp says of itself as one JSON object."""
    told: dict[str, Any]
    try:
        told = {
            "library": bindings().c._lib._name,
            "build": build_features(),
            "backends": backends(),
            "devices": [asdict(device) for device in gpu_devices()],
        }
    except EngineError as error:
        told = {"error": str(error)}
    print(json.dumps(told))


def read_threads(cores: machine.Cores, configuration: Configuration, environ: Mapping[str, str]) -> Threads:
    load = None
    with suppress(OSError):
        load = os.getloadavg()[0]
    return Threads(
        logical=cores.logical,
        affinity=cores.affinity,
        physical=cores.physical,
        cgroup_limit=cores.cgroup_limit,
        best=cores.threads,
        used=configuration.threads or cores.threads,
        load=load,
        variables={name: environ[name] for name in sorted(environ) if _THREAD_VARIABLES.fullmatch(name)},
    )


def read_memory(memory: machine.Memory, gpus: Gpus) -> Memory:
    room = max(memory.usable, gpus.free)  # never the sum: a GPU may share the machine's memory
    fits = tuple(
        Fit(name, n_bytes, max(0, min(4096, (room - n_bytes - WORK_SPACE) // per_token // 256 * 256)))
        for name, (n_bytes, per_token) in PUBLISHED.items()
    )
    return Memory(memory.total, memory.available, memory.cgroup_limit, memory.usable, fits)


def read_models(
    places: Places, configuration: Configuration, room: Memory, gpus: Gpus, cache: Path | None = None
) -> Models:
    directory = places.models
    default: ModelFile | None = None
    default_problem = directory_problem = None
    try:
        default = store.find(configuration.model, places)
    except ModelError as error:
        default_problem = error
    except OSError as error:
        default_problem = ModelError(f"{configuration.model} cannot be looked for: {error.strerror}")
    try:
        files = store.on_this_machine(places)
    except OSError as error:
        files, directory_problem = [], f"{directory} cannot be read: {error.strerror}"
    if default and default.path not in [file.path for file in files]:
        files = [*files, default]
    models = [
        read_file(file, room.usable, gpus, is_default=default is not None and file.path == default.path)
        for file in files
        if not _LATER_SHARD.fullmatch(file.path.stem)
    ]
    rates = None
    if default is not None and cache is not None:
        rates = tuning_file.known(cache / TUNING, default, configuration.kv_type, Notes(cache))
    return Models(directory, tuple(models), default_problem, directory_problem, rates.measured if rates else None)


def read_file(file: ModelFile, usable: int, gpus: Gpus, *, is_default: bool = False) -> Model:
    model = Model(file.name, file.path, is_default)
    with suppress(OSError):
        model = replace(model, n_bytes=file.path.stat().st_size)
    try:
        header = read_model(file.path)
        model = replace(
            model,
            n_bytes=header.file_size,
            is_header_whole=True,
            quantization=header.quantization,
            context_length=header.context_length,
        )
        if file.is_bundled:  # the others take seconds: llamacli verify
            checksum.check(file, None)
            model = replace(model, is_verified=True)
        return replace(model, context_that_fits=_context_that_fits(header, usable, gpus.free))
    except ResourceError as error:
        return replace(model, context_that_fits=0, problem=error)
    except LlamacliError as error:
        return replace(model, problem=error)
    except OSError as error:
        return replace(model, problem=ModelError(f"{file.path} cannot be read: {error.strerror}"))


def _context_that_fits(header: Header, usable: int, free_on_gpus: int) -> int:
    """As a launch would find it. Raises ResourceError when not even the shortest context fits."""
    limit = header.usual_context
    shortest = min(limit, launch.MAX_BATCH)
    gpu_layers = memory.gpu_layers_that_fit(header, free_on_gpus, shortest) if free_on_gpus else 0
    memory.check(memory.plan(header, shortest, n_ubatch=launch.MIN_BATCH, gpu_layers=gpu_layers), usable)
    if gpu_layers > header.n_layer:
        return limit
    return max(shortest, memory.largest_context(header, usable, limit, gpu_layers=gpu_layers))


def read_disk(data: Path) -> Disk:
    for path in (data, *data.absolute().parents):
        try:
            usage = shutil.disk_usage(path)
        except FileNotFoundError:
            continue
        except OSError:
            break
        return Disk(path, usage.total, usage.free)
    return Disk(data)
