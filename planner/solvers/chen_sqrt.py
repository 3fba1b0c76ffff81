"""Chen's square root of n: equal segments, the value at the end of each is retained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from planner.just_in_time import just_in_time
from planner.problem import Problem
from planner.solution import Solution
from planner.solvers.articulation import candidates, has_backward
from planner.solvers.incumbent import Incumbent


@dataclass(frozen=True)
class ChenSqrt:
    """Of p nodes where a segment may end, retain the outputs of every ceil(sqrt(p))-th.

    All other forward values are rematerialized just before their first need in backward. The answer does not depend
    on the budget: it fits or it does not.

    Attributes:
        linearized: segments end at any forward node, not at articulation points alone.

    Reference: Chen et al., 2016, Training deep nets with sublinear memory cost, arXiv:1604.06174, section 3;
        articulation points and linearization: Jain et al., 2020, MLSys, section 5.
    """

    name: ClassVar[str] = "chen_sqrt"

    linearized: bool = False

    def solve(self, problem: Problem) -> Solution:
        """The one schedule of the method, if it fits.

        Args:
            problem: a training step; without a backward phase nothing is found.

        Returns:
            A schedule that `simulate` accepts within the budget, or `NOT_FOUND`.
        """
        graph = problem.costed.graph
        best = Incumbent(problem, solver=self.name)
        if has_backward(graph):
            ends = candidates(graph, linearized=self.linearized)
            step = math.ceil(math.sqrt(max(len(ends), 1)))
            retained = [v for node in ends[step - 1 :: step] for v in graph.nodes[node].outputs]
            best.offer(just_in_time(graph, retained))
        return best.answer()
