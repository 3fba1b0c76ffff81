"""Which run of a grid of batch sizes and rates comes next, how long it may take, and what the runs say."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from orchestrator.batch_size.critical_batch import RunSteps
from orchestrator.batch_size.rate_rule import RateRule, rate_factor_of
from orchestrator.batch_size.results_file import SweepRun

# Rates tried around the one that the rule gives, as powers of two, and how much further where the best is the last.
_AROUND = (0, 1, -1, 2, -2)
_MOST_EXTENSIONS = 8
# A larger batch needs no more steps, a smaller one no more examples; twice that is left for bad luck.
_SLACK = 2.0
_OTHER_SEEDS_SLACK = 3.0


@dataclass(frozen=True)
class Cell:
    """A run of the grid.

    Attributes:
        batch: examples of a step.
        rate: learning rate.
        seed: of weights and data.
        limit: most steps.
        pace: (step, loss) of the best run of the batch so far, () for none.
    """

    batch: int
    rate: float
    seed: int
    limit: int = field(compare=False)
    pace: tuple[tuple[int, float], ...] = field(compare=False, default=())


@dataclass(frozen=True)
class Grid:
    """What is to be tried.

    Attributes:
        batches: ascending.
        own_batch: of the job, whose rate is `own_rate`.
        own_rate: of the job.
        rule: how the rate changes with the batch.
        rates: exactly these for every batch; () for powers of two around the rule's rate, continued where the best
            is the last one.
        seeds: the first chooses the rate, the others run at it.
        max_steps: at the job's batch and above; smaller batches may see as many examples.
    """

    batches: tuple[int, ...]
    own_batch: int
    own_rate: float
    rule: RateRule
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    max_steps: int

    def __post_init__(self) -> None:
        if len(set(self.batches)) < 3:
            raise ValueError(
                f"a sweep needs at least three batch sizes to fit a curve to, got {list(self.batches)}. "
                "Give more with --batches."
            )

    def most_steps(self, batch: int) -> int:
        """Steps that a run may take where nothing else is known."""
        return math.ceil(self.max_steps * max(1.0, self.own_batch / batch))

    def first_rates(self, batch: int) -> list[float]:
        """Rates of a batch, the likeliest first."""
        middle = self.own_rate * rate_factor_of(batch / self.own_batch, self.rule)
        if self.rates:
            return sorted(self.rates, key=lambda rate: abs(math.log(rate / middle)))
        # On one grid of powers of two for all batches.
        power = round(math.log2(middle / self.own_rate))
        return [self.own_rate * 2.0 ** (power + step) for step in _AROUND]


class Sweep:
    """The state of a sweep: a function of the runs that have ended, so that it goes on where it was ended.

    Args:
        grid: what is to be tried.
        runs: that have ended.
    """

    def __init__(self, grid: Grid, runs: Sequence[SweepRun]) -> None:
        self.grid = grid
        self.runs = list(runs)

    def add(self, run: SweepRun) -> None:
        """A run has ended."""
        self.runs.append(run)

    def best(self, batch: int) -> SweepRun | None:
        """See `best_run`."""
        return best_run(self.runs, batch, first_seed=self.grid.seeds[0])

    def next_cell(self, running: Collection[Cell]) -> Cell | None:
        """The next run to start; None where there is none, or none before one that runs has ended."""
        for rank in range(max(len(self.grid.first_rates(batch)) for batch in self.grid.batches)):
            for batch in self._batches_from_the_middle():
                rates = self.grid.first_rates(batch)
                if rank < len(rates) and (cell := self._cell(batch, rates[rank], running)):
                    return cell
        for batch in self._batches_from_the_middle():
            if any(cell.batch == batch for cell in running):
                continue
            rate = self._extension(batch)
            cell = None if rate is None else self._cell(batch, rate, running)
            if cell is not None:
                return cell
        return self._other_seed(running)

    def _batches_from_the_middle(self) -> list[int]:
        return sorted(self.grid.batches, key=lambda batch: abs(math.log(batch / self.grid.own_batch)))

    def _of(self, batch: int) -> list[SweepRun]:
        return [run for run in self.runs if run.batch == batch and run.seed == self.grid.seeds[0]]

    def _cell(self, batch: int, rate: float, running: Collection[Cell]) -> Cell | None:
        """A run with the first seed, unless it runs or has ended with an answer that a new one would repeat."""
        best, limit = self.best(batch), self.limit(batch)
        cell = Cell(batch, rate, self.grid.seeds[0], limit, () if best is None else best.curve)
        if cell in running:
            return None
        for run in self._of(batch):
            may_go_on = run.outcome in ("limit", "hopeless") and best is None and run.limit < limit
            if run.rate == rate and not may_go_on:
                return None
        return cell

    def limit(self, batch: int) -> int:
        """Steps after which a run of a batch can no longer be the best, or is not worth its time."""
        best = self.best(batch)
        if best is not None:
            return max(1, best.steps)
        bounds = [float(self.grid.most_steps(batch))]
        for other in self.grid.batches:
            known = self.best(other)
            if known is not None:
                bounds.append(_SLACK * known.steps * max(1.0, other / batch))
        return max(1, math.ceil(min(bounds)))

    def _extension(self, batch: int) -> float | None:
        """A rate beyond those tried: where the best is the last one, or none has reached the target."""
        tried = sorted({run.rate for run in self._of(batch)})
        if self.grid.rates or not tried or len(tried) >= len(_AROUND) + _MOST_EXTENSIONS:
            return None
        best = self.best(batch)
        if best is not None:
            if best.rate == tried[-1]:
                return tried[-1] * 2
            return tried[0] / 2 if best.rate == tried[0] else None
        if all(run.outcome == "diverged" for run in self._of(batch)):
            return tried[0] / 2
        # None has reached it: on towards the rate that came nearest, while that is the last one.
        nearest = min(self._of(batch), key=lambda run: min((loss for _, loss in run.curve), default=math.inf))
        if nearest.rate == tried[0]:
            return tried[0] / 2
        return tried[-1] * 2 if nearest.rate == tried[-1] else None

    def _other_seed(self, running: Collection[Cell]) -> Cell | None:
        """The best rate of a batch with a seed that has not run, once its rates are done."""
        for batch in self.grid.batches:
            best = self.best(batch)
            if best is None or any(
                cell.batch == batch and cell.seed == self.grid.seeds[0] for cell in running
            ):
                continue
            limit = math.ceil(_OTHER_SEEDS_SLACK * max(1, best.steps))
            done = {run.seed for run in self.runs if (run.batch, run.rate) == (batch, best.rate)}
            for seed in self.grid.seeds:
                cell = Cell(batch, best.rate, seed, limit)
                if seed not in done and cell not in running:
                    return cell
        return None


def best_run(runs: Sequence[SweepRun], batch: int, *, first_seed: int) -> SweepRun | None:
    """The run of a batch that reached the target in the fewest steps with the first seed."""
    reached = [run for run in runs if (run.batch, run.seed, run.outcome) == (batch, first_seed, "reached")]
    return min(reached, key=lambda run: run.steps, default=None)


def outcomes(runs: Sequence[SweepRun], *, first_seed: int) -> list[RunSteps]:
    """What each batch took at its best rate, seed by seed; of one that no rate brought to the target, its limit.

    A batch all of whose runs diverged says nothing and is left out.
    """
    found: list[RunSteps] = []
    for batch in sorted({run.batch for run in runs}):
        best = best_run(runs, batch, first_seed=first_seed)
        own = [run for run in runs if run.batch == batch]
        if best is None:
            limits = [run.steps for run in own if run.outcome == "limit"]
            if limits:
                found.append(RunSteps(batch, max(1, *limits), reached=False))
            continue
        for run in own:
            if run.rate == best.rate and run.outcome != "hopeless":
                has = run.outcome == "reached"
                found.append(RunSteps(batch, max(1, run.steps if has else run.limit), reached=has))
    return found


def at_edge(runs: Sequence[SweepRun], *, first_seed: int) -> list[int]:
    """Batches whose best rate is the smallest or the largest that was tried: a better one may lie beyond."""
    edges = []
    for batch in sorted({run.batch for run in runs}):
        best = best_run(runs, batch, first_seed=first_seed)
        tried = {run.rate for run in runs if (run.batch, run.seed) == (batch, first_seed)}
        if best is not None and best.rate in (min(tried), max(tried)):
            edges.append(batch)
    return edges
