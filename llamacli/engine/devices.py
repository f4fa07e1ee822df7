"""GPUs that this build of llama.cpp can use. What the operating system shows is machine.py's to say."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from llamacli.engine.bindings import bindings

_INTEGRATED = "integrated GPU"
_GPU_KINDS = {1: "GPU", 2: _INTEGRATED}  # ggml-backend.h: enum ggml_backend_dev_type


@dataclass(frozen=True, slots=True)
class Device:
    """Memory in bytes, at the time of asking."""

    name: str
    description: str
    kind: str
    backend: str
    free: int
    total: int


def placed_on(devices: Sequence[Device]) -> list[Device]:
    """Those that llama.cpp puts layers on: integrated ones only where there are no others."""
    return [each for each in devices if each.kind != _INTEGRATED] or list(devices)


def gpu_devices() -> list[Device]:
    """All of them, in llama.cpp's order, which is the order it fills them in."""
    lib = bindings().c._lib
    for function in ("ggml_backend_dev_get", "ggml_backend_dev_backend_reg"):
        getattr(lib, function).restype = ctypes.c_void_p
    for function in ("ggml_backend_dev_name", "ggml_backend_dev_description", "ggml_backend_reg_name"):
        getattr(lib, function).restype = ctypes.c_char_p
        getattr(lib, function).argtypes = [ctypes.c_void_p]
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    lib.ggml_backend_dev_type.argtypes = lib.ggml_backend_dev_backend_reg.argtypes = [ctypes.c_void_p]
    lib.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p] + [ctypes.POINTER(ctypes.c_size_t)] * 2
    lib.ggml_backend_dev_memory.restype = None
    found = []
    for i in range(lib.ggml_backend_dev_count()):
        device = lib.ggml_backend_dev_get(i)
        kind = _GPU_KINDS.get(lib.ggml_backend_dev_type(device))
        if kind is None:
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        lib.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        backend = lib.ggml_backend_reg_name(lib.ggml_backend_dev_backend_reg(device))
        name, description = lib.ggml_backend_dev_name(device), lib.ggml_backend_dev_description(device)
        texts = [(raw or b"").decode("utf-8", "replace") for raw in (name, description, backend)]
        found.append(Device(texts[0], texts[1], kind, texts[2], free.value, total.value))
    return found


def build_features() -> str:
    """What this build was compiled with and found on the CPU, in llama.cpp's words."""
    info: bytes = bindings().c.llama_print_system_info()
    return info.decode("utf-8", "replace").strip().rstrip("|").strip()


def backends() -> list[str]:
    """What this build can compute with, in llama.cpp's names: CPU, CUDA, Metal, Vulkan ..."""
    lib = bindings().c._lib
    lib.ggml_backend_reg_count.restype = ctypes.c_size_t
    lib.ggml_backend_reg_get.restype = ctypes.c_void_p
    lib.ggml_backend_reg_get.argtypes = [ctypes.c_size_t]
    lib.ggml_backend_reg_name.restype = ctypes.c_char_p
    lib.ggml_backend_reg_name.argtypes = [ctypes.c_void_p]
    names = [lib.ggml_backend_reg_name(lib.ggml_backend_reg_get(i)) for i in range(lib.ggml_backend_reg_count())]
    return [name.decode("utf-8", "replace") for name in names]
