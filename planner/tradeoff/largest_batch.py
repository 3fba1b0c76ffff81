"""The largest batch under a budget and an allowed extra time."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from planner.costed import CostModel
from planner.errors import InfeasibleError
from planner.graph import Phase
from planner.prepared import Prepared
from planner.problem import Problem
from planner.simulate import simulate
from planner.solution import Solution, Status
from planner.solvers.bounds import least_need_bytes
from planner.solvers.retain_all import RetainAll
from planner.solving import chosen_solver, solve
from planner.tradeoff.rebatched import scaling

T = TypeVar("T")
_FORWARD = "forward"
# No batch is larger: doubling ends here.
_MAX_BATCH = 1 << 24


@dataclass(frozen=True)
class AllowedTime:
    """How much longer a step may take.

    Attributes:
        fraction: of the step; None for the seconds of one forward.
    """

    fraction: float | None

    @classmethod
    def parse(cls, text: str) -> AllowedTime:
        """Read "10%" or "forward".

        Raises:
            ValueError: anything else.
        """
        if text.strip() == _FORWARD:
            return cls(None)
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*%\s*", text)
        if match is None or float(match[1]) > 1e6:
            raise ValueError(f"--extra-time must read like '10%', or be 'forward', got {text!r}.")
        return cls(float(match[1]) / 100.0)

    def allowed_s(self, problem: Problem) -> float:
        """Seconds above the retained-all step."""
        costed = problem.costed
        if self.fraction is not None:
            return self.fraction * costed.step_s
        nodes = zip(costed.graph.nodes, costed.time_s, strict=True)
        return sum(time_s for node, time_s in nodes if node.phase is Phase.FORWARD)


@dataclass(frozen=True)
class Trial:
    """One batch size under the budget.

    Attributes:
        size: samples.
        solution: within the budget and the allowed time, or None.
        reason: why there is none, "" with a solution.
        proven: there is none for certain, not only none found.
    """

    size: int
    solution: Solution | None
    reason: str = ""
    proven: bool = True


@dataclass(frozen=True)
class LargestBatch(Generic[T]):
    """The largest batch that was found.

    Attributes:
        size: samples of one micro-batch of one rank.
        plan: at that size.
        refused: the next size, which has no plan.
        scaled: the sizes between were scaled from two captures, and the capture at `size` had the same bytes.
        num_captures: how often the step was captured.
    """

    size: int
    plan: T
    refused: Trial
    scaled: bool
    num_captures: int


@dataclass
class _Search(Generic[T]):
    """Trials of batch sizes, each size captured at most once."""

    prepare: Callable[[int], Prepared[T]]
    budget: str
    allowed: AllowedTime
    solver: str
    time_limit_s: float
    tell: Callable[[str], None]

    def __post_init__(self) -> None:
        self.captured: dict[int, Prepared[T]] = {}
        self.trials: dict[int, Trial] = {}

    def at(self, size: int) -> Prepared[T]:
        if size not in self.captured:
            self.tell(f"largest batch: capturing {size} samples")
            self.captured[size] = self.prepare(size)
        return self.captured[size]

    def captured_fits(self, size: int) -> bool:
        if size not in self.trials:
            self.trials[size] = self.trial(size, self.at(size).problem)
        return self.trials[size].solution is not None

    def trial(self, size: int, problem: Problem) -> Trial:
        problem = dataclasses.replace(problem, budget_bytes=self.budget_bytes)
        plain = RetainAll().solve(problem)
        if plain.status is Status.OPTIMAL:
            return Trial(size, plain)
        if least_need_bytes(problem) > problem.budget_bytes:
            return Trial(size, None, "one operation alone needs more than the budget")
        self.tell(f"largest batch: planning {size} samples")
        found = chosen_solver(self.solver, time_limit_s=self.time_limit_s).solve(problem)
        if found.schedule is None:
            proven = found.status is Status.INFEASIBLE
            return Trial(size, None, "no plan fits" if proven else "no plan was found in time", proven)
        allowed_s, step_s = self.allowed.allowed_s(problem), problem.costed.step_s
        if found.time_s - step_s <= allowed_s * (1.0 + 1e-9):
            return Trial(size, found)
        fraction = (found.time_s - step_s) / step_s
        proven = found.bound_s - step_s > allowed_s
        return Trial(size, None, f"the best plan found takes {fraction:.1%} extra time", proven)

    @property
    def budget_bytes(self) -> int:
        any_step = next(iter(self.captured.values()))
        return any_step.budgeted(self.budget).budget_bytes


def largest_batch(
    prepare: Callable[[int], Prepared[T]],
    *,
    size: int,
    budget: str,
    allowed: AllowedTime,
    cost_model: CostModel,
    solver: str,
    time_limit_s: float,
    tell: Callable[[str], None] = lambda _: None,
) -> LargestBatch[T]:
    """Find the largest batch: by scaling two captures, and by capture where that is not exact.

    Peak and time grow with the batch, so sizes are doubled until one is refused, then bisected. The answer and the
    size after it are captured themselves.

    Args:
        prepare: captures the step with a number of samples.
        size: samples to begin with.
        budget: in bytes, with a unit.
        allowed: extra time.
        cost_model: that `prepare` prices with.
        solver: name of the algorithm.
        time_limit_s: seconds of one search.
        tell: called with a line of progress.

    Returns:
        The largest batch, its plan, and why one more sample is too many.

    Raises:
        InfeasibleError: not even one sample fits.
        ValueError: no batch is ever refused.
    """
    search = _Search(prepare, budget, allowed, solver, time_limit_s, tell)
    first, second = search.at(size), search.at(2 * size)
    scaled = scaling(first.problem, second.problem, sizes=(size, 2 * size), cost_model=cost_model)
    exact = False
    found = size
    if scaled is not None:
        tried: dict[int, bool] = {}

        def scaled_fits(size: int) -> bool:
            if size not in tried:
                tried[size] = search.trial(size, scaled(size)).solution is not None
            return tried[size]

        found = max(1, _bisected(scaled_fits, size))
        exact = _same_bytes(search.at(found).problem, scaled(found))
    found = _bisected(search.captured_fits, found, step=1 if scaled is not None else found)
    if found == 0:
        raise _nothing_fits(search)
    problem = dataclasses.replace(search.at(found).problem, budget_bytes=search.budget_bytes)
    solution = search.trials[found].solution
    assert solution is not None
    return LargestBatch(
        size=found,
        plan=search.at(found).answer(problem, solution),
        refused=search.trials[found + 1],
        scaled=exact,
        num_captures=len(search.captured),
    )


def _bisected(fits: Callable[[int], bool], size: int, *, step: int | None = None) -> int:
    """The largest size that fits, 0 if none does: steps that double from `size`, then bisection."""
    step = step or size
    low, high = 0, size
    if fits(size):
        low, high = size, size + step
        while fits(high):
            step *= 2
            low, high = high, high + step
            if high > _MAX_BATCH:
                raise ValueError(
                    f"{low} samples fit, and memory hardly grows with them. Is dim 0 of the batch the samples?"
                )
    while low == 0 and high > 1:
        lower = max(1, high - step)
        step *= 2
        low, high = (lower, high) if fits(lower) else (0, lower)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _same_bytes(one: Problem, two: Problem) -> bool:
    pairs = zip(one.costed.graph.values, two.costed.graph.values, strict=True)
    return len(one.costed.graph.values) == len(two.costed.graph.values) and all(
        a.size_bytes == b.size_bytes for a, b in pairs
    )


def _nothing_fits(search: _Search[T]) -> InfeasibleError:
    """The error for one sample that does not fit."""
    problem = dataclasses.replace(search.at(1).problem, budget_bytes=search.budget_bytes)
    try:
        solution = solve(problem, time_limit_s=search.time_limit_s, solver=search.solver)
    except InfeasibleError as error:
        error.facts |= {"solver": search.solver, **search.at(1).facts()}
        return error
    assert solution.schedule is not None
    peak_bytes = simulate(problem, solution.schedule).peak_bytes
    return InfeasibleError(
        f"one sample fits, but {search.trials[1].reason}, more than allowed. Allow more, or raise the budget.",
        budget_bytes=problem.budget_bytes,
        smallest_feasible_bytes=peak_bytes,
        owner="the allowed extra time",
    )
