"""How a run may end without a result."""

from __future__ import annotations


class RunFailedError(RuntimeError):
    """A run ended without a result.

    Attributes:
        bad_input: what the user wrote is the cause; otherwise a rank, a machine or the cluster is.
    """

    def __init__(self, message: str, *, bad_input: bool = False) -> None:
        super().__init__(message)
        self.bad_input = bad_input
