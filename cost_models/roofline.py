"""Time of an operation from the peaks of the device: max(compute, memory, serial) + launch latency."""

from dataclasses import dataclass
from typing import Literal, Protocol

from cost_models.efficiency import DEFAULT_EFFICIENCY, Efficiency
from cost_models.hardware import HardwareSpec
from cost_models.work import MATRIX_KINDS, Work


class CostModel(Protocol):
    """Whatever can say how long an operation takes."""

    @property
    def name(self) -> str:
        """A short name for provenance, such as "roofline"."""
        ...

    def time_s(self, work: Work) -> float:
        """Seconds that the work takes, at least 0."""
        ...


@dataclass(frozen=True)
class RooflineEstimate:
    """A time with its reasons.

    Args:
        compute_s: seconds of the arithmetic alone.
        memory_s: seconds of the memory traffic alone.
        serial_s: seconds of what can only be done one after the other.
        launch_s: seconds before any of them can start.
        rate_dtype: dtype whose rate was used; differs from the work's where the device lists none for it.
        efficiency: fractions of the peaks that were assumed; None for a view.
    """

    compute_s: float
    memory_s: float
    serial_s: float
    launch_s: float
    rate_dtype: str
    efficiency: Efficiency | None

    @property
    def time_s(self) -> float:
        """Seconds in all: max(compute_s, memory_s, serial_s) + launch_s."""
        return max(self.compute_s, self.memory_s, self.serial_s) + self.launch_s

    @property
    def bound(self) -> Literal["compute", "memory", "serial", "launch", "none"]:
        """The largest of the four terms; "none" where all are zero."""
        terms_s = {
            "compute": self.compute_s,
            "memory": self.memory_s,
            "serial": self.serial_s,
            "launch": self.launch_s,
        }
        if not any(terms_s.values()):
            return "none"
        return max(terms_s, key=lambda term: terms_s[term])  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Roofline:
    """The roofline model with a launch latency.

        t = max(flop / (e_c * peak_flop_per_s), moved_bytes / (e_m * memory_bytes_per_s), flop * e_s)
            + launch_latency_s

    e_c and e_m are fractions per kind of work, e_s its seconds of one operation after another: the hardware's own
    where its file gives them, else `DEFAULT_EFFICIENCY`. Matrix kinds use the rate of the matrix units, all others
    that of the vector units. The latency makes small operations inefficient, as on a device: see
    `half_performance_flop`.

    Args:
        hardware: the device.

    Reference: Williams, Waterman and Patterson, 2009, Commun. ACM 52(4); Hockney, 1982, for the latency.
    """

    hardware: HardwareSpec

    @property
    def name(self) -> str:
        """The name of this model in a plan's provenance."""
        return "roofline"

    def efficiency(self, kind: str) -> Efficiency:
        """Fractions of the peaks assumed for a kind of work other than "view"."""
        own = self.hardware.efficiency.get(kind)
        return own if own is not None else DEFAULT_EFFICIENCY[self.hardware.kind][kind]

    def estimate(self, work: Work) -> RooflineEstimate:
        """The time of the work, and what bounds it."""
        if work.kind == "view":
            return RooflineEstimate(0.0, 0.0, 0.0, 0.0, rate_dtype=work.dtype, efficiency=None)
        hardware, efficiency = self.hardware, self.efficiency(work.kind)
        rate = (hardware.matrix_rate if work.kind in MATRIX_KINDS else hardware.vector_rate)(work.dtype)
        return RooflineEstimate(
            compute_s=work.flop / (efficiency.compute * rate.flop_per_s),
            memory_s=work.moved_bytes / (efficiency.memory * hardware.memory_bytes_per_s),
            serial_s=work.flop * efficiency.serial_s,
            launch_s=hardware.launch_latency_s,
            rate_dtype=rate.dtype,
            efficiency=efficiency,
        )

    def time_s(self, work: Work) -> float:
        """Seconds that the work takes; 0.0 for a view, at least the launch latency for all else."""
        return self.estimate(work).time_s

    def half_performance_flop(self, dtype: str) -> float:
        """FLOP of a compute-bound matmul that reaches half of the speed of a very large one.

            flop = launch_latency_s * e_c * peak_flop_per_s

        Below it the launch latency takes more time than the arithmetic.

        Reference: Hockney, 1982, Comput. Phys. Commun. 26(3), the half-performance length.
        """
        rate = self.hardware.matrix_rate(dtype)
        return self.hardware.launch_latency_s * self.efficiency("matmul").compute * rate.flop_per_s
