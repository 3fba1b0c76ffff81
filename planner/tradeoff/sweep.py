"""Peak memory against time: a sweep of budgets, and the Pareto front of all plans that it finds."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.problem import Problem
from planner.schedule import Schedule
from planner.simulate import simulate
from planner.solution import Solution, Status
from planner.solvers import DEFAULT_SOLVER, solver_names
from planner.solvers.retain_all import RetainAll, retain_all_schedule
from planner.tradeoff.smallest import Smallest, smallest_budget
from planner.tradeoff.workers import Outcome, Task, run_tasks

NUM_BUDGETS = 12
# What a front is compared with, where the solver exists.
BASELINES = ("chen_sqrt", "chen_greedy", "griewank")
_BASELINE_LIMIT_S = 10.0
_GAP = 0.002


@dataclass(frozen=True)
class FrontPoint:
    """The best plan known within one budget.

    Attributes:
        budget_bytes: of the rank.
        status: of the search at this budget, or "failed".
        solver: that found the plan; at a lower budget, maybe.
        peak_bytes: of the plan; None without one, and so for the rest.
        extra_time_fraction: rematerialization over the step.
        gap: share of the step's time that is not proven necessary within this budget.
        num_rematerialized: second runs.
        solve_s: seconds of the search at this budget.
        schedule: the plan.
    """

    budget_bytes: int
    status: str
    solver: str
    peak_bytes: int | None
    extra_time_fraction: float | None
    gap: float | None
    num_rematerialized: int | None
    solve_s: float
    schedule: Schedule | None = None

    def to_object(self) -> dict[str, Any]:
        """The point without its schedule, for ``--json``."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "schedule"
        }


@dataclass(frozen=True)
class Front:
    """A sweep of budgets.

    Attributes:
        points: from the smallest budget to everything retained; time never grows along them. One more than was
            asked for where a search found a flatter plan than the smallest budget that was known before.
        pareto: (peak_bytes, extra_time_fraction) of every plan that no other one beats in both.
        baselines: what each baseline found at the same budgets.
        smallest: the flattest plan known, at the first of the budgets.
        retained_all_peak_bytes: the last of the budgets.
    """

    points: tuple[FrontPoint, ...]
    pareto: tuple[tuple[int, float], ...]
    baselines: dict[str, tuple[FrontPoint, ...]]
    smallest: Smallest
    retained_all_peak_bytes: int


def budgets_between(first_bytes: int, last_bytes: int, count: int) -> list[int]:
    """Budgets at equal steps, both ends included, each once.

    >>> budgets_between(10, 13, 3)
    [10, 11, 13]
    """
    steps = max(1, count - 1)
    return sorted({first_bytes + (last_bytes - first_bytes) * k // steps for k in range(steps + 1)})


def sweep(
    problem: Problem,
    *,
    num_budgets: int = NUM_BUDGETS,
    solver: str = DEFAULT_SOLVER,
    free_order: bool = False,
    time_limit_s: float = 20.0,
    workers: int | None = None,
    baselines: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> Front:
    """The Pareto front of peak against time.

    Budgets go from the smallest for which a plan is known to everything retained. Each is searched in a process of
    its own, the lowest first, from the best plan that is known by then: a plan within a budget is one within every
    larger budget. For the same reason a point whose plan is beaten by that of a lower budget takes it over.

    Args:
        problem: its budget is not read.
        num_budgets: points.
        solver: name of the algorithm.
        free_order: it may change the order of the nodes.
        time_limit_s: seconds of the search at one budget.
        workers: processes of one thread each; None for as many as there are cores.
        baselines: run the baselines too.
        tell: called with a line of progress.

    Returns:
        The front.

    Raises:
        SolverError: the solver failed before any budget was searched.
    """
    tell("smallest budget: searching")
    smallest = smallest_budget(problem, solver, time_limit_s=time_limit_s, free_order=free_order)
    last = simulate(problem, retain_all_schedule(problem)).peak_bytes
    budgets = budgets_between(smallest.budget_bytes, last, num_budgets)
    cores = os.cpu_count() or 1
    options = {"time_limit_s": time_limit_s, "gap": _GAP, "threads": 1, "free_order": free_order}
    tasks = [Task(budget, solver, options) for budget in budgets[:-1]]
    if baselines:
        limited = {"time_limit_s": min(_BASELINE_LIMIT_S, time_limit_s), "threads": 1}
        names = [name for name in BASELINES if name in solver_names() and name != solver]
        tasks += [Task(budget, name, limited) for name in names for budget in budgets]
    known = [Known.of(problem, smallest.solution, DEFAULT_SOLVER)]
    outcomes: list[Outcome] = []

    def start(task: Task) -> Schedule | None:
        best = best_within(known, task.budget_bytes)
        return None if best is None else best.solution.schedule

    def done(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if outcome.solution is not None and outcome.solution.schedule is not None:
            known.append(Known.of(problem, outcome.solution, outcome.task.solver))
        tell(f"sweep: {len(outcomes)} of {len(tasks) + 1} searches done")

    done(Outcome(Task(last, solver, options), RetainAll().solve(replace(problem, budget_bytes=last))))
    run_tasks(problem, tasks, workers=min(workers or cores, len(tasks) or 1), start=start, done=done)
    own = {one.task.budget_bytes: one for one in outcomes if one.task.solver == solver}
    # Only the default solver takes over what another one found.
    shared = [one for one in known if solver == DEFAULT_SOLVER or one.asked in (solver, DEFAULT_SOLVER)]
    flattest = min(shared, key=lambda one: (one.peak_bytes, one.time_s))
    if flattest.peak_bytes < smallest.budget_bytes:
        lower = replace(own[budgets[0]].task, budget_bytes=flattest.peak_bytes)
        # What is proven of the lowest budget that was searched holds below it too.
        own[flattest.peak_bytes] = replace(own[budgets[0]], task=lower)
        smallest = _smaller(problem, smallest, flattest)
    return Front(
        points=tuple(_point(problem, own[budget], best_within(shared, budget)) for budget in sorted(own)),
        pareto=_pareto(problem, shared),
        baselines={
            name: points
            for name in BASELINES
            if name != solver and (points := _baseline_points(problem, outcomes, name))
        },
        smallest=smallest,
        retained_all_peak_bytes=last,
    )


@dataclass(frozen=True)
class Known:
    """A plan that some search found.

    Attributes:
        peak_bytes: replayed.
        time_s: replayed.
        num_rematerialized: replayed.
        solution: the search's answer.
        asked: name of the solver that was asked.
    """

    peak_bytes: int
    time_s: float
    num_rematerialized: int
    solution: Solution
    asked: str

    @classmethod
    def of(cls, problem: Problem, solution: Solution, asked: str) -> Known:
        """Replay the answer of a search."""
        assert solution.schedule is not None
        trace = simulate(problem, solution.schedule)
        return cls(trace.peak_bytes, trace.time_s, trace.num_rematerialized, solution, asked)


def best_within(known: Sequence[Known], budget_bytes: int) -> Known | None:
    """The quickest of the plans that fit, the flattest of equals; None if none fits."""
    fitting = [one for one in known if one.peak_bytes <= budget_bytes]
    return min(fitting, key=lambda one: (one.time_s, one.peak_bytes), default=None)


def _smaller(problem: Problem, smallest: Smallest, flattest: Known) -> Smallest:
    """The smallest budget, where the searches of the budgets found a flatter plan than the search for it."""
    schedule = flattest.solution.schedule
    assert schedule is not None
    return replace(
        smallest,
        schedule=schedule,
        trace=simulate(problem, schedule),
        solver=flattest.solution.solver,
    )


def _pareto(problem: Problem, known: Sequence[Known]) -> tuple[tuple[int, float], ...]:
    """Peak and extra time of the plans that no other one beats, by rising peak."""
    front: list[tuple[int, float]] = []
    for one in sorted(known, key=lambda one: (one.peak_bytes, one.time_s)):
        extra = problem.costed.extra_time_fraction(one.time_s)
        if not front or extra < front[-1][1]:
            front.append((one.peak_bytes, extra))
    return tuple(front)


def _baseline_points(problem: Problem, outcomes: Sequence[Outcome], name: str) -> tuple[FrontPoint, ...]:
    """What a baseline found, one point a peak."""
    points: dict[int, FrontPoint] = {}
    for one in outcomes:
        if one.task.solver == name and one.solution is not None and one.solution.schedule is not None:
            found = Known.of(problem, one.solution, name)
            points.setdefault(found.peak_bytes, _point(problem, one, found))
    return tuple(points[peak] for peak in sorted(points))


def _point(problem: Problem, own: Outcome, best: Known | None) -> FrontPoint:
    """The best plan within a budget, whichever search found it, against the bound of the budget's own search."""
    solved, step_s = own.solution, problem.costed.step_s
    solve_s = solved.solve_s if solved is not None else 0.0
    if best is None:
        status = solved.status.value if solved is not None else "failed"
        return FrontPoint(own.task.budget_bytes, status, own.task.solver, None, None, None, None, solve_s)
    bound_s = step_s  # each node runs at least once
    if solved is not None and solved.schedule is not None:
        bound_s = max(bound_s, solved.bound_s)
    unproven_s = max(0.0, best.time_s - bound_s)
    # The same test as the solvers': the gap of a plan at least as good as one that is proven stays proven.
    proven = solved is not None and solved.status is Status.OPTIMAL and best.time_s <= solved.time_s
    proven |= unproven_s <= own.task.options.get("gap", 0.0) * step_s
    return FrontPoint(
        budget_bytes=own.task.budget_bytes,
        status=(Status.OPTIMAL if proven else Status.FEASIBLE).value,
        solver=best.solution.solver,
        peak_bytes=best.peak_bytes,
        extra_time_fraction=problem.costed.extra_time_fraction(best.time_s),
        gap=unproven_s / best.time_s if best.time_s else 0.0,
        num_rematerialized=best.num_rematerialized,
        solve_s=solve_s,
        schedule=best.solution.schedule,
    )
