"""A plan replayed from its file alone: what is there when, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.costed import CostedGraph
from planner.graph import Phase
from planner.plan_file import Plan
from planner.problem import Problem, StaticMemory
from planner.residency import Lifetime, lifetimes
from planner.schedule import Compute, Schedule
from planner.simulate import Trace, simulate

# Without a depth, layers are rolled up until a table has at most so many rows; many are better than very few.
_MAX_ROWS, _FEW_ROWS, _MANY_ROWS = 24, 7, 64
_NO_LAYER = "(model)"
STATIC, WORKSPACE = "static memory", "workspace"


@dataclass(frozen=True)
class Replayed:
    """A plan's schedule, replayed on the graph in its table.

    Attributes:
        plan: it.
        costed: the graph.
        schedule: what runs.
        trace: the judge's replay.
    """

    plan: Plan
    costed: CostedGraph
    schedule: Schedule
    trace: Trace

    @classmethod
    def of(cls, plan: Plan) -> Replayed:
        """Replay a plan.

        Raises:
            ValueError: it has no table, or its schedule is not one of the step in its table.
        """
        if plan.table is None:
            raise ValueError(
                f"this plan is of format {plan.format}, which has no table of the step's operations. "
                "Make it again with lowtide plan."
            )
        try:
            costed = plan.table.costed_graph()
            problem = Problem(costed, plan.budget_bytes, StaticMemory(parameter_bytes=plan.static_bytes))
            return cls(plan, costed, plan.schedule, simulate(problem, plan.schedule))
        except ValueError as error:
            raise ValueError(
                f"this plan's schedule does not fit its table: {error}. Make it again with lowtide plan."
            ) from error

    @cached_property
    def problem(self) -> Problem:
        """What the plan answers; the optimizer's step counts where it is the peak."""
        step_bytes = self.plan.predicted_peak_bytes if self.plan.peak_owner == "optimizer step" else 0
        static = StaticMemory(parameter_bytes=self.plan.static_bytes, optimizer_step_peak_bytes=step_bytes)
        return Problem(self.costed, self.plan.budget_bytes, static)

    @cached_property
    def stays(self) -> list[Lifetime]:
        """Every stay of every value."""
        return lifetimes(self.costed.graph, self.schedule)

    @cached_property
    def backward_begins(self) -> int:
        """Number of the computation that is the first of backward."""
        nodes = self.costed.graph.nodes
        order = self.schedule.node_order
        return next((at for at, k in enumerate(order) if nodes[k].phase is Phase.BACKWARD), len(order))

    @cached_property
    def peak_computation(self) -> int:
        """Number of the computation at which forward and backward peak."""
        return sum(isinstance(i, Compute) for i in self.schedule.instructions[: self.trace.peak_instruction])

    def groups(self, depth: int | None) -> tuple[str, ...]:
        """For each node its layer, rolled up.

        Args:
            depth: parts of the qualified name that are kept; None for as many as a table has room for.
        """
        layers = [node.layer for node in self.costed.graph.nodes]
        deepest = max((layer.count(".") + 1 for layer in layers), default=1)
        if depth is None:
            rows = {d: len({rolled_up(layer, d) for layer in layers}) for d in range(1, deepest + 1)}
            depth = max((d for d in rows if rows[d] <= _MAX_ROWS), default=1)
            if rows[depth] < _FEW_ROWS and rows.get(depth + 1, _MANY_ROWS + 1) <= _MANY_ROWS:
                depth += 1  # many equal blocks
        return tuple(rolled_up(layer, depth) for layer in layers)


def rolled_up(layer: str, depth: int) -> str:
    """The first parts of a qualified name.

    >>> rolled_up("blocks.0.mlp.up", 2)
    'blocks.0'
    """
    return ".".join(layer.split(".")[:depth]) or _NO_LAYER


def layer_timelines(plan: Plan, *, depth: int | None = None) -> dict[str, np.ndarray]:
    """Bytes of each layer while each computation runs; static memory and workspace are the first two.

    Args:
        plan: of format 2.
        depth: as for `explain`.

    Returns:
        Owner -> bytes at each computation; they sum to the plan's timeline.
    """
    replayed = Replayed.of(plan)
    graph, order = replayed.costed.graph, replayed.schedule.node_order
    group = replayed.groups(depth)
    changes = {layer: np.zeros(len(order) + 1, dtype=np.int64) for layer in dict.fromkeys(group)}
    for stay in replayed.stays:
        value = graph.values[stay.value]
        changes[group[value.node]][stay.first] += value.size_bytes
        changes[group[value.node]][stay.stop] -= value.size_bytes
    workspace = np.array([graph.nodes[k].workspace_bytes for k in order], dtype=np.int64)
    always = {STATIC: np.full(len(order), plan.static_bytes, dtype=np.int64), WORKSPACE: workspace}
    return always | {layer: np.cumsum(change[:-1]) for layer, change in changes.items()}
