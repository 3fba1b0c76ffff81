"""A graph with the seconds of every node on one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from cost_models.device import HardwareSpec
from cost_models.energy import work_energy_j
from cost_models.measured import Measured
from cost_models.roofline import Roofline
from cost_models.work import VIEW, Work
from planner.graph import Graph


class CostModel(Protocol):
    """Anything that prices work in seconds."""

    @property
    def name(self) -> str:
        """Of the model, for a plan's provenance."""
        ...

    def time_s(self, work: Work) -> float:
        """Seconds that the work takes."""
        ...


@dataclass(frozen=True)
class CostedGraph:
    """A graph and the time of each of its nodes.

    Attributes:
        graph: the training step.
        time_s: seconds of each node, in the order of ``graph.nodes``.
        cost_model: name of what priced it, "" where the prices were given.
        energy_j: joules of each node; () where none are known.
    """

    graph: Graph
    time_s: tuple[float, ...]
    cost_model: str = ""
    energy_j: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.energy_j and len(self.energy_j) != len(self.graph.nodes):
            raise ValueError(
                f"one energy per node: got {len(self.energy_j)} for {len(self.graph.nodes)} nodes"
            )
        if len(self.time_s) != len(self.graph.nodes):
            raise ValueError(
                f"one time per node: got {len(self.time_s)} times for {len(self.graph.nodes)} nodes"
            )
        if not np.all(np.isfinite(self.time_s)) or min(self.time_s, default=0.0) < 0.0:
            raise ValueError("node times must be finite and >= 0")

    @cached_property
    def step_s(self) -> float:
        """Seconds of the step when every node runs once."""
        return float(sum(self.time_s))

    def extra_time_fraction(self, time_s: float) -> float:
        """What a schedule of `time_s` seconds takes beyond the step, as a share of the step.

        >>> CostedGraph(Graph((), ()), ()).extra_time_fraction(0.0)
        0.0
        """
        return max(0.0, time_s - self.step_s) / self.step_s if self.step_s else 0.0

    @property
    def by_energy(self) -> CostedGraph:
        """The same graph with joules in the place of seconds: for a solver, which adds up and compares.

        Raises:
            ValueError: no energies are known.
        """
        if not self.energy_j:
            raise ValueError("the energy of this step is not known: its costs are given without a device.")
        return CostedGraph(self.graph, self.energy_j, self.cost_model)


def annotate(graph: Graph, cost_model: CostModel, *, hardware: HardwareSpec | None = None) -> CostedGraph:
    """Price every node of the graph.

    Args:
        graph: the training step.
        cost_model: prices one node's work.
        hardware: the device, whose powers price energy; None counts none.

    Returns:
        The graph with seconds, and joules.
    """

    def price(of: Callable[[Work], float]) -> tuple[float, ...]:
        view = of(VIEW)
        return tuple(
            sum(of(work) for work in (node.work, *node.then)) + node.num_views * view for node in graph.nodes
        )

    def energy_j(work: Work) -> float:
        assert hardware is not None
        return work_energy_j(work, time_s=cost_model.time_s(work), hardware=hardware)

    return CostedGraph(
        graph,
        price(cost_model.time_s),
        cost_model=cost_model.name,
        energy_j=() if hardware is None else price(energy_j),
    )


def priced(graph: Graph, cost_model: CostModel) -> CostedGraph:
    """The graph with seconds, and joules where a device priced it; `cost_model` says what share is measured."""
    hardware = cost_model.hardware if isinstance(cost_model, Roofline | Measured) else None
    costed = annotate(graph, cost_model, hardware=hardware)
    if not isinstance(cost_model, Measured):
        return costed
    share = cost_model.measured_share(work for node in graph.nodes for work in (node.work, *node.then))
    name = f"measured for {share:.1%} of the time, the rest by a fitted roofline"
    return replace(costed, cost_model=name)
