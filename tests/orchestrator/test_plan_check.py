"""A plan that is made elsewhere is the one that every rank runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.block_planning import plan_job_blocks
from orchestrator.job import JobSpec
from orchestrator.plan_answer import PlanAnswer, planned
from orchestrator.plan_check import check_same_plan, digest_of_plans
from orchestrator.planning import plan_job
from orchestrator.rank_errors import RankError
from orchestrator.ranks import Ranks
from orchestrator.worker import Assignment, train_rank
from planner.errors import InfeasibleError, PlanMismatchError
from planner.inputs.strict import WorkloadError
from tests.orchestrator.test_sharded_ranks import BLOCKS
from tests.orchestrator.test_training import Recorder


def sent_over(answer: PlanAnswer) -> PlanAnswer:
    """As it comes out of another process: plain values only."""
    fields = json.loads(json.dumps(dataclasses.asdict(answer)))
    return PlanAnswer(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    )


@pytest.mark.parametrize("planning", ["whole", "blocks"])
def test_a_plan_made_elsewhere_is_the_one_made_here(write_job: Any, tmp_path: Path, planning: str):
    (tmp_path / "blocks.py").write_text(BLOCKS)
    batch = {"inputs": {"shape": [4, 8]}, "targets": {"shape": [4]}}
    changes = {"model": "blocks.py:net", "loss": "blocks.py:loss", "batch": batch, "budget": "1MiB"}
    job = JobSpec.load(
        write_job(**changes, optimizer={"name": "sgd", "lr": 0.01}, train={"planning": planning})
    )
    there = sent_over(planned(job.to_data(), str(job.model.folder))).read(job)
    here = plan_job(job) if planning == "whole" else plan_job_blocks(job)
    assert type(there) is type(here)
    assert there.predicted_peak_bytes == here.predicted_peak_bytes
    assert there.budget_bytes == here.budget_bytes == 1 << 20


def test_what_is_refused_elsewhere_is_refused_here_with_the_same_words(write_job: Any):
    job = JobSpec.load(write_job(budget="1B"))
    with pytest.raises(InfeasibleError) as here:
        plan_job(job)
    with pytest.raises(InfeasibleError) as there:
        sent_over(planned(job.to_data(), str(job.model.folder))).read(job)
    assert str(there.value) == str(here.value)
    assert there.value.smallest_feasible_bytes == here.value.smallest_feasible_bytes
    job = JobSpec.load(write_job(loss="tiny.py:nothing"))
    with pytest.raises(WorkloadError, match="nothing"):
        sent_over(planned(job.to_data(), str(job.model.folder))).read(job)


class TwoRanks(Ranks):
    """This rank and another one that has said its digest."""

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, digest_of_plans("another plan", {})]


def test_a_rank_with_another_plan_is_named():
    ranks = TwoRanks(rank=0, world_size=2, device=torch.device("cpu"))
    sent = digest_of_plans("a plan", {"block": "its plan"})
    with pytest.raises(
        PlanMismatchError, match=rf"rank 1 has the plan \w{{12}}, but {sent[:12]} was planned"
    ):
        check_same_plan(ranks, plan="a plan", block_plans={"block": "its plan"}, sent=sent)


def test_a_rank_trains_nothing_with_a_plan_that_was_changed_on_its_way(write_job: Any, tmp_path: Path):
    job = JobSpec.load(write_job(budget="1MiB"))
    plan = plan_job(job).to_json()
    assignment = Assignment(
        job.to_data(), str(tmp_path), str(tmp_path), plan + " ", plan_digest=digest_of_plans(plan, {})
    )
    recorder = Recorder()
    with pytest.raises(RankError, match="rank 0 has the plan") as caught:
        train_rank(assignment, rank=0, world_size=1, device_index=0, reporter=recorder)
    assert caught.value.bad_input
    assert recorder.events == []
