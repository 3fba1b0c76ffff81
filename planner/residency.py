"""Which values are there while a schedule runs."""

from __future__ import annotations

from collections.abc import Iterator

from planner.graph import Graph
from planner.schedule import Compute, Schedule


def residencies(graph: Graph, schedule: Schedule) -> Iterator[tuple[int, int, list[int]]]:
    """What is there at each computation, as `planner.simulate` counts it.

    An output that is there already and made again counts twice while its node runs.

    Args:
        graph: the training step.
        schedule: one that can be executed.

    Yields:
        (index of the instruction, node, values that are there while it runs). The list is one and the same object,
        changed between the yields.
    """
    there: list[int] = []
    places: dict[int, int] = {}
    ran: set[int] = set()

    def remove(value: int) -> None:
        place, last = places.pop(value), there.pop()
        if last != value:
            there[place], places[last] = last, place

    for position, instruction in enumerate(schedule.instructions):
        if not isinstance(instruction, Compute):
            remove(instruction.value)
            continue
        outputs = graph.nodes[instruction.node].outputs
        if instruction.node in ran:
            outputs = tuple(v for v in outputs if not graph.values[v].first_run_only)
        ran.add(instruction.node)
        twice = [v for v in outputs if v in places]
        for value in outputs:
            if value not in places:
                places[value] = len(there)
                there.append(value)
        there.extend(twice)
        yield position, instruction.node, there
        del there[len(there) - len(twice) :]


def residents_at(graph: Graph, schedule: Schedule, position: int) -> list[int]:
    """The values that are there while one instruction runs.

    Args:
        graph: the training step.
        schedule: one that can be executed.
        position: index of a `Compute` in it; nothing is there at any other.

    Returns:
        Indices of values; one that is made a second time is there twice.
    """
    for at, _, there in residencies(graph, schedule):
        if at == position:
            return list(there)
    return []
