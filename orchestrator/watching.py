"""Programs that watch a run: each hears its events in a thread of its own, and none slows or fails the run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Protocol

from orchestrator.failures import one_line
from orchestrator.metrics import Event

_MOST_WAITING = 10_000
_CLOSE_S = 10.0


class Watcher(Protocol):
    """Takes a run's events to where somebody looks at them."""

    def watch(self, events: Sequence[Event]) -> None:
        """Take some more events, in their order."""
        ...

    def close(self, *, failed: bool) -> None:
        """The run has ended."""
        ...


class Watchers:
    """Passes events on without waiting; what a watcher cannot do is one warning, and then it is left out.

    Args:
        make: name of each -> how it is made, which is done in its thread.
        warn: shows a line.
    """

    def __init__(self, make: Mapping[str, Callable[[], Watcher]], warn: Callable[[str], None]) -> None:
        self._lanes = [_Lane(name, maker, warn) for name, maker in make.items()]

    def __call__(self, event: Event) -> None:
        """Pass an event on."""
        for lane in self._lanes:
            lane.put(event)

    def __enter__(self) -> Watchers:
        for lane in self._lanes:
            lane.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for lane in self._lanes:
            lane.put(_End(failed=error is not None))
        for lane in self._lanes:
            lane.join()


class _End:
    """The last that a watcher hears."""

    def __init__(self, *, failed: bool) -> None:
        self.failed = failed


class _Lane:
    """One watcher's thread, and what waits for it."""

    def __init__(self, name: str, make: Callable[[], Watcher], warn: Callable[[str], None]) -> None:
        self._name = name
        self._make = make
        self._warn = warn
        self._waiting: queue.Queue[Event | _End] = queue.Queue(_MOST_WAITING)
        self._is_out = False
        self.thread = threading.Thread(target=self._run, daemon=True, name=f"watch-{name}")

    def put(self, item: Event | _End) -> None:
        """Leave something for it."""
        if self._is_out:
            return
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            self._leave_out(f"{_MOST_WAITING} events wait for it")

    def join(self) -> None:
        """Wait a little for what is left to be written."""
        self.thread.join(_CLOSE_S)
        if self.thread.is_alive() and not self._is_out:
            self._leave_out(f"it did not end in {_CLOSE_S:g} seconds")

    def _run(self) -> None:
        try:
            watcher = self._make()
            while not self._is_out:
                items = [self._waiting.get()]
                while not self._waiting.empty():
                    items.append(self._waiting.get())
                watcher.watch([item for item in items if not isinstance(item, _End)])
                if isinstance(items[-1], _End):
                    watcher.close(failed=items[-1].failed)
                    return
        except Exception as error:  # whatever it is, the run is worth more
            if not self._is_out:
                self._leave_out(f"{type(error).__name__}: {one_line(error)}")

    def _leave_out(self, reason: str) -> None:
        self._is_out = True
        self._warn(f"{self._name} is left out of the rest of the run: {reason}")
