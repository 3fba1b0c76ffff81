"""Exhaustive optimum over every set of retained values, for graphs of a few nodes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from planner.just_in_time import just_in_time
from planner.problem import Problem
from planner.simulate import simulate


@dataclass(frozen=True)
class Best:
    """The cheapest just-in-time schedule within the budget, and the least peak of any.

    Attributes:
        time_s: of the cheapest; inf if none fits.
        smallest_peak_bytes: over all sets.
    """

    time_s: float
    smallest_peak_bytes: int


def best_just_in_time(problem: Problem) -> Best:
    """Try every set of retained forward values with the judge."""
    graph = problem.costed.graph
    forward = [
        v
        for v, value in enumerate(graph.values)
        if value.node < graph.num_forward and graph.nodes[value.node].can_rematerialize and not value.is_held
    ]
    time_s, smallest = float("inf"), 2**62
    for count in range(len(forward) + 1):
        for retained in itertools.combinations(forward, count):
            trace = simulate(problem, just_in_time(graph, retained))
            smallest = min(smallest, trace.peak_bytes)
            if trace.peak_bytes <= problem.budget_bytes:
                time_s = min(time_s, trace.time_s)
    return Best(time_s, smallest)
