"""What every spec file must satisfy; a new file is found by its name."""

import itertools
import tomllib
from pathlib import Path

import pytest

import cost_models
from cost_models import HardwareSpec, known_hardware, load_hardware

SPECS = Path(cost_models.__file__).parent / "specs"
NAMES = tuple(name for name in known_hardware() if name != "host")


def numbers(table: dict, prefix: str = "") -> dict[str, float]:
    """Dotted name -> number, for a nested table."""
    found: dict[str, float] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            found[prefix + key] = value
    return found


def source_of(table: dict, dotted: str) -> str:
    if dotted.startswith("efficiency."):  # carries its source beside its numbers
        return table["efficiency"][dotted.split(".")[1]]["source"]
    value = table["sources"]
    for key in dotted.split("."):
        value = value[key]
    return value


def test_the_promised_devices_are_there():
    promised = (
        *("v100-16gb", "v100-32gb", "t4", "a10g", "a100-40gb", "a100-80gb", "l4", "l40s", "h100-sxm"),
        *("h100-pcie", "h200", "b200", "rtx-3090", "rtx-4090"),
        *("cpu-x86-avx2", "cpu-x86-avx512", "cpu-arm-neon", "host"),
    )
    assert set(promised) <= set(known_hardware())


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_source(name: str):
    table = tomllib.loads((SPECS / f"{name}.toml").read_text())
    for dotted in numbers(table):
        assert len(source_of(table, dotted)) > 10, f"{name}: {dotted}"


@pytest.mark.parametrize("name", NAMES)
def test_no_source_is_left_of_a_number_that_is_gone(name: str):
    table = tomllib.loads((SPECS / f"{name}.toml").read_text())
    spec = load_hardware(name)
    derived = {f"peak_flop_per_s.{dtype}" for dtype in table.get("flop_per_cycle", {})}
    assert set(spec.sources) - derived <= set(numbers(table))


@pytest.mark.parametrize("name", known_hardware())
def test_dense_rates_do_not_fall_as_dtypes_narrow(name: str):
    rates = load_hardware(name).peak_flop_per_s
    present = [rates[d] for d in ("float32", "tf32", "bfloat16", "float8") if d in rates]
    assert present == sorted(present)
    if "float16" in rates and "bfloat16" in rates:
        assert rates["float16"] == rates["bfloat16"]
    assert rates.get("float64", 0) <= rates["float32"]


@pytest.mark.parametrize("name", NAMES)
def test_numbers_lie_in_the_range_of_real_devices(name: str):
    spec = load_hardware(name)
    assert 2**30 <= spec.memory_bytes <= 2**40
    assert 1e9 <= spec.memory_bytes_per_s <= 2e13
    assert 1e-7 <= spec.launch_latency_s <= 1e-4
    assert all(1e9 <= rate <= 1e16 for rate in spec.peak_flop_per_s.values())
    assert all(1e9 <= link.bytes_per_s <= spec.memory_bytes_per_s for link in spec.links.values())
    assert all(1e-7 <= link.latency_s <= 1e-4 for link in spec.links.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_has_a_link_to_its_host_and_to_its_peers(name: str):
    spec = load_hardware(name)
    assert set(spec.links) == ({"host", "peer"} if spec.kind == "gpu" else set())


def test_no_two_devices_are_equal_in_every_number():
    def key(spec: HardwareSpec):
        return (dict(spec.peak_flop_per_s), spec.memory_bytes, spec.memory_bytes_per_s)

    specs = [load_hardware(name) for name in NAMES]
    for left, right in itertools.combinations(specs, 2):
        assert key(left) != key(right), f"{left.name} and {right.name}"


@pytest.mark.parametrize(
    ("name", "memory_bytes", "memory_bytes_per_s", "float32", "half"),
    [
        # From the vendor's tables, dense; half is bfloat16, or float16 where there is none.
        ("v100-16gb", 16e9, 900e9, 15.7e12, 125e12),
        ("v100-32gb", 32e9, 900e9, 15.7e12, 125e12),
        ("t4", 16e9, 320e9, 8.1e12, 65e12),
        ("a10g", 24e9, 600e9, 35e12, 70e12),
        ("a100-40gb", 40e9, 1555e9, 19.5e12, 312e12),
        ("a100-80gb", 80e9, 2039e9, 19.5e12, 312e12),
        ("l4", 24e9, 300e9, 30.3e12, 121e12),
        ("l40s", 48e9, 864e9, 91.6e12, 362e12),
        ("h100-sxm", 80e9, 3350e9, 67e12, 989e12),
        ("h100-pcie", 80e9, 2000e9, 51e12, 756e12),
        ("h200", 141e9, 4800e9, 67e12, 989e12),
        ("b200", 180e9, 8000e9, 80e12, 2250e12),
        ("rtx-3090", 24e9, 936e9, 35.6e12, 71e12),
        ("rtx-4090", 24e9, 1008e9, 82.6e12, 165.2e12),
    ],
)
def test_gpus_have_the_vendors_numbers(name, memory_bytes, memory_bytes_per_s, float32, half):
    spec = load_hardware(name)
    rates = spec.peak_flop_per_s
    assert spec.memory_bytes == memory_bytes
    assert spec.memory_bytes_per_s == memory_bytes_per_s
    assert (rates["float32"], rates.get("bfloat16", rates["float16"])) == (float32, half)


@pytest.mark.parametrize(
    ("name", "float32"),
    [
        ("cpu-x86-avx2", 78.4e9),  # 32 FLOP a cycle * 2.45 GHz
        ("cpu-x86-avx512", 147.2e9),  # 64 * 2.3 GHz
        ("cpu-arm-neon", 40.0e9),  # 16 * 2.5 GHz
    ],
)
def test_cpu_rates_are_flop_a_cycle_times_the_clock(name: str, float32: float):
    # The product of two decimal fractions is rounded once.
    assert load_hardware(name).peak_flop_per_s["float32"] == pytest.approx(float32, rel=1e-12)
