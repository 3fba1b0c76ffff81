"""A MILP kept alive in HiGHS: rows and columns are added between solves, which PuLP would rebuild."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import highspy
import numpy as np

from planner.solvers.highs import SolveOutcome, outcome_of, run, silence

Terms = Sequence[tuple[int, float]]
_INFINITY = highspy.kHighsInf


class LiveModel:
    """Columns in [0, upper], rows ``lower <= terms <= upper``, a cost to minimize.

    Attributes:
        values: of the columns, after a solve that found a point.
    """

    def __init__(self) -> None:
        self.values = np.zeros(0)
        self._cost: list[float] = []
        self._upper: list[float] = []
        self._integer: list[bool] = []
        self._rows: list[tuple[Terms, float, float]] = []
        self._highs: highspy.Highs | None = None
        self._sent_columns = self._sent_rows = 0
        self._is_mip = False

    @property
    def num_columns(self) -> int:
        """Columns so far."""
        return len(self._cost)

    @property
    def num_binaries(self) -> int:
        """Columns that must be whole."""
        return sum(self._integer)

    def column(self, *, cost: float = 0.0, integer: bool = False, upper: float = 1.0) -> int:
        """Add a column in [0, upper]; its index."""
        self._cost.append(cost)
        self._upper.append(upper)
        self._integer.append(integer)
        return len(self._cost) - 1

    def at_most(self, terms: Terms, bound: float) -> None:
        """Add the row ``terms <= bound``."""
        self._rows.append((terms, -_INFINITY, bound))

    def at_least(self, terms: Terms, bound: float) -> None:
        """Add the row ``terms >= bound``."""
        self._rows.append((terms, bound, _INFINITY))

    def solve(
        self,
        *,
        mip: bool,
        time_limit_s: float,
        abs_gap: float,
        threads: int,
        start: Mapping[int, float] | None = None,
    ) -> SolveOutcome:
        """Minimize; a relaxation goes on from the basis of the last one.

        Args:
            mip: keep integrality.
            time_limit_s: wall-clock seconds.
            abs_gap: stop when objective - bound is no more.
            threads: of HiGHS.
            start: column -> value; HiGHS completes a partial one.

        Returns:
            What was proven and found; the point is in `values`.

        Raises:
            SolverError: HiGHS reports an error of its own.
        """
        highs, gap = self._send(mip=mip), max(abs_gap, 1e-9)
        for option, value in (
            ("time_limit", highs.getRunTime() + max(0.05, time_limit_s)),
            ("mip_abs_gap", gap),
            ("mip_rel_gap", 0.0),
            ("threads", threads),
        ):
            highs.setOptionValue(option, value)
        if start and mip:
            highs.setSolution(
                len(start), np.array(list(start), dtype=np.int32), np.array(list(start.values()))
            )
        run(highs)
        values = np.array(highs.getSolution().col_value)
        outcome = outcome_of(highs, lambda: float(np.dot(self._cost, values)), mip=mip, abs_gap=gap)
        if outcome.has_values:
            self.values = values
        return outcome

    def _send(self, *, mip: bool) -> highspy.Highs:
        """Hand over what is new since the last solve."""
        if self._highs is None:
            silence()
            self._highs = highspy.Highs()
            self._highs.setOptionValue("output_flag", False)
        highs = self._highs
        first, count = self._sent_columns, self.num_columns - self._sent_columns
        if count:
            none = np.zeros(0, dtype=np.int32)
            highs.addCols(
                count,
                np.array(self._cost[first:]),
                np.zeros(count),
                np.array(self._upper[first:]),
                0,
                np.zeros(count, dtype=np.int32),
                none,
                np.zeros(0),
            )
        rows = self._rows[self._sent_rows :]
        if rows:
            sizes = [len(terms) for terms, _, _ in rows]
            highs.addRows(
                len(rows),
                np.array([lower for _, lower, _ in rows]),
                np.array([upper for _, _, upper in rows]),
                sum(sizes),
                np.concatenate(([0], np.cumsum(sizes)[:-1])).astype(np.int32),
                np.array([column for terms, _, _ in rows for column, _ in terms], dtype=np.int32),
                np.array([factor for terms, _, _ in rows for _, factor in terms], dtype=np.float64),
            )
        if mip != self._is_mip or (mip and count):
            whole, real = highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous
            kinds = [whole if mip and integer else real for integer in self._integer]
            highs.changeColsIntegrality(
                self.num_columns, np.arange(self.num_columns, dtype=np.int32), np.array(kinds)
            )
            self._is_mip = mip
        self._sent_columns, self._sent_rows = self.num_columns, len(self._rows)
        return highs
