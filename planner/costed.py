"""A graph with the seconds of every node on one device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

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
    """

    graph: Graph
    time_s: tuple[float, ...]
    cost_model: str = ""

    def __post_init__(self) -> None:
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


def annotate(graph: Graph, cost_model: CostModel) -> CostedGraph:
    """Price every node of the graph.

    Args:
        graph: the training step.
        cost_model: prices one node's work.

    Returns:
        The graph with seconds.
    """
    view_s = cost_model.time_s(VIEW)
    return CostedGraph(
        graph,
        tuple(
            sum(cost_model.time_s(work) for work in (node.work, *node.then)) + node.num_views * view_s
            for node in graph.nodes
        ),
        cost_model=cost_model.name,
    )
