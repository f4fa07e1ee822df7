"""Where a model computes: how many of its layers go to a GPU, and what to say where none can.

Knows the GPUs by what it is told of them, and loads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llamacli.choices import Choice
from llamacli.engine import memory
from llamacli.engine.bindings import VERSION
from llamacli.errors import UsageError
from llamacli.machine import Gpu

if TYPE_CHECKING:
    from llamacli.engine.devices import Device
    from llamacli.launch import Launch, Notice

GPU_BUILD = (
    "rebuild the bindings for it: CMAKE_ARGS=-DGGML_{backend}=on "
    "pip install --force-reinstall --no-cache-dir llama-cpp-python=={version}"
)
BACKENDS = {"nvidia": "CUDA", "amd": "HIP", "intel": "VULKAN", "apple": "METAL"}


def place(launch: Launch, devices: Sequence[Device], present: Sequence[Gpu], notice: Notice) -> int:
    """How many layers go to a GPU; -1 is all of them.

    devices   GPUs that this build of llama.cpp can use
    present   GPUs that the operating system shows

    Raises UsageError where a GPU is required and cannot be had.
    """
    from llamacli.engine.devices import placed_on

    if not devices:
        return _without_gpu(launch, present, notice)
    devices = placed_on(devices)
    launch.n_devices = len(devices)
    wish = launch.settings.gpu_layers
    n_all = launch.header.n_layer + 1  # the output layer counts as one
    layers, why = _layers(launch, devices, wish, n_all)
    launch.choices["gpu_layers"] = Choice(layers, why)
    if layers == 0:
        if launch.settings.require_gpu:
            raise UsageError(f"--require-gpu, but no layer can be placed on the GPU: {why}")
        if wish != "0":
            notice(f"running on the CPU: {why}, not enough for one layer")
        return 0
    names = ", ".join(device.description or device.name for device in devices)
    launch.device = f"{names} ({layers}/{n_all} layers)"
    if layers < n_all and wish == "auto":
        notice(f"{layers} of {n_all} layers on the GPU, the others on the CPU: {why}")
    return -1 if layers == n_all else layers


def _layers(launch: Launch, devices: Sequence[Device], wish: str, n_all: int) -> tuple[int, str]:
    if wish == "all":
        return n_all, "as set"
    if wish != "auto":
        return min(int(wish), n_all), "as set"
    free, n, kv = sum(device.free for device in devices), len(devices), launch.settings.kv_type
    launch.device_bytes = memory.device_room(free, n)
    layers = memory.gpu_layers_that_fit(launch.header, free, launch.n_limit, type_k=kv, type_v=kv, n_devices=n)
    return min(layers, n_all), f"{free / 2**30:.1f} GiB of GPU memory are free"


def _without_gpu(launch: Launch, present: Sequence[Gpu], notice: Notice) -> int:
    settings = launch.settings
    launch.choices["gpu_layers"] = Choice(0, "this build of llama.cpp has no GPU backend")
    backend = BACKENDS.get(present[0].vendor, "VULKAN") if present else "CUDA"
    remedy = GPU_BUILD.format(backend=backend, version=VERSION)
    if settings.require_gpu:
        raise UsageError(f"--require-gpu, but this build of llama.cpp can use none: {remedy}")
    if present and settings.gpu_layers != "0":
        notice(f"running on the CPU: {present[0].name} is here, but this build of llama.cpp cannot use it; {remedy}")
    elif settings.gpu_layers not in ("auto", "0"):
        notice(f"running on the CPU: --gpu-layers {settings.gpu_layers} has no effect, this build has no GPU backend")
    return 0
