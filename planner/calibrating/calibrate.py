"""Measure operations one by one, visit by visit, into measurements that are written as they grow."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cost_models.measurements import MeasuredOperation, Measurements, Setting, Transfer, find_measurements
from planner.calibrating.operations import RunsAlone
from planner.calibrating.overhead import Overhead
from planner.calibrating.timer import Timer
from planner.whole_file import write_whole

_log = logging.getLogger(__name__)
_SAVE_EVERY_S = 5.0


@dataclass
class Calibration:
    """Measurements of one setting while they grow.

    Attributes:
        path: of the file.
        setting: of this machine.
        device: that computes.
        known: line of an operation -> what is measured of it.
        overhead_visits_s: as for `Measurements`.
        all_reduce: as for `Measurements`.
        block_overheads_s: as for `Measurements`.
        failed: line of an operation that does not run alone -> why.
    """

    path: Path
    setting: Setting
    device: torch.device
    known: dict[str, MeasuredOperation] = field(default_factory=dict)
    overhead_visits_s: tuple[float, ...] = ()
    all_reduce: tuple[Transfer, ...] = ()
    block_overheads_s: Mapping[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    _saved: Measurements | None = None

    @staticmethod
    def resumed(path: Path, setting: Setting, device: torch.device) -> Calibration:
        """What the file holds, or nothing yet.

        Raises:
            ValueError: the file is something else, or was measured elsewhere; it is left as it is.
        """
        calibration = Calibration(path, setting, device)
        if path.exists():
            found = find_measurements(path, setting)
            calibration.known = dict(found.operations)
            calibration.overhead_visits_s = found.overhead_visits_s
            calibration.all_reduce = found.all_reduce
            calibration.block_overheads_s = found.block_overheads_s
            calibration._saved = calibration.measurements
        return calibration

    @property
    def measurements(self) -> Measurements:
        """As they are now."""
        return Measurements(
            setting=self.setting,
            operations=self.known,
            overhead_visits_s=self.overhead_visits_s,
            all_reduce=self.all_reduce,
            block_overheads_s=self.block_overheads_s,
        )

    def missing(self, operations: Mapping[str, RunsAlone], *, visits: int) -> list[RunsAlone]:
        """The operations with fewer visits than asked for."""
        return [
            operation
            for line, operation in operations.items()
            if line not in self.failed and len(self._visits(line)) < visits
        ]

    def _visits(self, line: str) -> tuple[float, ...]:
        return self.known[line].visits_s if line in self.known else ()

    def measure(
        self,
        operations: Mapping[str, RunsAlone],
        *,
        visits: int,
        progress: Callable[[int, int], None] = lambda done, of: None,
        before_each: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Visit every operation so often, all of them once before any again; save on the way and at the end.

        Args:
            operations: as `operations_of` gives them.
            visits: of each; those of earlier runs count.
            progress: called with visits done and visits in all.
            before_each: called with its line before an operation is timed, for other processes to do the same.
        """
        timer = Timer(self.device, threads=self.setting.threads)
        total, done = visits * len(operations), 0
        saved_at = time.monotonic()
        overhead = Overhead(self.device) if len(self.overhead_visits_s) < visits else None
        try:
            for turn in range(visits):
                if overhead is not None and len(self.overhead_visits_s) <= turn:
                    extra_s = overhead.a_call_s(functools.partial(self._time_s, timer), before_each)
                    self.overhead_visits_s = (*self.overhead_visits_s, extra_s)
                for line, operation in operations.items():
                    done += 1
                    if line not in self.failed and len(self._visits(line)) <= turn:
                        self._visit(timer, before_each, operation)
                    progress(done, total)
                    if time.monotonic() - saved_at > _SAVE_EVERY_S:
                        self.save()
                        saved_at = time.monotonic()
        finally:
            self.save()

    def save(self) -> None:
        """Write the file, whole; nothing is written while nothing is known, or nothing is new."""
        if self.known and self.measurements != self._saved:
            write_whole(self.path, self.measurements.to_json())
            self._saved = self.measurements

    def _visit(self, timer: Timer, before_each: Callable[[str], None], operation: RunsAlone) -> None:
        before_each(operation.line)
        try:
            time_s = self._time_s(timer, operation)
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            self.failed[operation.line] = str(error).splitlines()[0][:200]
            _log.debug("%s does not run alone: %s", operation.line, error)
            return
        work = operation.work
        self.known[operation.line] = MeasuredOperation(
            visits_s=(*self._visits(operation.line), time_s),
            flop=work.flop,
            read_bytes=work.read_bytes,
            written_bytes=work.written_bytes,
            dtype=work.dtype,
            kind=work.kind,
        )

    def _time_s(self, timer: Timer, operation: RunsAlone) -> float:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return timer.median_s(
                functools.partial(operation.ready, self.device),
                moved_bytes=operation.work.moved_bytes,
                distance=operation.distance,
            )
