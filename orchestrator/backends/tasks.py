"""What runs tasks side by side: independent calls of one function, each on one worker."""

from __future__ import annotations

from typing import Any, Protocol

Task = Any
"""Plain data that the function is called with."""


class TaskPool(Protocol):
    """Calls a function with one task after another, several at a time.

    Attributes:
        num_slots: how many run at the same time.
    """

    num_slots: int

    def submit(self, task: Task) -> None:
        """Start a call; there is a free slot."""
        ...

    def next_result(self) -> tuple[Task, Any]:
        """Wait for any of the calls that run.

        Raises:
            RunFailedError: a worker was lost.
        """
        ...
