import pickle
from dataclasses import replace

import pytest

from cost_models import (
    DTYPES,
    Efficiency,
    HardwareSpec,
    LinkSpec,
    UnknownHardwareError,
    known_hardware,
    load_hardware,
)

GPU = HardwareSpec(
    name="round",
    kind="gpu",
    peak_flop_per_s={"float32": 100.0, "bfloat16": 1000.0, "float8": 2000.0, "int8": 3000.0},
    memory_bytes=2**30,
    memory_bytes_per_s=400.0,
    launch_latency_s=1.0,
    power_watts=100.0,
    idle_power_watts=20.0,
    sparse_flop_per_s={"bfloat16": 2000.0},
)
CPU = HardwareSpec(
    name="core",
    kind="cpu",
    peak_flop_per_s={"float32": 10.0},
    memory_bytes=7,
    memory_bytes_per_s=4.0,
    launch_latency_s=1.0,
    power_watts=5.0,
    idle_power_watts=1.0,
    num_cores=1,
    socket_memory_bytes_per_s=10.0,
)


def test_an_unknown_name_is_answered_with_all_known_names():
    with pytest.raises(UnknownHardwareError) as refusal:
        load_hardware("H100")
    assert str(refusal.value).startswith(
        "no hardware is named 'H100'. Did you mean 'h100-pcie' or 'h100-sxm'? "
    )
    assert all(name in str(refusal.value) for name in known_hardware())
    assert isinstance(refusal.value, ValueError)


@pytest.mark.parametrize("name", ["../specs/t4", "T4", ""])
def test_only_exact_names_are_taken(name: str):
    with pytest.raises(UnknownHardwareError):
        load_hardware(name)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kind": "npu"}, "kind must be 'cpu', 'gpu' or 'tpu': got 'npu'"),
        ({"power_watts": 0.0}, "power_watts must be positive and finite: got 0.0"),
        ({"idle_power_watts": 101.0}, "idle_power_watts must be at most power_watts, 100 W: got 101.0"),
        (
            {"sparse_flop_per_s": {"bfloat16": 999.0}},
            "peak_flop_per_s.bfloat16 must be at most the sparse rate, 999 FLOP/s: got 1000",
        ),
        ({"sparse_flop_per_s": {"tf32": 1.0}}, "sparse_flop_per_s has the unknown key 'tf32'"),
        ({"memory_bytes": 0}, "memory_bytes must be positive and finite: got 0"),
        ({"memory_bytes": 1.5}, "memory_bytes must be a whole number: got 1.5"),
        ({"memory_bytes_per_s": -1.0}, "memory_bytes_per_s must be positive and finite: got -1.0"),
        ({"memory_bytes_per_s": float("nan")}, "memory_bytes_per_s must be positive and finite: got nan"),
        ({"launch_latency_s": "4us"}, "launch_latency_s must be a number: got '4us'"),
        (
            {"peak_flop_per_s": {"bfloat16": 1.0}, "sparse_flop_per_s": {}},
            "peak_flop_per_s lacks the required float32 rate: got bfloat16",
        ),
        ({"peak_flop_per_s": {"float32": 0.0}}, "peak_flop_per_s.float32 must be positive"),
        ({"peak_flop_per_s": {"float32": 1.0, "fp16": 1.0}}, "peak_flop_per_s has the unknown key 'fp16'"),
        ({"efficiency": {"view": Efficiency(1, 1, "test")}}, "efficiency has the unknown key 'view'"),
        ({"links": {"nvlink": LinkSpec("x", 1.0, 1.0)}}, "links has the unknown key 'nvlink'"),
        ({"num_cores": 4}, "a cpu states num_cores, all else does not: got 4"),
        ({"kind": "cpu"}, "a cpu states num_cores, all else does not: got None"),
        ({"kind": "cpu", "num_cores": 0}, "num_cores must be at least 1: got 0"),
        ({"socket_memory_bytes_per_s": 0.0}, "socket_memory_bytes_per_s must be positive"),
    ],
)
def test_impossible_hardware_is_refused_with_its_name_and_field(changes: dict, sentence: str):
    with pytest.raises(ValueError, match=r"^hardware 'round': ") as refusal:
        replace(GPU, **changes)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(("bytes_per_s", "latency_s"), [(0.0, 1.0), (1.0, 0.0), (float("inf"), 1.0)])
def test_impossible_links_are_refused(bytes_per_s: float, latency_s: float):
    with pytest.raises(ValueError, match=r"^link 'x': \w+ must be positive and finite: got"):
        LinkSpec("x", bytes_per_s=bytes_per_s, latency_s=latency_s)


@pytest.mark.parametrize(("compute", "memory", "source"), [(0.0, 1.0, "a"), (1.0, 1.1, "a"), (1.0, 1.0, " ")])
def test_impossible_efficiencies_are_refused(compute: float, memory: float, source: str):
    with pytest.raises(ValueError, match=r"^Efficiency\.\w+ (must lie in|is empty)"):
        Efficiency(compute, memory, source)


@pytest.mark.parametrize("serial_s", [-1e-9, float("nan"), float("inf")])
def test_impossible_times_of_one_operation_are_refused(serial_s: float):
    with pytest.raises(ValueError, match=r"^Efficiency\.serial_s must be finite and at least 0: got"):
        Efficiency(1.0, 1.0, "a", serial_s=serial_s)


@pytest.mark.parametrize(
    ("dtype", "rate"),
    [
        ("bfloat16", ("bfloat16", 1000.0)),
        ("float16", ("float32", 100.0)),
        ("tf32", ("float32", 100.0)),
        ("float64", ("float32", 50.0)),
        ("complex128", ("float32", 50.0)),
        ("float8_e4m3fn", ("float8", 2000.0)),
        ("uint8", ("int8", 3000.0)),
    ],
)
def test_matrix_rates_follow_the_documented_fallback(dtype: str, rate: tuple):
    assert GPU.matrix_rate(dtype) == rate


def test_a_listed_float64_rate_also_serves_complex128():
    spec = replace(GPU, peak_flop_per_s={"float32": 100.0, "float64": 7.0}, sparse_flop_per_s={})
    assert spec.matrix_rate("complex128") == ("float64", 7.0)


@pytest.mark.parametrize(("dtype", "flop_per_s"), [("bfloat16", 100.0), ("float64", 50.0), ("bool", 100.0)])
def test_vector_rates_never_exceed_float32(dtype: str, flop_per_s: float):
    assert GPU.vector_rate(dtype).flop_per_s == flop_per_s


@pytest.mark.parametrize("name", known_hardware())
def test_every_dtype_of_work_has_a_rate_on_every_device(name: str):
    spec = load_hardware(name)
    assert all(
        spec.matrix_rate(dtype).flop_per_s >= spec.vector_rate(dtype).flop_per_s > 0 for dtype in DTYPES
    )


def test_an_unknown_dtype_has_no_rate():
    with pytest.raises(ValueError, match=r"^the dtype 'fp16' is unknown\. Give one of float64, "):
        GPU.matrix_rate("fp16")


def test_cores_multiply_rates_and_memory_but_not_the_bandwidth_of_the_socket():
    two, four = CPU.with_num_cores(2), CPU.with_num_cores(4)
    assert (two.peak_flop_per_s, two.memory_bytes, two.memory_bytes_per_s) == ({"float32": 20.0}, 14, 8.0)
    assert four.memory_bytes_per_s == 10.0  # 4 * 4 B/s, but the socket has 10


def test_cores_multiply_the_power():
    four = CPU.with_num_cores(4)
    assert (four.power_watts, four.idle_power_watts) == (20.0, 4.0)


def test_only_cpus_have_a_number_of_cores_to_change():
    with pytest.raises(ValueError, match=r"^hardware 'round' is a gpu and has no number of cores"):
        GPU.with_num_cores(2)
    with pytest.raises(ValueError, match="num_cores must be at least 1: got 0"):
        CPU.with_num_cores(0)


def test_a_spec_survives_pickling_and_ignores_later_changes_of_its_input():
    rates = {"float32": 1.0}
    spec = replace(GPU, peak_flop_per_s=rates, sparse_flop_per_s={})
    rates["float32"] = 2.0
    assert spec.peak_flop_per_s == {"float32": 1.0}
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert hash(spec) == hash(replace(spec))
