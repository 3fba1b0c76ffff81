"""Optimizers in a job file: one or two by name with their hyper-parameters, and the class behind a name."""

from __future__ import annotations

import importlib.metadata
import inspect
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import ConfigDict, Field, model_validator

from planner.inputs.long_tail import INSTALL, is_installed, long_tail_class, long_tail_names
from planner.inputs.strict import StrictModel, WorkloadError, unknown_name

if TYPE_CHECKING:
    import torch
    from torch import nn

OPTIMIZER_GROUP = "lowtide.optimizers"
# Makes groups of other rates, of the same bytes.
_RATES_ALONE = ("depth_decay",)


class NextOptimizerSpec(StrictModel):
    """The optimizer of the last part of a run; every other key is one of its hyper-parameters.

    Attributes:
        name: of the optimizer.
        start: share of the run's steps that the first optimizer makes.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    start: Annotated[float, Field(gt=0, lt=1)] = 0.75

    @model_validator(mode="after")
    def _is_the_last(self) -> Self:
        if "then" in self.hyper:
            raise ValueError("a run has two optimizers at most; take out the second 'then'")
        return self

    @property
    def hyper(self) -> dict[str, Any]:
        """The hyper-parameters as written."""
        return dict(self.model_extra or {})

    def start_step(self, steps: int) -> int:
        """Steps of a run of so many that are done before this optimizer's first.

        >>> NextOptimizerSpec(name="sgd", start=0.75).start_step(9)
        7
        """
        return math.ceil(self.start * steps)


class OptimizerSpec(StrictModel):
    """An optimizer by name; every other key is one of its hyper-parameters.

    Attributes:
        name: of the optimizer.
        then: the optimizer of the last part of the run; absent, this one makes all steps.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    then: NextOptimizerSpec | None = None

    @property
    def hyper(self) -> dict[str, Any]:
        """The hyper-parameters as written."""
        return dict(self.model_extra or {})

    def factories(self) -> tuple[Callable[[nn.Module], torch.optim.Optimizer], ...]:
        """module -> optimizer, for each of them; one group of all parameters.

        Raises:
            WorkloadError: no optimizer has this name.
        """
        return tuple(
            _factory(spec.name, spec.hyper) for spec in ((self,) if self.then is None else (self, self.then))
        )


def _factory(name: str, hyper: dict[str, Any]) -> Callable[[nn.Module], torch.optim.Optimizer]:
    chosen = optimizer_class(name)

    def build(module: nn.Module) -> torch.optim.Optimizer:
        given = {key: value for key, value in hyper.items() if key not in _RATES_ALONE}
        try:
            return chosen(module.parameters(), **given)
        except (TypeError, ValueError) as error:
            raise WorkloadError(f"optimizer {name!r} refuses {given}: {error}. Correct its keys") from error

    return build


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class behind a name: an entry point of `lowtide.optimizers`, torch's, or pytorch_optimizer's.

    Raises:
        WorkloadError: no optimizer has this name.
    """
    points = {point.name: point for point in importlib.metadata.entry_points(group=OPTIMIZER_GROUP)}
    if name in points:
        return points[name].load()
    of_torch = torch_optimizers()
    found = of_torch.get(name) or long_tail_class(name)
    if found is None:
        message = unknown_name("optimizer", name, [*of_torch, *points, *long_tail_names()])
        more = "" if is_installed() else f". NovoGrad, AdaHessian and more come with {INSTALL}"
        raise WorkloadError(message + more)
    return found


def torch_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """The classes of torch.optim by their names in snake case."""
    import torch

    public = {name: getattr(torch.optim, name) for name in torch.optim.__all__}
    return {
        _snake_case(name): value
        for name, value in public.items()
        if inspect.isclass(value)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
    }


def _snake_case(class_name: str) -> str:
    # A new word begins at a capital between small letters: SparseAdam -> sparse_adam, but RAdam -> radam.
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", class_name).lower()
