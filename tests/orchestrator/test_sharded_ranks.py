"""Ranks that share a model (FSDP2) train as ranks with a copy each (DDP), and continue their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint import load_state
from orchestrator.job import JobSpec
from orchestrator.planning import plan_job
from orchestrator.worker import Assignment, train_rank
from planner import Plan
from planner.inputs.strict import WorkloadError
from tests.orchestrator.conftest import job_writer
from tests.orchestrator.test_training import Recorder, differences
from tests.ranks import on_ranks

BLOCKS = '''
"""A perceptron of equal blocks; its widths are odd, so that two ranks get uneven shares."""

from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return x + self.drop(self.down(self.up(self.norm(x)).tanh()))


def net(width=7, layers=3):
    return nn.Sequential(nn.Linear(8, width), *(Block(width) for _ in range(layers)), nn.Linear(width, 1))


def loss(outputs, targets):
    return (outputs.squeeze(1) - targets).square().mean()
'''
STEPS = 10
SHARDINGS = ("ddp", "fsdp", "fsdp_keep")
SGD = {"name": "sgd", "lr": 0.01, "momentum": 0.9}
ADAMW_THEN_SGD = {"name": "adamw", "lr": 0.01, "then": {**SGD, "start": 0.5}}
RANGER_LARS = {"name": "ranger_lars", "lr": 0.01, "weight_decay": 0.01}


class Quiet(Recorder):
    """Checkpoints are rank 0's alone."""

    def checkpoint_saved(self, place: Path | None, *, step: int) -> None:
        pass


def train_all(rank: int, assignments: dict[str, tuple[Assignment, int | None]]) -> dict[str, Any]:
    """Events of several runs, one after the other."""
    found: dict[str, Any] = {}
    for name, (assignment, stop_after) in assignments.items():
        reporter = Quiet(stop_after=stop_after)
        outcome = train_rank(assignment, rank=rank, world_size=2, device_index=0, reporter=reporter)
        found[name] = outcome, reporter.events
    return found


class Runs:
    """All runs of this file, in one group of ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "blocks.py").write_text(BLOCKS)
        batch = {"inputs": {"shape": [4, 8]}, "targets": {"shape": [4], "dtype": "int64", "high": 4}}
        self.changes = {"model": "blocks.py:net", "loss": "blocks.py:loss", "batch": batch}
        self.write_job = job_writer(folder)
        self.asked: dict[str, tuple[Assignment, int | None]] = {}
        self.plan: Plan

    def job(self, sharding: str, optimizer: dict[str, Any], **changes: Any) -> JobSpec:
        train = {"workers": 2, "steps": STEPS, "sharding": sharding, **changes.pop("train", {})}
        return JobSpec.load(self.write_job(**self.changes, train=train, optimizer=optimizer, **changes))

    def ask(
        self, name: str, job: JobSpec, *, into: str = "", stop_after: int | None = None, **given: Any
    ) -> None:
        run_dir = self.folder / (into or name)
        run_dir.mkdir(exist_ok=True)
        assignment = Assignment(
            job.to_data(), str(self.folder), str(run_dir), given.pop("plan", None), **given
        )
        self.asked[name] = assignment, stop_after

    def run(self) -> None:
        self.found = on_ranks(train_all, self.asked)

    def losses(self, name: str) -> list[float]:
        return [event["loss"] for event in self.found[0][name][1] if event["event"] == "step"]

    def steps(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.found[0][name][1] if event["event"] == "step"]

    def final(self, name: str) -> dict[str, Any]:
        return load_state(self.folder / name / "checkpoints" / f"step-{STEPS:08d}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every run of this file: starting ranks takes longer than training them."""
    folder = tmp_path_factory.mktemp("sharded")
    runs = Runs(folder)
    clipped = {"accumulation": 2, "clip_norm": 1.0}
    for sharding in SHARDINGS:
        runs.ask(f"sgd {sharding}", runs.job(sharding, SGD, train={"checkpoint_every": 5}))
        runs.ask(f"in turn {sharding}", runs.job(sharding, ADAMW_THEN_SGD, train={"checkpoint_every": 5}))
        runs.ask(f"larc {sharding}", runs.job(sharding, RANGER_LARS, train=clipped))
    for step in (4, 5, 6):  # the switch comes after step 5
        in_turn = runs.job("fsdp", ADAMW_THEN_SGD)
        runs.ask(f"in turn, stopped after {step}", in_turn, into=f"in turn {step}", stop_after=step)
        runs.ask(f"in turn, resumed after {step}", in_turn, into=f"in turn {step}")
    stopping = runs.job("fsdp", RANGER_LARS, train=clipped)
    runs.ask("stopped", stopping, stop_after=5)
    runs.ask("resumed", stopping, into="stopped")
    runs.ask("first half ddp", runs.job("ddp", SGD), into="moved", stop_after=5)
    runs.ask("second half fsdp", runs.job("fsdp", SGD), into="moved")
    planned = runs.job("fsdp", SGD, budget="95%")
    runs.plan = plan_job(planned)
    runs.ask("whole plan", planned, plan=runs.plan.to_json())
    runs.run()
    return runs


def test_one_rank_has_nobody_to_share_with(tmp_path: Path):
    with pytest.raises(WorkloadError, match="set workers to at least 2, or sharding to 'ddp'"):
        Runs(tmp_path).job("fsdp", SGD, train={"workers": 1})


def far(found: Any, expected: Any) -> list[str]:
    """Tensors that differ by more than 1e-6 of their norm."""
    return [
        name
        for name, tensor in expected.items()
        if not float((found[name] - tensor).norm()) <= 1e-6 * float(tensor.norm())
    ]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp", "fsdp_keep"])
def test_sharded_ranks_have_the_weights_of_data_parallel_ones_bit_for_bit(runs: Runs, sharding: str):
    # A gradient is the mean of two in either, and SGD reads no norm.
    found, expected = runs.final(f"sgd {sharding}"), runs.final("sgd ddp")
    assert differences(found["model"], expected["model"]) == []
    assert differences(found["optimizer"], expected["optimizer"]) == []
    assert runs.losses(f"sgd {sharding}") == runs.losses("sgd ddp")
    assert len(runs.losses("sgd ddp")) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp", "fsdp_keep"])
def test_accumulation_clipping_and_layer_adaptation_work_on_shares(runs: Runs, sharding: str):
    # Norms over two shares are sums in another order than over the whole.
    found, expected = runs.final(f"larc {sharding}"), runs.final("larc ddp")
    assert found["model"].keys() == expected["model"].keys()
    assert far(found["model"], expected["model"]) == []
    assert runs.losses(f"larc {sharding}") == pytest.approx(runs.losses("larc ddp"), rel=1e-6)
    norms = [[event["gradient_norm"] for event in runs.steps(f"larc {name}")] for name in (sharding, "ddp")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


@pytest.mark.slow
def test_sharded_ranks_stop_and_continue_bit_for_bit(runs: Runs):
    assert not runs.found[0]["stopped"][0].finished
    assert runs.losses("stopped") + runs.losses("resumed") == runs.losses("larc fsdp")
    assert differences(runs.final("stopped"), runs.final("larc fsdp")) == []


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp", "fsdp_keep"])
def test_sharded_ranks_change_their_optimizer_as_data_parallel_ones_do(runs: Runs, sharding: str):
    # Both optimizers work number by number, so shares change nothing.
    found, expected = runs.final(f"in turn {sharding}"), runs.final("in turn ddp")
    assert differences(found["model"], expected["model"]) == []
    assert differences(found["optimizer"], expected["optimizer"]) == []
    assert runs.losses(f"in turn {sharding}") == runs.losses("in turn ddp")
    assert "momentum_buffer" in found["optimizer"]["state"][0]
    switches = [event for event in runs.found[0]["in turn fsdp"][1] if event["event"] == "optimizer"]
    assert [(event["step"], event["name"]) for event in switches] == [(5, "sgd")]


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 5, 6])
def test_sharded_ranks_continue_bit_for_bit_around_a_change_of_the_optimizer(runs: Runs, step: int):
    stopped, resumed = f"in turn, stopped after {step}", f"in turn, resumed after {step}"
    assert not runs.found[0][stopped][0].finished
    assert runs.losses(stopped) + runs.losses(resumed) == runs.losses("in turn fsdp")
    assert differences(runs.final(f"in turn {step}"), runs.final("in turn fsdp")) == []


@pytest.mark.slow
def test_sharded_ranks_continue_what_data_parallel_ones_began(runs: Runs):
    assert runs.losses("first half ddp") + runs.losses("second half fsdp") == runs.losses("sgd ddp")
    assert differences(runs.final("moved")["model"], runs.final("sgd ddp")["model"]) == []


@pytest.mark.slow
def test_a_plan_of_the_whole_step_runs_on_sharded_ranks(runs: Runs):
    assert runs.losses("whole plan") == runs.losses("sgd ddp")
    assert differences(runs.final("whole plan")["model"], runs.final("sgd ddp")["model"]) == []
    peaks = [event["measured_peak_bytes"] for event in runs.steps("whole plan")]
    assert min(peaks[1:]) <= runs.plan.predicted_peak_bytes


@pytest.mark.slow
def test_the_noise_of_sharded_ranks_is_that_of_data_parallel_ones(runs: Runs):
    moments = [
        [
            {key: value for key, value in statistics.items() if isinstance(value, float)}
            for statistics in (noise["whole"], *noise["by_group"])
        ]
        for noise in (
            runs.final(f"{run} {name}")["noise"] for run in ("sgd", "larc") for name in ("fsdp", "ddp")
        )
    ]
    # Of one micro-batch and of two; of the whole and of the optimizer's groups.
    for sharded, data_parallel in (moments[:2], moments[2:]):
        assert len(data_parallel) == 1 + 2
        for found, expected in zip(sharded, data_parallel):
            assert expected["weight"] > 1
            assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_validation_and_measured_peaks_are_there_on_sharded_ranks(runs: Runs):
    validations = [
        [event["loss"] for event in runs.found[0][f"sgd {name}"][1] if event["event"] == "validation"]
        for name in SHARDINGS
    ]
    assert len(validations[0]) == 4
    assert validations[1] == validations[2] == validations[0]
    for name in SHARDINGS:
        assert all(len(event["measured_peak_bytes_by_rank"]) == 2 for event in runs.steps(f"sgd {name}"))
