import os
from pathlib import Path

import pytest

from cost_models import load_hardware
from cost_models.host import parse_cpuinfo, read_host

LINUX = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="compares with Linux's own answer")

# Two cores, two threads each.
XEON = "\n\n".join(
    f"processor\t: {processor}\nmodel name\t: Intel(R) Xeon(R) CPU @ 2.20GHz\ncpu MHz\t\t: 800.0\n"
    f"physical id\t: 0\ncore id\t\t: {core}\nflags\t\t: fpu avx2 fma avx512f amx_bf16"
    for processor, core in enumerate((0, 1, 0, 1))
)
GRAVITON = "\n\n".join(f"processor\t: {i}\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd fphp" for i in range(3))


def test_two_threads_of_a_core_count_as_one_core():
    assert parse_cpuinfo(XEON, usable=None).num_cores == 2


def test_only_usable_processors_are_counted():
    assert parse_cpuinfo(XEON, usable={0, 2}).num_cores == 1


def test_the_nominal_clock_wins_over_the_momentary_one():
    assert parse_cpuinfo(XEON, usable=None).clock_hz == 2.2e9


def test_without_a_nominal_clock_the_highest_listed_one_counts():
    text = (
        "processor: 0\nmodel name: EPYC\ncpu MHz: 1500.0\n\nprocessor: 1\nmodel name: EPYC\ncpu MHz: 2450.0"
    )
    assert parse_cpuinfo(text, usable=None).clock_hz == 2.45e9


@pytest.mark.parametrize(
    ("text", "vector_units", "has_amx"),
    [
        (XEON, "avx512", True),
        (XEON.replace("avx512f amx_bf16", ""), "avx2", False),
        (GRAVITON, "neon", False),
        ("processor: 0\nflags: fpu sse2", None, False),
        ("", None, False),
    ],
)
def test_the_widest_vector_units_are_found(text: str, vector_units: str | None, has_amx: bool):
    info = parse_cpuinfo(text, usable=None)
    assert (info.vector_units, info.has_amx_bfloat16) == (vector_units, has_amx)


def test_an_arm_kernel_without_core_ids_lists_one_core_a_processor():
    info = parse_cpuinfo(GRAVITON, usable=None)
    assert (info.num_cores, info.clock_hz) == (3, None)


def test_the_memory_limit_of_a_container_counts():
    def read(path: Path) -> str:
        return "1048576\n" if path.name == "memory.max" else ""

    host = read_host(read)
    assert host.memory_bytes == 1_048_576
    assert "container" in host.sources["memory_bytes"]


@pytest.mark.parametrize("limit", ["max", "9223372036854771712", ""])
def test_no_memory_limit_means_the_physical_memory(limit: str):
    host = read_host(lambda path: limit if "memory" in path.name else "")
    assert host.memory_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@LINUX
def test_a_system_without_any_file_still_has_cores():
    host = read_host(lambda path: "")
    assert host.num_cores == len(os.sched_getaffinity(0))
    assert host.clock_hz is None


def test_the_base_frequency_of_the_kernel_wins():
    assert read_host(lambda path: "2900000\n" if path.name == "base_frequency" else "").clock_hz == 2.9e9


@LINUX
def test_host_is_this_machine_and_states_its_sources():
    spec = load_hardware("host")
    assert (spec.name, spec.kind) == ("host", "cpu")
    assert spec.num_cores is not None
    assert 1 <= spec.num_cores <= len(os.sched_getaffinity(0))
    assert 0 < spec.memory_bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert {"clock_hz", "num_cores", "memory_bytes", "memory_bytes_per_s"} <= set(spec.sources)
