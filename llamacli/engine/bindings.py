"""The one way in to llama.cpp's bindings: imported light, checked against the ABI we were built for, log kept.

Only the ctypes layer of llama-cpp-python is used. Importing it through a bare package costs about 25 ms; the
package's own __init__ would bring numpy, jinja2 and the high-level classes, and cost 200 ms.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

from llamacli.errors import EngineError

VERSION = "0.3.36"  # of llama-cpp-python; pyproject.toml pins the same

# What that version's structures measure and default to. A binding that disagrees with its library, or another
# version, shows here and not as a corrupt answer.
_SIZES = {
    "llama_model_params": 80,
    "llama_context_params": 160,
    "llama_batch": 56,
    "llama_logit_bias": 8,
    "llama_token_data": 12,
    "llama_token_data_array": 32,
}
_MODEL_DEFAULTS = {
    "n_gpu_layers": -1,
    "split_mode": 1,
    "load_mode": -1,
    "use_extra_bufts": True,
    "vocab_only": False,
}
_CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_threads": 4,
    "flash_attn_type": -1,
    "type_k": 1,
    "type_v": 1,
    "offload_kqv": True,
    "kv_unified": False,
    "n_samplers": 0,
}

_INFO, _WARN, _ERROR, _CONT = 2, 3, 4, 5  # ggml.h: enum ggml_log_level

# How often GNU's OpenMP looks whether the other threads have come before it lets the kernel wake it: 0.1 to 0.5 ms. By
# itself it looks for several ms, and where other programs share the cores it so takes the time of the very thread that
# it waits for: a step then took 5 to 10 times as long. Read when the library is loaded.
SPINS = "10000"

# Names of the CPU's extra buffer types (ggml-cpu: repack.cpp, amx.cpp, kleidiai.cpp), as the loader lists them.
_REWRITTEN = re.compile(r"\b(CPU_REPACK|AMX|CPU_KLEIDIAI) model buffer size")


class Log:
    """The last lines llama.cpp logged. It is the only place that says why a load failed.

    Kept while loading only: afterwards a native function that does nothing takes over, because llama.cpp
    logs while the interpreter is shutting down.
    """

    def __init__(self, size: int = 400) -> None:
        self.lines: deque[tuple[int, str]] = deque(maxlen=size)
        self._level = _INFO

    def append(self, level: int, text: bytes | None, _: object) -> None:
        line = (text or b"").decode("utf-8", "replace").rstrip("\n")
        if level != _CONT:
            self._level = level
        elif self.lines:
            level, last = self.lines.pop()
            self.lines.append((level, last + line))
            return
        self.lines.append((self._level, line))

    def reason(self) -> str:
        """The first error since the log was cleared, without the name of the C function that reported it."""
        for level, line in self.lines:
            if level == _ERROR and line.strip():
                _, _, said = line.partition(": ")
                return (said or line).strip()
        return "llama.cpp gave no reason"

    def rewrote_weights(self) -> bool:
        """Whether the model loaded last has weights in a buffer where the CPU keeps them in an order of its own."""
        return any(_REWRITTEN.search(line) for _, line in self.lines)


class Bindings:
    """llama_cpp's ctypes module, and handles of our own for the calls that need another treatment.

    c        the module: its functions release the GIL
    fast     the same library through PyDLL: keeps the GIL, for calls of microseconds
    log      what llama.cpp said while loading
    """

    def __init__(self) -> None:
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # else a native abort starts a debugger
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
        self.c: Any = _import_light()
        _check_abi(self.c)
        self.fast = _fast_handle(self.c)
        self.log = Log()
        self._log_callback = self.c.llama_log_callback(self.log.append)  # kept alive with us
        libc = ctypes.CDLL(None)
        # abs(level) takes the first argument and touches nothing: a logger that is safe at interpreter exit.
        self._silence = self.c.llama_log_callback(ctypes.cast(libc.abs, ctypes.c_void_p).value)
        # strlen(flag) is non-zero once the flag is set: an abort callback without the GIL, which
        # llama.cpp asks hundreds of times for each batch.
        self.abort_callback = self.c.ggml_abort_callback(ctypes.cast(libc.strlen, ctypes.c_void_p).value)
        self.keep_log()
        self.c.llama_backend_init()

    def build(self) -> str:
        """Tells one compiled llama.cpp from another: its version, and size and time of each of its libraries."""
        place = Path(self.c._lib._name).parent
        states = ((path.name, path.stat()) for path in sorted(place.iterdir()))
        return f"{VERSION} " + " ".join(f"{n}:{state.st_size}:{state.st_mtime_ns}" for n, state in states)

    def keep_log(self) -> None:
        self.log.lines.clear()
        self.c.llama_log_set(self._log_callback, None)

    def silence_log(self) -> None:
        self.c.llama_log_set(self._silence, None)


@cache
def bindings() -> Bindings:
    """The bindings, loaded once in a process. Raises EngineError if they are missing or not the ones we need."""
    return Bindings()


def installed_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return None


def _import_light() -> Any:
    spec = importlib.util.find_spec("llama_cpp") if "llama_cpp" not in sys.modules else None
    if "llama_cpp" not in sys.modules:
        if spec is None:
            raise EngineError(f"llama-cpp-python is not installed: pip install llama-cpp-python=={VERSION}")
        sys.modules["llama_cpp"] = importlib.util.module_from_spec(spec)
    try:
        import llama_cpp.llama_cpp as module
    except (OSError, RuntimeError, FileNotFoundError) as error:
        raise EngineError(
            f"llama.cpp's library does not load ({error}): "
            f"pip install --force-reinstall --no-cache-dir llama-cpp-python=={VERSION}"
        ) from error
    return module


def _check_abi(c: Any) -> None:
    problems = [
        f"{name} has {ctypes.sizeof(getattr(c, name))} bytes, not {size}"
        for name, size in _SIZES.items()
        if ctypes.sizeof(getattr(c, name)) != size
    ]
    for params, expected in (
        (c.llama_model_default_params(), _MODEL_DEFAULTS),
        (c.llama_context_default_params(), _CONTEXT_DEFAULTS),
    ):
        problems += [
            f"{name} is {getattr(params, name)} by default, not {value}"
            for name, value in expected.items()
            if getattr(params, name) != value
        ]
    if problems:
        raise EngineError(
            f"llama-cpp-python {installed_version()} is not the {VERSION} this program drives ({problems[0]}): "
            f"pip install llama-cpp-python=={VERSION}"
        )


def _fast_handle(c: Any) -> ctypes.PyDLL:
    fast = ctypes.PyDLL(c._lib._name)
    fast.llama_sampler_sample.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32]
    fast.llama_sampler_sample.restype = ctypes.c_int32
    fast.llama_get_logits_ith.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    fast.llama_get_logits_ith.restype = ctypes.c_void_p
    fast.llama_token_to_piece.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_char_p,
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.c_bool,
    ]
    fast.llama_token_to_piece.restype = ctypes.c_int32
    fast.llama_vocab_is_eog.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    fast.llama_vocab_is_eog.restype = ctypes.c_bool
    for name in ("llama_sampler_apply", "llama_sampler_accept"):
        getattr(fast, name).restype = None
    fast.llama_sampler_apply.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    fast.llama_sampler_accept.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    return fast
