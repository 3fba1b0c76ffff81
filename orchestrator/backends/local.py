"""This machine's processes: one rank runs in this process, several in processes of their own. No Ray."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event as EventFlag
from pathlib import Path
from typing import Any

import torch.distributed as dist

from orchestrator.backends.protocol import RunFailedError
from orchestrator.job import JobSpec
from orchestrator.metrics import Event
from orchestrator.stopping import StopSignal
from orchestrator.worker import Assignment, Outcome, RankError, train_rank

_POLL_S = 0.1
_JOIN_S = 10.0
_GRACE_S = 1.0


@dataclass(frozen=True)
class _DirectReporter:
    """Reports by calling a function of this process."""

    on_event: Callable[[Event], None]
    stop: StopSignal

    def emit(self, event: Event) -> None:
        self.on_event(event)

    def stop_requested(self) -> bool:
        return self.stop.requested

    def checkpoint_saved(self, path: Path | None, *, step: int) -> None:
        """Nobody else needs to know."""


@dataclass(frozen=True)
class _QueueReporter:
    """Reports to the process that started this one."""

    messages: Any
    stop: EventFlag

    def emit(self, event: Event) -> None:
        self.messages.put(event)

    def stop_requested(self) -> bool:
        return self.stop.is_set()

    def checkpoint_saved(self, path: Path | None, *, step: int) -> None:
        """Nobody else needs to know."""


def run(
    assignment: Assignment, job: JobSpec, *, on_event: Callable[[Event], None], stop: StopSignal
) -> Outcome:
    """Run all ranks on this machine.

    Raises:
        RunFailedError: a rank failed or was killed.
    """
    if job.train.workers == 1:
        reporter = _DirectReporter(on_event, stop)
        try:
            with stop:
                return train_rank(assignment, rank=0, world_size=1, device_index=0, reporter=reporter)
        except RankError as error:
            raise RunFailedError(str(error), bad_input=error.bad_input) from error
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    stop_flag = context.Event()
    with tempfile.TemporaryDirectory(prefix="lowtide-") as folder:
        processes = [
            context.Process(
                target=_rank_process,
                args=(
                    assignment,
                    rank,
                    job.train.workers,
                    job.train.device,
                    f"{folder}/rendezvous",
                    messages,
                    stop_flag,
                ),
                daemon=True,
            )
            for rank in range(job.train.workers)
        ]
        try:
            for process in processes:
                process.start()
            with stop:
                return _follow(processes, messages, stop_flag, on_event=on_event, stop=stop)
        finally:
            _end(processes)


def _follow(
    processes: list[SpawnProcess],
    messages: Any,
    stop_flag: EventFlag,
    *,
    on_event: Callable[[Event], None],
    stop: StopSignal,
) -> Outcome:
    """Pass events on until rank 0 has its outcome and every process has ended."""
    outcome: Outcome | None = None
    errors: list[RankError] = []
    while True:
        if stop.requested:
            stop_flag.set()
        # Looked at before the queue is drained: what a process said before it ended is then already there.
        all_ended = all(process.exitcode is not None for process in processes)
        for content in _drain(messages):
            if isinstance(content, RankError):
                errors.append(content)
            elif isinstance(content, Outcome):
                outcome = content
            else:
                on_event(content)
        if errors and not all_ended:  # the first to complain may only have lost its peer; hear the others too
            for process in processes:
                process.join(_GRACE_S)
            errors += [content for content in _drain(messages) if isinstance(content, RankError)]
        # Rank 0 says its outcome after the last collective and checkpoint: how a rank ends then is no matter.
        if outcome is None:
            _raise_failure(processes, errors)
        if all_ended:
            if outcome is None:
                raise RunFailedError("the ranks ended without an outcome")
            return outcome


def _raise_failure(processes: list[SpawnProcess], errors: list[RankError]) -> None:
    """Raise the likeliest cause: a killed process, then bad input, then the first error."""
    for rank, process in enumerate(processes):
        if process.exitcode is not None and process.exitcode < 0:
            raise RunFailedError(f"rank {rank} was ended by {signal.Signals(-process.exitcode).name}")
    for error in sorted(errors, key=lambda error: not error.bad_input):
        raise RunFailedError(str(error), bad_input=error.bad_input)


def _drain(messages: Any) -> list[Any]:
    found: list[Any] = []
    timeout_s = _POLL_S
    while True:
        try:
            found.append(messages.get(timeout=timeout_s))
        except queue.Empty:
            return found
        timeout_s = 0.0


def _rank_process(
    assignment: Assignment,
    rank: int,
    world_size: int,
    device: str,
    rendezvous: str,
    messages: Any,
    stop: EventFlag,
) -> None:
    """The whole life of one rank's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
        )
        reporter = _QueueReporter(messages, stop)
        outcome = train_rank(
            assignment, rank=rank, world_size=world_size, device_index=rank, reporter=reporter
        )
        if rank == 0:
            messages.put(outcome)
        dist.destroy_process_group()
    except RankError as error:
        messages.put(error)
    finally:
        messages.close()
        messages.join_thread()
    # All is said. The interpreter's own end is left out: threads of torch now and then abort a process in it.
    os._exit(0)


def _end(processes: list[SpawnProcess]) -> None:
    """Leave no process behind."""
    for process in processes:
        if process.pid is not None and process.exitcode is None:
            process.terminate()
    for process in processes:
        if process.pid is not None:
            process.join(_JOIN_S)
            if process.exitcode is None:
                process.kill()
                process.join()
