"""Workload: the model, batch, loss, optimizer, budget and hardware that a YAML file names."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cost_models.hardware import OWN_FILE, load_hardware
from cost_models.units import parse_seconds
from planner.inputs.optimizers import OptimizerSpec
from planner.inputs.strict import StrictModel, WorkloadError, sentence, unknown_name
from planner.inputs.targets import TargetSpec
from planner.inputs.yaml_reader import read_yaml
from planner.problem import Budget, Objective
from planner.solvers import DEFAULT_SOLVER, solver_names

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

_TRAIN_KEY = "train"
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


class TensorSpec(StrictModel):
    """One tensor of a batch: its shape, its dtype and, for integers, the exclusive bound of its values."""

    shape: tuple[Annotated[int, Field(strict=True, ge=0)], ...]
    dtype: str = "float32"
    high: Annotated[int, Field(strict=True, gt=0)] | None = None

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, dtype: str) -> str:
        if dtype not in _DTYPES:
            raise ValueError(unknown_name("dtype", dtype, list(_DTYPES)))
        return dtype

    def example(self, *, seed: int) -> torch.Tensor:
        """A tensor of this kind: standard normal values, or integers below `high` (2 where none is given)."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        dtype: torch.dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point:
            return torch.randn(self.shape, generator=generator).to(dtype)
        return torch.randint(self.high or 2, self.shape, generator=generator).to(dtype)


def _tensors_kind(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "list"
    if isinstance(value, TensorSpec) or (isinstance(value, Mapping) and "shape" in value):
        return "tensor"
    return "mapping"


Tensors = Annotated[
    Annotated[TensorSpec, Tag("tensor")]
    | Annotated[tuple[TensorSpec, ...], Tag("list")]
    | Annotated[dict[str, TensorSpec], Tag("mapping")],
    Discriminator(_tensors_kind),
]


class BatchSpec(StrictModel):
    """The inputs of the model and the targets of its loss, tensor by tensor. Dim 0 is the batch."""

    inputs: Tensors
    targets: Tensors | None = None


def _batch_kind(value: Any) -> str:
    named = isinstance(value, str | TargetSpec) or (isinstance(value, Mapping) and "target" in value)
    return "callable" if named else "spec"


def parse_gap(text: str) -> float:
    """The share that a text such as "0.2%" stands for.

    Raises:
        ValueError: anything else, or no share from 0 to 100 %.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*%", text.strip())
    if match is None or not 0.0 <= float(match[1]) <= 100.0:
        raise ValueError(f"a gap must read like '0.2%', from 0% to 100%, got {text[:40]!r}")
    return float(match[1]) / 100.0


class SolverSpec(StrictModel):
    """Which solver, how long it may take, how close it must prove, whether it may change the order, and what of.

    `gap` is a share of the step's time ("0.2%") that may stay unproven. `minimize` is "time" or "energy".
    """

    time_limit: str = "20s"
    gap: str = "0.2%"
    name: str = DEFAULT_SOLVER
    free_order: Annotated[bool, Field(strict=True)] = False
    minimize: Objective = "time"

    @field_validator("name")
    @classmethod
    def _known_solver(cls, name: str) -> str:
        if name not in solver_names():
            raise ValueError(unknown_name("solver", name, list(solver_names())))
        return name

    @field_validator("time_limit")
    @classmethod
    def _seconds(cls, text: str) -> str:
        if parse_seconds(text) <= 0:
            raise ValueError(f"the time limit must be positive, got {text!r}")
        return text

    @field_validator("gap")
    @classmethod
    def _share(cls, text: str) -> str:
        parse_gap(text)
        return text

    @property
    def gap_share(self) -> float:
        """The gap as a share: 0.002 for "0.2%"."""
        return parse_gap(self.gap)

    @property
    def time_limit_s(self) -> float:
        """The limit in seconds."""
        return parse_seconds(self.time_limit)


class Workload(StrictModel):
    """What is planned: one training step of one model on one device.

    The key `train` of a job file belongs to the orchestrator; `load` leaves it out.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: TargetSpec
    batch: Annotated[
        Annotated[BatchSpec, Tag("spec")] | Annotated[TargetSpec, Tag("callable")], Discriminator(_batch_kind)
    ]
    loss: TargetSpec | None = None
    optimizer: OptimizerSpec
    hardware: str = "host"
    budget: str = "none"
    solver: SolverSpec = SolverSpec()
    executor: Literal["aten", "inductor"] = "aten"
    measurements: str | None = None

    @property
    def measurements_path(self) -> Path | None:
        """File or folder of measured times, relative to the job's folder; None prices with the roofline."""
        return None if self.measurements is None else self.model.folder / self.measurements

    @property
    def hardware_place(self) -> str:
        """What `load_hardware` finds the device by: its name, or the path of a file beside the job."""
        is_own = self.hardware.endswith(OWN_FILE)
        return str((self.model.folder / self.hardware).absolute()) if is_own else self.hardware

    @field_validator("budget", mode="before")
    @classmethod
    def _budget_has_a_unit(cls, budget: Any) -> Any:
        return check_budget(budget)

    @field_validator("hardware")
    @classmethod
    def _known_hardware(cls, name: str, info: ValidationInfo) -> str:
        load_hardware(name, folder=(info.context or {}).get("folder"))
        return name

    @model_validator(mode="after")
    def _targets_need_a_loss(self) -> Self:
        if isinstance(self.batch, BatchSpec) and self.loss is None and self.batch.targets is not None:
            raise ValueError("batch has targets but there is no loss; give a loss as 'module:callable'")
        return self

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The workload that a YAML file describes.

        Raises:
            WorkloadError: the file cannot be read or does not describe one.
        """
        data = read_yaml(path)
        if _TRAIN_KEY not in cls.model_fields:
            data.pop(_TRAIN_KEY, None)
        return cls.from_data(data, folder=Path(path).resolve().parent, source=str(path))

    @classmethod
    def from_data(cls, data: Mapping[str, Any], *, folder: Path, source: str) -> Self:
        """The workload that plain data describes; file targets are relative to `folder`."""
        try:
            return cls.model_validate(data, context={"folder": folder})
        except ValidationError as error:
            raise WorkloadError(sentence(error, source=source)) from error

    def build_model(self, *, fake: bool) -> nn.Module:
        """The model, built by the named callable.

        Args:
            fake: the caller has entered torch's fake mode, so that parameters take no memory. A constructor
                that looks at values cannot run there: it is then built really, and a warning says so.

        Raises:
            WorkloadError: the callable fails, or returns something else than a module.
        """
        from torch import nn

        try:
            model = self.model.call()
        except WorkloadError as error:
            if not fake or not isinstance(error.__cause__, RuntimeError | TypeError | NotImplementedError):
                raise
            model = _outside_of_modes(self.model)
            logger.warning(
                "%s cannot be built without its values (%s); it was built really and takes memory",
                self.model.target,
                error,
            )
        if not isinstance(model, nn.Module):
            raise WorkloadError(
                f"target {self.model.target!r} returned a {type(model).__name__}, not a torch.nn.Module"
            )
        return model

    def example_batch(self) -> tuple[Any, Any]:
        """(inputs, targets) as the file describes them; fake where the caller has entered fake mode."""
        if isinstance(self.batch, TargetSpec):
            batch = self.batch.call()
            if not (isinstance(batch, tuple) and len(batch) == 2):
                raise WorkloadError(
                    f"batch target {self.batch.target!r} must return the pair (inputs, targets)"
                )
            return batch
        return _examples(self.batch.inputs, seed=0), _examples(self.batch.targets, seed=1)

    def loss_fn(self) -> Callable[..., Any] | None:
        """loss(output, targets) -> scalar, or None where the model returns its own loss."""
        return None if self.loss is None else self.loss.as_function()


def check_budget(budget: Any) -> str:
    """A budget as the planner reads it: bytes with a unit, a percentage, or "none".

    Raises:
        ValueError: a bare number, an unknown unit, or a number that is not positive.
    """
    if not isinstance(budget, str):
        raise ValueError(
            f"a budget needs a unit, got {budget!r}; write '4GiB', '60%', '50% of activations' or 'none'"
        )
    Budget.parse(budget)
    return budget


def _examples(tensors: Any, *, seed: int) -> Any:
    if tensors is None:
        return None
    if isinstance(tensors, TensorSpec):
        return tensors.example(seed=seed)
    if isinstance(tensors, tuple):
        return tuple(spec.example(seed=seed + 2 * index) for index, spec in enumerate(tensors))
    return {name: spec.example(seed=seed + 2 * index) for index, (name, spec) in enumerate(tensors.items())}


def _outside_of_modes(target: TargetSpec) -> Any:
    """Build in a fresh thread: torch's modes belong to the thread that entered them."""
    built: list[Any] = []
    failures: list[WorkloadError] = []

    def run() -> None:
        try:
            built.append(target.call())
        except WorkloadError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return built[0]
