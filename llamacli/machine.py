"""What this machine is: cores we may use, memory we may use, GPUs present. Knows nothing of models.

On Linux everything is read from files below `root`. A container's limits count as much as the hardware: llama.cpp
itself looks at neither affinity nor cgroups, and threads that have to share a core cost it a factor of ten.
"""

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")

_ENTRY = 1 << 13  # bytes that hold a CPU's entry in /proc/cpuinfo
_PCI_INTEL, _PCI_DISPLAY = "0x8086", "0x03"  # vendor; the class byte of display controllers

_X86_FEATURES = {"pni", "ssse3", "avx", "avx2", "avx_vnni", "fma", "f16c", "bmi2"}
_ARM_FEATURES = {"neon", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2", "sme", "sme2"}


@dataclass(frozen=True)
class Cores:
    """`logical` CPUs are online; we may run on `affinity` of them, which are `physical` cores.

    `cgroup_limit` is the CPU time we may use per second of wall time, None without a limit.
    """

    logical: int
    affinity: int
    physical: int
    cgroup_limit: float | None = None

    @property
    def threads(self) -> int:
        """How many threads are worth starting: one per core that we really have."""
        limit = self.physical if self.cgroup_limit is None else math.ceil(self.cgroup_limit)
        return max(1, min(self.physical, limit))


@dataclass(frozen=True)
class Memory:
    """In bytes. `cgroup_used` is what cannot be reclaimed in the group whose `cgroup_limit` is nearest."""

    total: int
    available: int
    cgroup_limit: int | None = None
    cgroup_used: int = 0

    @property
    def usable(self) -> int:
        """What can be allocated or mapped before something is killed or swapped out."""
        if self.cgroup_limit is None:
            return self.available
        return max(0, min(self.available, self.cgroup_limit - self.cgroup_used))


@dataclass(frozen=True)
class Gpu:
    """A GPU that the operating system shows. `device` is its file, None when a container was not given it."""

    vendor: str
    name: str
    device: Path | None = None


def usable_cores(root: Path = ROOT) -> Cores:
    if _is_mac(root):
        logical = _sysctl_int("hw.logicalcpu") or os.cpu_count() or 1
        # Apple's efficiency cores hold the others up: every step ends when the slowest thread does.
        physical = _sysctl_int("hw.perflevel0.physicalcpu") or _sysctl_int("hw.physicalcpu") or logical
        return Cores(logical, logical, physical)
    online, allowed = _online(root), _allowed(root)
    limits = [limit for group in _cgroups(root, "cpu") if (limit := _cpu_limit(group)) is not None]
    return Cores(len(online), len(allowed), _n_physical(root, allowed), min(limits, default=None))


def memory(root: Path = ROOT) -> Memory:
    if _is_mac(root):
        total = _sysctl_int("hw.memsize")
        return Memory(total, min(total, vm_stat_available(_output("vm_stat")) or total))
    meminfo = _table(_read(root / "proc/meminfo").replace(":", ""))
    total = meminfo.get("MemTotal", 0) * 1024
    available = meminfo.get("MemAvailable", meminfo.get("MemFree", 0)) * 1024
    groups = [room for group in _cgroups(root, "memory") if (room := _memory_room(group))]
    limit, used = min(groups, key=lambda room: room[0] - room[1], default=(None, 0))
    return Memory(total, available, limit, used)


def total_memory() -> int:
    """Bytes; the same as memory().total, in microseconds."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def gpus(root: Path = ROOT) -> tuple[Gpu, ...]:
    """Whether or not any library of ours can use them."""
    if _is_mac(root):
        return (Gpu("apple", cpu_name()),) if os.uname().machine == "arm64" else ()
    return (*_nvidia(root), *_amd(root), *_intel(root))


def cpu_name(root: Path = ROOT) -> str:
    if _is_mac(root):
        return _output("sysctl", "-n", "machdep.cpu.brand_string").strip() or os.uname().machine
    cpuinfo = _fields(_read(root / "proc/cpuinfo"))
    return cpuinfo.get("model name") or cpuinfo.get("Model") or cpuinfo.get("cpu") or os.uname().machine


def cpu_features(root: Path = ROOT) -> tuple[str, ...]:
    """The instruction sets llama.cpp has kernels for, under the kernel's names."""
    if _is_mac(root):
        return ("asimd",) if os.uname().machine == "arm64" else ()
    cpuinfo = _fields(_read(root / "proc/cpuinfo"))
    flags = cpuinfo.get("flags") or cpuinfo.get("Features", "")
    return tuple(sorted({flag for flag in flags.split() if _matters(flag)}))


def cpu(root: Path = ROOT) -> tuple[str, tuple[str, ...]]:
    """Name and features, as above, in a tenth of a millisecond: of many CPUs only the first one's entry is read."""
    if _is_mac(root):
        return cpu_name(root), cpu_features(root)
    entry = _fields(_read(root / "proc/cpuinfo", _ENTRY))
    part = f"{entry.get('CPU implementer', '')} {entry.get('CPU part', '')}".strip()
    flags = entry.get("flags") or entry.get("Features", "")
    name = entry.get("model name") or entry.get("cpu") or f"{os.uname().machine} {part}".strip()
    return name, tuple(sorted({flag for flag in flags.split() if _matters(flag)}))


def cpu_seconds(root: Path = ROOT) -> float | None:
    """What all programs together have used of the CPUs open to us since the machine began; None where nobody counts.

    Time that the hypervisor gave to other machines is in it.
    """
    total, allowed = 0, _allowed(root)
    for line in _read(root / "proc/stat").splitlines():
        name, *counts = line.split() or [""]
        if not name.startswith("cpu") or not name[3:].isdecimal() or not all(n.isdecimal() for n in counts):
            continue
        if len(counts) >= 8 and int(name[3:]) in allowed:
            # proc(5): user, nice, system, idle, iowait, irq, softirq, steal; guest time is in the first two already.
            total += sum(int(counts[i]) for i in (0, 1, 2, 5, 6, 7))
    return total / os.sysconf("SC_CLK_TCK") if total else None


def _is_mac(root: Path) -> bool:
    """A tree other than the machine's own is always read as Linux writes it."""
    return sys.platform == "darwin" and root == ROOT


def _matters(flag: str) -> bool:
    return flag in _X86_FEATURES | _ARM_FEATURES or flag.startswith(("avx512", "amx_"))


# --- cores ---


def _online(root: Path) -> set[int]:
    return _cpu_list(_read(root / "sys/devices/system/cpu/online")) or set(range(os.cpu_count() or 1))


def _allowed(root: Path) -> set[int]:
    """The CPUs that we may run on."""
    online = _online(root)
    return (_affinity(root) & online) or online


def _affinity(root: Path) -> set[int]:
    status = _read(root / "proc/self/status")
    for line in status.splitlines():
        if line.startswith("Cpus_allowed_list:"):
            return _cpu_list(line.partition(":")[2])
    # Sandboxed kernels leave the line out.
    if sys.platform != "linux":
        return set()
    return os.sched_getaffinity(0)


def _n_physical(root: Path, cpus: set[int]) -> int:
    """Hyperthreads share a core, so they count once. A CPU whose siblings are not told is a core of its own."""
    cores = set()
    for cpu in cpus:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
        cores.add(frozenset(_cpu_list(siblings) or {cpu}))
    return len(cores)


def _cpu_list(text: str) -> set[int]:
    """ "0-3,8" as the kernel writes it; nothing from what is not a list."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


# --- cgroups ---


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of our own group and of every group above it, in v2 and in the controller's v1 hierarchy."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if len(left) < 5 or len(right) < 3:
            continue
        is_v2 = right[0] == "cgroup2"
        if not is_v2 and not (right[0] == "cgroup" and controller in right[2].split(",")):
            continue
        own = _own_group(root, "" if is_v2 else controller)
        mount = root / _unescape(left[4]).lstrip("/")
        yield from _upwards(mount, Path(own), Path(_unescape(left[3])))


def _own_group(root: Path, controller: str) -> str:
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, found, path = rest.partition(":")
        if found and controller in controllers.split(","):
            return path
    return "/"


def _upwards(mount: Path, own: Path, mounted: Path) -> Iterator[Path]:
    """`mounted` is the group that the mount shows as its top: not / in a container without its own namespace."""
    below = own.relative_to(mounted) if own.is_relative_to(mounted) and ".." not in own.parts else Path()
    group = mount / below
    yield group
    while group != mount:
        group = group.parent
        yield group


def _unescape(path: str) -> str:
    return path.replace("\\040", " ")


def _cpu_limit(group: Path) -> float | None:
    quota, period = (*_read(group / "cpu.max").split(), "", "")[:2]
    if not quota:
        quota = _read(group / "cpu.cfs_quota_us").strip()
        period = _read(group / "cpu.cfs_period_us").strip()
    # No limit is "max" in v2, -1 in v1; isdecimal is false for both.
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0 or int(quota) == 0:
        return None
    return int(quota) / int(period)


def _memory_room(group: Path) -> tuple[int, int] | None:
    """(limit, bytes in use that the kernel cannot take back), or None when the group has no limit."""
    limits = [_number(group / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    # v1 writes "no limit" as the largest multiple of a page below 2^63.
    limit = min((n for n in limits if n is not None and n < 1 << 62), default=None)
    if limit is None:
        return None
    used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
    stat = _table(_read(group / "memory.stat"))
    keys = ("inactive_file", "active_file", "slab_reclaimable")
    # v1 counts the group alone under the plain names and the groups below it under total_.
    reclaimable = sum(stat.get(f"total_{key}", stat.get(key, 0)) for key in keys)
    return limit, max(0, used - reclaimable)


# --- GPUs ---


def _nvidia(root: Path) -> Iterator[Gpu]:
    names: dict[str, str] = {}
    for information in _glob(root / "proc/driver/nvidia/gpus", "*/information"):
        fields = _fields(_read(information))
        names[fields.get("Device Minor", str(len(names)))] = fields.get("Model", "NVIDIA GPU")
    devices = {file.name.removeprefix("nvidia"): file for file in _glob(root / "dev", "nvidia[0-9]*")}
    for minor in sorted({*names, *devices}, key=lambda text: (len(text), text)):
        yield Gpu("nvidia", names.get(minor, "NVIDIA GPU"), devices.get(minor))


def _amd(root: Path) -> Iterator[Gpu]:
    if not (root / "dev/kfd").exists():
        return
    for node in _glob(root / "sys/class/kfd/kfd/topology/nodes", "*"):
        properties = _table(_read(node / "properties"))
        if properties.get("simd_count", 0) > 0:
            render = root / f"dev/dri/renderD{properties.get('drm_render_minor', 0)}"
            yield Gpu("amd", _read(node / "name").strip() or "AMD GPU", render if render.exists() else None)


def _intel(root: Path) -> Iterator[Gpu]:
    """Discrete ones. The graphics inside the processor are always on PCI bus 0 and share its memory."""
    for render in _glob(root / "sys/class/drm", "renderD*"):
        vendor = _read(render / "device/vendor").strip()
        pci_class = _read(render / "device/class").strip()
        slot = _fields(_read(render / "device/uevent"), "=").get("PCI_SLOT_NAME", "0000:00:")
        if vendor == _PCI_INTEL and pci_class.startswith(_PCI_DISPLAY) and not slot.startswith("0000:00:"):
            device = root / "dev/dri" / render.name
            yield Gpu("intel", "Intel discrete GPU", device if device.exists() else None)


# --- macOS ---


def vm_stat_available(text: str) -> int:
    """Bytes that vm_stat's report counts as free or reclaimable without swapping."""
    fields = _fields(text)
    words = text.split("page size of ", 1)[-1].split()
    page = int(words[0]) if words and words[0].isdecimal() else 0
    kinds = ("Pages free", "Pages inactive", "Pages speculative", "Pages purgeable")
    return page * sum(int(n) for kind in kinds if (n := fields.get(kind, "").rstrip(".")).isdecimal())


def _sysctl_int(name: str) -> int:
    text = _output("sysctl", "-n", name).strip()
    return int(text) if text.isdecimal() else 0


def _output(*command: str) -> str:
    import subprocess  # only macOS needs it

    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


# --- files of the kernel ---


def _read(path: Path, size: int = -1) -> str:
    """A small text file, or its beginning, or nothing: what the kernel does not show is not there."""
    try:
        with path.open("rb", buffering=0) as file:
            return (file.read(size) or b"").decode("utf-8", "replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _table(text: str) -> dict[str, int]:
    """Lines of "name number", perhaps with a unit after them."""
    rows = [line.split() for line in text.splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _fields(text: str, separator: str = ":") -> dict[str, str]:
    """Lines of "name: value"; of a name that comes again the first is kept."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, found, value = line.partition(separator)
        if found:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _glob(folder: Path, pattern: str) -> list[Path]:
    """In the order of the numbers in the names."""
    try:
        return sorted(folder.glob(pattern), key=lambda path: (len(path.name), path))
    except OSError:
        return []
