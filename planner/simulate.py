"""Replay a schedule from the definition: peak, time, timeline. The judge of every solver."""

from __future__ import annotations

from dataclasses import dataclass

from planner.problem import Problem
from planner.schedule import Compute, Schedule


class ScheduleError(ValueError):
    """A schedule that cannot be executed, or does not do the whole step."""


@dataclass(frozen=True)
class Trace:
    """What a schedule does when it is executed.

    Attributes:
        peak_bytes: most bytes of the rank at any time of the step, static memory and optimizer step included.
        peak_instruction: index of the instruction at which forward and backward peak.
        time_s: seconds of all computed nodes.
        timeline_bytes: bytes of the rank while each `Compute` runs, in order.
        num_rematerialized: computations beyond the first of each node.
    """

    peak_bytes: int
    peak_instruction: int
    time_s: float
    timeline_bytes: tuple[int, ...]
    num_rematerialized: int


def simulate(problem: Problem, schedule: Schedule) -> Trace:
    """Execute the schedule on paper.

    While node k runs, memory holds the static bytes, every value that was made and not freed, the outputs of
    k, and its workspace. An output that is already there is made a second time and dropped when k ends.

    Args:
        problem: graph, seconds, static memory. The budget is not read: peak is an answer, not a rule here.
        schedule: instructions in order.

    Returns:
        Peak, time and timeline.

    Raises:
        ScheduleError: an input is not there; a node that may run only once runs twice; a value is freed that
            is not there or that the caller holds; a node never runs; a first run is out of the graph's order
            of phases.
    """
    graph = problem.costed.graph
    resident = [False] * len(graph.values)
    runs = [0] * len(graph.nodes)
    live = problem.static.resident_bytes
    time_s = 0.0
    timeline: list[int] = []
    peak, peak_at = live, 0
    for position, instruction in enumerate(schedule.instructions):
        if isinstance(instruction, Compute):
            node = graph.nodes[instruction.node]
            for value in node.inputs:
                if not resident[value]:
                    raise ScheduleError(f"{node.name}: input {graph.values[value].name} is not there")
            if runs[instruction.node] and not node.can_rematerialize:
                raise ScheduleError(f"{node.name} may run only once")
            again = runs[instruction.node] > 0
            outputs = [v for v in node.outputs if not (again and graph.values[v].first_run_only)]
            made = sum(graph.values[value].size_bytes for value in outputs)
            now = live + made + node.workspace_bytes
            timeline.append(now)
            if now > peak:
                peak, peak_at = now, position
            for value in outputs:
                if not resident[value]:
                    resident[value] = True
                    live += graph.values[value].size_bytes
            runs[instruction.node] += 1
            time_s += problem.costed.time_s[instruction.node]
        else:
            value = graph.values[instruction.value]
            if not resident[instruction.value]:
                raise ScheduleError(f"{value.name} is freed but is not there")
            if value.is_held:
                raise ScheduleError(f"{value.name} is freed but the caller holds it")
            resident[instruction.value] = False
            live -= value.size_bytes
    for index, node in enumerate(graph.nodes):
        if not runs[index]:
            raise ScheduleError(f"{node.name} never runs")
    return Trace(
        peak_bytes=max(peak, problem.static.optimizer_step_peak_bytes),
        peak_instruction=peak_at,
        time_s=time_s,
        timeline_bytes=tuple(timeline),
        num_rematerialized=sum(runs) - len(runs),
    )
