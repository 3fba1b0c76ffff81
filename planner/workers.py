"""Solve problems in other processes: a step is sent once, then budgets; a process that dies is an answer too."""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from planner.errors import SolverError
from planner.problem import Problem
from planner.schedule import Schedule
from planner.solution import Solution
from planner.solvers import solver_named


@dataclass(frozen=True)
class Task:
    """One search.

    Attributes:
        budget_bytes: of the problem.
        solver: name of the algorithm.
        options: of the solver.
    """

    budget_bytes: int
    solver: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a search came to.

    Attributes:
        task: the search.
        solution: its answer, or None where the solver failed.
        failure: sentence that says why, "" with an answer.
    """

    task: Task
    solution: Solution | None
    failure: str = ""


Start = Callable[[Task], Schedule | None]
_step: list[Problem] = []  # of a worker process, from its initializer


def run_tasks(
    problem: Problem,
    tasks: Iterable[Task],
    *,
    workers: int,
    start: Start,
    done: Callable[[Outcome], None],
) -> None:
    """Run searches in parallel processes, in the given order.

    Args:
        problem: its budget is replaced by each task's.
        tasks: what to search.
        workers: processes; with 1 the searches run here.
        start: a schedule within a task's budget that is known when the task begins, or None.
        done: called here with each outcome, in the order in which they come.
    """
    waiting = deque(tasks)
    if workers == 1:
        for task in waiting:
            done(_outcome(problem, task, start(task)))
        return
    while waiting:
        _run_until_broken(problem, waiting, workers, start, done)


def _run_until_broken(
    problem: Problem,
    waiting: deque[Task],
    workers: int,
    start: Start,
    done: Callable[[Outcome], None],
) -> None:
    """Run until nothing waits, or a process died and took the pool with it."""
    before = set(multiprocessing.active_children())
    # A forked process would inherit the locks of torch's and HiGHS's threads without the threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(problem,))
    running: dict[Future[Outcome], Task] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                task = waiting.popleft()
                running[pool.submit(_search, task, start(task))] = task
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                task = running.pop(future)
                try:
                    done(future.result())
                except BrokenProcessPool:
                    done(Outcome(task, None, "the solver's process ended without an answer"))
                    raise
    except BrokenProcessPool:
        for task in running.values():
            done(Outcome(task, None, "the solver's process ended without an answer"))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()


def _begin(problem: Problem) -> None:
    """Make a worker ready; Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _step.append(problem)


def _search(task: Task, start: Schedule | None) -> Outcome:
    return _outcome(_step[0], task, start)


def _outcome(problem: Problem, task: Task, start: Schedule | None) -> Outcome:
    try:
        solver = solver_named(task.solver, **task.options, start=start)
        return Outcome(task, solver.solve(dataclasses.replace(problem, budget_bytes=task.budget_bytes)))
    except SolverError as error:
        return Outcome(task, None, str(error))
