"""The published MILP of Checkmate, written to PuLP; FORMULATIONS.md numbers the equations."""

from __future__ import annotations

import math
from collections.abc import Callable

import pulp

from planner.problem import Problem
from planner.solvers.highs import SolveOutcome, run_highs
from planner.solvers.sequences import fixed_values


class TooLargeError(Exception):
    """The time for writing the model is over."""


def num_rows(problem: Problem) -> int:
    """Rows of the model, about: what decides whether it can be written at all."""
    graph = problem.costed.graph
    n = len(graph.nodes)
    edges = sum(len(node.inputs) for node in graph.nodes)
    return n * (2 * edges + 2 * len(graph.values) + 2 * edges + 2 * n) // 2


class CheckmateModel:
    """Stages are nodes: in stage t node t runs for the first time, and earlier nodes may run again before it.

    Bytes are divided by their common divisor where that leaves small numbers, else by a thousandth of the budget;
    seconds by a hundredth of the step.

    Args:
        problem: what is to be solved.
        check: called after every stage is written; raises `TooLargeError` when there is no time left.
    """

    def __init__(self, problem: Problem, *, check: Callable[[], None]) -> None:
        self.problem = problem
        self.graph = graph = problem.costed.graph
        self.fixed = fixed_values(graph)
        self.time_scale = (problem.costed.step_s or 1.0) / 100.0
        self.byte_scale = _byte_scale(problem)
        self.model = pulp.LpProblem("checkmate", pulp.LpMinimize)
        self.cap = self.model.add_variable("cap", lowBound=0.0)
        self.R: dict[tuple[int, int], pulp.LpVariable] = {}
        self.S: dict[tuple[int, int], pulp.LpVariable] = {}
        last = len(graph.nodes) - 1
        for t in range(last + 1):
            self._add_variables(t)
        for t in range(last + 1):
            check()
            self._add_dependencies(t)
            self._add_memory(t)
        # (1) Least time of all runs; the first ones are a constant.
        time_s = problem.costed.time_s
        self.model.setObjective(
            pulp.LpAffineExpression([(r, time_s[k] / self.time_scale) for (_, k), r in self.R.items()])
        )

    def _add_variables(self, t: int) -> None:
        """R[t,k]: node k runs again in stage t. S[t,v]: value v is retained into stage t."""
        graph = self.graph
        for k in range(t):
            if graph.nodes[k].can_rematerialize:
                self.R[t, k] = self.model.add_variable(f"R_{t}_{k}", cat="Binary")
        for v, value in enumerate(graph.values):
            if value.node < t and not value.is_held:
                self.S[t, v] = self.model.add_variable(f"S_{t}_{v}", cat="Binary")

    def made(self, t: int, v: int) -> pulp.LpVariable | int:
        """Whether value v is made in stage t."""
        value = self.graph.values[v]
        if value.node == t:
            return 1
        return 0 if value.first_run_only else self.R.get((t, value.node), 0)

    def _kept(self, t: int, v: int) -> pulp.LpVariable | int:
        """Whether value v is there when stage t begins."""
        value = self.graph.values[v]
        if value.node >= t or t >= len(self.graph.nodes):
            return 0
        return 1 if value.is_held else self.S[t, v]

    def _run(self, t: int, k: int) -> pulp.LpVariable | int:
        """Whether node k runs in stage t."""
        return 1 if k == t else self.R.get((t, k), 0)

    def _add_dependencies(self, t: int) -> None:
        model, graph = self.model, self.graph
        for k in range(t + 1):
            run = self._run(t, k)
            if isinstance(run, int) and run == 0:
                continue
            # (2) A node that runs finds its inputs: made in this stage, or retained into it.
            for v in graph.nodes[k].inputs:
                there = self.made(t, v) + self._kept(t, v)
                if not isinstance(there, int):
                    model += there >= run
        for v, value in enumerate(graph.values):
            if (t, v) not in self.S:
                continue
            # (3) Only what was there or made in the stage before can be retained.
            if value.node < t - 1:
                model += self.S[t, v] <= self.S[t - 1, v] + self.made(t - 1, v)
            # (4) What is made again has not been retained too; a node of several outputs makes them all.
            made = self.made(t, v)
            if len(graph.nodes[value.node].outputs) > 1 and not isinstance(made, int):
                model += self.S[t, v] + made <= 1

    def _add_memory(self, t: int) -> None:
        """U[t,k]: bytes while node k runs in stage t, its outputs and workspace included."""
        model, graph = self.model, self.graph
        # (5) A stage begins with the static bytes and with what is retained into it.
        static = self.problem.static.resident_bytes / self.byte_scale
        start = [self._kept(t, v) * self._size(v) for v in range(len(graph.values))]
        level: pulp.LpVariable | None = None
        carried = pulp.lpSum(start) + static
        for k in range(t + 1):
            run = self._run(t, k)
            if isinstance(run, int) and run == 0:
                continue
            node = graph.nodes[k]
            made = sum(self._size(v) for v in node.outputs if k == t or v not in self.fixed)
            # (6) Held outputs of a second run are there for its time only.
            passing = node.workspace_bytes / self.byte_scale
            if k < t:
                passing += sum(
                    self._size(v)
                    for v in node.outputs
                    if v in self.fixed and not graph.values[v].first_run_only
                )
            level = model.add_variable(f"U_{t}_{k}", lowBound=0.0)
            # (7) Memory grows by what is made and shrinks by what was freed after the node before.
            model += level == carried + made * run
            model += level + passing * run <= self.cap
            carried = level - pulp.lpSum(self._freed(t, k))

    def _freed(self, t: int, k: int) -> list[pulp.LpAffineExpression]:
        """Free[t,v,k] times bytes for every value that may go right after node k in stage t."""
        graph = self.graph
        terms = []
        for v in dict.fromkeys((*graph.nodes[k].inputs, *graph.nodes[k].outputs)):
            if graph.values[v].is_held or not self._size(v):
                continue
            if v in graph.nodes[k].outputs and k < t and graph.values[v].first_run_only:
                continue
            free = self.model.add_variable(f"Free_{t}_{v}_{k}", cat="Binary")
            later = [self._run(t, j) for j in graph.users[v] if k < j <= t]
            # (8) Hazards: the node does not run, the value is retained, a later node of the stage reads it.
            hazards = 1 - self._run(t, k) + self._kept(t + 1, v) + pulp.lpSum(later)
            # (9) Free is 1 exactly where there is no hazard: Free = 1 - min(1, hazards).
            self.model += 1 - free <= hazards
            self.model += (2 + len(later)) * (1 - free) >= hazards
            terms.append(free * self._size(v))
        return terms

    def _size(self, v: int) -> float:
        return self.graph.values[v].size_bytes / self.byte_scale

    def run(
        self, *, relaxed: bool, cap_bytes: float, time_limit_s: float, abs_gap_s: float, threads: int
    ) -> SolveOutcome:
        """Solve with no more than `cap_bytes` at any time, static memory included."""
        self.cap.upBound = cap_bytes / self.byte_scale
        return run_highs(
            self.model,
            mip=not relaxed,
            time_limit_s=time_limit_s,
            abs_gap=abs_gap_s / self.time_scale,
            threads=threads,
        )

    def retained(self, threshold: float) -> list[set[int]]:
        """For each stage the values of which at least the threshold is retained into it in the current point."""
        stages: list[set[int]] = [set() for _ in self.graph.nodes]
        for (t, v), variable in self.S.items():
            if (variable.varValue or 0.0) >= threshold:
                stages[t].add(v)
        return stages

    def order(self) -> list[int]:
        """Nodes in the order in which the current whole point runs them."""
        order: list[int] = []
        for t in range(len(self.graph.nodes)):
            order += [k for k in range(t) if (t, k) in self.R and (self.R[t, k].varValue or 0.0) > 0.5]
            order.append(t)
        return order


def _byte_scale(problem: Problem) -> float:
    """Bytes of one unit of the model."""
    graph = problem.costed.graph
    sizes = [value.size_bytes for value in graph.values] + [node.workspace_bytes for node in graph.nodes]
    unit = math.gcd(*sizes)
    if unit and sum(sizes) <= 10_000 * unit:
        return float(unit)
    return max(problem.budget_bytes, 1) / 1000.0
