"""One attempt of several ranks in processes of this machine: start them, follow them, say how it ended."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch.distributed as dist

from orchestrator.backends.attempt import of_ranks
from orchestrator.checkpoint_places import Place
from orchestrator.failures import Failure
from orchestrator.job import JobSpec
from orchestrator.metrics import Event
from orchestrator.rank_errors import RankError
from orchestrator.stopping import StopSignal
from orchestrator.worker import Assignment, Outcome, train_rank

_POLL_S = 0.1
_GRACE_S = 1.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class _PipeReporter:
    """Reports to the process that started this one, which answers with the request to stop."""

    pipe: Connection
    lock: threading.Lock = field(default_factory=threading.Lock)

    def emit(self, event: Event) -> None:
        with self.lock:
            self.pipe.send(event)

    def stop_requested(self) -> bool:
        return self.pipe.poll(0)  # nothing else is ever said on it, and it stays there

    def checkpoint_saved(self, place: Place | None, *, step: int) -> None:
        """Nobody else needs to know."""


@dataclass
class _Rank:
    """One rank's process and what has been heard of it.

    Attributes:
        pipe: a pipe of its own: what one rank leaves half said when it is killed disturbs no other.
        is_open: whether more may come.
        exit_code: None while it runs; negative for the signal that ended it.
    """

    process: BaseProcess
    pipe: Connection
    is_open: bool = True
    outcome: Outcome | None = None
    error: RankError | None = None

    @property
    def exit_code(self) -> int | None:
        return self.process.exitcode

    def hear(self, on_event: Callable[[Event], None]) -> None:
        """Take all that it has said."""
        try:
            while self.is_open and self.pipe.poll(0):
                content = self.pipe.recv()
                if isinstance(content, RankError):
                    self.error = content
                elif isinstance(content, Outcome):
                    self.outcome = content
                else:
                    on_event(content)
        except (EOFError, ConnectionResetError):
            self.is_open = False


def run_ranks(
    assignment: Assignment, job: JobSpec, *, on_event: Callable[[Event], None], stop: StopSignal
) -> Outcome | Failure:
    """Start a process a rank and follow them to their end; none is left behind."""
    with tempfile.TemporaryDirectory(prefix="lowtide-") as folder, _started(assignment, job, folder) as ranks:
        is_told = False
        while True:
            if stop.requested and not is_told:
                is_told = True
                for rank in ranks:
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        rank.pipe.send("stop")
            # Looked at before they are heard: what a process said before it ended is then already there.
            all_ended = all(rank.exit_code is not None for rank in ranks)
            _hear(ranks, on_event, timeout_s=_POLL_S)
            # Rank 0 says its outcome after the last collective and checkpoint: how a rank ends then is no matter.
            outcome = ranks[0].outcome
            if outcome is None and any(rank.error or rank.exit_code for rank in ranks):
                # The first to complain may only have lost its peer; hear the others too.
                deadline_s = time.monotonic() + _GRACE_S
                while time.monotonic() < deadline_s and not all(rank.exit_code is not None for rank in ranks):
                    _hear(ranks, on_event, timeout_s=_POLL_S)
                errors = {number: rank.error for number, rank in enumerate(ranks) if rank.error}
                ended = {number: how for number, rank in enumerate(ranks) if (how := _how(rank))}
                return of_ranks(errors, ended, world_size=len(ranks), timeout=job.train.collective_timeout)
            if all_ended:
                assert outcome is not None  # else rank 0 has said what was wrong, or has an exit code
                return outcome


def _hear(ranks: list[_Rank], on_event: Callable[[Event], None], *, timeout_s: float) -> None:
    """Wait a little for something to be said, and pass it on."""
    pipes = [rank.pipe for rank in ranks if rank.is_open]
    if not pipes:
        time.sleep(timeout_s)
    else:
        wait(pipes, timeout_s)
    for rank in ranks:
        rank.hear(on_event)


def _how(rank: _Rank) -> str:
    """How a process ended that said nothing; "" for one that runs, or said it."""
    code = rank.exit_code
    if code is None or code == 0 or rank.error is not None:
        return ""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended by itself with status {code}"


@contextlib.contextmanager
def _started(assignment: Assignment, job: JobSpec, folder: str) -> Iterator[list[_Rank]]:
    """The processes of all ranks, for the time of the block."""
    # Ranks are forked by a server that has imported torch and done nothing else: another attempt begins at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["orchestrator.worker"])
    resource_tracker.ensure_running()  # which unblocks signals; the server starts it otherwise, with them blocked
    ranks: list[_Rank] = []
    try:
        for number in range(job.train.workers):
            ours, theirs = context.Pipe()
            arguments = (assignment, job, number, f"{folder}/rendezvous", theirs)
            process = context.Process(target=_rank_process, args=arguments, daemon=True)
            # A signal to the whole group must not end a rank before it has said that its parent decides, nor the
            # server at any time, which ends with this process.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            ranks.append(_Rank(process, ours))
        yield ranks
    finally:
        for rank in ranks:
            if rank.exit_code is None:
                rank.process.kill()
        for rank in ranks:
            rank.process.join()
            rank.pipe.close()


def _rank_process(assignment: Assignment, job: JobSpec, rank: int, rendezvous: str, pipe: Connection) -> None:
    """The whole life of one rank's process."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the parent decides what they mean
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True, name="parent").start()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    train = job.train
    try:
        dist.init_process_group(
            "nccl" if train.device == "cuda" else "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=train.workers,
            timeout=timedelta(seconds=train.collective_timeout_s),
        )
        outcome: Any = train_rank(
            assignment, rank=rank, world_size=train.workers, device_index=rank, reporter=_PipeReporter(pipe)
        )
        pipe.send(outcome)
        dist.destroy_process_group()
    except RankError as error:
        pipe.send(error)
    # All is said. The interpreter's own end is left out: threads of torch now and then abort a process in it.
    os._exit(0)


def _end_with_parent() -> None:
    """A rank without anybody who follows it would train on in vain, and against the one that continues the run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
