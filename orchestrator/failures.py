"""How a run may fail, and what is then decided: try again, plan again, or stop."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal


class RunFailedError(RuntimeError):
    """A run ended without a result.

    Attributes:
        bad_input: what the user wrote is the cause; otherwise a rank, a machine or the cluster is.
    """

    def __init__(self, message: str, *, bad_input: bool = False) -> None:
        super().__init__(message)
        self.bad_input = bad_input


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why and what to do."""


def one_line(error: object) -> str:
    """What an error says, on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


class Cause(StrEnum):
    """Why a rank, or all of them, ended before the time; what causes the others comes first."""

    BAD_INPUT = "bad_input"
    KILLED = "killed"
    OUT_OF_MEMORY = "out_of_memory"
    NOT_FINITE = "not_finite"
    STORAGE = "storage"
    ERROR = "error"
    HANG = "hang"
    LOST_PEER = "lost_peer"
    LOST_DRIVER = "lost_driver"


@dataclass(frozen=True)
class Failure:
    """How one attempt of all ranks ended.

    Attributes:
        cause: of it.
        message: the same in a sentence that names the rank.
        rank: that it began with; None where that is not known.
    """

    cause: Cause
    message: str
    rank: int | None


@dataclass(frozen=True)
class Decision:
    """What follows a failure.

    Attributes:
        action: "retry" from the last checkpoint, "replan" with a lower budget and retry, or "stop".
        reason: in words.
    """

    action: Literal["retry", "replan", "stop"]
    reason: str


class FailurePolicy:
    """Decides what follows each failure of a run; the same for processes and for actors.

    What another attempt cannot mend stops the run: bad input, a loss that is not finite, a disk without room, and
    an error that comes before the first step or again at the same one. Too little memory is answered by a plan with
    a lower budget. All else (a rank that was killed, one that hangs, other errors) is tried again.

    Args:
        max_failures: how many are answered with another attempt.
        is_planned: whether there is a plan whose budget can be lowered.
    """

    def __init__(self, *, max_failures: int, is_planned: bool) -> None:
        self._max_failures, self._is_planned = max_failures, is_planned
        self._earlier: list[tuple[Failure, int]] = []

    def decide(self, failure: Failure, *, step: int, num_steps: int) -> Decision:
        """What follows.

        Args:
            failure: the newest.
            step: of the run, the last one that was done.
            num_steps: done in this attempt.

        >>> policy = FailurePolicy(max_failures=1, is_planned=False)
        >>> killed = Failure(Cause.KILLED, "rank 1 was ended by SIGKILL", rank=1)
        >>> policy.decide(killed, step=7, num_steps=7).reason
        'trying again from the last checkpoint, 1 of at most 1 times'
        >>> policy.decide(killed, step=9, num_steps=4).action
        'stop'
        """
        is_repeated = (failure, step) in self._earlier
        self._earlier.append((failure, step))
        number = len(self._earlier)
        if failure.cause in (Cause.BAD_INPUT, Cause.NOT_FINITE, Cause.STORAGE):
            return Decision("stop", "another attempt would end alike")
        if failure.cause is Cause.ERROR and (is_repeated or not num_steps):
            return Decision("stop", "the same at the same step" if is_repeated else "before the first step")
        if failure.cause is Cause.OUT_OF_MEMORY and not self._is_planned:
            return Decision("stop", "there is no plan to lower; set a budget, or a smaller batch")
        if number > self._max_failures:
            return Decision(
                "stop", f"train.max_failures allows {self._max_failures}, and this is number {number}"
            )
        times = f"{number} of at most {self._max_failures} times"
        if failure.cause is Cause.OUT_OF_MEMORY:
            return Decision("replan", f"planning with a lower budget and trying again, {times}")
        return Decision("retry", f"trying again from the last checkpoint, {times}")


def failure_event(failure: Failure, decision: Decision, *, step: int) -> dict[str, Any]:
    """The event that tells of a failure and of what was decided."""
    return {
        "event": "failure",
        "step": step,
        "cause": str(failure.cause),
        "rank": failure.rank,
        "decision": decision.action,
        "message": f"{failure.message}: {decision.reason}",
    }
