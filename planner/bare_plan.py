"""The plan of a bare graph: an order of nodes, and the same numbers as for a model's plan."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from planner.bare_graph import read_bare_graph
from planner.prepared import Prepared
from planner.problem import Problem
from planner.schedule import Compute, Schedule
from planner.simulate import Trace
from planner.solution import Solution, Status
from planner.whole_file import write_whole


@dataclass(frozen=True)
class BarePlan:
    """What a solver found for a bare graph.

    Attributes:
        graph_hash: SHA-256 of the graph.
        status: "optimal" within the solver's gap, or "feasible".
        solver: that found the schedule.
        gap: share of the time that is not proven necessary.
        solve_s: seconds of the search.
        num_nodes: of the graph.
        num_forward: of them in the forward phase.
        num_rematerialized: runs beyond the first of each node.
        budget_bytes: what was allowed.
        predicted_peak_bytes: peak of the schedule.
        retained_all_peak_bytes: peak of the given order with everything retained.
        static_bytes: none; a graph says nothing of it.
        step_s: cost of running each node once.
        extra_time_fraction: rematerialization over `step_s`.
        peak_owner: node that runs when the schedule peaks.
        schedule: what is computed and freed.
        timeline_bytes: memory while each computation runs.
        retained_all_timeline_bytes: the same with everything retained.
    """

    hardware: ClassVar[None] = None
    static_bytes: ClassVar[int] = 0

    graph_hash: str
    status: str
    solver: str
    gap: float
    solve_s: float
    num_nodes: int
    num_forward: int
    num_rematerialized: int
    budget_bytes: int
    predicted_peak_bytes: int
    retained_all_peak_bytes: int
    step_s: float
    extra_time_fraction: float
    peak_owner: str
    schedule: Schedule
    timeline_bytes: tuple[int, ...]
    retained_all_timeline_bytes: tuple[int, ...]

    def save(self, path: str | Path) -> None:
        """Write the nodes in order of execution as one JSON list; a node is there once per run.

        Raises:
            ValueError: it cannot be written.
        """
        write_whole(path, json.dumps(list(self.schedule.node_order)) + "\n")


def bare_step(path: str | Path) -> Prepared[BarePlan]:
    """The graph in a file, ready to be planned.

    Raises:
        ValueError: the file holds no graph.
    """
    return Prepared.of(Problem(read_bare_graph(path), 0), hardware=None, written=_plan_of)


def _plan_of(problem: Problem, solution: Solution, trace: Trace, retained_all: Trace) -> BarePlan:
    costed, schedule = problem.costed, solution.schedule
    assert schedule is not None
    peak_step = schedule.instructions[trace.peak_instruction]
    assert isinstance(peak_step, Compute)
    return BarePlan(
        graph_hash=costed.graph.digest,
        status="optimal" if solution.status is Status.OPTIMAL else "feasible",
        solver=solution.solver,
        gap=min(1.0, solution.gap),
        solve_s=solution.solve_s,
        num_nodes=len(costed.graph.nodes),
        num_forward=costed.graph.num_forward,
        num_rematerialized=trace.num_rematerialized,
        budget_bytes=problem.budget_bytes,
        predicted_peak_bytes=trace.peak_bytes,
        retained_all_peak_bytes=retained_all.peak_bytes,
        step_s=costed.step_s,
        extra_time_fraction=costed.extra_time_fraction(trace.time_s),
        peak_owner=costed.graph.nodes[peak_step.node].name,
        schedule=schedule,
        timeline_bytes=trace.timeline_bytes,
        retained_all_timeline_bytes=retained_all.timeline_bytes,
    )
