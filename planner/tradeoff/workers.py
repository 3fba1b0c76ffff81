"""Solve problems in other processes: a step is sent once, then budgets; a process that dies is an answer too."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
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
    processes = [_Process(problem) for _ in range(workers)]
    idle = SimpleQueue[_Process]()
    for process in processes:
        idle.put(process)
    pool = ThreadPoolExecutor(workers)  # a thread only waits for its process
    running: set[Future[Outcome]] = set()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                task = waiting.popleft()
                running.add(pool.submit(_in_a_process, idle, task, start(task)))
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                done(future.result())
    finally:
        # After Ctrl-C some still search: the process ends, and its thread with it.
        for process in processes:
            process.end()
        pool.shutdown(wait=True, cancel_futures=True)


def _in_a_process(idle: SimpleQueue[_Process], task: Task, start: Schedule | None) -> Outcome:
    process = idle.get()
    try:
        return process.search(task, start)
    finally:
        idle.put(process)


class _Process:
    """A Python process of its own that searches one task after the other; a new one follows one that died.

    It is no fork, which would inherit the locks of torch's and HiGHS's threads without the threads, and it does not
    run the caller's main file again, as `multiprocessing` does.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.process: subprocess.Popen[bytes] | None = None
        self.ended = False

    def search(self, task: Task, start: Schedule | None) -> Outcome:
        """Run a task and wait for its outcome."""
        try:
            if self.process is None:
                self.process = self._begun()
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            pickle.dump((task, start), self.process.stdin)
            self.process.stdin.flush()
            return pickle.load(self.process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            self._kill()
            return Outcome(task, None, "the solver's process ended without an answer")

    def end(self) -> None:
        """End the process; what it is searching is lost."""
        self.ended = True
        self._kill()

    def _begun(self) -> subprocess.Popen[bytes]:
        if self.ended:
            raise EOFError
        paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        assert process.stdin is not None
        pickle.dump(self.problem, process.stdin)
        return process

    def _kill(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()


def _serve() -> None:
    """A worker's life: a problem, then tasks, until the pipe closes. Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what a solver prints is no answer
        problem = pickle.load(sys.stdin.buffer)
        while True:
            try:
                task, start = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            pickle.dump(_outcome(problem, task, start), answers)
            answers.flush()


def _outcome(problem: Problem, task: Task, start: Schedule | None) -> Outcome:
    try:
        solver = solver_named(task.solver, **task.options, start=start)
        return Outcome(task, solver.solve(dataclasses.replace(problem, budget_bytes=task.budget_bytes)))
    except SolverError as error:
        return Outcome(task, None, str(error))


if __name__ == "__main__":
    from planner.tradeoff.workers import (
        _serve as serve,  # what is pickled belongs to the module, not to __main__
    )

    serve()
