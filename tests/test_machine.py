"""What the machine is, read from trees of files as kernels write them."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from llamacli.machine import (
    Gpu,
    cpu,
    cpu_features,
    cpu_name,
    cpu_seconds,
    gpus,
    memory,
    total_memory,
    usable_cores,
    vm_stat_available,
)

GIB = 1 << 30


def tree(root: Path, *parts: Mapping[str, object]) -> Path:
    for name, content in (item for part in parts for item in part.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def cpus(n: int, *, threads_per_core: int = 1, allowed: str | None = None) -> dict[str, object]:
    """`n` logical CPUs, numbered as Linux does: the second threads of all cores after the first ones."""
    n_cores = n // threads_per_core
    files: dict[str, object] = {"sys/devices/system/cpu/online": f"0-{n - 1}"}
    for number in range(n):
        siblings = ",".join(str(number % n_cores + i * n_cores) for i in range(threads_per_core))
        files[f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"] = siblings
    return files | {"proc/self/status": f"Name:\tpython\nCpus_allowed_list:\t{allowed or f'0-{n - 1}'}"}


V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = (
    "31 30 0:27 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "32 30 0:28 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "33 30 0:29 {top} /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset"
)


def v2(group: str, files: Mapping[str, object]) -> dict[str, object]:
    own = {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    return {"proc/self/mountinfo": V2, "proc/self/cgroup": f"0::{group}", **own}


def v1(group: str, files: Mapping[str, object], top: str = "/") -> dict[str, object]:
    own = {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    groups = f"4:memory:{group}\n3:cpuset:/\n2:cpu,cpuacct:{group}\n1:name=systemd:/elsewhere"
    return {"proc/self/mountinfo": V1.format(top=top), "proc/self/cgroup": groups, **own}


# --- cores ---


def test_hyperthreads_count_once(tmp_path: Path) -> None:
    cores = usable_cores(tree(tmp_path, cpus(8, threads_per_core=2)))
    assert (cores.logical, cores.affinity, cores.physical, cores.threads) == (8, 8, 4, 4)


def test_only_cores_within_the_affinity_are_used(tmp_path: Path) -> None:
    cores = usable_cores(tree(tmp_path, cpus(16, threads_per_core=2, allowed="0-2,8,15")))
    # 0 and 8 are one core; 1, 2 and 15 (a thread of core 7) are three more.
    assert (cores.affinity, cores.physical, cores.threads) == (5, 4, 4)


def test_a_cpu_that_is_offline_is_not_used(tmp_path: Path) -> None:
    root = tree(tmp_path, cpus(4, allowed="0-3"), {"sys/devices/system/cpu/online": "0,2"})
    assert usable_cores(root).threads == 2


def test_without_topology_every_cpu_is_a_core(tmp_path: Path) -> None:
    files = {"sys/devices/system/cpu/online": "0-5"}
    root = tree(tmp_path, files, {"proc/self/status": "Cpus_allowed_list:\t0-5"})
    assert usable_cores(root).physical == 6


@pytest.mark.parametrize(("quota", "threads"), [("200000 100000", 2), ("250000 100000", 3), ("10000 100000", 1)])
def test_a_quota_caps_the_threads_rounded_up(tmp_path: Path, quota: str, threads: int) -> None:
    cores = usable_cores(tree(tmp_path, cpus(16), v2("/", {"cpu.max": quota})))
    assert cores.threads == threads


def test_no_quota_is_no_limit(tmp_path: Path) -> None:
    cores = usable_cores(tree(tmp_path, cpus(4), v2("/job", {"job/cpu.max": "max 100000"})))
    assert (cores.cgroup_limit, cores.threads) == (None, 4)


def test_the_tightest_quota_of_all_groups_above_us_counts(tmp_path: Path) -> None:
    limits = {
        "a/cpu.max": "300000 100000",
        "a/b/cpu.max": "150000 100000",
        "a/b/c/cpu.max": "800000 100000",
    }
    assert usable_cores(tree(tmp_path, cpus(16), v2("/a/b/c", limits))).cgroup_limit == 1.5


def test_a_quota_of_cgroup_v1_counts(tmp_path: Path) -> None:
    limits = {
        "cpu,cpuacct/cpu.cfs_quota_us": -1,
        "cpu,cpuacct/cpu.cfs_period_us": 100_000,
        "cpu,cpuacct/job/cpu.cfs_quota_us": 400_000,
        "cpu,cpuacct/job/cpu.cfs_period_us": 100_000,
    }
    assert usable_cores(tree(tmp_path, cpus(16), v1("/job", limits))).cgroup_limit == 4.0


def test_a_container_without_its_own_namespace_finds_its_group_at_the_top_of_the_mount(tmp_path: Path) -> None:
    limits = {
        "cpu,cpuacct/cpu.cfs_quota_us": 200_000,
        "cpu,cpuacct/cpu.cfs_period_us": 100_000,
    }
    root = tree(tmp_path, cpus(16), v1("/docker/0a1b", limits, top="/docker/0a1b"))
    assert usable_cores(root).cgroup_limit == 2.0


def test_a_group_outside_our_namespace_is_not_followed_out_of_the_mount(tmp_path: Path) -> None:
    root = tree(tmp_path, cpus(4), v2("/../../other", {"cpu.max": "300000 100000"}))
    tree(tmp_path, {"sys/other/cpu.max": "100000 100000"})
    assert usable_cores(root).cgroup_limit == 3.0


def test_an_empty_tree_still_has_one_thread(tmp_path: Path) -> None:
    assert usable_cores(tmp_path).threads >= 1


@pytest.mark.parametrize("nonsense", ["", "garbage", "0-", "-1", "max", "100000 0", "1 2 3", "\0"])
def test_nonsense_from_the_kernel_is_no_limit_and_no_error(tmp_path: Path, nonsense: str) -> None:
    names = ["sys/fs/cgroup/cpu.max", "sys/fs/cgroup/memory.max", "sys/devices/system/cpu/online"]
    names += ["proc/meminfo", "proc/cpuinfo", "dev/kfd", "sys/class/kfd/kfd/topology/nodes/0/properties"]
    root = tree(tmp_path, v2("/", {}), dict.fromkeys(names, nonsense))
    assert usable_cores(root).threads >= 1
    assert memory(root).usable >= 0
    assert (gpus(root), cpu_features(root)) == ((), ())


def test_this_machine_has_cores_and_memory() -> None:
    cores, mem = usable_cores(), memory()
    assert 1 <= cores.threads <= cores.physical <= cores.affinity <= cores.logical
    assert 0 < mem.usable <= mem.total


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_a_process_held_to_one_cpu_starts_one_thread() -> None:
    cpu = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{cpu}]); from llamacli.machine import *; print(usable_cores().threads)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "1\n"


# --- memory ---

MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\n"


def test_without_a_group_what_is_available_is_usable(tmp_path: Path) -> None:
    found = memory(tree(tmp_path, {"proc/meminfo": MEMINFO}))
    assert (found.total, found.available, found.usable, found.cgroup_limit) == (16 * GIB, 8 * GIB, 8 * GIB, None)


def test_page_cache_counts_as_free_in_a_group(tmp_path: Path) -> None:
    group = {
        "job/memory.max": 4 * GIB,
        "job/memory.current": 4 * GIB,
        "job/memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}\nactive_file {GIB // 2}\nslab_reclaimable {GIB // 2}",
    }
    found = memory(tree(tmp_path, {"proc/meminfo": MEMINFO}, v2("/job", group)))
    assert (found.cgroup_limit, found.cgroup_used, found.usable) == (4 * GIB, GIB, 3 * GIB)


def test_a_group_with_more_room_than_the_machine_does_not_add_any(tmp_path: Path) -> None:
    group = {"memory.max": 64 * GIB, "memory.current": 0}
    assert memory(tree(tmp_path, {"proc/meminfo": MEMINFO}, v2("/", group))).usable == 8 * GIB


def test_the_group_with_the_least_room_counts_not_the_one_with_the_lowest_limit(tmp_path: Path) -> None:
    groups = {
        "a/memory.max": 6 * GIB,
        "a/memory.current": 5 * GIB,
        "a/b/memory.max": 4 * GIB,
        "a/b/memory.current": GIB,
    }
    found = memory(tree(tmp_path, {"proc/meminfo": MEMINFO}, v2("/a/b", groups)))
    assert (found.cgroup_limit, found.usable) == (6 * GIB, GIB)


def test_a_group_that_is_throttled_above_memory_high_may_use_no_more(tmp_path: Path) -> None:
    group = {"memory.max": "max", "memory.high": 2 * GIB, "memory.current": 0}
    assert memory(tree(tmp_path, {"proc/meminfo": MEMINFO}, v2("/", group))).usable == 2 * GIB


def test_a_group_over_its_limit_has_nothing_usable(tmp_path: Path) -> None:
    group = {"memory.max": GIB, "memory.current": 2 * GIB}
    assert memory(tree(tmp_path, {"proc/meminfo": MEMINFO}, v2("/", group))).usable == 0


def test_a_memory_limit_of_cgroup_v1_counts_with_the_groups_below_it(tmp_path: Path) -> None:
    group = {
        "memory/job/memory.limit_in_bytes": 2 * GIB,
        "memory/job/memory.usage_in_bytes": GIB,
        "memory/job/memory.stat": f"inactive_file 0\nactive_file 0\ntotal_inactive_file {GIB // 2}",
        "memory/memory.limit_in_bytes": 9223372036854771712,  # how v1 writes "none"
    }
    found = memory(tree(tmp_path, {"proc/meminfo": MEMINFO}, v1("/job", group)))
    assert (found.cgroup_limit, found.usable) == (2 * GIB, GIB + GIB // 2)


def test_the_largest_number_of_cgroup_v1_is_no_limit(tmp_path: Path) -> None:
    group = {"memory/memory.limit_in_bytes": 9223372036854771712, "memory/memory.usage_in_bytes": GIB}
    assert memory(tree(tmp_path, {"proc/meminfo": MEMINFO}, v1("/", group))).cgroup_limit is None


def test_memory_of_a_mac_is_read_from_vm_stat() -> None:
    report = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               10000.\n"
        "Pages active:                            300000.\n"
        "Pages inactive:                           20000.\n"
        "Pages speculative:                         1000.\n"
        "Pages wired down:                        100000.\n"
        "Pages purgeable:                            500.\n"
        '"Translation faults":                 987654321.\n'
    )
    assert vm_stat_available(report) == 16384 * 31500
    assert vm_stat_available("") == 0


# --- GPUs ---

H200 = "Model: \t\t NVIDIA H200\nIRQ:   \t\t 57\nBus Location: \t 0000:0{n}:00.0\nDevice Minor: \t {n}"


def test_no_gpu_is_an_empty_answer(tmp_path: Path) -> None:
    assert gpus(tmp_path) == ()


def test_nvidia_gpus_are_named_by_their_driver(tmp_path: Path) -> None:
    files = {f"proc/driver/nvidia/gpus/0000:0{n}:00.0/information": H200.format(n=n) for n in range(2)}
    root = tree(tmp_path, files, {"dev/nvidia0": "", "dev/nvidia1": "", "dev/nvidiactl": "", "dev/nvidia-uvm": ""})
    assert gpus(root) == (
        Gpu("nvidia", "NVIDIA H200", root / "dev/nvidia0"),
        Gpu("nvidia", "NVIDIA H200", root / "dev/nvidia1"),
    )


def test_a_gpu_that_the_container_was_not_given_is_shown_without_a_device(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/driver/nvidia/gpus/0000:01:00.0/information": H200.format(n=1)})
    assert gpus(root) == (Gpu("nvidia", "NVIDIA H200", None),)


def test_a_device_file_alone_is_a_gpu(tmp_path: Path) -> None:
    root = tree(tmp_path, {"dev/nvidia0": ""})
    assert gpus(root) == (Gpu("nvidia", "NVIDIA GPU", root / "dev/nvidia0"),)


def test_amd_gpus_are_the_kfd_nodes_with_compute_units(tmp_path: Path) -> None:
    nodes = "sys/class/kfd/kfd/topology/nodes"
    files = {
        "dev/kfd": "",
        "dev/dri/renderD128": "",
        f"{nodes}/0/properties": "cpu_cores_count 16\nsimd_count 0\n",
        f"{nodes}/1/properties": "cpu_cores_count 0\nsimd_count 384\ndrm_render_minor 128\n",
        f"{nodes}/1/name": "gfx1100",
    }
    root = tree(tmp_path, files)
    assert gpus(root) == (Gpu("amd", "gfx1100", root / "dev/dri/renderD128"),)
    (root / "dev/kfd").unlink()
    assert gpus(root) == ()


@pytest.mark.parametrize(
    ("vendor", "pci_class", "slot", "n"),
    [
        ("0x8086", "0x030000", "0000:03:00.0", 1),
        ("0x8086", "0x038000", "0000:4d:00.0", 1),
        ("0x8086", "0x030000", "0000:00:02.0", 0),  # inside the processor
        ("0x1af4", "0x038000", "0000:03:00.0", 0),  # a virtual machine's display
    ],
)
def test_of_intels_only_discrete_gpus_count(tmp_path: Path, vendor: str, pci_class: str, slot: str, n: int) -> None:
    device = "sys/class/drm/renderD128/device"
    files = {
        f"{device}/vendor": vendor,
        f"{device}/class": pci_class,
        f"{device}/uevent": f"DRIVER=xe\nPCI_CLASS=30000\nPCI_SLOT_NAME={slot}",
    }
    assert len(gpus(tree(tmp_path, files))) == n


# --- the processor ---


def test_only_instruction_sets_that_matter_are_named(tmp_path: Path) -> None:
    flags = "fpu sse2 ssse3 fma f16c avx avx2 smep avx512f avx512_bf16 amx_int8 vmx"
    root = tree(tmp_path, {"proc/cpuinfo": f"processor\t: 0\nmodel name\t: Xeon  8592+\nflags\t\t: {flags}\n"})
    assert cpu_name(root) == "Xeon  8592+"
    assert cpu_features(root) == ("amx_int8", "avx", "avx2", "avx512_bf16", "avx512f", "f16c", "fma", "ssse3")


def test_an_arm_processor_has_features_too(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd aes asimddp sve i8mm\n"})
    assert cpu_features(root) == ("asimd", "asimddp", "i8mm", "sve")
    assert cpu_name(root) == os.uname().machine


def test_importing_brings_in_nothing_heavy() -> None:
    code = "import sys, llamacli.machine; print({'subprocess', 'ctypes', 'numpy', 'psutil'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


# --- whose time it is ---


def test_the_first_entry_names_the_processor_however_many_follow(tmp_path: Path) -> None:
    entry = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 fma avx512f\n\n"
    tree(tmp_path, {"proc/cpuinfo": entry + 4000 * "processor\t: 1\nmodel name\t: Other\nflags\t\t: avx\n\n"})
    assert cpu(tmp_path) == ("Some CPU", ("avx2", "avx512f", "fma"))
    assert cpu(tmp_path) == (cpu_name(tmp_path), cpu_features(tmp_path))


def test_a_processor_without_a_name_is_told_by_its_numbers(tmp_path: Path) -> None:
    tree(tmp_path, {"proc/cpuinfo": "processor : 0\nFeatures : fp asimd\nCPU implementer : 0x41\nCPU part : 0xd0c"})
    name, features = cpu(tmp_path)
    assert name.endswith("0x41 0xd0c") and features == ("asimd",)


def test_time_of_cpus_that_are_not_ours_does_not_count_and_stolen_time_does(tmp_path: Path) -> None:
    stat = "cpu 9 9 9 9 9 9 9 9 9 9\ncpu0 100 20 30 9999 9999 4 5 1000 50 60\ncpu1 7777 0 0 0 0 0 0 0 0 0\nintr 5 0 0"
    tree(tmp_path, cpus(2, allowed="0"), {"proc/stat": stat})
    ticks = os.sysconf("SC_CLK_TCK")
    assert cpu_seconds(tmp_path) == pytest.approx((100 + 20 + 30 + 4 + 5 + 1000) / ticks)


@pytest.mark.parametrize("stat", ["", "cpu0", "cpu0 a b c d e f g h", "cpu0 0 0 0 0 0 0 0 0 0 0"])
def test_where_nobody_counts_there_is_no_time(stat: str, tmp_path: Path) -> None:
    assert cpu_seconds(tree(tmp_path, cpus(1), {"proc/stat": stat})) is None


def test_the_memory_of_this_machine_is_what_the_kernel_says() -> None:
    if sys.platform == "linux":
        assert total_memory() == pytest.approx(memory().total, rel=0.01)
