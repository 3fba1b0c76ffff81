from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models import (
    Efficiency,
    HardwareSpec,
    Roofline,
    Work,
    energy_j,
    known_hardware,
    load_hardware,
    power_utilization,
    step_energy_j,
    work_energy_j,
)

FULL = Efficiency(compute=1.0, memory=1.0, source="round numbers for the test")
# 100 FLOP/s, 10 B/s, 1 s to launch; 20 W at rest, 100 W at work.
DEVICE = HardwareSpec(
    name="round",
    kind="gpu",
    peak_flop_per_s={"float32": 100.0},
    memory_bytes=2**30,
    memory_bytes_per_s=10.0,
    launch_latency_s=1.0,
    power_watts=100.0,
    idle_power_watts=20.0,
    efficiency={"matmul": FULL, "copy": FULL},
)
VIEW = Work(0.0, 0, 0, "float32", "view")


def joules_of(work: Work, spec: HardwareSpec = DEVICE) -> float:
    """What the work takes in the time of its roofline."""
    return work_energy_j(work, time_s=Roofline(spec).time_s(work), hardware=spec)


@pytest.mark.parametrize(("busy", "joules"), [(0.0, 40.0), (0.5, 120.0), (1.0, 200.0)])
def test_power_rises_from_rest_to_board_power(busy: float, joules: float):
    # 2 s at 20, 60 and 100 W.
    assert energy_j(2.0, hardware=DEVICE, utilization=busy) == joules


@pytest.mark.parametrize(
    ("work", "joules"),
    [
        # 900 FLOP: 9 s of arithmetic and 1 s of launch, 0.9 busy: 10 s * (20 + 80 * 0.9) W.
        (Work(900.0, 0, 0, "float32", "matmul"), 920.0),
        # 90 B: 9 s of memory and 1 s of launch, 0.9 * 0.63 = 0.567 busy: 10 s * (20 + 80 * 0.567) W.
        (Work(0.0, 90, 0, "float32", "copy"), 653.6),
        # 300 FLOP beside 90 B: 10 s, (3 + 5.67) / 10 = 0.867 busy: 10 s * (20 + 80 * 0.867) W.
        (Work(300.0, 90, 0, "float32", "matmul"), 893.6),
        # 900 FLOP beside 90 B would be (9 + 5.67) / 10 busy: the board holds 100 W.
        (Work(900.0, 90, 0, "float32", "matmul"), 1000.0),
        # A launch alone: 1 s at rest.
        (Work(0.0, 0, 0, "float32", "copy"), 20.0),
        (VIEW, 0.0),
    ],
)
def test_work_takes_the_energy_computed_by_hand(work: Work, joules: float):
    # Sums and products of decimal fractions are rounded a few times.
    assert joules_of(work) == pytest.approx(joules, rel=1e-12)


def test_work_that_takes_longer_than_its_roofline_draws_less_power_for_longer():
    # 9 s of arithmetic in 20 s: 0.45 busy: 20 s * (20 + 80 * 0.45) W.
    work = Work(900.0, 0, 0, "float32", "matmul")
    assert work_energy_j(work, time_s=20.0, hardware=DEVICE) == pytest.approx(1120.0, rel=1e-12)


def test_what_is_done_one_after_the_other_keeps_one_core_busy():
    serial = Efficiency(compute=1.0, memory=1.0, source="round numbers for the test", serial_s=1.0)
    cores = replace(DEVICE, kind="cpu", num_cores=4, efficiency={"random": serial})
    # 9 s of numbers and 1 s of launch: arithmetic 0.09 s, and 9 s of one core in four: 10 s * (20 + 80 * 0.234) W.
    assert joules_of(Work(9.0, 0, 0, "float32", "random"), cores) == pytest.approx(387.2, rel=1e-12)


def test_a_step_rests_while_it_waits_for_messages():
    # 4 ranks, 500 J each, and 10 s at 20 W each.
    assert step_energy_j(500.0, hardware=DEVICE, exposed_s=10.0, world_size=4) == 2800.0
    assert step_energy_j(500.0, hardware=DEVICE, exposed_s=0.0) == 500.0


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: energy_j(-1.0, hardware=DEVICE, utilization=0.0),
            "time_s must be finite and at least 0: got -1.0",
        ),
        (
            lambda: energy_j(1.0, hardware=DEVICE, utilization=1.5),
            r"utilization must lie in \[0, 1\]: got 1.5",
        ),
        (
            lambda: power_utilization(Roofline(DEVICE).estimate(VIEW), time_s=float("inf"), hardware=DEVICE),
            "time_s must be finite and at least 0: got inf",
        ),
        (
            lambda: step_energy_j(-1.0, hardware=DEVICE, exposed_s=0.0),
            "compute_j must be finite and at least 0",
        ),
        (
            lambda: step_energy_j(1.0, hardware=DEVICE, exposed_s=-1.0),
            "time_s must be finite and at least 0: got -1.0",
        ),
        (
            lambda: step_energy_j(1.0, hardware=DEVICE, exposed_s=0.0, world_size=0),
            "world_size must be at least 1: got 0",
        ),
    ],
)
def test_impossible_times_and_fractions_are_refused(call, sentence: str):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        call()


@pytest.mark.parametrize("name", known_hardware())
def test_no_device_leaves_the_range_from_rest_to_board_power(name: str):
    spec = load_hardware(name)
    for work in (
        Work(1e12, 10**6, 10**6, "float32", "matmul"),
        Work(1e6, 10**8, 10**8, "float32", "elementwise"),
        Work(1e9, 10**8, 0, "bfloat16", "attention"),
    ):
        watts = joules_of(work, spec) / Roofline(spec).time_s(work)
        assert spec.idle_power_watts <= watts <= spec.power_watts * (1 + 1e-12)


def test_a_large_product_on_an_a100_takes_the_energy_computed_by_hand():
    # n = 8192 in bfloat16: 4.405 ms of arithmetic, 0.24 ms of memory beside it, 3.8 us of launch. Arithmetic and
    # memory together would exceed board power, so 4.409 ms at 400 W.
    a100 = load_hardware("a100-80gb")
    side_bytes = 2 * 8192**2
    work = Work(2.0 * 8192**3, 2 * side_bytes, side_bytes, "bfloat16", "matmul")
    assert joules_of(work, a100) == pytest.approx(1.7635, rel=1e-4)


@given(st.floats(0, 1e15), st.integers(0, 10**12), st.integers(0, 10**12))
def test_more_work_never_takes_less_energy(flop: float, read_bytes: int, more: int):
    less = joules_of(Work(flop, read_bytes, 0, "float32", "matmul"))
    for larger in (
        Work(flop + more, read_bytes, 0, "float32", "matmul"),
        Work(flop, read_bytes + more, 0, "float32", "matmul"),
    ):
        # The last digits of the two sums may differ.
        assert joules_of(larger) >= less * (1 - 1e-12)
