"""JobSpec: what the user writes in one YAML file, the workload and how to train it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import ConfigDict, Field, model_validator

from cost_models.cluster import ClusterSpec
from cost_models.cluster_file import host_cluster, load_cluster, read_cluster
from cost_models.hardware import HOST
from planner.inputs.strict import StrictModel, WorkloadError
from planner.inputs.targets import TargetSpec
from planner.inputs.workload import BatchSpec, Tensors, TensorSpec, Workload
from planner.tradeoff.rebatched import with_batch_size

if TYPE_CHECKING:
    from torch import nn

    from orchestrator.step_shape import Shape

Count = Annotated[int, Field(strict=True, ge=1)]
CountOrZero = Annotated[int, Field(strict=True, ge=0)]


class ScheduleSpec(StrictModel):
    """The learning-rate schedule by name; every other key is one of its settings."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = "polynomial"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as written."""
        return dict(self.model_extra or {})


class AverageSpec(StrictModel):
    """An average of the weights over the end of the run, evaluated and saved beside the last weights.

    Attributes:
        kind: "swa", the mean of the weights after each step; "ema", an exponential average.
        start: share of the steps before the first one averaged.
        decay: of the exponential average.
    """

    kind: Literal["swa", "ema"] = "swa"
    start: Annotated[float, Field(ge=0.75, lt=1)] = 0.75
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999

    def start_step(self, steps: int) -> int:
        """Steps of a run of so many that are done before the first one averaged."""
        return math.ceil(self.start * steps)


class TrainSpec(StrictModel):
    """How a workload is trained.

    Attributes:
        data: callable that returns the pair (training set, validation set) of map-style data sets, whose
            samples are pairs (input, target).
        steps: optimizer steps of the whole run.
        workers: ranks; each has its own copy of the model, or its share.
        batch_norm: "group_norm" replaces it, "sync" takes its statistics over all ranks (CUDA), "local" accepts
            those of small micro-batches; absent, sizing refuses micro-batches that are too small for it.
        sharding: "ddp" for a copy a rank; "fsdp" for FSDP2, where each rank has a share of parameters, gradients
            and optimizer state, and blocks are gathered for their forward and again for their backward;
            "fsdp_keep" where they stay gathered in between.
        planning: "whole" for one plan of the step, "blocks" for one of each block, which can be gathered and freed
            block by block; absent, whole under ddp and blocks under fsdp.
        backend: "ray" for actors of a Ray cluster, "local" for processes of this machine.
        accumulation: micro-batches per rank and step.
        seed: of the initial weights, the order of the data and the ranks' random numbers.
        shuffle: a new order of the training set in each epoch.
        schedule: of the learning rate.
        average: of the weights over the last quarter of the run or less; absent for none.
        clip_norm: largest global norm of a step's gradient; absent for no clipping.
        validate_every: steps between two validations; 0 for one before and one after training.
        validation_batches: micro-batches per rank and validation.
        checkpoint_every: steps between two checkpoints; 0 for one at the end.
        keep_checkpoints: how many of the newest checkpoints stay on disk.
        run_dir: folder that the run's own folder is made in.
        max_failures: how often a lost worker group is started again.
        device: what a rank computes on.
        threads_per_worker: threads of one rank's tensor operations.
        measure_memory_every: steps between two measurements of the peak; 0 for none.
    """

    data: TargetSpec
    steps: Count
    workers: Count = 1
    batch_norm: Literal["local", "group_norm", "sync"] | None = None
    sharding: Literal["ddp", "fsdp", "fsdp_keep"] = "ddp"
    planning: Literal["whole", "blocks"] | None = None
    backend: Literal["ray", "local"] = "ray"
    accumulation: Count = 1
    seed: CountOrZero = 0
    shuffle: bool = True
    schedule: ScheduleSpec = ScheduleSpec()
    average: AverageSpec | None = None
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    validate_every: CountOrZero = 0
    validation_batches: Count = 8
    checkpoint_every: CountOrZero = 0
    keep_checkpoints: Count = 2
    run_dir: str = "runs"
    max_failures: CountOrZero = 3
    device: Literal["cpu", "cuda"] = "cpu"
    threads_per_worker: Count = 1
    measure_memory_every: CountOrZero = 1

    @model_validator(mode="after")
    def _synchronized_batch_norm_needs_cuda(self) -> Self:
        if self.batch_norm == "sync" and self.device != "cuda":
            raise ValueError(
                f"batch_norm 'sync' is torch's own and runs on CUDA only, but device is {self.device!r}; set "
                "batch_norm to 'group_norm'"
            )
        return self

    @model_validator(mode="after")
    def _average_needs_whole_weights(self) -> Self:
        if self.average is not None and self.sharding != "ddp":
            raise ValueError(
                f"average needs the whole weights on every rank, but sharding is {self.sharding!r}; leave average "
                "out, or set sharding to 'ddp'"
            )
        return self

    @model_validator(mode="after")
    def _sharding_needs_ranks(self) -> Self:
        if self.sharding != "ddp" and self.workers == 1:
            raise ValueError(
                f"sharding {self.sharding!r} shares the model among ranks, but workers is 1; set workers to at "
                "least 2, or sharding to 'ddp'"
            )
        return self


class JobSpec(Workload):
    """A workload and how to train it.

    Attributes:
        train: how.
        cluster: that `lowtide size` divides the step for: a name and a number of nodes ("dgx-a100-40gb x8"), or
            device, nodes, devices_per_node and network; absent, the workers on this machine.
    """

    train: TrainSpec
    cluster: str | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _both_optimizers_have_steps(self) -> Self:
        then, steps = self.optimizer.then, self.train.steps
        if then is None:
            return self
        start_step = then.start_step(steps)
        if start_step == steps:
            raise ValueError(
                f"optimizer.then starts after {then.start:g} of {steps} steps, which leaves it none; lower its "
                "start or raise train.steps"
            )
        average = self.train.average
        if average is not None and average.start_step(steps) < start_step:
            raise ValueError(
                f"train.average starts at {average.start:g} of the steps, before optimizer.then at "
                f"{then.start:g}, and would mix the weights of two optimizers; set its start to {then.start:g} or "
                "more"
            )
        return self

    def cluster_spec(self) -> ClusterSpec:
        """The cluster that the job names, or this machine with the job's workers.

        Raises:
            ValueError: no such cluster, or a number in it is wrong.
        """
        if self.cluster is None:
            return host_cluster(self.train.workers)
        return load_cluster(self.cluster) if isinstance(self.cluster, str) else read_cluster(self.cluster)

    def build_model(self, *, fake: bool) -> nn.Module:
        """The model, with what `train.batch_norm` makes of its batch norm; see `Workload.build_model`."""
        from orchestrator.techniques.normalization import with_group_norm, with_sync_batch_norm

        model = super().build_model(fake=fake)
        if self.train.batch_norm == "group_norm":
            return with_group_norm(model)
        return with_sync_batch_norm(model) if self.train.batch_norm == "sync" else model

    @property
    def micro_batch(self) -> int:
        """Samples of one micro-batch: dim 0 of the first input.

        Raises:
            WorkloadError: the batch is a callable, or has no dim 0.
        """
        if not isinstance(self.batch, BatchSpec):
            raise WorkloadError(
                "training needs the batch as shapes, not as a callable, to know the samples per micro-batch"
            )
        shape = _first(self.batch.inputs).shape
        if not shape or shape[0] < 1:
            raise WorkloadError(
                f"batch.inputs: dim 0 must count the samples of a micro-batch, got shape {list(shape)}"
            )
        return shape[0]

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step, over all ranks and micro-batches."""
        return self.micro_batch * self.train.accumulation * self.train.workers

    def with_changes(self, overrides: Mapping[str, Any]) -> Self:
        """This job with other settings.

        Args:
            overrides: "budget", or a key of `train`, to its new value.

        Raises:
            WorkloadError: an override is not valid.
        """
        data = self.to_data()
        for key, value in overrides.items():
            owner = data if key == "budget" else data["train"]
            owner[key] = value
        return type(self).from_data(data, folder=self.model.folder, source="command line")

    def with_shape(
        self,
        shape: Shape,
        *,
        is_blockwise: bool,
        cluster: ClusterSpec | None = None,
        budget_bytes: int | None = None,
    ) -> Self:
        """This job with its step divided in another way, planned block by block or in one.

        Args:
            shape: how the step is divided.
            is_blockwise: planned block by block.
            cluster: that it was sized for; None keeps the job's hardware.
            budget_bytes: of one rank; None keeps the job's budget.

        Raises:
            WorkloadError: the batch is a callable.
        """
        changed = with_batch_size(self, shape.micro_batch).model_dump(mode="json")
        changed["train"] |= {
            "workers": shape.workers,
            "sharding": shape.sharding,
            "accumulation": shape.accumulation,
            "planning": "blocks" if is_blockwise else "whole",
        }
        if cluster is not None and cluster.device.name != HOST:
            changed["hardware"] = cluster.device.name
            if cluster.device.kind == "gpu":
                changed["train"]["device"] = "cuda"
        if budget_bytes is not None:
            changed["budget"] = f"{budget_bytes}B"
        return type(self).from_data(changed, folder=self.model.folder, source="sizing")

    def to_yaml(self) -> str:
        """A job file that lies beside this one."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump(data, sort_keys=False, width=110)

    def to_data(self) -> dict[str, Any]:
        """Plain data that `from_data` reads back; file targets stay relative to the job's folder."""
        return self.model_dump(mode="json")


def _first(tensors: Tensors) -> TensorSpec:
    if isinstance(tensors, TensorSpec):
        return tensors
    values = list(tensors.values()) if isinstance(tensors, dict) else list(tensors)
    if not values:
        raise WorkloadError("batch.inputs is empty; give at least one tensor with its shape")
    return values[0]
