"""Griewank and Walther's REVOLVE on the forward nodes taken as a chain."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from planner.graph import Graph
from planner.just_in_time import schedule_of_order
from planner.problem import Problem
from planner.solution import Solution
from planner.solvers.articulation import has_backward
from planner.solvers.incumbent import Incumbent
from planner.solvers.sequences import fixed_values, nodes_to_run

# An order of this many runs is written and replayed in a second, at least.
_RUNS_PER_S = 30_000


@dataclass(frozen=True)
class Griewank:
    """Binomial placement of c snapshots; a value may be rematerialized many times. c is searched.

    Reversing step i needs the state before it. Snapshots are the outputs of forward nodes; whatever else a node
    needs is made again from them. All steps count alike: costs and bytes do not move the snapshots.

    Attributes:
        time_limit_s: for the search of c.

    Reference: Griewank and Walther, 2000, Algorithm 799: revolve, ACM Transactions on Mathematical Software 26(1).
    """

    name: ClassVar[str] = "griewank"

    time_limit_s: float = 20.0

    def solve(self, problem: Problem) -> Solution:
        """Try numbers of snapshots from few to many with the judge.

        Args:
            problem: a training step; without a backward phase nothing is found.

        Returns:
            A schedule that `simulate` accepts within the budget, or `NOT_FOUND`.
        """
        graph = problem.costed.graph
        best = Incumbent(problem, solver=self.name)
        if not has_backward(graph):
            return best.answer()
        for num_snapshots in _counts(graph.num_forward):
            left_s = self.time_limit_s - best.elapsed_s()
            if left_s <= 0.0:
                break
            # With few snapshots a long chain runs again a number of times that grows with its square.
            if _forward_steps(graph.num_forward, num_snapshots) > _RUNS_PER_S * left_s:
                continue
            for carry in (False, True):
                deadline = best.start + self.time_limit_s
                order = revolve_order(graph, num_snapshots=num_snapshots, carry=carry, deadline=deadline)
                if order is not None:
                    best.offer(schedule_of_order(graph, order))
        return best.answer()


def snapshots_by_step(num_steps: int, *, num_snapshots: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Steps in the order in which they are reversed, each with the states that are kept while it is.

    State i is that after step i, for i from 1; state 0, before the first step, is always there.

        t(l, c) = min_m  m + t(l - m, c - 1) + t(m, c)       t(1, c) = 0,  t(l, 0) = l (l - 1) / 2

    >>> list(snapshots_by_step(4, num_snapshots=1))
    [(4, (1,)), (3, (1,)), (2, (1,)), (1, ())]

    Args:
        num_steps: l.
        num_snapshots: c, besides state 0.

    Yields:
        Step (from 1) and its kept states.
    """
    # (first, last, kept): reverse the steps first + 1 .. last from state `first`, with `kept` states besides.
    stack: list[tuple[int, int, tuple[int, ...]]] = [(0, num_steps, ())]
    while stack:
        first, last, kept = stack.pop()
        if last - first == 1:
            yield last, kept
            continue
        free = num_snapshots - len(kept)
        if free <= 0:
            stack.append((first, last - 1, kept))
            yield last, kept
            continue
        middle = first + _split(last - first, free)
        stack.append((first, middle, kept))
        stack.append((middle, last, (*kept, middle)))


def revolve_order(graph: Graph, *, num_snapshots: int, carry: bool, deadline: float) -> list[int] | None:
    """Nodes in the order in which REVOLVE runs them.

    Each backward node is put to the last forward node whose outputs it, or a node after it, reads; the backward
    nodes of one forward node are one step. What a step makes again stays to its end, snapshots while they are kept.

    Args:
        graph: a training step with a backward phase.
        num_snapshots: c.
        carry: what the step before has left and this one reads stays; the published method makes it again.
        deadline: of `time.perf_counter`.

    Returns:
        Nodes; forward ones may be there several times. None if the time was up.
    """
    cut = graph.num_forward
    steps: list[list[int]] = [[] for _ in range(cut)]
    at = 0
    for node in reversed(range(cut, len(graph.nodes))):
        makers = [graph.values[v].node for v in graph.nodes[node].inputs]
        at = max([at, *(maker for maker in makers if maker < cut)])
        steps[at].insert(0, node)
    kept_at: dict[int, tuple[int, ...]] = {}
    for step, kept in snapshots_by_step(cut, num_snapshots=num_snapshots):
        if time.perf_counter() > deadline:
            return None
        kept_at[step - 1] = kept
    fixed = fixed_values(graph)
    always = {v for v, value in enumerate(graph.values) if value.node >= cut or v in fixed}
    order = list(range(cut))
    there = set(range(len(graph.values)))
    for step in reversed(range(cut)):
        if time.perf_counter() > deadline:
            return None
        states = {v for state in kept_at[step] for v in graph.nodes[state - 1].outputs}
        reads = {v for node in steps[step] for v in graph.nodes[node].inputs}
        # The first forward sweep ends with what its last step reads.
        there = (there & (states | reads if carry or step == cut - 1 else states)) | always
        for node in steps[step]:
            again = nodes_to_run(graph, (*states, *graph.nodes[node].inputs), there)
            order.extend((*again, node))
            there.update(v for k in again for v in graph.nodes[k].outputs)
    return order


def _counts(num_steps: int) -> list[int]:
    """Numbers of snapshots to try: all up to 16, then each about an eighth more."""
    counts = list(range(min(16, num_steps)))
    while counts[-1] < num_steps - 1:
        counts.append(min(num_steps - 1, math.ceil(counts[-1] * 1.125)))
    return counts


@cache
def _forward_steps(length: int, snapshots: int) -> int:
    """t(l, c) = r l - binomial(s + r, r - 1) with s = c + 1 and r the least with binomial(s + r, s) >= l."""
    if length <= 1:
        return 0
    repeats = 1
    while math.comb(snapshots + 1 + repeats, repeats) < length:
        repeats += 1
    return repeats * length - math.comb(snapshots + 1 + repeats, repeats - 1)


@cache
def _split(length: int, snapshots: int) -> int:
    """The number m of steps to run before the next snapshot."""
    return min(
        range(1, length),
        key=lambda m: m + _forward_steps(length - m, snapshots - 1) + _forward_steps(m, snapshots),
    )
