"""Times measured operation by operation on one device; what was not measured is priced by a fitted roofline."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from cost_models.hardware import HardwareSpec
from cost_models.measurements import MeasuredOperation, Measurements
from cost_models.roofline import Roofline
from cost_models.work import Work

# With what the line of an optimizer's step begins: it is many operations in one.
OPTIMIZER = "optimizer "
# Operations whose roofline times differ by no more than this factor tell of one another's efficiency.
_NEAR = 4.0


@dataclass(frozen=True)
class FittedRoofline:
    """The roofline, corrected by what operations of the same kind and of like size took on the device.

        t = roofline(work) * median of measured / roofline over operations of its kind, within a factor of 4 in time

    Where no operation of like size was measured, the nearest one of the kind counts; a kind of which none was
    measured keeps the roofline's time. The correction is an efficiency per kind of operation and size.

    Args:
        roofline: of the device.
        measured: operations that were measured on it.
    """

    roofline: Roofline
    measured: tuple[MeasuredOperation, ...]

    @property
    def name(self) -> str:
        """The name of this model in a plan's provenance."""
        return "roofline fitted to measurements"

    @cached_property
    def _ratios(self) -> Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]:
        """Kind -> (log of the roofline's times in rising order, measured / roofline of each)."""
        by_kind: dict[str, list[tuple[float, float]]] = {}
        for operation in self.measured:
            guess_s = self.roofline.time_s(operation.work)
            if guess_s > 0:
                by_kind.setdefault(operation.kind, []).append((math.log(guess_s), operation.time_s / guess_s))
        return {
            kind: (tuple(at for at, _ in sorted(pairs)), tuple(ratio for _, ratio in sorted(pairs)))
            for kind, pairs in by_kind.items()
        }

    def correction(self, work: Work) -> float:
        """What the roofline's time of a work is multiplied by; 1.0 for a kind of which nothing was measured."""
        sizes, ratios = self._ratios.get(work.kind, ((), ()))
        guess_s = self.roofline.time_s(work)
        if not sizes or guess_s <= 0:
            return 1.0
        at, near = math.log(guess_s), math.log(_NEAR)
        low, high = bisect.bisect_left(sizes, at - near), bisect.bisect_right(sizes, at + near)
        if low == high:
            low = min(range(len(sizes)), key=lambda index: abs(sizes[index] - at))
            high = low + 1
        return statistics.median(ratios[low:high])

    def time_s(self, work: Work) -> float:
        """Seconds that the work takes."""
        return self.roofline.time_s(work) * self.correction(work)

    def without(self, operation: MeasuredOperation) -> FittedRoofline:
        """The model that has not seen one operation, to tell how well it prices what it has not seen."""
        return FittedRoofline(self.roofline, tuple(o for o in self.measured if o is not operation))


@dataclass(frozen=True)
class Measured:
    """Measured seconds where the operation was measured, else those of the fitted roofline.

    Args:
        measurements: of the device.
        hardware: the device, for what was not measured.
    """

    measurements: Measurements
    hardware: HardwareSpec

    @property
    def name(self) -> str:
        """The name of this model in a plan's provenance."""
        return "measured"

    @cached_property
    def fallback(self) -> FittedRoofline:
        """What prices the operations that were not measured."""
        operations = self.measurements.operations
        single = tuple(o for line, o in operations.items() if not line.startswith(OPTIMIZER))
        return FittedRoofline(Roofline(self.hardware), single)

    def is_measured(self, work: Work) -> bool:
        """Whether this operation was measured with these shapes."""
        return work.operation in self.measurements.operations

    def time_s(self, work: Work) -> float:
        """Seconds that the work takes in a step; a view takes what any call takes."""
        found = self.measurements.operations.get(work.operation)
        alone_s = self.fallback.time_s(work) if found is None else found.time_s
        return alone_s + self.measurements.overhead_s

    def measured_share(self, works: Iterable[Work]) -> float:
        """Share of the seconds of some works that are measured ones; 1.0 where there are none."""
        times_s = [(self.time_s(work), self.is_measured(work)) for work in works]
        total_s = sum(time_s for time_s, _ in times_s)
        return sum(time_s for time_s, known in times_s if known) / total_s if total_s else 1.0
