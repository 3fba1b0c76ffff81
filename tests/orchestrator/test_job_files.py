"""What a job file may say, and the sentence that answers what it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from orchestrator import optim
from orchestrator.job import JobSpec
from planner.inputs.optimizers import optimizer_class
from planner.inputs.strict import WorkloadError
from planner.inputs.workload import Workload
from planner.inputs.yaml_reader import read_yaml


def refusal(path: Path) -> str:
    with pytest.raises(WorkloadError) as caught:
        JobSpec.load(path)
    return str(caught.value)


def test_every_setting_survives_being_sent_to_another_process(write_job: Any):
    then = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "start": 0.8}
    job = JobSpec.load(write_job(optimizer={"name": "adamw", "lr": 0.01, "then": then}, budget="60%"))
    assert JobSpec.from_data(job.to_data(), folder=job.model.folder, source="job") == job
    (job.model.folder / "again.yaml").write_text(job.to_yaml())
    assert JobSpec.load(job.model.folder / "again.yaml") == job
    assert job.optimizer.then is not None
    assert job.optimizer.then.hyper == {"lr": 0.1, "momentum": 0.9}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"budgets": "4GiB"}, "unknown key 'budgets'; did you mean 'budget'?"),
        ({"batch": {"input": {"shape": [1]}}}, "batch: unknown key 'input'; did you mean 'inputs'?"),
        ({"train": {"worker": 2}}, "train: unknown key 'worker'; did you mean 'workers'?"),
        ({"budget": 4}, "budget: a budget needs a unit, got 4"),
        ({"budget": "4"}, "budget: the size has no unit: got '4'"),
        ({"budget": "-4GiB"}, "is negative: got '-4GiB'"),
        ({"budget": "0%"}, "got '0%'"),
        ({"solver": {"time_limit": "20"}}, "solver.time_limit: the duration has no unit"),
        ({"train": {"steps": -3}}, "train.steps: input should be greater than or equal to 1, got -3"),
        ({"train": {"steps": 2.5}}, "train.steps: input should be a valid integer, got 2.5"),
        ({"train": {"workers": "two"}}, "train.workers: input should be a valid integer, got 'two'"),
        ({"train": {"backend": "slurm"}}, "train.backend: input should be 'ray' or 'local', got 'slurm'"),
        ({"model": "tiny.py"}, "model.target: a target is written 'module:callable'"),
        ({"batch": {"inputs": {"shape": [4, -8]}}}, "batch.inputs.shape.1: input should be greater than"),
        (
            {"batch": {"inputs": {"shape": [4], "dtype": "float"}}},
            "unknown dtype 'float'; did you mean 'float",
        ),
        ({"loss": None}, "batch has targets but there is no loss"),
        ({"name": "../tiny"}, "name: string should match pattern"),
        ({"hardware": "h100"}, "h100-sxm"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_got(write_job: Any, changes: dict[str, Any], expected: str):
    assert expected.lower() in refusal(write_job(**changes)).lower()


def test_a_missing_key_is_named(tmp_path: Path):
    path = tmp_path / "job.yaml"
    path.write_text("name: tiny\n")
    assert "the required key 'model' is missing" in refusal(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [", "is not valid YAML: line 1"),
        ("a: &a [1]\nb: *a\n", "line 2: aliases (*name) are not read"),
        ("a: 1\na: 2\n", "line 2: the key 'a' is written twice"),
        ("? [a]\n: 1\n", "line 1: a key must be a plain word"),
        ("- 1\n", "must hold a mapping of keys to values, got list"),
        ("", "must hold a mapping of keys to values, got NoneType"),
        ("a: " + "[" * 5000 + "]" * 5000, "is nested too deeply"),
        ("a: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        ("# " + "x" * (1 << 20), "a job file has at most"),
    ],
)
def test_a_file_that_is_not_plain_yaml_is_refused(tmp_path: Path, text: str, expected: str):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    assert expected in refusal(path)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path):
    assert "cannot be read" in refusal(tmp_path / "none.yaml")
    (tmp_path / "job.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in refusal(tmp_path / "job.yaml")


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path):
    path = tmp_path / "job.yaml"
    path.write_text("a: 1e-3\nb: no\nc: 1:30\nd: true\ne: 0o17\nf: .5\ng: ~\nh: 012\n")
    assert read_yaml(path) == {
        "a": 0.001, "b": "no", "c": "1:30", "d": True, "e": "0o17", "f": 0.5, "g": None, "h": 12
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("none.py:net", "there is no file"),
        ("tiny.py:nett", "unknown name 'nett'; did you mean 'net'?"),
        ("no_such_module_at_all:net", "does not import: ModuleNotFoundError"),
        ("broken.py:net", "does not import: ZeroDivisionError: division by zero"),
        ("tiny.py:torch", "is a module, not a callable"),
    ],
)
def test_a_target_that_does_not_import_is_refused(write_job: Any, tmp_path: Path, target: str, expected: str):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    job = JobSpec.load(write_job(model=target))
    with pytest.raises(WorkloadError, match="target") as caught:
        job.build_model(fake=False)
    assert expected in str(caught.value)


def test_wrong_arguments_of_a_target_are_refused(write_job: Any):
    job = JobSpec.load(write_job(model={"target": "tiny.py:net", "kwargs": {"depth": 3}}))
    with pytest.raises(WorkloadError, match="unexpected keyword argument 'depth'"):
        job.build_model(fake=False)


def test_a_workload_is_read_from_a_job_file_without_its_training(write_job: Any):
    workload = Workload.load(write_job(train={"whatever": 1}))
    assert workload.name == "tiny"
    assert type(workload) is Workload


def test_a_model_built_in_fake_mode_takes_no_memory(write_job: Any):
    job = JobSpec.load(write_job(model={"target": "tiny.py:net", "kwargs": {"width": 1 << 30}}))
    with FakeTensorMode():
        model = job.build_model(fake=True)
        inputs, targets = job.example_batch()
    assert next(model.parameters()).shape == (1 << 30, 8)
    assert (inputs.shape, targets.shape) == ((4, 8), (4,))


def test_a_constructor_that_reads_values_is_built_really_with_a_warning(
    write_job: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    source = "import torch\n\ndef net():\n    return torch.nn.Linear(2, int(torch.ones(3).sum().item()))\n"
    (tmp_path / "reads.py").write_text(source)
    job = JobSpec.load(write_job(model="reads.py:net"))
    with FakeTensorMode():
        model = job.build_model(fake=True)
    assert type(next(model.parameters()).data) is torch.Tensor
    assert model.out_features == 3
    assert "cannot be built without its values" in caplog.text


def test_inputs_may_be_a_list_or_a_mapping(write_job: Any):
    one, two = {"shape": [4, 8]}, {"shape": [4], "dtype": "int64", "high": 3}
    in_list = JobSpec.load(write_job(batch={"inputs": [one, two], "targets": two})).example_batch()[0]
    in_mapping = JobSpec.load(write_job(batch={"inputs": {"x": one, "y": two}, "targets": two}))
    assert [tuple(t.shape) for t in in_list] == [(4, 8), (4,)]
    assert int(in_list[1].max()) < 3
    assert sorted(in_mapping.example_batch()[0]) == ["x", "y"]


def test_a_loss_class_is_instantiated_and_a_function_bound(write_job: Any):
    smooth = {"label_smoothing": 0.1}
    by_class = JobSpec.load(
        write_job(loss={"target": "torch.nn:CrossEntropyLoss", "kwargs": smooth})
    ).loss_fn()
    by_function = JobSpec.load(
        write_job(loss={"target": "torch.nn.functional:cross_entropy", "kwargs": smooth})
    ).loss_fn()
    logits, labels = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    assert by_class is not None
    assert by_function is not None
    assert torch.equal(by_class(logits, labels), by_function(logits, labels))


def test_an_optimizer_is_found_by_name_and_unknown_ones_are_refused(write_job: Any):
    module = nn.Linear(2, 2)
    adamw = JobSpec.load(write_job(optimizer={"name": "adamw", "lr": 0.5})).optimizer.factories()[0](module)
    assert type(adamw) is torch.optim.AdamW
    assert adamw.param_groups[0]["lr"] == 0.5
    with pytest.raises(WorkloadError, match="unknown optimizer 'adamww'; did you mean 'adamw'"):
        JobSpec.load(write_job(optimizer={"name": "adamww"})).optimizer.factories()
    with pytest.raises(WorkloadError, match="optimizer 'sgd' refuses"):
        JobSpec.load(write_job(optimizer={"name": "sgd", "rate": 1})).optimizer.factories()[0](module)


def test_the_planner_alone_knows_the_optimizers_that_training_knows(write_job: Any):
    for name in optim.optimizer_names():
        assert optimizer_class(name) is optim.optimizer_class(name)
    fine_tuning = {"name": "lamb", "lr": 0.5, "depth_decay": 0.8}
    (build,) = JobSpec.load(write_job(optimizer=fine_tuning)).optimizer.factories()
    assert type(build(nn.Linear(2, 2))) is optim.LAMB


def test_overrides_are_checked_like_the_file(write_job: Any):
    job = JobSpec.load(write_job())
    changed = job.with_changes({"budget": "60%", "steps": 3, "backend": "ray"})
    assert (changed.budget, changed.train.steps, changed.train.backend) == ("60%", 3, "ray")
    with pytest.raises(WorkloadError, match=r"command line: train\.steps"):
        job.with_changes({"steps": 0})
