"""Chen's greedy: a segment ends where the values since the last end weigh more than b; b is searched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from planner.graph import Graph
from planner.just_in_time import just_in_time
from planner.problem import Problem
from planner.solution import Solution
from planner.solvers.articulation import candidates, has_backward
from planner.solvers.incumbent import Incumbent


@dataclass(frozen=True)
class ChenGreedy:
    """The cheapest greedy segmentation, over segment sizes b, that fits the budget.

    Attributes:
        time_limit_s: for the search of b.
        linearized: segments end at any forward node, not at articulation points alone.
        num_sizes: values of b, from 0 to the bytes of all forward values, evenly spaced in their logarithm.

    Reference: Chen et al., 2016, arXiv:1604.06174, algorithm 3; articulation points: Jain et al., 2020, MLSys.
    """

    name: ClassVar[str] = "chen_greedy"

    time_limit_s: float = 20.0
    linearized: bool = False
    num_sizes: int = 100

    def solve(self, problem: Problem) -> Solution:
        """Try every segment size with the judge.

        Args:
            problem: a training step; without a backward phase nothing is found.

        Returns:
            A schedule that `simulate` accepts within the budget, or `NOT_FOUND`.
        """
        graph = problem.costed.graph
        best = Incumbent(problem, solver=self.name)
        if not has_backward(graph):
            return best.answer()
        ends = set(candidates(graph, linearized=self.linearized))
        sizes = [value.size_bytes for value in graph.values if value.node < graph.num_forward]
        smallest = min((size for size in sizes if size), default=1)
        grid = np.geomspace(smallest, max(sum(sizes), smallest), max(self.num_sizes, 1))
        tried: set[tuple[int, ...]] = set()
        for segment_bytes in (0.0, *grid):
            if best.elapsed_s() >= self.time_limit_s:
                break
            retained = segment_ends(graph, ends, segment_bytes)
            if retained not in tried:
                tried.add(retained)
                best.offer(just_in_time(graph, retained))
        return best.answer()


def segment_ends(graph: Graph, ends: set[int], segment_bytes: float) -> tuple[int, ...]:
    """Values at the ends of the segments of one size.

    Args:
        graph: the training step.
        ends: forward nodes after which a segment may end.
        segment_bytes: b; a segment ends at the first such node by which its values weigh more.

    Returns:
        Values to retain.
    """
    retained: list[int] = []
    weight = 0
    for k in range(graph.num_forward):
        weight += sum(graph.values[v].size_bytes for v in graph.nodes[k].outputs)
        if k in ends and weight > segment_bytes:
            retained.extend(graph.nodes[k].outputs)
            weight = 0
    return tuple(retained)
