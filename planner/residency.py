"""Which values are there while a schedule runs."""

from __future__ import annotations

from dataclasses import dataclass

from planner.graph import Graph
from planner.schedule import Compute, Schedule


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
