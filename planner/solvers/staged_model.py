"""The equations of the stage-sparse MILP on a live HiGHS model; FORMULATIONS.md numbers them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from planner.problem import Problem
from planner.solvers.live_model import LiveModel
from planner.solvers.reruns import Rerun
from planner.solvers.staged_gaps import ALWAYS, Gaps, Share

# The room is this many units of memory in the model, the step this many units of time: coefficients lie where
# the solver's tolerances make sense.
_MEMORY_UNITS = 1000.0
_TIME_UNITS = 100.0
# A unit of memory beyond the room costs this many units of time where the excess is to be lowered first.
_EXCESS_PRICE = 30.0


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
        self.graph = problem.costed.graph
        room = float(problem.budget_bytes - problem.static.resident_bytes)
        self.byte_scale = max(room, 1.0) / _MEMORY_UNITS
        self.room_units = room / self.byte_scale
        self.time_scale = (problem.costed.step_s or 1.0) / _TIME_UNITS
        self.elastic = elastic
        self.model = LiveModel()
        self.rerun: dict[Rerun, int] = {
            (t, k): self.model.column(cost=problem.costed.time_s[k] / self.time_scale, integer=True)
            for t, k in sorted(free)
        }
        self.fixed = frozenset(fixed)
        self.gaps = Gaps(self.graph, self.model, self.rerun, self.fixed, self.byte_scale)
        # Columns of each memory row that was written.
        self.written: dict[Rerun, list[int]] = {}
        self._write_needs()

    @property
    def stage(self) -> list[list[int]]:
        """For each stage what runs, or may run, again in it."""
        return self.gaps.stage

    def first_run_units(self) -> np.ndarray:
        """Memory while each node runs for the first time, at the current point."""
        return self.gaps.first_run_units(self.model.values)

    def chosen(self) -> frozenset[Rerun]:
        """Fixed reruns and those that the current point runs."""
        values = self.model.values
        return self.fixed | {run for run, column in self.rerun.items() if values[column] > 0.5}

    def start_at(self, reruns: frozenset[Rerun]) -> dict[int, float]:
        """Columns of a set of reruns, for a warm start."""
        return {column: float(run in reruns) for run, column in self.rerun.items()}

    def _write_needs(self) -> None:
        """(2) to (4): what a node reads is there or made again; what is kept was there or made again."""
        for t, node in enumerate(self.graph.nodes):
            for v in node.inputs:
                self._need(v, t, ALWAYS)
            for k in self.stage[t]:
                for v in self.graph.nodes[k].inputs:
                    self._need(v, t, self.gaps.runs(t, k))
        for v, shares in enumerate(self.gaps.after):
            for a, kept in shares.items():
                if kept.column is not None and a != self.graph.values[v].node:
                    self._need(v, a, kept)

    def _need(self, v: int, t: int, wanted: Share) -> None:
        """``there(v, t) + made(v, t) >= wanted``, where the former is undecided."""
        there, made = self.gaps.there(v, t), self.gaps.made(v, t)
        if there.column is None:
            return
        terms = [(there.column, 1.0)]
        if made.column is not None:
            terms.append((made.column, 1.0))
        if wanted.column is not None:
            terms.append((wanted.column, -1.0))
        self.model.at_least(terms, wanted.number - made.number)

    def write_first_run(self, t: int) -> None:
        """(5) Memory while node t runs for the first time."""
        node = self.graph.nodes[t]
        own = {self.gaps.kept(v, t).column for v in (*node.inputs, *node.outputs)}
        terms = {column: units for column, units in self.gaps.open_at(t) if column not in own}
        self._write_memory((t, t), terms, float(self.gaps.base[t] + self.gaps.own[t]))

    def write_rerun(self, t: int, k: int) -> None:
        """(6), (7) Memory while node k runs again in stage t."""
        graph, gaps, terms = self.graph, self.gaps, dict(self.gaps.open_at(t))
        held = sum(graph.values[v].size_bytes for v in graph.nodes[t].outputs if graph.values[v].is_held)
        constant = float(gaps.base[t]) - held / self.byte_scale

        def add(share: Share, units: float) -> float:
            """Add a share of some units to the row; the number that it adds."""
            if share.column is not None:
                terms[share.column] = terms.get(share.column, 0.0) + units
            return share.number * units

        constant += add(gaps.runs(t, k), graph.nodes[k].workspace_bytes / self.byte_scale)
        touched = {
            v
            for run in (*self.stage[t], t)
            for v in (*graph.nodes[run].inputs, *graph.nodes[run].outputs)
            if gaps.size[v] > 0.0
        }
        for v in touched:
            # Gaps count what is there after the stage; here what is there now is counted.
            kept = gaps.kept(v, t)
            if kept.column is not None:
                del terms[kept.column]
            constant -= kept.number * gaps.size[v]
            if graph.values[v].node == k:
                constant += add(gaps.made(v, t), gaps.size[v])
            constant += add(self._now(v, t, k), gaps.size[v])
        self._write_memory((t, k), {column: units for column, units in terms.items() if units}, constant)

    def _now(self, v: int, t: int, k: int) -> Share:
        """Is v, from before, there while node k runs again in stage t?"""
        gaps, maker = self.gaps, self.graph.values[v].node
        if maker >= k:
            # A node with one output does not run again while that is there.
            is_pointless = maker == k and len(self.graph.nodes[k].outputs) == 1
            return Share(None) if maker == t or is_pointless else gaps.there(v, t)
        if v in self.graph.nodes[t].inputs:
            return ALWAYS
        later = [run for run in self.stage[t] if run >= k and v in self.graph.nodes[run].inputs]
        shares = [gaps.kept(v, t), *(gaps.runs(t, run) for run in later)]
        if ALWAYS in shares:
            return ALWAYS
        columns = [share.column for share in shares if share.column is not None]
        if len(columns) <= 1:
            return Share(columns[0]) if columns else Share(None)
        most = self.model.column()
        for column in columns:
            self.model.at_least([(most, 1.0), (column, -1.0)], 0.0)
        return Share(most)

    def write_cover(self, run: Rerun) -> bool:
        """(8) What is there is too much by less than the solver's tolerance: from now on not all of it at once.

        Returns:
            Whether there is anything to leave out.
        """
        there = [column for column in self.written[run] if self.model.values[column] > 0.5]
        if there:
            self.model.at_most([(column, 1.0) for column in there], len(there) - 1.0)
        return bool(there)

    def _write_memory(self, run: Rerun, terms: dict[int, float], constant: float) -> None:
        """``terms + constant <= room``, to which an excess is added where the model is elastic."""
        self.written[run] = list(terms)
        row = list(terms.items())
        if self.elastic:
            row.append((self.model.column(cost=_EXCESS_PRICE, upper=1e12), -1.0))
        self.model.at_most(row, self.room_units - constant)
