"""The part `train` of a job file: how a workload is trained."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from cost_models.units import parse_seconds
from orchestrator.batch_size.batch_range import BatchSize, read_batch_size
from orchestrator.checkpoint_places import check_address
from orchestrator.mlflow_run import check_mlflow
from planner.inputs.strict import StrictModel
from planner.inputs.targets import TargetSpec

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


class WorkerRange(StrictModel):
    """Between which numbers of workers a run goes on.

    Attributes:
        min: with fewer it waits.
        max: more are not used.
    """

    min: Count
    max: Count

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min must be at most max, got {self.min} and {self.max}")
        return self


class TrainSpec(StrictModel):
    """How a workload is trained.

    Attributes:
        data: callable that returns the pair (training set, validation set) of map-style data sets, whose
            samples are pairs (input, target).
        steps: optimizer steps of the whole run.
        workers: ranks; each has its own copy of the model, or its share. Written as {min: 2, max: 8}, as many as
            the Ray cluster has room for, while it changes: the global batch stays, that of `max`.
        elastic: the range, where one was written; `workers` is then the number at the time, `max` at first.
        batch_norm: "group_norm" replaces it, "sync" takes its statistics over all ranks (CUDA), "local" accepts
            those of small micro-batches; absent, sizing refuses micro-batches that are too small for it.
        sharding: "ddp" for a copy a rank; "fsdp" for FSDP2, where each rank has a share of parameters, gradients
            and optimizer state, and blocks are gathered for their forward and again for their backward;
            "fsdp_keep" where they stay gathered in between.
        planning: "whole" for one plan of the step, "blocks" for one of each block, which can be gathered and freed
            block by block; absent, whole under ddp and blocks under fsdp.
        backend: "ray" for actors of a Ray cluster, "local" for processes of this machine.
        accumulation: micro-batches per rank and step.
        batch_size: samples of a step over all ranks, in the place of `accumulation`; or {min, max} for a batch that
            follows the gradient noise; or "auto" for one that does so from the job's own batch on, with a probe and
            a sizing before the first step. `steps` then counts in batches of the smallest size.
        seed: of the initial weights, the order of the data and the ranks' random numbers.
        shuffle: a new order of the training set in each epoch.
        schedule: of the learning rate.
        average: of the weights over the last quarter of the run or less; absent for none.
        clip_norm: largest global norm of a step's gradient; absent for no clipping.
        validate_every: steps between two validations; 0 for one before and one after training.
        validation_batches: micro-batches per rank and validation.
        checkpoint_every: steps between two checkpoints; 0 for one at the end.
        checkpoint_dir: where the checkpoints lie, in a folder of the run's name: a path, or the URL of any storage
            that fsspec knows, such as s3://bucket/folder; absent, in the run's folder.
        keep_checkpoints: how many of the newest checkpoints stay on disk.
        keep_best: how many of those with the least validation loss stay beside them; only a step that is validated
            (`validate_every`) can be one.
        mlflow: URI/EXPERIMENT of an MLflow that is to show the run; absent, none.
        run_dir: folder that the run's own folder is made in.
        max_failures: how many failures are answered with another attempt, such as a rank that is lost, hangs or has
            no more memory; and how many rollbacks an attempt may have.
        collective_timeout: how long a rank waits for the others before the one that does not come is named.
        on_nan: what follows a loss, or weights before a checkpoint, that are not finite: "stop"; "rollback" to the
            last checkpoint, the second time without the samples of that step; or "continue" with a warning.
        device: what a rank computes on.
        threads_per_worker: threads of one rank's tensor operations.
        measure_memory_every: steps between two measurements of the peak; 0 for none.
        measure_noise_every: steps between two measurements of the gradient noise, once some dozens are there.
    """

    data: TargetSpec
    steps: Count
    workers: Count = 1
    elastic: WorkerRange | None = None
    batch_norm: Literal["local", "group_norm", "sync"] | None = None
    sharding: Literal["ddp", "fsdp", "fsdp_keep"] = "ddp"
    planning: Literal["whole", "blocks"] | None = None
    backend: Literal["ray", "local"] = "ray"
    accumulation: Count = 1
    batch_size: BatchSize | None = None
    seed: CountOrZero = 0
    shuffle: bool = True
    schedule: ScheduleSpec = ScheduleSpec()
    average: AverageSpec | None = None
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    validate_every: CountOrZero = 0
    validation_batches: Count = 8
    checkpoint_every: CountOrZero = 0
    checkpoint_dir: str | None = None
    keep_checkpoints: Count = 2
    keep_best: CountOrZero = 0
    mlflow: str | None = None
    run_dir: str = "runs"
    max_failures: CountOrZero = 3
    collective_timeout: str = "10min"
    on_nan: Literal["stop", "rollback", "continue"] = "stop"
    device: Literal["cpu", "cuda"] = "cpu"
    threads_per_worker: Count = 1
    measure_memory_every: CountOrZero = 1
    measure_noise_every: Count = 4

    @model_validator(mode="before")
    @classmethod
    def _range_of_workers(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("workers"), dict):
            sizes = WorkerRange.model_validate(data["workers"])
            return {**data, "workers": sizes.max, "elastic": sizes.model_dump()}
        return data

    @field_validator("batch_size", mode="before")
    @classmethod
    def _known_batch_size(cls, value: Any) -> Any:
        return read_batch_size(value)

    @field_validator("collective_timeout")
    @classmethod
    def _some_time(cls, value: str) -> str:
        if parse_seconds(value) < 1:
            raise ValueError(f"collective_timeout must be at least 1s, got {value!r}")
        return value

    @property
    def collective_timeout_s(self) -> float:
        """`collective_timeout` in seconds."""
        return parse_seconds(self.collective_timeout)

    @property
    def fewest_workers(self) -> int:
        """With which the run goes on."""
        return self.workers if self.elastic is None else self.elastic.min

    @model_validator(mode="after")
    def _a_range_of_workers_needs_ray(self) -> Self:
        if self.elastic is not None and self.backend != "ray":
            raise ValueError(
                f"workers from {self.elastic.min} to {self.elastic.max} come and go with a Ray cluster, but "
                f"backend is {self.backend!r}; set workers to a number, or backend to 'ray'"
            )
        return self

    @field_validator("checkpoint_dir")
    @classmethod
    def _address_without_secrets(cls, value: str | None) -> str | None:
        return None if value is None else check_address(value)

    @field_validator("mlflow")
    @classmethod
    def _mlflow_without_secrets(cls, value: str | None) -> str | None:
        return None if value is None else check_mlflow(value)

    @model_validator(mode="after")
    def _synchronized_batch_norm_needs_cuda(self) -> Self:
        if self.batch_norm == "sync" and self.device != "cuda":
            raise ValueError(
                f"batch_norm 'sync' is torch's own and runs on CUDA only, but device is {self.device!r}; set "
                "batch_norm to 'group_norm'"
            )
        return self

    @model_validator(mode="after")
    def _average_counts_steps(self) -> Self:
        if self.average is not None and not isinstance(self.batch_size, int | None):
            raise ValueError(
                "average counts steps of one batch size, but batch_size lets it change; leave average out, or set "
                "batch_size to a number"
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
        if self.sharding != "ddp" and self.fewest_workers == 1:
            raise ValueError(
                f"sharding {self.sharding!r} shares the model among ranks, but workers may be 1; set workers to at "
                "least 2, or sharding to 'ddp'"
            )
        return self
