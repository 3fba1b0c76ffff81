"""Tasks in processes of this machine; with one slot in this very process. No Ray."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from orchestrator.backends.protocol import RunFailedError
from orchestrator.backends.tasks import Task, TaskPool

_JOIN_S = 5.0


@dataclass
class _InThisProcess:
    """One slot: the call is made when its result is asked for, and Ctrl-C ends it like any other work."""

    function: Callable[[Task], Any]
    num_slots: int = 1
    waiting: list[Task] = field(default_factory=list)

    def submit(self, task: Task) -> None:
        self.waiting.append(task)

    def next_result(self) -> tuple[Task, Any]:
        task = self.waiting.pop(0)
        return task, self.function(task)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    task: Task | None = None


class _Processes:
    """A process a slot, which calls the function again and again."""

    def __init__(self, function: Callable[[Task], Any], num_slots: int) -> None:
        self.num_slots = num_slots
        context = multiprocessing.get_context("spawn")
        self.workers: list[_Worker] = []
        for _ in range(num_slots):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, function), daemon=True)
            process.start()
            theirs.close()
            self.workers.append(_Worker(process, ours))

    def submit(self, task: Task) -> None:
        free = next(worker for worker in self.workers if worker.task is None)
        free.task = task
        with contextlib.suppress(BrokenPipeError):  # a lost worker is found when its result is waited for
            free.pipe.send(task)

    def next_result(self) -> tuple[Task, Any]:
        busy = [worker for worker in self.workers if worker.task is not None]
        ready: Any = wait([worker.pipe for worker in busy])[0]
        worker = next(worker for worker in busy if worker.pipe is ready)
        try:
            result = worker.pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            worker.process.join(_JOIN_S)
            code = worker.process.exitcode
            how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else "ended by itself"
            raise RunFailedError(f"the process of a run {how}; the runs before it are kept") from error
        task, worker.task = worker.task, None
        return task, result

    def end(self) -> None:
        """Leave no process behind."""
        for worker in self.workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join(_JOIN_S)
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()


def _serve(pipe: Connection, function: Callable[[Task], Any]) -> None:
    """The whole life of a worker's process: it ends with the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            pipe.send(function(pipe.recv()))


@contextlib.contextmanager
def local_tasks(function: Callable[[Task], Any], *, num_slots: int) -> Iterator[TaskPool]:
    """Slots for the time of the block; what still runs at its end is ended.

    Args:
        function: of a module, so that other processes find it.
        num_slots: processes; 1 for none but this one.
    """
    if num_slots == 1:
        yield _InThisProcess(function)
        return
    pool = _Processes(function, num_slots)
    try:
        yield pool
    finally:
        pool.end()
