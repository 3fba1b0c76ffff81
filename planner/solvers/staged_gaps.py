"""Between which stages each value may be there: a column of the model, or a number where that is decided."""

from __future__ import annotations

from collections.abc import Mapping, Set
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from planner.graph import Graph
from planner.solvers.live_model import LiveModel
from planner.solvers.reruns import Rerun


class Share(NamedTuple):
    """Something between 0 and 1: a column of the model, or else a number."""

    column: int | None
    number: float = 0.0


NEVER, ALWAYS = Share(None, 0.0), Share(None, 1.0)


class Gaps:
    """Gaps between the touches of each value, and memory while nodes run for the first time.

    A *touch* of a value is a stage that makes it, reads it, or has a rerun that does. Held values and values
    without bytes have no gaps: the former are always there, the latter cost nothing.

    Args:
        graph: the training step.
        model: gets a column for each gap of a value that an undecided rerun touches.
        rerun: undecided reruns and their columns.
        fixed: decided reruns.
        byte_scale: bytes of a unit of memory in the model.
    """

    def __init__(
        self,
        graph: Graph,
        model: LiveModel,
        rerun: Mapping[Rerun, int],
        fixed: Set[Rerun],
        byte_scale: float,
    ) -> None:
        self.graph = graph
        self.rerun = rerun
        self.fixed = fixed
        self.stage: list[list[int]] = [[] for _ in graph.nodes]
        for t, k in sorted((*rerun, *fixed)):
            self.stage[t].append(k)
        self.size = [0.0 if value.is_held else value.size_bytes / byte_scale for value in graph.values]
        # after[v][a]: is v there between touch a and the next one; before[v][b]: the touch before touch b.
        self.after: list[dict[int, Share]] = [{} for _ in graph.values]
        self.before: list[dict[int, int]] = [{} for _ in graph.values]
        self.base = self._write(model, byte_scale)
        self.own = self._own(byte_scale)

    def there(self, v: int, t: int) -> Share:
        """Is v there when stage t, a touch of it, begins?"""
        a = self.before[v].get(t)
        return NEVER if a is None else self.after[v][a]

    def kept(self, v: int, t: int) -> Share:
        """Is v there after stage t, a touch of it?"""
        return self.after[v].get(t, NEVER)

    def made(self, v: int, t: int) -> Share:
        """Is v made again in stage t?"""
        return NEVER if self.graph.values[v].first_run_only else self.runs(t, self.graph.values[v].node)

    def runs(self, t: int, k: int) -> Share:
        """Does node k run again in stage t?"""
        if (t, k) in self.rerun:
            return Share(self.rerun[t, k])
        return ALWAYS if (t, k) in self.fixed else NEVER

    def open_at(self, t: int) -> list[tuple[int, float]]:
        """Columns of the gaps that cover stage t or begin with it, with their units of memory."""
        at = np.flatnonzero((self.start <= t) & (t < self.stop))
        return [(int(self.column[i]), float(self.units[i])) for i in at]

    def first_run_units(self, values: np.ndarray) -> np.ndarray:
        """Memory while each node runs for the first time, in units, at a point of the model."""
        delta = np.zeros(len(self.graph.nodes) + 1)
        held = self.units * values[self.column]
        np.add.at(delta, self.start, held)
        np.add.at(delta, self.stop, -held)
        total = self.base + self.own + np.cumsum(delta[:-1])
        np.subtract.at(total, self.own_row, self.own_units * values[self.own_column])
        return total

    def _write(self, model: LiveModel, byte_scale: float) -> np.ndarray:
        """Add the columns; units of memory at each first run that no choice changes."""
        touches, is_open = self._touches()
        delta = np.zeros(len(self.graph.nodes) + 1)
        rows: list[tuple[int, int, float, int]] = []
        for v, value in enumerate(self.graph.values):
            if value.is_held:
                delta[value.node] += value.size_bytes / byte_scale
            if self.size[v] == 0.0:
                continue
            for a, b in pairwise(touches[v]):
                self.before[v][b] = a
                if is_open[v]:
                    column = model.column()
                    self.after[v][a] = Share(column)
                    rows.append((a, b, self.size[v], column))
                else:
                    there = NEVER if self.made(v, b) == ALWAYS else ALWAYS
                    self.after[v][a] = there
                    delta[a] += there.number * self.size[v]
                    delta[b] -= there.number * self.size[v]
        self.start, self.stop = (np.array([row[i] for row in rows], dtype=np.int64) for i in (0, 1))
        self.units = np.array([row[2] for row in rows])
        self.column = np.array([row[3] for row in rows], dtype=np.int64)
        return np.cumsum(delta[:-1])

    def _touches(self) -> tuple[list[list[int]], list[bool]]:
        """For each value its touches, and whether an undecided rerun is one of them."""
        graph = self.graph
        touches: list[set[int]] = [{value.node} for value in graph.values]
        is_open = [False] * len(graph.values)
        for t, node in enumerate(graph.nodes):
            for v in node.inputs:
                touches[v].add(t)
            for k in self.stage[t]:
                for v in (*graph.nodes[k].inputs, *graph.nodes[k].outputs):
                    touches[v].add(t)
                    is_open[v] |= (t, k) in self.rerun
        return [sorted(row) for row in touches], is_open

    def _own(self, byte_scale: float) -> np.ndarray:
        """While a node runs its inputs and outputs are there, whatever becomes of them: what that adds to gaps."""
        own = np.zeros(len(self.graph.nodes))
        rows: list[tuple[int, int, float]] = []
        for t, node in enumerate(self.graph.nodes):
            own[t] = node.workspace_bytes / byte_scale
            for v in dict.fromkeys((*node.inputs, *node.outputs)):
                kept = self.kept(v, t)
                own[t] += self.size[v] * (1.0 - kept.number)
                if kept.column is not None:
                    rows.append((t, kept.column, self.size[v]))
        self.own_row, self.own_column = (np.array([row[i] for row in rows], dtype=np.int64) for i in (0, 1))
        self.own_units = np.array([row[2] for row in rows])
        return own
