"""JobSpec: what the user writes in one YAML file, the workload and how to train it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import yaml
from pydantic import model_validator

from cost_models.cluster import ClusterSpec
from cost_models.cluster_file import host_cluster, load_cluster, read_cluster
from cost_models.hardware import HOST
from orchestrator.batch_size.batch_range import MOST_GROWTH, BatchRange
from orchestrator.train_spec import TrainSpec
from planner.inputs.strict import WorkloadError
from planner.inputs.workload import BatchSpec, Tensors, TensorSpec, Workload
from planner.tradeoff.rebatched import with_batch_size

if TYPE_CHECKING:
    from torch import nn

    from orchestrator.step_shape import Shape


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

    @model_validator(mode="after")
    def _batch_is_whole_micro_batches(self) -> Self:
        wanted, train = self.train.batch_size, self.train
        if wanted is None or wanted == "auto":
            return self
        if train.accumulation != 1:
            raise ValueError(
                f"train.batch_size and train.accumulation {train.accumulation} both say how many micro-batches a "
                "step has; leave accumulation out"
            )
        unit = self.micro_batch if train.elastic else self.micro_batch * train.workers
        sizes = {"": wanted} if isinstance(wanted, int) else {".min": wanted.min, ".start": wanted.first}
        for key, size in sizes.items():
            least = 0 if train.elastic is None else self.micro_batch * train.elastic.max
            if size < least:
                raise ValueError(
                    f"train.batch_size{key} must be at least {least}, a micro-batch of {self.micro_batch} for each "
                    f"of {least // self.micro_batch} workers, got {size}; raise it, or lower workers.max"
                )
            if size % unit:
                raise ValueError(
                    f"train.batch_size{key} must be a multiple of {unit} ({train.workers} workers with "
                    f"micro-batches of {self.micro_batch}), got {size}; write {max(1, size // unit) * unit}"
                )
        if isinstance(wanted, BatchRange) and wanted.min < 2 * self.micro_batch:
            raise ValueError(
                f"train.batch_size.min must be at least {2 * self.micro_batch}, two micro-batches, since one "
                f"gradient a step says nothing of the noise, got {wanted.min}; raise it, or lower the micro-batch"
            )
        return self

    @model_validator(mode="after")
    def _sharded_ranks_do_alike(self) -> Self:
        sizes = self.train.elastic
        if sizes is None or self.train.sharding == "ddp":
            return self
        count = self.global_batch // self.micro_batch
        uneven = [workers for workers in range(sizes.min, sizes.max + 1) if count % workers]
        if uneven:
            raise ValueError(
                f"under sharding {self.train.sharding!r} all workers must have as many micro-batches, but {count} "
                f"cannot be shared by {', '.join(map(str, uneven))}; choose a global batch that all numbers of "
                "workers divide, or another range"
            )
        return self

    def cluster_spec(self) -> ClusterSpec:
        """The cluster that the job names, or this machine with the job's workers.

        Raises:
            ValueError: no such cluster, or a number in it is wrong.
        """
        if self.cluster is None:
            return host_cluster(self.train.workers)
        folder = self.model.folder
        if isinstance(self.cluster, str):
            return load_cluster(self.cluster, folder=folder)
        return read_cluster(self.cluster, folder=folder)

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
        """Samples of one optimizer step, over all ranks and micro-batches; of the first where they change."""
        wanted = self.train.batch_size
        if wanted is None or wanted == "auto":
            most = self.train.elastic.max if self.train.elastic else self.train.workers
            return self.micro_batch * self.train.accumulation * most
        return wanted if isinstance(wanted, int) else wanted.first

    @property
    def base_batch(self) -> int:
        """Samples of the steps that the learning rate and the number of steps belong to."""
        wanted = self.train.batch_size
        if isinstance(wanted, BatchRange):
            return wanted.min if wanted.rate_batch is None else wanted.rate_batch
        return self.global_batch

    @property
    def batch_range(self) -> BatchRange | None:
        """Between which ends the batch follows the gradient noise; None where it stays."""
        wanted = self.train.batch_size
        if wanted == "auto":
            return BatchRange(min=self.global_batch, max=MOST_GROWTH * self.global_batch)
        return wanted if isinstance(wanted, BatchRange) else None

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank in a step of `global_batch`; of the first where others have one less."""
        return math.ceil(self.global_batch / (self.micro_batch * self.train.workers))

    @property
    def batch_unit(self) -> int:
        """What every batch of a run is a multiple of, in samples."""
        return self.micro_batch if self.train.elastic else self.micro_batch * self.train.workers

    @property
    def planned_accumulation(self) -> int:
        """Micro-batches of one rank that a plan has to hold for: two need what any more need."""
        return self.accumulation if self.batch_range is None else max(2, self.accumulation)

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
            if key == "workers":
                owner["elastic"] = None
            owner[key] = value
        return type(self).from_data(data, folder=self.model.folder, source="command line")

    def resized(self, workers: int) -> Self:
        """The same training on another number of workers of its range."""
        data = self.to_data()
        data["train"]["workers"] = workers
        return type(self).from_data(data, folder=self.model.folder, source="resized")

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
            "elastic": None,
            "sharding": shape.sharding,
            "accumulation": shape.accumulation,
            "batch_size": "auto" if self.train.batch_size == "auto" else None,
            "planning": "blocks" if is_blockwise else "whole",
        }
        if cluster is not None and cluster.device.name != HOST:
            changed["hardware"] = cluster.device.place
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
