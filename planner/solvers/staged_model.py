"""The equations of the stage-sparse MILP on a live HiGHS model; FORMULATIONS.md numbers them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from planner.problem import Problem
from planner.solvers.live_model import LiveModel
from planner.solvers.reruns import Rerun

# The room is this many units of memory in the model, the step this many units of time: coefficients lie where
# the solver's tolerances make sense.
_MEMORY_UNITS = 1000.0
_TIME_UNITS = 100.0
# A unit of memory beyond the room costs this many units of time where the excess is to be lowered first.
_EXCESS_PRICE = 30.0


def nearby(problem: Problem, depth: int) -> list[list[int]]:
    """For each stage the nodes that may run again in it: those that make its inputs, and theirs, `depth` deep.

    Args:
        problem: the graph.
        depth: longest chain of reruns in a stage; no less than the number of nodes is every earlier node.

    Returns:
        For each node t the earlier nodes, in order.
    """
    graph = problem.costed.graph
    if depth >= len(graph.nodes):
        again = [k for k, node in enumerate(graph.nodes) if node.can_rematerialize]
        return [again[: bisect_left(again, t)] for t in range(len(graph.nodes))]
    makers = [
        tuple(
            dict.fromkeys(
                value.node
                for value in (graph.values[v] for v in node.inputs)
                if graph.nodes[value.node].can_rematerialize
                and value.size_bytes > 0
                and not value.is_held
                and not value.first_run_only
            )
        )
        for node in graph.nodes
    ]
    stages: list[list[int]] = []
    for t in range(len(graph.nodes)):
        seen: set[int] = set()
        front = [t]
        for _ in range(min(depth, t)):
            if not front:
                break
            front = [k for user in front for k in makers[user] if k not in seen]
            seen.update(front)
            front = list(dict.fromkeys(front))
        stages.append(sorted(seen))
    return stages


def binding_stages(problem: Problem, candidates: Iterable[Rerun]) -> np.ndarray:
    """For each stage whether memory could pass the room in it, whatever of the candidates runs again."""
    graph = problem.costed.graph
    last = [max((value.node, *users)) for value, users in zip(graph.values, graph.users, strict=True)]
    workspace = [node.workspace_bytes for node in graph.nodes]
    for t, k in candidates:
        workspace[t] = max(workspace[t], graph.nodes[k].workspace_bytes)
        for v in (*graph.nodes[k].inputs, *graph.nodes[k].outputs):
            last[v] = max(last[v], t)
    delta = np.zeros(len(graph.nodes) + 1)
    for v, value in enumerate(graph.values):
        delta[value.node] += value.size_bytes
        delta[(len(graph.nodes) - 1 if value.is_held else last[v]) + 1] -= value.size_bytes
    room = problem.budget_bytes - problem.static.resident_bytes
    return np.cumsum(delta[:-1]) + np.array(workspace) > room


class StagedModel:
    """Which of some candidates run again, when everything else is decided.

    Args:
        problem: graph, seconds, budget.
        free: candidates (t, k) to be decided.
        fixed: reruns that are decided; disjoint from `free`.
        elastic: memory may pass the room, at a price.
    """

    def __init__(
        self, problem: Problem, free: Iterable[Rerun], fixed: Iterable[Rerun] = (), *, elastic: bool = False
    ) -> None:
        self.problem = problem
        self.graph = graph = problem.costed.graph
        self.room = float(problem.budget_bytes - problem.static.resident_bytes)
        self.byte_scale = max(self.room, 1.0) / _MEMORY_UNITS
        self.time_scale = (problem.costed.step_s or 1.0) / _TIME_UNITS
        self.model = LiveModel()
        count = len(graph.nodes)
        self.rerun: dict[Rerun, int] = {
            (t, k): self.model.column(cost=problem.costed.time_s[k] / self.time_scale, integer=True)
            for t, k in sorted(free)
        }
        self.fixed = frozenset(fixed)
        self.elastic = elastic
        self.stage: list[list[int]] = [[] for _ in range(count)]
        for t, k in (*self.rerun, *self.fixed):
            self.stage[t].append(k)
        for ks in self.stage:
            ks.sort()
        self.written: set[Rerun] = set()
        # Columns of each memory row that was written.
        self.row_columns: dict[Rerun, list[int]] = {}
        self.size = [0.0 if value.is_held else value.size_bytes / self.byte_scale for value in graph.values]
        # Bytes at each first run that no choice changes.
        self.base = np.zeros(count)
        self._write_gaps()
        self._write_needs()

    def _write_gaps(self) -> None:
        """Gaps between touches: variables for values that a candidate makes or reads, numbers for the others."""
        graph, count = self.graph, len(self.graph.nodes)
        touches: list[set[int]] = [{value.node} for value in graph.values]
        is_open = [False] * len(graph.values)
        decided = {(t, k) for t, k in self.fixed}
        for t, node in enumerate(graph.nodes):
            for v in node.inputs:
                touches[v].add(t)
            for k in self.stage[t]:
                for v in (*graph.nodes[k].inputs, *graph.nodes[k].outputs):
                    touches[v].add(t)
                    is_open[v] |= (t, k) not in decided
        self.touches = [sorted(row) for row in touches]
        # after[v][a]: is v there between touch a and the next one? A column, or a number.
        self.after: list[dict[int, int]] = [{} for _ in graph.values]
        self.after_is: list[dict[int, float]] = [{} for _ in graph.values]
        self.before: list[dict[int, int]] = [{} for _ in graph.values]
        delta = np.zeros(count + 1)
        starts: list[int] = []
        ends: list[int] = []
        sizes: list[float] = []
        columns: list[int] = []
        for v, value in enumerate(graph.values):
            if value.is_held:
                delta[value.node] += value.size_bytes / self.byte_scale
                delta[count] -= value.size_bytes / self.byte_scale
                continue
            if self.size[v] == 0.0:
                continue
            row = self.touches[v]
            for a, b in pairwise(row):
                self.before[v][b] = a
                if is_open[v]:
                    column = self.after[v][a] = self.model.column()
                    starts.append(a)
                    ends.append(b)
                    sizes.append(self.size[v])
                    columns.append(column)
                else:
                    there = 0.0 if self._remade(b, v) == 1.0 else 1.0
                    self.after_is[v][a] = there
                    delta[a] += there * self.size[v]
                    delta[b] -= there * self.size[v]
        self.base = np.cumsum(delta[:-1])
        self.gap_start, self.gap_end = np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64)
        self.gap_size, self.gap_column = np.array(sizes), np.array(columns, dtype=np.int64)
        # While a node runs its inputs and outputs are there, whatever becomes of them afterwards.
        self.own = np.zeros(count)
        own_rows: list[int] = []
        own_columns: list[int] = []
        own_sizes: list[float] = []
        for t, node in enumerate(graph.nodes):
            self.own[t] = node.workspace_bytes / self.byte_scale
            for v in dict.fromkeys((*node.inputs, *node.outputs)):
                self.own[t] += self.size[v]
                self.own[t] -= self.after_is[v].get(t, 0.0) * self.size[v]
                if t in self.after[v]:
                    own_rows.append(t)
                    own_columns.append(self.after[v][t])
                    own_sizes.append(self.size[v])
        self.own_row, self.own_column = np.array(own_rows, dtype=np.int64), np.array(own_columns, np.int64)
        self.own_size = np.array(own_sizes)

    def _remade(self, t: int, v: int) -> float | int:
        """Column of the rerun that makes v in stage t (an int), or 1.0 or 0.0 where that is decided."""
        if self.graph.values[v].first_run_only:
            return 0.0
        k = self.graph.values[v].node
        if (t, k) in self.rerun:
            return self.rerun[t, k]
        return 1.0 if (t, k) in self.fixed else 0.0

    def _write_needs(self) -> None:
        """(2) to (4): what a node reads is there or made again; what is kept was there or made again."""
        graph = self.graph
        for t, node in enumerate(graph.nodes):
            for v in node.inputs:
                self._need(t, v, 1.0)
            for k in self.stage[t]:
                for v in graph.nodes[k].inputs:
                    self._need(t, v, self.rerun.get((t, k), 1.0))
        for v, columns in enumerate(self.after):
            for a, column in columns.items():
                if a == graph.values[v].node:
                    continue
                terms, constant = [(column, 1.0)], 0.0
                terms.append((self.after[v][self.before[v][a]], -1.0))
                made = self._remade(a, v)
                if isinstance(made, int):
                    terms.append((made, -1.0))
                else:
                    constant = made
                self.model.at_most(terms, constant)

    def _need(self, t: int, v: int, wanted: float | int) -> None:
        """``there(v, t) + made(v, t) >= wanted``."""
        if not self.after[v] or t == self.graph.values[v].node:
            return
        terms: list[tuple[int, float]] = [(self.after[v][self.before[v][t]], 1.0)]
        bound = 0.0
        made = self._remade(t, v)
        if isinstance(made, int):
            terms.append((made, 1.0))
        else:
            bound -= made
        if isinstance(wanted, int):
            terms.append((wanted, -1.0))
        else:
            bound += wanted
        if bound > 0.0 or len(terms) > 1:
            self.model.at_least(terms, bound)

    # -- memory -----------------------------------------------------------------------------------------------

    def first_run_units(self, values: np.ndarray) -> np.ndarray:
        """Memory while each node runs for the first time, in model units, at a point of the model."""
        delta = np.zeros(len(self.graph.nodes) + 1)
        held = self.gap_size * values[self.gap_column]
        np.add.at(delta, self.gap_start, held)
        np.add.at(delta, self.gap_end, -held)
        total = self.base + self.own + np.cumsum(delta[:-1])
        np.subtract.at(total, self.own_row, self.own_size * values[self.own_column])
        return total

    def write_first_run(self, t: int) -> None:
        """(5) Memory while node t runs for the first time."""
        self.written.add((t, t))
        node = self.graph.nodes[t]
        own = {*node.inputs, *node.outputs}
        open_now = np.flatnonzero((self.gap_start <= t) & (t < self.gap_end))
        mine = {self.after[v][t] for v in own if t in self.after[v]}
        terms = [
            (int(self.gap_column[i]), float(self.gap_size[i]))
            for i in open_now
            if int(self.gap_column[i]) not in mine
        ]
        self._write_memory((t, t), terms, float(self.base[t] + self.own[t]))

    def write_rerun(self, t: int, k: int) -> None:
        """(6), (7) Memory while node k runs again in stage t."""
        self.written.add((t, k))
        graph = self.graph
        terms: dict[int, float] = {}
        constant = float(self.base[t]) + graph.nodes[k].workspace_bytes / self.byte_scale * (
            1.0 if (t, k) in self.fixed else 0.0
        )
        constant -= sum(
            graph.values[v].size_bytes / self.byte_scale
            for v in graph.nodes[t].outputs
            if graph.values[v].is_held
        )
        if (t, k) in self.rerun and graph.nodes[k].workspace_bytes:
            terms[self.rerun[t, k]] = graph.nodes[k].workspace_bytes / self.byte_scale
        inputs = set(graph.nodes[t].inputs)
        touched = {
            v
            for run in (*self.stage[t], t)
            for v in (*graph.nodes[run].inputs, *graph.nodes[run].outputs)
            if self.size[v] > 0.0
        }
        mine = {self.after[v][t]: v for v in touched if t in self.after[v]}
        for i in np.flatnonzero((self.gap_start <= t) & (t < self.gap_end)):
            column = int(self.gap_column[i])
            if column not in mine:
                terms[column] = terms.get(column, 0.0) + float(self.gap_size[i])
        readers: dict[int, list[int]] = {}
        for run in self.stage[t]:
            if run >= k:
                for v in graph.nodes[run].inputs:
                    readers.setdefault(v, []).append(run)
        for v in touched:
            # `base` counts what is there after the first run; here what is there now is counted.
            constant -= self.size[v] * self.after_is[v].get(t, 0.0)
            maker = graph.values[v].node
            if maker == t:
                continue
            now: list[float | int] = []
            if maker == k:
                now = [self._remade(t, v)]
                self._add(terms, now[0], self.size[v])
                constant += self._number(now[0]) * self.size[v]
                if len(graph.nodes[k].outputs) == 1:
                    continue
                now = [self._there(v, t)]
            elif maker > k:
                now = [self._there(v, t)]
            elif v in inputs:
                now = [1.0]
            else:
                now = [self.after[v][t] if t in self.after[v] else self.after_is[v].get(t, 0.0)]
                now += [self.rerun.get((t, run), 1.0) for run in readers.get(v, ())]
            if any(isinstance(one, float) and one == 1.0 for one in now):
                constant += self.size[v]
                continue
            columns = [one for one in now if isinstance(one, int)]
            if len(columns) == 1:
                self._add(terms, columns[0], self.size[v])
            elif columns:
                most = self.model.column()
                for column in columns:
                    self.model.at_least([(most, 1.0), (column, -1.0)], 0.0)
                terms[most] = self.size[v]
        self._write_memory((t, k), list(terms.items()), constant)

    def _there(self, v: int, t: int) -> float | int:
        """Is v there when stage t begins: a column or a number."""
        a = self.before[v].get(t)
        if a is None:
            return 0.0
        return self.after[v][a] if a in self.after[v] else self.after_is[v][a]

    @staticmethod
    def _number(one: float | int) -> float:
        return one if isinstance(one, float) else 0.0

    @staticmethod
    def _add(terms: dict[int, float], one: float | int, size: float) -> None:
        if isinstance(one, int):
            terms[one] = terms.get(one, 0.0) + size

    def write_cover(self, run: Rerun) -> bool:
        """What is there is too much by less than the solver's tolerance: from now on not all of it at once.

        Returns:
            Whether there is anything to leave out.
        """
        there = [column for column in self.row_columns[run] if self.model.values[column] > 0.5]
        if there:
            self.model.at_most([(column, 1.0) for column in there], len(there) - 1.0)
        return bool(there)

    def _write_memory(self, run: Rerun, terms: list[tuple[int, float]], constant: float) -> None:
        self.row_columns[run] = [column for column, _ in terms]
        if self.elastic:
            terms = [*terms, (self.model.column(cost=_EXCESS_PRICE, upper=1e12), -1.0)]
        self.model.at_most(terms, self.room / self.byte_scale - constant)

    # -- answers ----------------------------------------------------------------------------------------------

    def chosen(self) -> frozenset[Rerun]:
        """Fixed reruns and those that the current point runs."""
        values = self.model.values
        return self.fixed | {run for run, column in self.rerun.items() if values[column] > 0.5}

    def start_at(self, reruns: frozenset[Rerun]) -> dict[int, float]:
        """Columns of a set of reruns, for a warm start."""
        return {column: float(run in reruns) for run, column in self.rerun.items()}
