"""What every spec file must satisfy; a new file is found by its name."""

import itertools
import tomllib
from pathlib import Path

import pytest

import cost_models
from cost_models import WORK_KINDS, Roofline, Work, known_hardware, load_hardware
from cost_models.hardware import RANGES
from cost_models.spec_file import range_of

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
        *("h100-pcie", "h200", "b200", "rtx-3090", "rtx-4090", "mi250x-gcd", "mi300x", "jetson-orin"),
        *("tpu-v4", "tpu-v5e"),
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
def test_a_dense_rate_is_about_half_of_the_sparse_one(name: str):
    spec = load_hardware(name)
    for dtype, sparse in spec.sparse_flop_per_s.items():
        # Two of four weights are zero, so twice the speed; vendors round either figure.
        assert spec.peak_flop_per_s[dtype] == pytest.approx(sparse / 2, rel=0.02), dtype


@pytest.mark.parametrize("name", NAMES)
def test_numbers_lie_in_the_range_of_real_devices(name: str):
    spec = load_hardware(name)
    assert 1e9 <= spec.memory_bytes <= 1e12
    assert 1e9 <= spec.memory_bytes_per_s <= 2e13
    assert 1e-7 <= spec.launch_latency_s <= 1e-3
    assert all(1e9 <= rate <= 1e16 for rate in spec.peak_flop_per_s.values())
    assert all(1e9 <= link.bytes_per_s <= spec.memory_bytes_per_s for link in spec.links.values())
    assert all(1e-7 <= link.latency_s <= 1e-4 for link in spec.links.values())
    assert 1 <= spec.power_watts <= 2000
    # Nothing is off while it is held, and nothing at rest draws half of what it draws at work.
    assert 0.1 * spec.power_watts <= spec.idle_power_watts <= 0.5 * spec.power_watts


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_a_file_has_a_range(name: str):
    table = tomllib.loads((SPECS / f"{name}.toml").read_text())
    assert all(range_of(dotted, RANGES) is not None for dotted in numbers(table))


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_where_the_device_has_neighbours(name: str):
    spec = load_hardware(name)
    alone = {"jetson-orin": {"host"}}  # one to a board
    usual = {"cpu": {"peer"}, "gpu": {"host", "peer"}, "tpu": {"host", "peer"}}
    assert set(spec.links) == alone.get(name, usual[spec.kind])


@pytest.mark.parametrize("name", known_hardware())
def test_every_kind_of_work_has_a_time_on_every_device(name: str):
    model = Roofline(load_hardware(name))
    for kind in WORK_KINDS:
        is_view = kind == "view"
        work = Work(0.0 if is_view else 1e6, 0 if is_view else 10**6, 0, "float32", kind)  # pyright: ignore[reportArgumentType]
        assert (model.time_s(work) > 0) == (not is_view)


def test_no_two_devices_are_equal_in_every_number():
    tables = {name: tomllib.loads((SPECS / f"{name}.toml").read_text()) for name in NAMES}
    for left, right in itertools.combinations(NAMES, 2):
        assert numbers(tables[left]) != numbers(tables[right]), f"{left} and {right}"


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
        ("mi250x-gcd", 64e9, 1638.4e9, 47.85e12, 191.5e12),
        ("mi300x", 192e9, 5300e9, 163.4e12, 1307.4e12),
        ("jetson-orin", 64e9, 204.8e9, 5.3e12, 42.5e12),
        # A float32 product is six of bfloat16: 275 / 6 and 197 / 6.
        ("tpu-v4", 32 * 2**30, 1200e9, 45.83e12, 275e12),
        ("tpu-v5e", 16e9, 819e9, 32.83e12, 197e12),
    ],
)
def test_gpus_have_the_vendors_numbers(name, memory_bytes, memory_bytes_per_s, float32, half):
    spec = load_hardware(name)
    rates = spec.peak_flop_per_s
    assert spec.memory_bytes == memory_bytes
    assert spec.memory_bytes_per_s == memory_bytes_per_s
    assert (rates["float32"], rates.get("bfloat16", rates.get("float16"))) == (float32, half)


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


@pytest.mark.parametrize(
    ("name", "power_watts"),
    [
        # Board power of the vendors' tables.
        *(("v100-16gb", 300), ("v100-32gb", 300), ("t4", 70), ("a10g", 300), ("a100-40gb", 400)),
        *(("a100-80gb", 400), ("l4", 72), ("l40s", 350), ("h100-sxm", 700), ("h100-pcie", 350)),
        *(("h200", 700), ("b200", 1000), ("rtx-3090", 350), ("rtx-4090", 450), ("mi250x-gcd", 250)),
        *(("mi300x", 750), ("tpu-v4", 192), ("jetson-orin", 60)),
        # One core: 280 W over 64, 270 W over 40, 105 W over 64.
        *(("cpu-x86-avx2", 4.375), ("cpu-x86-avx512", 6.75), ("cpu-arm-neon", 1.64)),
    ],
)
def test_devices_draw_the_power_that_their_vendor_states(name: str, power_watts: float):
    assert load_hardware(name).power_watts == power_watts
