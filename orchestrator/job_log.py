"""The log of a submitted job, shown as `train` shows its run: progress on stderr, results on stdout."""

from __future__ import annotations

import json
import re
from typing import Any

from orchestrator.progress import Display, write_line
from orchestrator.summary import summary_lines

# What Ray itself writes into the log of a job that it starts.
_OF_RAY = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\tINFO |Running entrypoint for job ")


class JobLog:
    """Takes a log piece by piece, as it arrives, and shows each line that is whole.

    The job runs `lowtide train --json`: its steps are objects, one a line; all else in its log are warnings and
    complaints, which go to stderr as they are. What Ray says of starting the job is left out.

    Args:
        display: of the run.
    """

    def __init__(self, display: Display) -> None:
        self._display = display
        self._rest = ""

    def take(self, text: str) -> None:
        """More of the log."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._show(line)

    def end(self) -> None:
        """There is no more."""
        if self._rest:
            self._show(self._rest)
            self._rest = ""

    def _show(self, line: str) -> None:
        event = _event_of(line)
        if event is None:
            if not _OF_RAY.match(line):
                self._display.pass_on(line)
        elif event["event"] == "end":
            for part in summary_lines(event):
                write_line(part)
        elif event["event"] != "error":  # the job has said it in words too
            self._display.show(event)


def _event_of(line: str) -> dict[str, Any] | None:
    if not line.startswith('{"event": '):
        return None
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
