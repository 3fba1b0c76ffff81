"""TensorBoard's event files of a run.

tensorboardX writes them, which Ray Train needs already; torch's own writer would ask for all of TensorBoard.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.metrics import Event
from orchestrator.scalars import scalars_of

_FLUSH_S = 5


class TensorboardFiles:
    """Writes each number of a run under its name.

    Args:
        folder: of the files; made when the run starts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def watch(self, events: Sequence[Event]) -> None:
        """Write their numbers; a start makes TensorBoard forget what the run will now do again."""
        for event in events:
            if event["event"] == "started":
                self._open(event["step"])
            for name, value in scalars_of(event).items():
                assert self._writer is not None  # a run starts before it has numbers
                self._writer.add_scalar(name, value, event["step"])

    def close(self, *, failed: bool) -> None:
        """Have all of it on disk."""
        if self._writer is not None:
            self._writer.close()

    def _open(self, steps_done: int) -> None:
        from tensorboardX import SummaryWriter

        if self._writer is not None:
            self._writer.close()
        # Two files that are begun in the same second would have the same name, and only one would be left.
        number = len(list(self._folder.iterdir())) if self._folder.exists() else 0
        self._writer = SummaryWriter(
            str(self._folder),
            purge_step=steps_done + 1 if number else None,
            flush_secs=_FLUSH_S,
            filename_suffix=f".{number:03d}",
        )
