"""The equations of the materialization-time MILP, written to PuLP; FORMULATIONS.md numbers them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
import pulp

from planner.problem import Problem
from planner.solvers.highs import SolveOutcome, run_highs
from planner.solvers.windows import Windows


class MaterializationModel:
    """Variables, implications, and the memory rows that were asked for so far.

    Bytes are divided by the largest amount of the problem and seconds by a hundredth of the step, so that all
    coefficients lie where the solver's tolerances make sense.

    Args:
        problem: what is to be solved.
        cap_bytes: memory of forward, loss and backward, static memory not included.
    """

    def __init__(self, problem: Problem, *, cap_bytes: float) -> None:
        graph = problem.costed.graph
        self.problem = problem
        self.graph = graph
        self.windows = Windows(graph)
        self.byte_scale = float(max(sum(v.size_bytes for v in graph.values), 1))
        self.time_scale = (problem.costed.step_s or 1.0) / 100.0
        self.model = pulp.LpProblem("materialization", pulp.LpMinimize)
        # x_q = 1: value q is retained for backward.
        self.x = {v: self.model.add_variable(f"x_{v}", cat="Binary") for v in self.windows.droppable}
        # z_{k,t}: node k has been run again by backward time t. Given x, the least z is 0 or 1.
        self.z: dict[tuple[int, int], pulp.LpVariable] = {}
        self.cap = self.model.add_variable("cap", lowBound=0.0)
        self.rows: set[int] = set()
        self.cap_bytes = cap_bytes

    @property
    def cap_bytes(self) -> float:
        """Right-hand side of every memory row."""
        return self._cap_bytes

    @cap_bytes.setter
    def cap_bytes(self, value: float) -> None:
        self._cap_bytes = value
        self.cap.upBound = value / self.byte_scale if np.isfinite(value) else None

    def minimize_time(self) -> None:
        """(1) Least time of what runs again."""
        time_s = self.problem.costed.time_s
        self.model.setObjective(
            pulp.LpAffineExpression(
                [
                    (self.remade(k, triggers[-1]), time_s[k] / self.time_scale)
                    for k, triggers in enumerate(self.windows.triggers)
                    if triggers
                ]
            )
        )

    def minimize_peak(self) -> None:
        """(2) Least cap."""
        self.model.setObjective(pulp.LpAffineExpression(self.cap))

    def remade(self, k: int, t: int) -> pulp.LpVariable:
        """z_{k,t} with its implications; times between two triggers share one variable."""
        at = self._trigger(k, t)
        if (k, at) not in self.z:
            # Each begun variable waits for those that its implications name, as deep as the step is long.
            begun = [self._implications(k, at)]
            while begun:
                missing = next(begun[-1], None)
                if missing is None:
                    begun.pop()
                else:
                    begun.append(self._implications(*missing))
        return self.z[k, at]

    def _trigger(self, k: int, t: int) -> int:
        """The last trigger of node k up to backward time t."""
        triggers = self.windows.triggers[k]
        return triggers[bisect_right(triggers, t) - 1]

    def _implications(self, k: int, at: int) -> Iterator[tuple[int, int]]:
        """Add z_{k,at} with its implications; names each z that one needs and that is still to be added."""
        z = self.z[k, at] = self.model.add_variable(f"z_{k}_{at}", lowBound=0.0, upBound=1.0)
        for v in self.graph.nodes[k].outputs:
            if v not in self.x:
                continue
            direct = self.windows.direct[v]
            # (3) A dropped value has been made again by its first direct use.
            if direct and direct[0] <= at:
                self.model += z + self.x[v] >= 1
            # (4) A dropped value has been made again when a node that reads it has run again.
            for c in self.windows.consumers[v]:
                if self.windows.triggers[c][0] <= at:
                    needed = c, self._trigger(c, at)
                    if needed not in self.z:
                        yield needed
                    self.model += z + self.x[v] - self.z[needed] >= 0

    def add_row(self, t: int) -> None:
        """(5) in forward, (6) in backward: memory at time t is no more than the cap."""
        self.rows.add(t)
        in_forward = t < self.graph.num_forward
        terms: list[tuple[pulp.LpVariable, float]] = [(self.cap, -1.0)]
        for v, x in self.x.items():
            value = self.graph.values[v]
            size = value.size_bytes / self.byte_scale
            if in_forward:
                if self.windows.last_forward_use[v] < t:
                    terms.append((x, size))
            elif t <= self.windows.end[v]:
                terms += [(term, size) for term in self._there(v, x, t)]
        fixed = float(self.windows.fixed_bytes[t]) / self.byte_scale
        self.model += pulp.LpAffineExpression(terms, constant=fixed) <= 0

    def _there(self, v: int, x: pulp.LpVariable, t: int) -> list[pulp.LpVariable]:
        """Variables whose sum says whether value v is there at backward time t."""
        k = self.graph.values[v].node
        if self.windows.triggers[k][0] > t:
            return [x]
        z = self.remade(k, t)
        if len(self.graph.nodes[k].outputs) == 1:
            return [x, z]
        # A node of several outputs may run again for another one: a retained value is counted once.
        there = self.model.add_variable(f"o_{v}_{t}", lowBound=0.0, upBound=1.0)
        self.model += there - x >= 0
        self.model += there - z >= 0
        return [there]

    def run(
        self,
        *,
        relaxed: bool,
        time_limit_s: float,
        abs_gap: float,
        threads: int,
        incumbent: np.ndarray | None = None,
    ) -> SolveOutcome:
        """Solve the model as it stands, from the incumbent if there is one."""
        start = None
        if incumbent is not None and not relaxed:
            start = {x.name: float(incumbent[v]) for v, x in self.x.items()}
        return run_highs(
            self.model,
            mip=not relaxed,
            time_limit_s=time_limit_s,
            abs_gap=abs_gap,
            threads=threads,
            start=start,
        )

    def choice(self) -> np.ndarray:
        """Share of every value that is retained in the current point; 1 for what cannot be dropped."""
        choice = np.ones(len(self.graph.values))
        for v, x in self.x.items():
            choice[v] = min(1.0, max(0.0, x.varValue or 0.0))
        return choice

    def constant_choice(self, share: float) -> np.ndarray:
        """The choice that retains the same share of everything that can be dropped."""
        choice = np.ones(len(self.graph.values))
        choice[list(self.x)] = share
        return choice

    def profile_bytes(self, choice: np.ndarray) -> np.ndarray:
        """Memory at every time under a choice, as the rows count it."""
        return self.windows.profile_bytes(choice, self.windows.remade(choice))
