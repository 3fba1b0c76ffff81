"""One optimizer first and another one last: the switch, what it costs, and what continues after a stop."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint import CheckpointStore, load_state
from orchestrator.job import JobSpec
from orchestrator.phases import Phase, phases_of
from orchestrator.planning import check_job, plan_job
from orchestrator.techniques.schedules import rate_factor
from orchestrator.worker import Assignment, train_rank
from planner.capturing.optimizer_step import optimizer_bytes, unique_bytes
from planner.capturing.rank_memory import whole_shape
from planner.inputs.strict import WorkloadError
from planner.lower.trace import pytree
from tests.orchestrator.test_training import Recorder, differences, final_state

ADAMW = {"name": "adamw", "lr": 0.01}
SGD = {"name": "sgd", "lr": 0.2, "momentum": 0.9}
STEPS, SWITCH = 9, 5  # ceil(0.5 * 9)
EVERY_STEP = {"checkpoint_every": 1, "keep_checkpoints": 20, "steps": STEPS}
# One micro-batch that is large beside the parameters: its activations are in the peak.
DEEP = {
    "model": "tiny.py:deep",
    "batch": {"inputs": {"shape": [64, 8]}, "targets": {"shape": [64], "dtype": "int64", "high": 4}},
}

Run = Callable[..., tuple[Recorder, Path]]


def in_turn(first: dict[str, Any], last: dict[str, Any], *, start: float = 0.5) -> dict[str, Any]:
    return {**first, "then": {**last, "start": start}}


@pytest.fixture
def run(write_job: Any, tmp_path: Path) -> Run:
    """Train the tiny job as the only rank, in this process."""

    def start(
        run_dir: str, optimizer: dict[str, Any], *, stop_after: int | None = None, **changes: Any
    ) -> Any:
        train = {**EVERY_STEP, **changes.pop("train", {})}
        plan = changes.pop("plan", None)
        job = JobSpec.load(write_job(optimizer=optimizer, train=train, **changes))
        folder = tmp_path / run_dir
        folder.mkdir(exist_ok=True)
        recorder = Recorder(stop_after=stop_after)
        assignment = Assignment(job.to_data(), str(tmp_path), str(folder), plan)
        train_rank(assignment, rank=0, world_size=1, device_index=0, reporter=recorder)
        return recorder, folder

    return start


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


@pytest.mark.parametrize("pair", [(ADAMW, SGD), ({"name": "ranger"}, {"name": "lars"})], ids=["torch", "own"])
def test_a_run_continues_bit_for_bit_before_at_and_after_the_switch(run: Run, tmp_path: Path, pair: Any):
    undisturbed, folder = run("undisturbed", in_turn(*pair))
    for step in (SWITCH - 1, SWITCH, SWITCH + 1):
        killed = tmp_path / f"killed {step}"
        shutil.copytree(checkpoint(folder, step), checkpoint(killed, step))
        resumed, _ = run(killed.name, in_turn(*pair))
        assert resumed.losses == undisturbed.losses[step:]
        assert differences(final_state(killed), final_state(folder)) == []


@pytest.mark.parametrize("stop_after", [SWITCH - 1, SWITCH, SWITCH + 1])
def test_a_stopped_run_switches_once(run: Run, stop_after: int):
    undisturbed, folder = run("undisturbed", in_turn(ADAMW, SGD))
    before, _ = run("stopped", in_turn(ADAMW, SGD), stop_after=stop_after)
    after, stopped = run("stopped", in_turn(ADAMW, SGD))
    assert before.losses + after.losses == undisturbed.losses
    assert differences(final_state(stopped), final_state(folder)) == []
    assert before.of("optimizer") + after.of("optimizer") == undisturbed.of("optimizer")
    assert len(undisturbed.of("optimizer")) == 1


def test_the_second_part_is_what_its_optimizer_alone_makes_of_the_first_ones_weights(
    run: Run, tmp_path: Path
):
    _, folder = run("both", in_turn(ADAMW, SGD))
    run("sgd", SGD)
    # A run of SGD alone that goes on from AdamW's weights with its own schedule, and no state.
    state = load_state(checkpoint(tmp_path / "sgd", SWITCH))
    first = load_state(checkpoint(folder, SWITCH))
    assert first["optimizer"]["state"] == {}
    state |= {"model": first["model"], "optimizer": {**state["optimizer"], "state": {}}}
    CheckpointStore(tmp_path / "spliced" / "checkpoints", keep=9).save(state, step=SWITCH)
    run("spliced", SGD)
    assert differences(final_state(tmp_path / "spliced")["model"], final_state(folder)["model"]) == []


def test_each_part_has_its_own_rate_on_the_one_schedule(run: Run):
    schedule = {"name": "polynomial", "power": 1.0, "warmup_fraction": 0.0}
    recorder, _ = run("run", in_turn(ADAMW, SGD), train={"schedule": schedule})
    rates = [event["learning_rate"] for event in recorder.of("step")]
    base = [0.01] * SWITCH + [0.2] * (STEPS - SWITCH)
    assert rates == pytest.approx([rate * (1 - step / STEPS) for step, rate in enumerate(base)], rel=1e-12)
    factor = rate_factor(SWITCH, total_steps=STEPS, **schedule)
    event = {
        "event": "optimizer",
        "step": SWITCH,
        "name": "sgd",
        "learning_rate": pytest.approx(0.2 * factor),
    }
    assert recorder.of("optimizer") == [event]
    kinds = [(event["event"], event["step"]) for event in recorder.events]
    assert kinds.index(("step", SWITCH)) + 1 == kinds.index(("optimizer", SWITCH))


def test_the_switch_frees_the_first_state_and_touches_neither_weights_nor_gradients(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    made: list[weakref.ref[torch.optim.Optimizer]] = []
    tensors: list[weakref.ref[torch.Tensor]] = []
    before: list[list[torch.Tensor]] = []
    after: list[list[torch.Tensor]] = []
    make, emit = Phase.make_optimizer, Recorder.emit
    modules: list[torch.nn.Module] = []

    def values() -> list[torch.Tensor]:
        found = [t for p in modules[0].parameters() for t in (p, p.grad)]
        return [t.detach().clone() for t in found if t is not None]

    def making(phase: Phase, module: torch.nn.Module) -> torch.optim.Optimizer:
        modules.append(module)
        if made:
            before.append(values())
        optimizer = make(phase, module)
        made.append(weakref.ref(optimizer))
        return optimizer

    def emitting(recorder: Recorder, event: dict[str, Any]) -> None:
        emit(recorder, event)
        if event["event"] == "step" and event["step"] == SWITCH:
            optimizer = made[0]()
            assert optimizer is not None
            leaves = pytree.tree_leaves(list(optimizer.state.values()))
            tensors.extend(weakref.ref(t) for t in leaves if isinstance(t, torch.Tensor))
        if event["event"] == "optimizer":
            after.append(values())
            assert tensors
            assert [t() for t in tensors if t() is not None] == []

    monkeypatch.setattr(Phase, "make_optimizer", making)
    monkeypatch.setattr(Recorder, "emit", emitting)
    gc.disable()  # freed at once, not when the collector comes by
    try:
        run("run", in_turn(ADAMW, SGD), train={"checkpoint_every": 0})
    finally:
        gc.enable()
    assert len(made) == 2
    assert len(before[0]) == 8  # four parameters, four gradients
    assert differences(before, after) == []


@pytest.mark.parametrize("order", [(ADAMW, SGD), (SGD, ADAMW)], ids=["larger first", "larger last"])
def test_the_larger_of_both_is_charged_and_each_measures_what_it_does_alone(
    run: Run, write_job: Any, order: Any
):
    def predicted(optimizer: dict[str, Any]) -> int:
        job = JobSpec.load(write_job(optimizer=optimizer, train=EVERY_STEP, **DEEP, budget="90%"))
        return plan_job(job).predicted_peak_bytes

    job = JobSpec.load(write_job(optimizer=in_turn(*order), train=EVERY_STEP, **DEEP, budget="90%"))
    plan = plan_job(job)
    assert predicted(SGD) < predicted(ADAMW) == plan.predicted_peak_bytes
    recorder, _ = run("both", in_turn(*order), **DEEP, budget="90%", plan=plan.to_json())
    alone = [run(f"{part['name']}", part, **DEEP, budget="90%", plan=plan.to_json())[0] for part in order]
    peaks, first, last = (
        [event["measured_peak_bytes"] for event in found.of("step")] for found in (recorder, *alone)
    )
    # In the first step of an optimizer its state is made on the way.
    assert peaks[1:SWITCH] == first[1:SWITCH]
    assert peaks[SWITCH + 1 :] == last[SWITCH + 1 :]
    # The plan is that of AdamW alone, so it is as near: within the kernels' workspace of so small a net.
    assert 0 <= plan.predicted_peak_bytes - max(peaks) < 0.01 * max(peaks)


def test_states_are_predicted_to_the_byte(write_job: Any):
    job = JobSpec.load(write_job(optimizer=in_turn({"name": "ranger_lars"}, SGD), train={"steps": 8}))
    model = job.build_model(fake=False)
    held = []
    for phase in phases_of(job):
        optimizer = phase.make_optimizer(model)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        leaves = pytree.tree_leaves(list(optimizer.state.values()))
        held.append(unique_bytes(t for t in leaves if isinstance(t, torch.Tensor)))
        state_bytes, _ = optimizer_bytes(model, phase.make_optimizer, shape=whole_shape)
        assert state_bytes == held[-1]
    # The net 8-16-4 has 212 numbers: three tensors of them, and one.
    assert held == [3 * 4 * 212, 4 * 212]
    builds = [phase.make_optimizer for phase in phases_of(job)]
    assert optimizer_bytes(model, builds, shape=whole_shape)[0] == max(held)
    workload_builds = job.optimizer.factories()
    assert optimizer_bytes(model, workload_builds, shape=whole_shape)[0] == max(held)


def test_temporaries_are_charged_beside_the_state_that_is_there_with_them(write_job: Any):
    # AdaDelta on lists of tensors has two tensors of state and two temporaries; Ranger three of state and none.
    lists = {"name": "adadelta", "foreach": True}
    job = JobSpec.load(write_job(optimizer=in_turn({"name": "ranger"}, lists), train={"steps": 8}))
    model = job.build_model(fake=False)
    each = [optimizer_bytes(model, phase.make_optimizer, shape=whole_shape) for phase in phases_of(job)]
    (ranger, none), (adadelta, temporaries) = each
    assert none == 0
    assert adadelta < ranger < adadelta + temporaries
    builds = [phase.make_optimizer for phase in phases_of(job)]
    assert optimizer_bytes(model, builds, shape=whole_shape) == (ranger, adadelta + temporaries - ranger)


def test_averaged_weights_of_the_last_part_resume(run: Run, tmp_path: Path):
    average = {"average": {"kind": "swa", "start": 0.75}}  # steps 8 and 9
    _, folder = run("undisturbed", in_turn(ADAMW, SGD), train=average)
    run("stopped", in_turn(ADAMW, SGD), train=average, stop_after=8)
    _, resumed = run("stopped", in_turn(ADAMW, SGD), train=average)
    files = [torch.load(f / "averaged.pt", weights_only=True) for f in (folder, resumed)]
    assert differences(*files) == []
    weights = [load_state(checkpoint(folder, step))["model"] for step in (8, 9)]
    for name, value in files[0].items():
        torch.testing.assert_close(value, (weights[0][name] + weights[1][name]) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("optimizer", "train", "message"),
    [
        ({**ADAMW, "then": {**SGD, "start": 0}}, {}, r"optimizer\.then\.start: .*greater than 0, got 0"),
        ({**ADAMW, "then": {**SGD, "start": 1.0}}, {}, r"optimizer\.then\.start: .*less than 1, got 1.0"),
        ({**ADAMW, "then": {"lr": 0.1}}, {}, "the required key 'name' is missing"),
        ({**ADAMW, "then": in_turn(SGD, SGD)}, {}, "two optimizers at most; take out the second 'then'"),
        (
            in_turn(ADAMW, SGD),
            {"steps": 1},
            "starts after 0.5 of 1 steps, which leaves it none; lower its start",
        ),
        (
            in_turn(ADAMW, SGD, start=0.9),
            {"steps": 100, "average": {"start": 0.8}},
            "average starts at 0.8 of the steps, before optimizer.then at 0.9, .* set its start to 0.9 or more",
        ),
    ],
)
def test_a_switch_that_makes_no_sense_is_refused(
    write_job: Any, optimizer: dict[str, Any], train: dict[str, Any], message: str
):
    with pytest.raises(WorkloadError, match=message) as caught:
        JobSpec.load(write_job(optimizer=optimizer, train=train))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"name": "sgdd"}, r"optimizer\.then 'sgdd': unknown optimizer 'sgdd'"),
        ({"name": "sgd", "betas": 1}, r"optimizer\.then 'sgd': sgd has no hyper-parameter 'betas'"),
        ({"name": "sgd", "lr": -1}, r"optimizer\.then 'sgd': .*-1"),
        ({"name": "adahessian"}, r"optimizer\.then 'adahessian' needs second derivatives"),
    ],
)
def test_the_second_optimizer_is_checked_before_training(write_job: Any, last: dict[str, Any], message: str):
    job = JobSpec.load(write_job(optimizer=in_turn(ADAMW, last)))
    with pytest.raises(WorkloadError, match=message):
        check_job(job)
