"""What this machine says about itself: cores, clock, vector instructions, memory. No device library."""

import os
import platform
import re
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

VectorUnits = Literal["avx512", "avx2", "neon"]

_CPUINFO = Path("/proc/cpuinfo")
_BASE_FREQUENCY = Path("/sys/devices/system/cpu/cpu0/cpufreq/base_frequency")  # kHz, only on some machines
_MEMORY_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),  # cgroup v2, inside a container
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),  # cgroup v1
)


@dataclass(frozen=True)
class CpuInfo:
    """What a text in the format of /proc/cpuinfo says.

    Args:
        num_cores: physical cores among the usable logical processors; None where the text lists no cores.
        clock_hz: nominal clock of the model name, else the highest listed; None where none is listed.
        vector_units: widest family that the flags list; None where they list none of the three.
        has_amx_bfloat16: whether the flags list matrix units for bfloat16.
    """

    num_cores: int | None
    clock_hz: float | None
    vector_units: VectorUnits | None
    has_amx_bfloat16: bool


@dataclass(frozen=True)
class Host:
    """This machine, with a word beside each number on how it was found.

    Args:
        num_cores: physical cores that this process may use.
        clock_hz: nominal clock; None where the system does not tell.
        vector_units: widest vector family; None where the system does not tell.
        has_amx_bfloat16: whether there are matrix units for bfloat16.
        memory_bytes: physical memory, or the limit of the container; None where the system does not tell.
        sources: field -> how it was found.
    """

    num_cores: int
    clock_hz: float | None
    vector_units: VectorUnits | None
    has_amx_bfloat16: bool
    memory_bytes: int | None
    sources: dict[str, str]


def parse_cpuinfo(text: str, *, usable: Set[int] | None) -> CpuInfo:
    """Read a text in the format of /proc/cpuinfo.

    Two logical processors of one core share its vector units, so cores are counted, not processors.

    Args:
        text: the content.
        usable: logical processors to look at; None means all.
    """
    cores: set[tuple[str, str]] = set()
    clocks_hz: list[float] = []
    flags: set[str] = set()
    for block in text.strip().split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        fields = {key.strip(): value.strip() for key, _, value in pairs}
        if "processor" not in fields or (usable is not None and int(fields["processor"]) not in usable):
            continue
        # A virtual machine or an Arm kernel may list no core id: then each processor is a core.
        cores.add((fields.get("physical id", ""), fields.get("core id", "processor " + fields["processor"])))
        flags.update(fields.get("flags", fields.get("Features", "")).split())
        nominal = re.search(r"@ ([\d.]+)GHz", fields.get("model name", ""))
        if nominal:
            clocks_hz.append(float(nominal[1]) * 1e9)
        elif "cpu MHz" in fields:
            clocks_hz.append(float(fields["cpu MHz"]) * 1e6)
    vector_units: VectorUnits | None = None
    if "avx512f" in flags:
        vector_units = "avx512"
    elif "avx2" in flags:
        vector_units = "avx2"
    elif "asimd" in flags:
        vector_units = "neon"
    return CpuInfo(
        num_cores=len(cores) or None,
        clock_hz=max(clocks_hz, default=0.0) or None,
        vector_units=vector_units,
        has_amx_bfloat16="amx_bf16" in flags,
    )


def _read(path: Path) -> str:
    """Content of a system file, empty where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _physical_memory_bytes() -> int | None:
    """Physical memory from sysconf, None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _usable_processors() -> frozenset[int] | None:
    """Logical processors that this process may use, None where the system does not tell."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return None if affinity is None else frozenset(affinity(0))


def num_processors() -> int:
    """How many logical processors this process may use."""
    usable = _usable_processors()
    return len(usable) if usable is not None else (os.cpu_count() or 1)


def read_host(read: Callable[[Path], str] = _read) -> Host:
    """Ask this machine for its cores, clock, vector units and memory.

    Args:
        read: content of a system file, "" where there is none.
    """
    usable = _usable_processors()
    info = parse_cpuinfo(read(_CPUINFO), usable=usable)
    sources = {
        "num_cores": "distinct cores of /proc/cpuinfo that this process may use"
        if info.num_cores
        else "logical processors: this system lists no cores",
        "clock_hz": "/proc/cpuinfo: the model name, else the highest 'cpu MHz'",
        "memory_bytes": "physical pages times page size (sysconf)",
    }
    clock_hz = info.clock_hz
    base_khz = read(_BASE_FREQUENCY).strip()
    if base_khz.isdigit():
        clock_hz, sources["clock_hz"] = int(base_khz) * 1e3, "cpufreq base_frequency"
    memory_bytes = _physical_memory_bytes()
    limits = [int(limit) for path in _MEMORY_LIMITS if (limit := read(path).strip()).isdigit()]
    if memory_bytes is not None and limits and min(limits) < memory_bytes:
        memory_bytes, sources["memory_bytes"] = min(limits), "memory limit of this process's container"
    return Host(
        num_cores=info.num_cores or num_processors(),
        clock_hz=clock_hz,
        # Every 64-bit Arm has NEON, also where there is no /proc/cpuinfo to say so.
        vector_units=info.vector_units or ("neon" if platform.machine() in ("arm64", "aarch64") else None),
        has_amx_bfloat16=info.has_amx_bfloat16,
        memory_bytes=memory_bytes,
        sources=sources,
    )
