"""The optimal persistent schedule of a chain of blocks, by dynamic programming."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from planner.just_in_time import just_in_time, schedule_of_order
from planner.problem import Problem
from planner.solution import Solution
from planner.solvers.articulation import has_backward
from planner.solvers.bounds import cheapest_cover
from planner.solvers.chain_blocks import chain_of_blocks
from planner.solvers.chain_equal import persistent_is_optimal
from planner.solvers.chain_measure import Block
from planner.solvers.chain_tables import ChainTables, Choice
from planner.solvers.incumbent import Incumbent

# Numbers in one table; there are five of them, of 8 bytes each.
_MOST_CELLS = 12_000_000


class _OutOfTimeError(Exception):
    """The time for filling the tables is over."""


@dataclass(frozen=True)
class ChainDp:
    """Rotor's dynamic program: a value that is kept stays to its block's backward, at any depth of nesting.

    The forward graph is cut where one value crosses. Of a block the inner values are kept together or made again
    together. It is `OPTIMAL` where the answer equals a bound that holds for every schedule, and on chains of equal
    sizes, where that is proven (FORMULATIONS.md); else `FEASIBLE`.

    Attributes:
        time_limit_s: for the whole solve.
        num_slots: memory units into which the budget is cut where sizes have no large common divisor.

    Reference: Beaumont et al., 2019, Optimal checkpointing for heterogeneous chains, arXiv:1911.13214.
    """

    name: ClassVar[str] = "chain_dp"

    time_limit_s: float = 20.0
    num_slots: int = 500

    def solve(self, problem: Problem) -> Solution:
        """Least time over persistent schedules of the chain.

        Args:
            problem: a training step; without a backward phase nothing is found.

        Returns:
            A schedule that `simulate` accepts within the budget, or the reason why there is none.
        """
        best = Incumbent(problem, solver=self.name)
        graph = problem.costed.graph
        room = problem.budget_bytes - problem.static.resident_bytes
        if room < 0 or not has_backward(graph):
            return best.answer()
        if best.offer(schedule_of_order(graph, range(len(graph.nodes)))) == 0:
            return best.answer()
        # Dropping just what the bound counts is optimal where it fits, as it often does on chains of equal nodes.
        cover = cheapest_cover(problem)
        best.bound_s = cover.bound_s
        dropped = {v for k in cover.nodes for v in graph.nodes[k].outputs}
        retained = [v for v in range(len(graph.values)) if v not in dropped]
        best.offer(just_in_time(graph, retained))
        if best.attains_bound():
            return best.answer()
        blocks = chain_of_blocks(problem.costed)
        unit = self._unit_bytes(problem, len(blocks), room)

        def check() -> None:
            if best.elapsed_s() > self.time_limit_s:
                raise _OutOfTimeError

        # Rounding sizes up counts too much: a little more than the budget is planned too, and the judge decides.
        num_units = room // unit + (room // unit // 8 if unit > _common_bytes(problem) else 0)
        try:
            tables = ChainTables(blocks, unit_bytes=unit, num_units=num_units, check=check)
        except _OutOfTimeError:
            return best.answer()
        times = tables.B[0, len(blocks) - 1, : num_units + 1]
        for time_s in np.unique(times[np.isfinite(times)]):
            units = int(np.argmax(times == time_s))
            surely = units <= room // unit
            if not surely and best.elapsed_s() > self.time_limit_s:
                continue
            if best.offer(schedule_of_order(graph, _order(tables, unit, units))) == 0:
                break
        exact = unit == _common_bytes(problem) and math.isclose(best.time_s, times[-1], rel_tol=1e-9)
        if exact and persistent_is_optimal(graph, blocks):
            best.bound_s = best.time_s
        return best.answer()

    def _unit_bytes(self, problem: Problem, num_blocks: int, room: int) -> int:
        """The common divisor of all sizes where that leaves few units, else a share of the budget."""
        common = _common_bytes(problem)
        most = max(1, min(self.num_slots, _MOST_CELLS // num_blocks**2))
        return common if room <= most * common else -(-room // most)


def _common_bytes(problem: Problem) -> int:
    """Common divisor of all sizes."""
    graph = problem.costed.graph
    sizes = [value.size_bytes for value in graph.values] + [node.workspace_bytes for node in graph.nodes]
    return max(math.gcd(*sizes), 1)


def _order(tables: ChainTables, unit: int, units: int) -> list[int]:
    """Nodes in the order of the best schedule of the whole chain within some memory units."""
    blocks, order = tables.blocks, list[int]()
    last = len(blocks) - 1
    # Work to do: a stretch with its memory units and whether its output is there, or nodes to append.
    stack: list[tuple[int, int, int, bool] | list[int]] = [(0, last, units, False)]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            order += item
            continue
        s, t, m, with_output = item
        block = blocks[s]
        step = tables.begin(s, t, m, with_output=with_output, unit=unit)
        if step.choice is Choice.ONE:
            order += _one(block, first=t == last, with_output=with_output)
        elif step.choice is Choice.ALL:
            order += (block.first_all if t == last else block.again_all).nodes
            stack += [block.backward, (s + 1, t, m - tables.kept[s], with_output)]
        elif step.choice is Choice.PASS:
            q = step.split + 1
            for between in blocks[s:q]:
                order += (between.first_out if t == last else between.again_out).nodes
            stack.append((s, q - 1, m, False))
            if q == t:
                order += _one(blocks[q], first=t == last, with_output=with_output)
            else:
                order += (blocks[q].first_all if t == last else blocks[q].again_all).nodes
                stack += [blocks[q].backward, (q + 1, t, m - tables.kept[q], with_output)]
        else:
            p = step.split
            for between in blocks[s : p + 1]:
                order += (between.first_out if t == last else between.again_out).nodes
            with_inner = bool(tables.E[s, p, m] <= tables.B[s, p, m])
            stack += [(s, p, m, with_inner), (p + 1, t, m - tables.out[p], with_output)]
    return order


def _one(block: Block, *, first: bool, with_output: bool) -> list[int]:
    """Nodes of a single block: forward as far as backward needs it, then backward."""
    if first:
        return block.first_all.nodes + block.backward
    return (block.again_inner if with_output else block.again_backward).nodes + block.backward
