"""Where a model computes: which layers go to which GPU, and what the user is told. The GPUs are made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llamacli import sizing
from llamacli.config import Settings
from llamacli.engine import memory
from llamacli.engine.bindings import VERSION
from llamacli.engine.devices import Device
from llamacli.errors import UsageError
from llamacli.launch import Launch, prepare
from llamacli.machine import Gpu
from llamacli.models import store
from llamacli.placing import GPU_BUILD, place

GIB = 1 << 30
NVIDIA = Gpu("nvidia", "NVIDIA H200")


def prepared(**settings: object) -> tuple[Launch, list[str]]:
    """A launch of the tiny model, and the list its notices go to."""
    notices: list[str] = []
    chosen = replace(Settings(model="tiny", threads=1), **settings)  # type: ignore[arg-type]
    return prepare(chosen, store.tiny(), notices.append), notices


def device(free: int) -> Device:
    return Device("CUDA0", "NVIDIA H200", "GPU", "CUDA", free, 140 * GIB)


def test_everything_goes_to_a_gpu_with_room_and_nobody_is_bothered() -> None:
    launch, notices = prepared()
    assert place(launch, [device(100 * GIB)], [NVIDIA], notices.append) == -1
    assert (launch.device, notices) == ("NVIDIA H200 (6/6 layers)", [])
    assert "100.0 GiB" in launch.choices["gpu_layers"].why


def test_layers_are_shared_by_all_gpus_but_those_inside_the_processor() -> None:
    inside = Device("Vulkan1", "Intel UHD", "integrated GPU", "Vulkan", 64 * GIB, 64 * GIB)
    launch, notices = prepared()
    assert place(launch, [device(3 * GIB), inside, device(2 * GIB)], [NVIDIA], notices.append) == -1
    assert (launch.device, launch.n_devices) == ("NVIDIA H200, NVIDIA H200 (6/6 layers)", 2)
    assert launch.choices["gpu_layers"].why == "5.0 GiB of GPU memory are free"
    launch, notices = prepared()
    assert place(launch, [inside], [], notices.append) == -1
    assert launch.device == "Intel UHD (6/6 layers)"


def test_a_server_on_a_gpu_holds_what_the_gpu_has_room_for() -> None:
    launch, notices = prepared()
    whole = memory.plan(launch.header, 1024, gpu_layers=-1).device.total
    assert place(launch, [device(whole * 8 // 7 + (1 << 20))], [NVIDIA], notices.append) == -1
    n_cells = sizing.served_cells(launch, 4, 12, -1, 64 * GIB, notices.append)
    assert 1024 <= n_cells < 4 * 1024
    assert "GPU memory" in launch.choices["cells"].why
    launch, notices = prepared(gpu_layers="all")  # as set: llama.cpp will say whether it is true
    place(launch, [device(whole)], [NVIDIA], notices.append)
    assert sizing.served_cells(launch, 4, 12, -1, 64 * GIB, notices.append) == 4 * 1024


def test_a_gpu_without_room_is_said_and_not_used() -> None:
    launch, notices = prepared()
    assert place(launch, [device(1 << 20)], [NVIDIA], notices.append) == 0
    assert launch.device == "CPU"
    assert len(notices) == 1 and "running on the CPU" in notices[0]


def test_as_many_layers_as_are_asked_for() -> None:
    launch, notices = prepared(gpu_layers="2")
    assert place(launch, [device(GIB)], [NVIDIA], notices.append) == 2
    assert launch.device == "NVIDIA H200 (2/6 layers)"
    launch, notices = prepared(gpu_layers="all")
    assert place(launch, [device(0)], [NVIDIA], notices.append) == -1
    launch, notices = prepared(gpu_layers="0")
    assert place(launch, [device(100 * GIB)], [NVIDIA], notices.append) == 0
    assert notices == []


def test_a_gpu_that_this_build_cannot_use_is_one_line_with_the_remedy() -> None:
    launch, notices = prepared()
    assert place(launch, [], [NVIDIA], notices.append) == 0
    assert len(notices) == 1 and "-DGGML_CUDA=on" in notices[0]
    launch, notices = prepared(gpu_layers="0")
    place(launch, [], [NVIDIA], notices.append)
    assert notices == []


@pytest.mark.parametrize("devices", [[], [device(1 << 20)]])
def test_a_required_gpu_that_cannot_be_had_is_an_error(devices: list[Device]) -> None:
    launch, notices = prepared(require_gpu=True)
    with pytest.raises(UsageError, match="--require-gpu"):
        place(launch, devices, [NVIDIA], notices.append)


def test_the_remedy_names_the_pinned_bindings() -> None:
    assert "llama-cpp-python=={version}" in GPU_BUILD
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'"llama-cpp-python=={VERSION}"' in pyproject
