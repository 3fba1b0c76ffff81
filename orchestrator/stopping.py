"""Ctrl-C and SIGTERM in a run: the first asks for a checkpoint and an orderly end, the second ends at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any


class StopSignal:
    """While entered, turns SIGINT and SIGTERM into a request; a second one raises KeyboardInterrupt.

    Args:
        on_request: called once, from the signal handler, when the first one arrives.

    Attributes:
        requested: whether one has arrived.
        exit_status: of a process that it has ended, as shells count: 130 of Ctrl-C, 143 of SIGTERM, which is how a
            machine that is taken away says so.
    """

    def __init__(self, on_request: Callable[[], None]) -> None:
        self._on_request = on_request
        self._previous: dict[signal.Signals, Any] = {}
        self.requested = False
        self.exit_status = 128 + signal.SIGINT

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.exit_status = 128 + number
        self._on_request()
