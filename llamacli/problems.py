"""What is wrong with a machine and an installation, and the remedy: told from the facts of diagnosis.py alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llamacli import placing
from llamacli.diagnosis import (
    SMALLEST_FILE,
    Bindings,
    Configuration,
    Diagnosis,
    Disk,
    Gpus,
    Installation,
    Memory,
    Models,
    Processor,
    Threads,
)
from llamacli.engine.bindings import VERSION
from llamacli.errors import EngineError, ResourceError, UsageError
from llamacli.models import store

BUSY = 0.5  # a load average that this program's own start does not cause
_NO_GPU = ("CPU", "BLAS", "RPC")  # backends that compute without a GPU of this machine
_PINNING = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES")
_REINSTALL = f"pip install --force-reinstall --no-cache-dir llama-cpp-python=={VERSION}"
_REBUILD = f"{_REINSTALL} --no-binary llama-cpp-python"

# fmt: off
# What /proc/cpuinfo calls a feature -> what llama.cpp's build calls the kernels for it.
BUILD_NAMES = {
    "avx": "AVX", "avx2": "AVX2", "fma": "FMA", "f16c": "F16C", "bmi2": "BMI2", "avx_vnni": "AVX_VNNI",
    "avx512f": "AVX512", "avx512vbmi": "AVX512_VBMI", "avx512_vnni": "AVX512_VNNI", "avx512_bf16": "AVX512_BF16",
    "amx_int8": "AMX_INT8", "asimd": "NEON", "asimddp": "DOTPROD", "asimdhp": "FP16_VA", "i8mm": "MATMUL_INT8",
    "sve": "SVE", "sme": "SME",
}
# fmt: on
# llama.cpp uses these without asking the CPU first.
_UNASKED = ("AVX", "AVX2", "FMA", "F16C", "BMI2", "AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16")


@dataclass(frozen=True, slots=True)
class Problem:
    """An exit code makes it an error: what the settings ask for cannot run. Without one things are slow or partial."""

    what: str
    remedy: str
    exit_code: int = 0

    @property
    def severity(self) -> Literal["error", "warning"]:
        return "error" if self.exit_code else "warning"


def problems(diagnosis: Diagnosis) -> list[Problem]:
    """Errors first."""
    found = [
        *of_installation(diagnosis.installation),
        *of_bindings(diagnosis.bindings),
        *of_configuration(diagnosis.configuration),
        *of_gpus(diagnosis.gpus, require_gpu=diagnosis.configuration.require_gpu),
        *of_models(diagnosis.models, diagnosis.configuration),
        *of_processor(diagnosis.processor, diagnosis.bindings),
        *of_threads(diagnosis.threads),
        *of_memory(diagnosis.memory),
        *of_disk(diagnosis.disk),
    ]
    return sorted(found, key=lambda problem: problem.exit_code == 0)


def of_installation(installation: Installation) -> Iterator[Problem]:
    if installation.bits < 64:
        yield Problem(
            f"this Python is a {installation.bits}-bit program: no published Llama 2 fits into its address space",
            "install llamacli with a 64-bit Python",
        )


def of_bindings(library: Bindings) -> Iterator[Problem]:
    if library.problem:
        yield Problem(str(library.problem), f"install the bindings again: {_REINSTALL}", EngineError.exit_code)
    elif library.installed != library.wanted:
        yield Problem(
            f"llama-cpp-python {library.installed or 'of an unknown version'} is installed; llamacli is tested "
            f"with {library.wanted}",
            f"pip install llama-cpp-python=={library.wanted}",
        )


def of_configuration(configuration: Configuration) -> Iterator[Problem]:
    if problem := configuration.file_problem:
        yield Problem(str(problem), f"edit or remove {configuration.file}", problem.exit_code)
    if problem := configuration.environment_problem:
        yield Problem(str(problem), "correct the variable, or unset it", problem.exit_code)


def of_gpus(gpus: Gpus, *, require_gpu: bool) -> Iterator[Problem]:
    if gpus.backends is None or gpus.devices:
        return
    exit_code = UsageError.exit_code if require_gpu else 0
    required = "a GPU is required by the settings, but " if require_gpu else ""
    if not gpus.shown:
        if require_gpu:
            yield Problem(f"{required}this machine shows none", "unset require_gpu, or attach a GPU", exit_code)
        return
    gpu = gpus.shown[0]
    if gpu.device is None and gpu.vendor != "apple":
        yield Problem(
            f"{required}{gpu.name} is in this machine, but this container or user was not given it",
            "start the container with it: docker run --gpus all (NVIDIA), --device /dev/kfd --device /dev/dri (AMD), "
            "--device /dev/dri (Intel)",
            exit_code,
        )
    elif set(gpus.backends) <= set(_NO_GPU):
        backend = placing.BACKENDS.get(gpu.vendor, "VULKAN")
        yield Problem(
            f"{required}{gpu.name} is not used: this build of llama.cpp has no GPU backend",
            placing.GPU_BUILD.format(backend=backend, version=VERSION),
            exit_code,
        )
    else:
        built_for = ", ".join(backend for backend in gpus.backends if backend not in _NO_GPU)
        yield Problem(
            f"{required}{gpu.name} is not used: llama.cpp is built for {built_for} and sees no device",
            "check that the GPU's driver is installed and not older than the build's toolkit, and that no "
            "CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES hides it",
            exit_code,
        )


def of_models(models: Models, configuration: Configuration) -> Iterator[Problem]:
    if models.directory_problem:
        yield Problem(models.directory_problem, "make it readable, or let LLAMACLI_HOME name another place")
    if models.default_problem:
        # On a fresh installation our own default is not there yet, and nothing is wrong with that.
        exit_code = models.default_problem.exit_code if configuration.is_model_chosen else 0
        yield Problem(
            str(models.default_problem), f'set another default: model = "tiny" in {configuration.file}', exit_code
        )
    for model in models.files:
        if model.problem:
            remedy = "replace the file, or delete it"
            if model.name == store.TINY:
                remedy = "pip install --force-reinstall llamacli"
            if isinstance(model.problem, ResourceError):
                remedy = "free memory, or run a smaller model or quantization"
            yield Problem(str(model.problem), remedy, model.problem.exit_code if model.is_default else 0)


def of_processor(processor: Processor, library: Bindings) -> Iterator[Problem]:
    if not processor.features or library.features is None:
        return
    has = [BUILD_NAMES[feature] for feature in processor.features if feature in BUILD_NAMES]
    if lacking := [name for name in _UNASKED if name in library.features and name not in has]:
        yield Problem(
            f"this build of llama.cpp uses {', '.join(lacking)}, which this CPU lacks: it will end with an illegal "
            "instruction",
            f"build it on this machine: {_REBUILD}",
            EngineError.exit_code,
        )
    if unused := [name for name in has if name not in library.features]:
        yield Problem(
            f"slow build: this CPU has {', '.join(unused)}, which this build of llama.cpp does not use",
            f"build it on this machine: {_REBUILD}",
        )


def of_threads(threads: Threads) -> Iterator[Problem]:
    if threads.used > threads.best:
        yield Problem(
            f"{threads.used} threads are set, {threads.best} can run at once: spinning threads collapse when they "
            "share cores",
            f"unset threads, or set it to {threads.best}",
        )
    if threads.load is not None and threads.load >= BUSY and threads.load + threads.used > threads.logical:
        yield Problem(
            f"other programs are using the cores (load {threads.load:.1f}, {threads.logical} CPUs): spinning threads "
            "collapse when cores are shared",
            "end them, or leave them their cores with --threads; a run of llamacli within the last minute counts too",
        )
    yield from _of_variables(threads)


def _of_variables(threads: Threads) -> Iterator[Problem]:
    """llama.cpp starts as many OpenMP threads as it is told to; these variables change what becomes of them."""
    number = threads.variables.get("OMP_NUM_THREADS", "").strip()
    if number and number != str(threads.used):
        yield Problem(
            f"OMP_NUM_THREADS={number} has no effect: llamacli uses {threads.used} threads",
            f"say it with --threads {number} or LLAMACLI_THREADS={number}",
        )
    limit = threads.variables.get("OMP_THREAD_LIMIT", "").strip()
    if limit.isdecimal() and int(limit) < threads.used:
        yield Problem(f"OMP_THREAD_LIMIT={limit} keeps llama.cpp from its {threads.used} threads", "unset it")
    if threads.variables.get("OMP_DYNAMIC", "").strip().lower() in ("true", "1"):
        yield Problem("OMP_DYNAMIC lets OpenMP start fewer threads than llama.cpp asks for", "unset it")
    if pinning := [name for name in _PINNING if threads.variables.get(name)]:
        yield Problem(
            f"{' and '.join(pinning)} ties threads to certain cores; two of them on one core wait for each other",
            "unset it, or make sure that it names one core for each thread",
        )


def of_memory(memory: Memory) -> Iterator[Problem]:
    if not memory.total:
        yield Problem("this machine's memory cannot be read: whether a model fits is not known", "mount /proc")
    elif not any(fit.context for fit in memory.fits):
        limit = "" if memory.cgroup_limit is None else "raise the container's limit, "
        yield Problem(
            f"{memory.usable / 2**30:.1f} GiB of memory can be used: no Llama 2 in Q4_K_M fits",
            f"free some memory, {limit}or run a smaller quantization, as in -m 7b-chat:Q2_K",
        )


def of_disk(disk: Disk) -> Iterator[Problem]:
    if disk.free is None:
        yield Problem(f"the room on the disk of {disk.path} cannot be read", "let LLAMACLI_HOME name another place")
    elif disk.free < SMALLEST_FILE:
        yield Problem(
            f"{disk.free / 2**30:.1f} GiB are free at {disk.path}: no room for the smallest published model "
            f"({SMALLEST_FILE / 2**30:.1f} GiB)",
            "make room, or let LLAMACLI_HOME name a larger disk",
        )
