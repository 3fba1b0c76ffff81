"""Sizing: every way to divide a step is priced, what cannot run says why, and the best is what train runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cost_models.cluster import ClusterSpec
from cost_models.cluster_file import host_cluster, load_cluster, read_cluster
from cost_models.device import LinkSpec
from cost_models.hardware import load_hardware
from orchestrator.cli import app
from orchestrator.job import JobSpec
from orchestrator.size_job import size_batches
from orchestrator.size_report import sizing_figure
from orchestrator.step_shape import Shape, shapes_of
from orchestrator.step_timeline import BlockTimes, Communication, timeline
from planner.report.plots import saved

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "deploy" / "jobs" / "quickstart.yaml"

# Ten bytes a second and no latency: an all-gather of p parts of n bytes takes (p - 1) n / 10 s.
SLOW = ClusterSpec(
    "slow",
    load_hardware("a100-40gb"),
    num_nodes=1,
    devices_per_node=2,
    node_link=LinkSpec("link", 10.0, 1e-12),
)


FOUR = read_cluster({"device": "a100-40gb", "nodes": 1, "devices_per_node": 4})


def gpt_job(tmp_path: Path, *, budget: str = "none", batch_norm: str | None = None, **train: Any) -> Path:
    """The quickstart with a smaller model."""
    (tmp_path / "byte_gpt.py").write_text((QUICKSTART.parent / "byte_gpt.py").read_text())
    job = yaml.safe_load(QUICKSTART.read_text().replace("budget: 50% of activations", f"budget: {budget}"))
    job["model"]["kwargs"] = {"layers": 2, "width": 32, "heads": 2, "context": 32}
    job["batch"] = {key: {"shape": [4, 32], "dtype": "int64", "high": 256} for key in ("inputs", "targets")}
    job["train"]["data"]["kwargs"] = {"context": 32}
    job["train"] |= {"backend": "local", "steps": 2, "validate_every": 0, "checkpoint_every": 0, **train}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def size(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["size", *(str(word) for word in words)])


def test_every_division_of_a_batch_is_listed_once():
    found = list(shapes_of(8, host_cluster(2)))
    assert all(shape.global_batch == 8 for shape in found)
    assert len(set(found)) == len(found)
    # One worker: 1, 2, 4, 8 samples; two: 1, 2, 4 with each of three ways to share.
    assert len(found) == 4 + 3 * 3


def test_workers_that_do_not_divide_the_batch_are_left_out():
    assert {shape.workers for shape in shapes_of(3, host_cluster(2))} == {1}


def times(**changes: Any) -> BlockTimes:
    """Two blocks of 1 s forward and 2 s backward, of 20 bytes each; the rest takes no time."""
    kept: dict[str, Any] = {
        "rest_s": (0.0,) * 5,
        "forward_s": (1.0, 1.0),
        "backward_s": (2.0, 2.0),
        "block_bytes": (20, 20),
        "root_bytes": 0,
    }
    return BlockTimes(**{**kept, **changes})


def test_reductions_hide_behind_the_backward_of_the_blocks_before():
    # An all-reduce of 20 bytes over 2 ranks takes 2 * 20 / (2 * 10) = 2 s. The one of the last block, from second 4
    # to 6, hides behind the backward of the first; that one's own, from 6 to 8, is exposed.
    found = timeline(times(), Communication(SLOW, 2), "ddp", is_last=True)
    assert (found.compute_s, found.exposed_s) == pytest.approx((6.0, 2.0))
    early = timeline(times(), Communication(SLOW, 2), "ddp", is_last=False)
    assert early.exposed_s == 0.0


def test_gathers_hide_behind_the_block_before_and_cost_again_in_backward():
    # Each all-gather takes 20 / (2 * 10) = 1 s. Forward: the first is exposed, the second hides behind block 1.
    keep = timeline(times(), Communication(SLOW, 2), "fsdp_keep", is_last=False)
    assert keep.exposed_s == pytest.approx(1.0)
    # Backward: gathered again behind the computation before; all messages together take 4 s, 1 of them exposed.
    again = timeline(times(), Communication(SLOW, 2), "fsdp", is_last=False)
    assert again.communication_s == pytest.approx(4.0)
    assert again.exposed_s == pytest.approx(1.0)


def test_one_worker_sends_nothing():
    found = timeline(times(), Communication(host_cluster(1), 1), "ddp", is_last=True)
    assert (found.communication_s, found.exposed_s) == (0.0, 0.0)


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> Any:
    job = JobSpec.load(gpt_job(tmp_path_factory.mktemp("sized")))
    return size_batches(job, FOUR, global_batches=(8,), objective="time")[0]


def test_the_best_is_first_and_its_parts_add_up(sized: Any):
    fitting = [found for found in sized if not found.refused]
    assert len(fitting) > 15
    rates = [found.samples_per_s for found in fitting]
    assert rates == sorted(rates, reverse=True)
    for found in fitting:
        parts = found.compute_s + found.remat_s + found.exposed_s + found.optimizer_s
        assert found.step_s == pytest.approx(parts)
        assert found.energy_j > 0


def test_a_share_of_the_model_takes_less_than_a_copy(sized: Any):
    peaks = {found.shape: found.peak_bytes for found in sized}
    for found in sized:
        if found.shape.sharding == "fsdp":
            copy = Shape(found.shape.workers, "ddp", found.shape.micro_batch, found.shape.accumulation)
            if found.shape.workers == 4 and found.shape.micro_batch == 1:
                assert peaks[found.shape] < peaks[copy]


def test_a_tight_budget_rematerializes_or_refuses(tmp_path: Path):
    job = JobSpec.load(gpt_job(tmp_path))
    cluster = host_cluster(2)
    free, _ = size_batches(job, cluster, global_batches=(4,), objective="time")
    peaks = {one.shape: one.peak_bytes for one in free}
    limit = (min(peaks.values()) + 2 * max(peaks.values())) // 3
    tight = job.with_changes({"budget": f"{limit}B"})
    found, budget = size_batches(tight, cluster, global_batches=(4,), objective="time")
    assert budget == limit
    assert any(peaks[one.shape] > limit for one in found)
    for one in found:
        if peaks[one.shape] <= limit:
            assert not one.refused
        elif one.refused:
            assert "needs at least" in one.refused
        else:
            assert one.remat_s > 0
            assert one.peak_bytes <= limit


def test_the_least_energy_is_not_asked_of_the_fastest(tmp_path: Path):
    job = JobSpec.load(gpt_job(tmp_path))
    found, _ = size_batches(job, FOUR, global_batches=(4,), objective="energy")
    fitting = [one for one in found if not one.refused]
    assert fitting[0].energy_j == min(one.energy_j for one in fitting)
    assert fitting != sorted(fitting, key=lambda one: (one.score("time"), one.peak_bytes))


@pytest.mark.parametrize("batch_norm", [None, "group_norm", "local"])
def test_batch_norm_over_few_samples_is_refused_with_what_to_do(batch_norm: str | None, tmp_path: Path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)]\n"
        "    return nn.Sequential(*layers)\n"
        "def data():\n    raise NotImplementedError\n"
    )
    job = {
        "name": "norm",
        "model": "net.py:net",
        "batch": {
            "inputs": {"shape": [16, 1, 8, 8]},
            "targets": {"shape": [16], "dtype": "int64", "high": 10},
        },
        "loss": "torch.nn.functional:cross_entropy",
        "optimizer": {"name": "sgd", "lr": 0.1},
        "train": {"data": "net.py:data", "steps": 1}
        | ({"batch_norm": batch_norm} if batch_norm is not None else {}),
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    found, _ = size_batches(
        JobSpec.load(path), load_cluster("dgx-a100-40gb"), global_batches=(64,), objective="time"
    )
    small = [one for one in found if one.shape.micro_batch < 32 and one.shape.sharding == "ddp"]
    assert small
    if batch_norm is None:
        # One worker takes all 64 samples at once.
        sentence = (
            "needs micro-batches of at least 32 samples, and the largest possible has 64: give each rank more"
        )
        assert all(sentence in one.refused and "or fewer workers" in one.refused for one in small)
        assert all("group_norm" in one.refused and "to sync" in one.refused for one in small)
        assert any(not one.refused for one in found if one.shape.micro_batch >= 32)
    else:
        assert not any(one.refused for one in small)


def test_what_is_written_is_the_best_and_trains(tmp_path: Path):
    path = gpt_job(tmp_path)
    done = size(
        path, "--cluster", "host x2", "--global-batch", "4", "--write", tmp_path / "best.yaml", "--json"
    )
    assert done.exit_code == 0, done.output
    best = json.loads(done.stdout)["candidates"][0]
    job = JobSpec.load(tmp_path / "best.yaml")
    assert (job.train.workers, job.train.accumulation, job.micro_batch, job.train.sharding) == (
        best["workers"],
        best["accumulation"],
        best["micro_batch"],
        best["sharding"],
    )
    assert job.global_batch == 4
    runs = tmp_path / "runs"
    trained = CliRunner().invoke(
        app, ["train", str(tmp_path / "best.yaml"), "--run-dir", str(runs), "--quiet"]
    )
    assert trained.exit_code == 0, trained.output


@pytest.mark.slow
def test_ranks_that_share_a_model_train_with_plans_of_blocks_within_their_prediction(tmp_path: Path):
    path = gpt_job(tmp_path, budget="85%", sharding="fsdp", workers=2, steps=4)
    runs = tmp_path / "runs"
    done = CliRunner().invoke(app, ["train", str(path), "--run-dir", str(runs), "--quiet"])
    assert done.exit_code == 0, done.output
    (run,) = runs.iterdir()
    plan = json.loads((run / "plan.json").read_text())
    assert plan["blocks"]
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    peaks = [event["measured_peak_bytes"] for event in events if event["event"] == "step"]
    # In the first step the blocks are captured again and FSDP2 makes its buffers.
    assert {event["predicted_peak_bytes"] for event in events if event["event"] == "step"} == {
        plan["predicted_peak_bytes"]
    }
    assert max(peaks[1:]) <= plan["predicted_peak_bytes"] <= plan["budget_bytes"]
    assert plan["budget_bytes"] < plan["retained_all_peak_bytes"]


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["--cluster", "dgx-a1000"], 2, "no cluster is named"),
        (["--cluster", "dgx-a100-40gb x0"], 2, "dgx-a100-40gb x0"),
        (["--global-batch", "0"], 2, "whole numbers from 1"),
        (["--global-batch", "many"], 2, "whole numbers from 1"),
        (["--minimize", "money"], 2, "time, energy"),
        (["--budget", "60%"], 2, "a budget in bytes or none"),
        (["--budget", "10KiB", "--global-batch", "2"], 1, "no way to divide the step fits"),
        (["--cluster", "dgx-a100-40gb x100001"], 2, "a number from 1 to 100000 nodes"),
        (["--write", "/elsewhere/best.yaml"], 2, "must lie beside"),
        (["--picture", "table.gif"], 2, "must end in"),
    ],
)
def test_size_refuses_in_one_sentence(words: list[str], status: int, sentence: str, tmp_path: Path):
    done = size(gpt_job(tmp_path), "--cluster", "host x2", *words)
    assert done.exit_code == status, done.output
    assert sentence in done.output
    assert "Traceback" not in done.output
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("__")) == [
        "byte_gpt.py",
        "job.yaml",
    ]


def test_no_file_is_replaced_by_what_is_written(tmp_path: Path):
    path = gpt_job(tmp_path)
    before = (tmp_path / "byte_gpt.py").read_bytes()
    (tmp_path / "other.yaml").write_text("mine")
    for name, sentence in (
        ("byte_gpt.py", "must end in .yaml"),
        ("other.yaml", "exists already"),
        ("job.yaml", "same file"),
    ):
        done = size(path, "--cluster", "host x2", "--write", tmp_path / name)
        assert (done.exit_code, sentence in done.output) == (2, True), done.output
    picture = tmp_path / "new.png"
    done = size(path, "--cluster", "host x2", "--write", picture, "--picture", picture)
    assert (done.exit_code, "same file" in done.output) == (2, True), done.output
    assert (tmp_path / "byte_gpt.py").read_bytes() == before
    assert (tmp_path / "other.yaml").read_text() == "mine"


def test_a_job_is_written_for_the_cluster_that_it_was_sized_for(tmp_path: Path):
    job = JobSpec.load(gpt_job(tmp_path))
    shape = Shape(workers=8, sharding="ddp", micro_batch=2, accumulation=1)
    cluster = load_cluster("dgx-a100-40gb")
    written = job.with_shape(shape, is_blockwise=False, cluster=cluster, budget_bytes=1 << 30)
    assert (written.hardware, written.train.device, written.budget) == ("a100-40gb", "cuda", "1073741824B")
    assert written.train.workers == 8


def test_the_picture_is_drawn(sized: Any):
    assert saved(sizing_figure(sized, FOUR), "png").startswith(b"\x89PNG")
