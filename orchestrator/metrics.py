"""What a run reports, step by step, and the file that keeps it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from orchestrator.checkpoint_places import Place


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as all ranks saw it.

    Attributes:
        step: steps done, this one included.
        loss: mean over ranks and micro-batches; the event holds None where it is not finite.
        learning_rate: of the first parameter group in this step.
        samples_seen: training samples read since the beginning of the run.
        global_batch: of them, in this step.
        samples_per_s: all ranks together.
        gradient_norm: global norm before clipping; None where nothing is clipped.
        measured_peak_bytes: largest over the ranks; None where this step was not measured.
        measured_peak_bytes_by_rank: the same, rank by rank.
        predicted_peak_bytes: the plan's; None without a plan.
        noise_scale: B_simple in samples; None where nothing can be said yet.
        noise_scale_interval: its confidence interval; None as its upper end for no bound.
        noise_scale_reliable: whether the interval is narrow enough to act on.
        noise_scale_reason: why not, in words.
        noise_scale_by_group: B_simple of each parameter group of the optimizer, None where it is not known.
    """

    step: int
    loss: float
    learning_rate: float
    samples_seen: int
    global_batch: int
    samples_per_s: float
    gradient_norm: float | None
    measured_peak_bytes: int | None
    measured_peak_bytes_by_rank: tuple[int, ...]
    predicted_peak_bytes: int | None
    noise_scale: float | None
    noise_scale_interval: tuple[float, float | None]
    noise_scale_reliable: bool
    noise_scale_reason: str
    noise_scale_by_group: tuple[float | None, ...]

    def to_event(self) -> Event:
        """As it travels and is written."""
        return {"event": "step", **asdict(self), "loss": finite(self.loss)}


def finite(value: float) -> float | None:
    """A number that JSON can hold, None for NaN and the infinities."""
    return value if math.isfinite(value) else None


Event = dict[str, Any]
"""What a rank tells the outside: plain JSON values under the key "event", one of
"started", "step", "batch_size" (has changed), "optimizer" (another one goes on), "validation", "checkpoint",
"average", "note", "warning", "failure" (and what was decided), "resized" (other workers). Each has a "step"."""


class Reporter(Protocol):
    """How one rank talks to whoever started it. Every rank has one; those other than 0 emit warnings only."""

    def emit(self, event: Event) -> None:
        """Tell the outside something; never blocks the training for long."""
        ...

    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop; the ranks agree among themselves."""
        ...

    def checkpoint_saved(self, place: Place | None, *, step: int) -> None:
        """Called by every rank when a checkpoint is on disk; only rank 0 has its place."""
        ...


# What the leading process has decided stays true, whatever steps are done again.
_OF_DRIVER = ("failure", "resized")


class MetricsLog:
    """The run's events as one JSON object a line, without the steps that a restart has done again.

    Args:
        path: of the file; an existing one is continued.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, event: Event) -> None:
        """Write one event; a start makes the file forget what the run will now do again."""
        if event["event"] == "started":
            self._forget_after(event["step"])
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def read(self) -> list[Event]:
        """All events so far; a last line that was cut off is left out."""
        if not self._path.exists():
            return []
        events: list[Event] = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                events.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return events

    def _forget_after(self, step: int) -> None:
        events = self.read()
        kept = [e for e in events if e["event"] in _OF_DRIVER or (step > 0 and e["step"] <= step)]
        if len(kept) == len(events):
            return
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(event) + "\n" for event in kept), encoding="utf-8")
        os.replace(partial, self._path)
