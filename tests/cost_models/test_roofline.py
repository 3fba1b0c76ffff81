from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models import CostModel, Efficiency, HardwareSpec, Roofline, Work, load_hardware

HALF = Efficiency(compute=0.5, memory=0.25, source="round numbers for the test")
# Matrix units 1000 FLOP/s in bfloat16, 100 in float32; 400 B/s; 1 s to launch.
DEVICE = HardwareSpec(
    name="round",
    kind="gpu",
    peak_flop_per_s={"float32": 100.0, "bfloat16": 1000.0},
    memory_bytes=2**30,
    memory_bytes_per_s=400.0,
    launch_latency_s=1.0,
    power_watts=100.0,
    idle_power_watts=20.0,
    efficiency={"matmul": HALF, "elementwise": HALF},
)
MODEL = Roofline(DEVICE)


def test_a_compute_bound_matmul_takes_its_flop_over_the_reachable_rate():
    # 2000 / (0.5 * 1000) = 4 s; memory 100 / (0.25 * 400) = 1 s; plus 1 s launch.
    estimate = MODEL.estimate(Work(2000.0, 60, 40, "bfloat16", "matmul"))
    assert (estimate.compute_s, estimate.memory_s, estimate.time_s) == (4.0, 1.0, 5.0)
    assert estimate.bound == "compute"


def test_a_memory_bound_matmul_takes_its_bytes_over_the_reachable_bandwidth():
    # 600 / (0.25 * 400) = 6 s; 500 / (0.5 * 1000) = 1 s; plus 1 s launch.
    estimate = MODEL.estimate(Work(500.0, 400, 200, "bfloat16", "matmul"))
    assert (estimate.time_s, estimate.bound) == (7.0, "memory")


def test_elementwise_work_does_not_use_the_matrix_units():
    # bfloat16 additions run at 100 FLOP/s, as float32: 100 / (0.5 * 100) = 2 s, plus 1 s.
    assert MODEL.time_s(Work(100.0, 0, 0, "bfloat16", "elementwise")) == 3.0


def test_a_view_is_free():
    estimate = MODEL.estimate(Work(0.0, 0, 0, "float32", "view"))
    assert (estimate.time_s, estimate.bound) == (0.0, "none")


def test_an_empty_operation_costs_its_launch():
    estimate = MODEL.estimate(Work(0.0, 0, 0, "float32", "elementwise"))
    assert (estimate.time_s, estimate.bound) == (1.0, "launch")


def test_a_missing_rate_is_named_in_the_estimate():
    # float16 is not listed: 100 / (0.5 * 100) = 2 s at the float32 rate, plus 1 s.
    estimate = MODEL.estimate(Work(100.0, 0, 0, "float16", "matmul"))
    assert (estimate.rate_dtype, estimate.time_s) == ("float32", 3.0)


def test_a_kind_without_its_own_efficiency_takes_the_default_of_the_device_kind():
    # Default for attention on a GPU: 0.5 of 1000, so 500 FLOP take 1 s, plus 1 s.
    assert MODEL.time_s(Work(500.0, 0, 0, "bfloat16", "attention")) == 2.0


def test_what_waits_for_the_one_before_takes_its_seconds_one_after_the_other():
    serial = Efficiency(compute=0.5, memory=0.25, source="round numbers for the test", serial_s=0.5)
    estimate = Roofline(replace(DEVICE, efficiency={"random": serial})).estimate(
        Work(8.0, 0, 200, "float32", "random")
    )
    # 8 * 0.5 = 4 s; 200 / (0.25 * 400) = 2 s; 8 / (0.5 * 100) = 0.16 s; plus 1 s.
    assert (estimate.serial_s, estimate.memory_s, estimate.time_s) == (4.0, 2.0, 5.0)
    assert estimate.bound == "serial"


@pytest.mark.parametrize("name", ["cpu-x86-avx2", "cpu-x86-avx512", "cpu-arm-neon"])
def test_neither_cores_nor_narrow_numbers_make_a_processor_draw_faster(name: str):
    core = load_hardware(name)
    # A million numbers at 7 ns, and 2 us for the call: a mask reads what gives it its layout, the others nothing.
    for work in (
        Work(1e6, 0, 4 * 10**6, "float32", "random"),
        Work(1e6, 4 * 10**6, 4 * 10**6, "float32", "random"),
        Work(1e6, 0, 2 * 10**6, "bfloat16", "random"),
        Work(1e6, 0, 8 * 10**6, "int64", "random"),
    ):
        for spec in (core, core.with_num_cores(8)):
            assert Roofline(spec).time_s(work) == pytest.approx(7.002e-3, rel=1e-9)


def test_a_matmul_of_the_half_performance_size_runs_at_half_speed():
    # 1 s * 0.5 * 1000 FLOP/s = 500 FLOP: 1 s of arithmetic and 1 s of launch.
    assert MODEL.half_performance_flop("bfloat16") == 500.0
    assert MODEL.time_s(Work(500.0, 0, 0, "bfloat16", "matmul")) == 2.0


def test_a_large_matmul_of_a_real_device_takes_the_time_computed_by_hand():
    # n = 8192 in bfloat16 on an A100: 2 * 8192**3 = 1.0995e12 FLOP / (0.8 * 312e12) = 4.405 ms + 3.8 us.
    side_bytes = 2 * 8192**2
    work = Work(2.0 * 8192**3, 2 * side_bytes, side_bytes, "bfloat16", "matmul")
    assert Roofline(load_hardware("a100-80gb")).time_s(work) == pytest.approx(4.409e-3, rel=1e-3)


def test_roofline_is_a_cost_model():
    model: CostModel = MODEL
    assert model.name == "roofline"


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9))
def test_more_work_never_takes_less_time(flop: int, read_bytes: int, more: int):
    work = Work(float(flop), read_bytes, 0, "float32", "matmul")
    for larger in (
        Work(float(flop + more), read_bytes, 0, "float32", "matmul"),
        Work(float(flop), read_bytes + more, 0, "float32", "matmul"),
        Work(float(flop), read_bytes, more, "float32", "matmul"),
    ):
        assert MODEL.time_s(larger) >= MODEL.time_s(work)
