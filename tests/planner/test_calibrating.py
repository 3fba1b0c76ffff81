"""Operations measured one by one: each runs alone, visits add up over interrupted runs, files are never damaged."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from cost_models.hardware import load_hardware
from cost_models.measured import Measured
from cost_models.measurements import MeasuredOperation, Measurements, read_measurements
from cost_models.roofline import Roofline
from cost_models.work import Work
from orchestrator.cli import app
from planner.calibrating.calibrate import Calibration
from planner.calibrating.companions import companions
from planner.calibrating.operations import Operation, operations_of
from planner.calibrating.optimizer_step import optimizer_step
from planner.calibrating.setting import setting_here
from planner.calibrating.standard import standard_steps
from planner.calibrating.timer import Timer
from planner.capture import Captured, capture
from planner.costed import priced
from planner.pipeline import plan
from planner.prepare import prepare
from planner.pricing import cost_model_of
from planner.report.calibration import calibration_lines
from tests.models import BatchNormNet, TinyGPT, token_loss

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokens() -> torch.Tensor:
    return torch.zeros(2, 16, dtype=torch.int64)


@pytest.fixture(scope="module")
def captured() -> Captured:
    return capture(TinyGPT(layers=2, dropout=0.1).train(), (tokens(), tokens()), loss=token_loss)


def calibration(path: Path) -> Calibration:
    setting = setting_here(hardware="host", device=CPU, threads=1, processes=1)
    return Calibration.resumed(path, setting, CPU)


@pytest.mark.parametrize(
    "step",
    [
        lambda: capture(TinyGPT(dropout=0.1).train(), (tokens(), tokens()), loss=token_loss),
        lambda: capture(
            BatchNormNet().train(),
            (torch.zeros(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64)),
            loss=F.cross_entropy,
        ),
    ],
    ids=["gpt", "convolutions"],
)
def test_every_operation_runs_alone(step: Any):
    found = operations_of([step()])
    assert len(found) > 20
    for operation in found.values():
        with torch.no_grad():
            operation.ready(CPU)()


def test_operations_of_equal_layers_are_measured_once(captured: Captured):
    works = [work for node in captured.graph.nodes for work in (node.work, *node.then)]
    assert len(operations_of([captured])) < 0.75 * len(works)


def test_an_operation_in_place_is_another_than_in_memory_of_its_own(captured: Captured):
    lines = list(operations_of([captured]))
    assert any(line.startswith("in-place aten.") for line in lines)


def test_standard_steps_hold_every_kind_of_work():
    kinds = {operation.work.kind for operation in operations_of(standard_steps(CPU)).values()}
    assert kinds >= {
        "matmul",
        "convolution",
        "attention",
        "reduction",
        "elementwise",
        "gather",
        "copy",
        "random",
    }


def test_a_measured_step_costs_what_its_operations_took(captured: Captured, tmp_path: Path):
    measuring = calibration(tmp_path / "m.json")
    measuring.measure(operations_of([captured]), visits=1)
    assert not measuring.failed
    model = Measured(measuring.measurements, cost_model_of("host").hardware)  # type: ignore[attr-defined]
    costed = priced(captured.graph, model)
    alone = sum(
        measuring.known[work.operation].time_s
        for node in captured.graph.nodes
        for work in (node.work, *node.then)
        if work.operation in measuring.known
    )
    num_calls = sum(1 + len(node.then) + node.num_views for node in captured.graph.nodes)
    assert alone <= costed.step_s <= alone + num_calls * measuring.measurements.overhead_s + 1e-3
    assert costed.cost_model.startswith("measured for ")


def test_visits_of_an_interrupted_run_stay_and_count(captured: Captured, tmp_path: Path):
    path = tmp_path / "m.json"
    operations = dict(list(operations_of([captured]).items())[:8])

    def stop(done: int, of: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibration(path).measure(operations, visits=2, progress=stop)
    first = read_measurements(path)
    assert len(first.operations) == 4
    again = calibration(path)
    again.measure(operations, visits=2)
    for line, operation in first.operations.items():
        assert again.known[line].visits_s[0] == operation.visits_s[0]
    assert all(len(operation.visits_s) == 2 for operation in again.known.values())


def test_a_file_of_another_setting_is_left_as_it_is(captured: Captured, tmp_path: Path):
    path = tmp_path / "m.json"
    measuring = calibration(path)
    measuring.measure(dict(list(operations_of([captured]).items())[:1]), visits=1)
    data = json.loads(path.read_text())
    data["setting"]["torch_version"] = "1.0"
    path.write_text(json.dumps(data))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="torch_version"):
        calibration(path)
    assert path.read_bytes() == before


def test_an_operation_that_does_not_run_alone_is_named_and_priced_by_the_roofline(
    captured: Captured, tmp_path: Path
):
    class Broken:
        line, work = "broken", next(iter(operations_of([captured]).values())).work
        distance = "near"

        def ready(self, device: torch.device) -> Any:
            raise RuntimeError("it reads packed state")

    measuring = calibration(tmp_path / "m.json")
    measuring.measure({"broken": Broken()}, visits=2)
    assert measuring.failed == {"broken": "it reads packed state"}
    assert "broken" not in measuring.known


def test_a_timer_says_what_a_run_takes():
    timer = Timer(CPU, threads=1)
    left, right = torch.rand(256, 256), torch.rand(256, 256)
    small = timer.median_s(lambda: lambda: left @ right, moved_bytes=3 << 18)
    large = timer.median_s(lambda: lambda: [left @ right for _ in range(8)], moved_bytes=3 << 18)
    assert 3.0 < large / small < 25.0


def test_the_work_of_an_optimizer_is_what_it_reads_and_writes():
    model = torch.nn.Linear(64, 64, bias=False)
    step = optimizer_step(model, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, foreach=False), name="sgd")
    # w <- w - lr g: reads w and g, writes w.
    assert (step.work.read_bytes, step.work.written_bytes) == (2 * 4 * 64 * 64, 4 * 64 * 64)
    step.ready(CPU)()


def test_plans_are_priced_by_measurements_and_say_so(tmp_path: Path):
    model, batch = TinyGPT(layers=2).train(), (tokens(), tokens())
    setting = setting_here(hardware="host", device=CPU, threads=1, processes=1)
    measuring = calibration(tmp_path / setting.file_name)
    measuring.measure(operations_of([capture(model, batch, loss=token_loss)]), visits=1)
    made = plan(model, batch, loss=token_loss, budget="95%", measurements=tmp_path)
    assert made.provenance.cost_model.startswith("measured for ")
    by_roofline = prepare(model, batch, loss=token_loss)
    assert by_roofline.problem.costed.cost_model == "roofline"


def test_measurements_of_another_device_need_its_name(tmp_path: Path):
    with pytest.raises(ValueError, match="is a folder"):
        cost_model_of("a100-40gb", measurements=tmp_path)
    path = tmp_path / "m.json"
    path.write_text(calibration(tmp_path / "none.json").measurements.to_json())
    with pytest.raises(ValueError, match="measured on 'host'"):
        cost_model_of("a100-40gb", measurements=path)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--device", "tpu"], "--device must be one of"),
        (["--device", "cuda", "--processes", "2"], "--processes 2 is for the CPU"),
        (["--processes", "256"], "--processes 256 would share"),
        (["--hardware", "h1000"], "no hardware is named"),
        (["--micro-batches", "4,8"], "--micro-batches goes with a JOB"),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["--picture", "x.gif"], "must end in"),
    ],
)
def test_calibrate_refuses_in_one_sentence(words: list[str], sentence: str, tmp_path: Path):
    done = CliRunner().invoke(app, ["calibrate", *words, "--out", str(tmp_path / "m")])
    assert done.exit_code == 2
    assert sentence in done.output
    assert not (tmp_path / "m").exists()


def test_a_refused_file_is_left_as_it_is(captured: Captured, tmp_path: Path):
    measuring = calibration(tmp_path / "m.json")
    measuring.measure(operations_of([captured]), visits=1)
    text = json.dumps(json.loads((tmp_path / "m.json").read_text()))
    (tmp_path / "m.json").write_text(text)
    # Nothing is new, so nothing is written.
    calibration(tmp_path / "m.json").measure(operations_of([captured]), visits=1)
    assert (tmp_path / "m.json").read_text() == text
    (tmp_path / "m.json").write_text(text.replace("float32", "float31"))
    with pytest.raises(ValueError, match="unknown dtype"):
        calibration(tmp_path / "m.json")
    assert "float31" in (tmp_path / "m.json").read_text()


def no_operations() -> dict[str, Any]:
    """For a process of its own, which imports this by name."""
    return {}


def measure_with_a_lost_companion(measuring: Calibration, operations: Mapping[str, Operation]) -> None:
    """One of two processes ends before the other begins."""
    with companions(no_operations, processes=2, threads=1) as (before_each, _):
        (other,) = multiprocessing.active_children()
        other.kill()
        other.join()
        measuring.measure(operations, visits=1, before_each=before_each)


@pytest.mark.slow
def test_a_lost_companion_is_told_and_is_no_operation_that_fails(captured: Captured, tmp_path: Path):
    measuring = calibration(tmp_path / "m.json")
    with pytest.raises(ValueError, match="a process that measures beside this one has ended"):
        measure_with_a_lost_companion(measuring, operations_of([captured]))
    assert measuring.failed == {}


def test_a_fit_that_is_worse_than_none_is_said():
    roofline, demand = Roofline(load_hardware("a100-40gb")), Work(0.0, 1 << 24, 0, "float32", "elementwise")
    took_s = roofline.time_s(demand)

    def lines(*factors: float) -> list[str]:
        operations = {
            f"operation {number}": MeasuredOperation(
                visits_s=(factor * took_s,),
                flop=demand.flop,
                read_bytes=demand.read_bytes,
                written_bytes=demand.written_bytes,
                dtype=demand.dtype,
                kind=demand.kind,
            )
            for number, factor in enumerate(factors)
        }
        setting = setting_here(hardware="a100-40gb", device=CPU, threads=1, processes=1)
        return calibration_lines(
            Measurements(setting=setting, operations=operations), roofline, {}, place="x.json"
        )

    sentence = "fitted is further off than the roofline itself for elementwise, all: "
    assert any(line.startswith(sentence) for line in lines(1.0, 10.0, 0.1))
    assert not any("further off" in line for line in lines(3.0, 3.1, 2.9))
