"""JobSpec: what the user writes in one YAML file, the workload and how to train it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field

from planner.inputs.strict import StrictModel, WorkloadError
from planner.inputs.targets import TargetSpec
from planner.inputs.workload import BatchSpec, Tensors, TensorSpec, Workload

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


class TrainSpec(StrictModel):
    """How a workload is trained.

    Attributes:
        data: callable that returns the pair (training set, validation set) of map-style data sets, whose
            samples are pairs (input, target).
        steps: optimizer steps of the whole run.
        workers: ranks; each has its own copy of the model.
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


class JobSpec(Workload):
    """A workload and how to train it."""

    train: TrainSpec

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
