"""What one rank says when its training fails: a sentence, and what kind of failure it is."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

from cost_models.units import format_bytes
from orchestrator.checkpoint import CheckpointError
from orchestrator.checkpoint_writer import CheckpointWriteError
from orchestrator.failures import Cause
from planner.errors import PlanMismatchError
from planner.inputs.strict import WorkloadError

# Torch has one class for what its allocator and its transport between processors raise; only the words differ.
_NO_MEMORY = ("DefaultCPUAllocator", "not enough memory", "std::bad_alloc")
_TIMED_OUT = ("Timed out waiting", "timed out after", "Application timeout", "timeout(")
_TRANSPORT = ("gloo", "pair closure", "Connection closed by peer", "Connection reset", "Broken pipe")


class NotFiniteError(ArithmeticError):
    """The loss or a weight is NaN or infinite, and training stops for it."""


class RankError(RuntimeError):
    """One rank's training failed.

    Attributes:
        cause: what kind of failure it is.
        rank: whose training.
    """

    def __init__(self, message: str, cause: Cause, rank: int) -> None:
        super().__init__(message, cause, rank)
        self.cause = cause
        self.rank = rank

    @property
    def bad_input(self) -> bool:
        """Whether what the user wrote is the cause."""
        return self.cause is Cause.BAD_INPUT

    def __str__(self) -> str:
        return self.args[0]


def rank_error(
    error: Exception, *, rank: int, run_dir: Path, promise: tuple[int, int] | None, device: torch.device
) -> RankError:
    """What a rank says of an exception; a traceback is left in the run's folder where it may tell more.

    Args:
        error: that ended the rank's training.
        rank: whose.
        run_dir: where the traceback goes.
        promise: predicted peak and budget of the rank, in bytes; None without a plan.
        device: of the rank.
    """
    cause = cause_of(error)
    if cause in (Cause.BAD_INPUT, Cause.STORAGE, Cause.NOT_FINITE):
        return RankError(f"rank {rank}: {error}", cause, rank)
    details = run_dir / f"error-rank-{rank}.txt"
    where = f"the traceback is in {details}"
    try:
        details.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError as full:
        where = f"its traceback could not be written ({full.strerror})"
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    if cause is Cause.OUT_OF_MEMORY:
        reason = f"out of memory{_beside(promise, device)}; {reason}"
    return RankError(f"rank {rank}: {reason}; {where}", cause, rank)


def cause_of(error: BaseException) -> Cause:
    """What kind of failure an exception of a rank is.

    >>> cause_of(MemoryError()).value, cause_of(RuntimeError("[gloo] Timed out waiting 10ms")).value
    ('out_of_memory', 'hang')
    """
    text = str(error)
    if isinstance(error, CheckpointWriteError):
        return Cause.STORAGE
    if isinstance(error, WorkloadError | PlanMismatchError | CheckpointError):
        return Cause.BAD_INPUT
    if isinstance(error, NotFiniteError | FloatingPointError):
        return Cause.NOT_FINITE
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return Cause.OUT_OF_MEMORY
    if isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY):
        return Cause.OUT_OF_MEMORY
    is_transport = isinstance(error, RuntimeError) and any(words in text for words in _TRANSPORT)
    if isinstance(error, torch.distributed.DistError) or is_transport:
        return Cause.HANG if any(words in text for words in _TIMED_OUT) else Cause.LOST_PEER
    return Cause.ERROR


def _beside(promise: tuple[int, int] | None, device: torch.device) -> str:
    """What a rank had when there was no more, beside what it was promised."""
    parts: list[str] = []
    if device.type == "cuda":
        parts.append(f"measured peak {format_bytes(torch.cuda.max_memory_allocated(device))}")
    if promise is not None:
        parts.append(f"predicted peak {format_bytes(promise[0])}, budget {format_bytes(promise[1])}")
    return f" ({', '.join(parts)})" if parts else ""
