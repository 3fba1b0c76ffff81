"""The dynamic program of the optimal persistent schedule of a chain; FORMULATIONS.md numbers the recurrences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from planner.solvers.chain_measure import Block


class Choice(Enum):
    """How a stretch of blocks is begun."""

    ONE = "one"  # a single block: run it, then its backward
    ALL = "all"  # keep everything of the first block until its backward
    SPLIT = "split"  # keep only the output of a block, come back to those before later
    PASS = "pass"  # keep everything of a block but not its input, come back to those before later


@dataclass(frozen=True)
class Step:
    """What the traceback found for one stretch.

    Attributes:
        choice: how it begins.
        split: for `SPLIT` and `PASS` the last block that is run with nothing kept but its output.
    """

    choice: Choice
    split: int = -1


class ChainTables:
    """Least seconds of every stretch of blocks under every number of memory units.

    B[s,t,m]: blocks s..t are to be run and reversed, the input of s is there and not counted, m units are left.
    E[s,t,m] is the same with the output of t there too, and counted. In stretches that end with the last block
    nodes run for the first time, in all others again.

    Args:
        blocks: of the chain, measured.
        unit_bytes: bytes of one unit; sizes are rounded up to it.
        num_units: memory without static bytes, rounded down.
        check: called for every row; raises when there is no time left.
    """

    def __init__(
        self, blocks: list[Block], *, unit_bytes: int, num_units: int, check: Callable[[], None]
    ) -> None:
        self.blocks = blocks
        self.num_units = num_units
        count, unit = len(blocks), unit_bytes
        # One more column that stays infinite: the place of all negative amounts.
        self.B = np.full((count, count, num_units + 2), np.inf)
        self.E = np.full((count, count, num_units + 2), np.inf)
        self.X = np.full((count, count, num_units + 2), np.inf)  # min(B, E)
        self.B_less = np.full((count, count, num_units + 2), np.inf)  # B[s,t,m - output of s-1]
        self.E_less = np.full((count, count, num_units + 2), np.inf)
        # A[q,t,m]: as B with everything of q kept and its input gone; only where backward of q does not read that.
        self.A = np.full((count, count, num_units + 2), np.inf)
        self.A_there = np.full((count, count, num_units + 2), np.inf)
        self.passes = [not block.reads_input for block in blocks]
        self.units = np.arange(num_units + 2)
        self.units[-1] = -1
        self.out = [-(-block.output_bytes // unit) for block in blocks]
        self.kept = [-(-block.kept_bytes // unit) for block in blocks]
        self.run_s, self.run_units = self._runs(unit, again=True)
        self.first_s, self.first_units = self._runs(unit, again=False)
        for t in range(count):
            for s in range(t, -1, -1):
                self._fill(s, t, unit)
            check()

    def _runs(self, unit: int, *, again: bool) -> tuple[np.ndarray, np.ndarray]:
        """[s,p]: seconds, and units beside the stretch, of running s..p with nothing kept but the last output."""
        count = len(self.blocks)
        seconds, units = np.zeros((count, count)), np.zeros((count, count), dtype=np.int64)
        passing = np.array([(b.again_out if again else b.first_out).passing_bytes for b in self.blocks])
        before = np.array([0 if again else b.before_first_bytes for b in self.blocks])
        times = np.cumsum([0.0] + [(b.again_out if again else b.first_out).time_s for b in self.blocks])
        for s, block in enumerate(self.blocks):
            need = passing + before
            need[s] = (block.again_out if again else block.first_out).own_input_bytes + before[s]
            units[s, s:] = np.maximum.accumulate(need[s:])
            seconds[s, s:] = times[s + 1 :] - times[s]
        return seconds, units

    def needs(self, s: int, t: int, unit: int) -> tuple[int, float, int, float, int]:
        """Units and seconds to begin s..t with ONE (s = t) and ALL, and bytes beside any run of the stretch."""
        block, last = self.blocks[s], t == len(self.blocks) - 1
        if last:
            beside, before = 0, block.before_first_bytes
            one = run_all = block.first_all
        else:
            beside = before = self.blocks[t].beside_bytes
            one, run_all = block.again_backward, block.again_all
        one_units = -(-max(one.own_input_bytes + before, block.backward_bytes) // unit)
        all_units = -(-max(run_all.own_input_bytes + before, block.backward_bytes) // unit)
        return one_units, one.time_s, all_units, run_all.time_s, beside

    def _fill(self, s: int, t: int, unit: int) -> None:
        block = self.blocks[s]
        last = t == len(self.blocks) - 1
        one_units, one_s, all_units, all_s, beside = self.needs(s, t, unit)
        row, row_e = self.B[s, t], self.E[s, t]
        if s == t:
            # (1) One block: run it with its inner values, then its backward.
            row[one_units:-1] = one_s + block.backward_s
            if not last:
                # (2) The same when its output is still there: only the inner values are made.
                own = block.again_inner.own_input_bytes + beside + block.output_bytes
                row_e[-(-max(own, block.backward_bytes) // unit) : -1] = (
                    block.again_inner.time_s + block.backward_s
                )
        else:
            run_s, run_units = (self.first_s, self.first_units) if last else (self.run_s, self.run_units)
            need = -(-(run_units[s, s:t] + beside) // unit)
            # (3) Run s..p, keep the output of p, do p+1..t, then s..p with that output or without.
            self._best(s, t, need, run_s, less=self.B_less, gone=self.A, row=row)
            # (4) Keep everything of s, do s+1..t, then backward of s.
            self._keep_all(row, self.B[s + 1, t], self.kept[s], all_units, all_s + block.backward_s)
            if not last:
                self._best(s, t, need + self.out[t], run_s, less=self.E_less, gone=self.A_there, row=row_e)
                all_there = all_units + self.out[t]
                self._keep_all(row_e, self.E[s + 1, t], self.kept[s], all_there, all_s + block.backward_s)
        if s and self.passes[s]:
            self._pass(s, t, unit)
        np.minimum(row, row_e, out=self.X[s, t])
        if s:
            less = self.out[s - 1]
            if less <= self.num_units:
                self.B_less[s, t, less:-1] = row[: self.num_units + 1 - less]
                self.E_less[s, t, less:-1] = row_e[: self.num_units + 1 - less]

    def _best(
        self,
        s: int,
        t: int,
        need: np.ndarray,
        run_s: np.ndarray,
        *,
        less: np.ndarray,
        gone: np.ndarray,
        row: np.ndarray,
    ) -> None:
        """row = min over p of (3) and (5), where the run of s..p fits."""
        both = self.X[s, s:t] + less[s + 1 : t + 1, t]
        if any(self.passes[s + 1 : t + 1]):
            # (5) Run s..p, keep everything of p+1 but not its input, do p+2..t, backward of p+1, then s..p.
            np.minimum(both, self.B[s, s:t] + gone[s + 1 : t + 1, t], out=both)
        np.where(self.units >= need[:, None], both + run_s[s, s:t, None], np.inf).min(axis=0, out=row)

    def _pass(self, q: int, t: int, unit: int) -> None:
        """(6) Fill A[q,t] and the same with the output of t there."""
        block, last = self.blocks[q], t == len(self.blocks) - 1
        beside = block.before_first_bytes if last else self.blocks[t].beside_bytes
        if q == t:
            for table, run, own in (
                (self.A, block.first_all if last else block.again_backward, 0),
                (self.A_there, block.again_inner, block.output_bytes),
            ):
                need = -(-max(run.passing_bytes + beside + own, block.backward_bytes) // unit)
                table[q, t, need:-1] = run.time_s + block.backward_s
            return
        run = block.first_all if last else block.again_all
        need = -(-max(run.passing_bytes + beside, block.backward_bytes) // unit)
        time_s = run.time_s + block.backward_s
        self._keep_all(self.A[q, t], self.B[q + 1, t], self.kept[q], need, time_s)
        self._keep_all(self.A_there[q, t], self.E[q + 1, t], self.kept[q], need + self.out[t], time_s)

    def _keep_all(self, row: np.ndarray, rest: np.ndarray, kept: int, need: int, time_s: float) -> None:
        """row[m] = min(row[m], time_s + rest[m - kept]) for m >= need."""
        first = max(kept, need)
        if first <= self.num_units:
            part = row[first:-1]
            np.minimum(part, rest[first - kept : self.num_units + 1 - kept] + time_s, out=part)

    def begin(self, s: int, t: int, m: int, *, with_output: bool, unit: int) -> Step:
        """The choice that reaches the table's value."""
        if s == t:
            return Step(Choice.ONE)
        less = self.E_less if with_output else self.B_less
        _, _, all_units, all_s, beside = self.needs(s, t, unit)
        extra = self.out[t] if with_output else 0
        last = t == len(self.blocks) - 1
        run_s, run_units = (self.first_s, self.first_units) if last else (self.run_s, self.run_units)
        need = -(-(run_units[s, s:t] + beside) // unit) + extra
        there = self.X[s, s:t, m] + less[s + 1 : t + 1, t, m]
        gone = self.B[s, s:t, m] + (self.A_there if with_output else self.A)[s + 1 : t + 1, t, m]
        split = np.where(m >= need, np.minimum(there, gone) + run_s[s, s:t], np.inf)
        p = int(np.argmin(split))
        rest = (self.E if with_output else self.B)[s + 1, t]
        if m >= max(self.kept[s], all_units + extra):
            keep_all = rest[m - self.kept[s]] + all_s + self.blocks[s].backward_s
            if keep_all <= split[p]:
                return Step(Choice.ALL)
        return Step(Choice.SPLIT if there[p] <= gone[p] else Choice.PASS, s + p)
