"""Which values are there while a schedule runs, and what holds its peak up."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from planner.graph import Graph
from planner.problem import Problem
from planner.schedule import Compute, Schedule
from planner.simulate import Trace

# An answer names no more of the values that hold a peak up.
_MAX_HOLDERS = 20


@dataclass(frozen=True, slots=True)
class Lifetime:
    """One stay of a value in memory, in numbers of computations of the schedule, as `planner.simulate` counts it.

    Attributes:
        value: index of the value.
        first: computation that made it.
        stop: first computation at which it is gone.
    """

    value: int
    first: int
    stop: int


@dataclass(frozen=True)
class Holder:
    """A value that is there when a schedule peaks.

    Attributes:
        name: of the operation that made it, or what else the bytes are.
        op: its operator.
        layer: module that it comes from, "" if unknown.
        size_bytes: what it takes.
    """

    name: str
    op: str
    layer: str
    size_bytes: int


def lifetimes(graph: Graph, schedule: Schedule) -> list[Lifetime]:
    """Every stay of every value.

    An output that is there already when its node runs again is made in vain: a second stay of one computation.

    Args:
        graph: the training step.
        schedule: one that can be executed.
    """
    stays: list[Lifetime] = []
    made_at: dict[int, int] = {}
    ran: set[int] = set()
    now = -1
    for instruction in schedule.instructions:
        if not isinstance(instruction, Compute):
            stays.append(Lifetime(instruction.value, made_at.pop(instruction.value), now + 1))
            continue
        now += 1
        again = instruction.node in ran
        ran.add(instruction.node)
        for value in graph.nodes[instruction.node].outputs:
            if again and graph.values[value].first_run_only:
                continue
            if value in made_at:
                stays.append(Lifetime(value, now, now + 1))
            else:
                made_at[value] = now
    stays.extend(Lifetime(value, first, now + 1) for value, first in made_at.items())
    return stays


def residents_at(graph: Graph, schedule: Schedule, position: int) -> list[int]:
    """The values that are there while one computation runs.

    Args:
        graph: the training step.
        schedule: one that can be executed.
        position: index of a `Compute` among the instructions.

    Returns:
        Indices of values; one that is made a second time is there twice.
    """
    now = sum(isinstance(i, Compute) for i in schedule.instructions[:position])
    return [stay.value for stay in lifetimes(graph, schedule) if stay.first <= now < stay.stop]


def peak_owner(problem: Problem, schedule: Schedule, trace: Trace) -> str:
    """What runs when a schedule peaks, in words."""
    step = schedule.instructions[trace.peak_instruction]
    if 0 < trace.peak_bytes == problem.static.optimizer_step_peak_bytes:
        return "the optimizer's step"
    if not isinstance(step, Compute):
        return "memory that is always there"
    return described(problem.costed.graph, step.node)


def described(graph: Graph, node: int) -> str:
    """A node in words: its name, operator, phase and layer."""
    this = graph.nodes[node]
    if this.name == str(node):
        return f"node {this.name}"
    layer = f" of {this.layer}" if this.layer else ""
    return f"{this.name} ({this.op}, {this.phase.value}{layer})"


def holders(problem: Problem, schedule: Schedule, trace: Trace) -> list[Holder]:
    """Everything that is there when a schedule peaks, the largest first; the bytes sum to the peak."""
    graph, static = problem.costed.graph, problem.static
    if 0 < trace.peak_bytes == static.optimizer_step_peak_bytes:
        return [Holder("optimizer step", "", "", trace.peak_bytes)]
    found = []
    for v in residents_at(graph, schedule, trace.peak_instruction):
        node = graph.nodes[graph.values[v].node]
        found.append(Holder(node.name, node.op, node.layer, graph.values[v].size_bytes))
    step = schedule.instructions[trace.peak_instruction]
    if isinstance(step, Compute) and graph.nodes[step.node].workspace_bytes:
        node = graph.nodes[step.node]
        found.append(Holder(f"{node.name} (workspace)", node.op, node.layer, node.workspace_bytes))
    if static.resident_bytes:
        found.append(Holder("static memory", "", "", static.resident_bytes))
    return sorted(found, key=lambda holder: -holder.size_bytes)


def holder_objects(problem: Problem, schedule: Schedule, trace: Trace) -> list[dict[str, Any]]:
    """The largest of what is there when a schedule peaks, for ``--json``."""
    return [dataclasses.asdict(one) for one in holders(problem, schedule, trace)[:_MAX_HOLDERS]]
