"""One device as plain data: HardwareSpec, its LinkSpecs, and the rates of its dtypes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal, NamedTuple, get_args

from cost_models.efficiency import Efficiency
from cost_models.work import DTYPES, WORK_KINDS

DeviceKind = Literal["cpu", "gpu", "tpu"]

# Rates are listed per family: both float8 formats run at one rate, as do signed and unsigned bytes.
RATE_DTYPES: Final = (*(d for d in DTYPES if not d.startswith("float8")), "float8")
_FAMILY: Final[Mapping[str, str]] = {"float8_e4m3fn": "float8", "float8_e5m2": "float8", "uint8": "int8"}


class Rate(NamedTuple):
    """A rate, and the dtype whose listed number it was made from."""

    dtype: str
    flop_per_s: float


def _check_positive(owner: str, **numbers: float) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"{owner}: {name} must be a number: got {number!r}.")
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"{owner}: {name} must be positive and finite: got {number!r}.")


def _check_cores(owner: str, num_cores: object) -> None:
    if isinstance(num_cores, bool) or not isinstance(num_cores, int):
        raise ValueError(f"{owner}: num_cores must be a whole number: got {num_cores!r}.")
    if num_cores < 1:
        raise ValueError(f"{owner}: num_cores must be at least 1: got {num_cores!r}.")


@dataclass(frozen=True)
class LinkSpec:
    """One direction of a link between two devices, or between a device and its host.

    Args:
        name: such as "NVLink 3".
        bytes_per_s: of one direction.
        latency_s: before the first byte arrives.

    Raises:
        ValueError: a number that is not positive and finite.
    """

    name: str
    bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        _check_positive(f"link {self.name!r}", bytes_per_s=self.bytes_per_s, latency_s=self.latency_s)


@dataclass(frozen=True)
class HardwareSpec:
    """One device: its peaks, its memory, and a source for each number.

    Args:
        name: exact name, the stem of its file.
        kind: "cpu", "gpu" or "tpu"; nothing here runs on a tpu, plans for one can be made.
        peak_flop_per_s: dtype -> dense rate of the fastest units for it; "float32" is required.
        memory_bytes: memory of the device.
        memory_bytes_per_s: bandwidth of that memory.
        launch_latency_s: time from one small operation to the next.
        power_watts: electric power of the device at work, the vendor's board power or TDP. For a CPU that of
            num_cores cores, without memory modules.
        idle_power_watts: power while a process holds the device and nothing runs.
        num_cores: cores that the numbers are for; None for a GPU.
        socket_memory_bytes_per_s: bandwidth that all cores share; None where it does not limit.
        sparse_flop_per_s: dtype -> rate with two of four weights zero, as datasheets print it. No model of
            this package uses it; it keeps the dense rate beside it honest.
        links: "host" (to host memory) and "peer" (to a device of the same machine), one direction each. The
            peer link of a CPU joins two processes of one machine.
        efficiency: kind of work -> fractions that replace the default ones.
        sources: dotted field name -> where its number is from.
        path: of the file of a device of one's own; "" for one that is known by its name.

    Raises:
        ValueError: a number that is not positive and finite, more power at rest than at work, a dense rate
            above the sparse one, an unknown dtype, kind or link, or no float32 rate.
    """

    name: str
    kind: DeviceKind
    peak_flop_per_s: Mapping[str, float] = field(hash=False)
    memory_bytes: int
    memory_bytes_per_s: float
    launch_latency_s: float
    power_watts: float
    idle_power_watts: float
    num_cores: int | None = None
    socket_memory_bytes_per_s: float | None = None
    sparse_flop_per_s: Mapping[str, float] = field(default_factory=dict, hash=False)
    links: Mapping[str, LinkSpec] = field(default_factory=dict, hash=False)
    efficiency: Mapping[str, Efficiency] = field(default_factory=dict, hash=False)
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)
    path: str = ""

    def __post_init__(self) -> None:
        for mapping in ("peak_flop_per_s", "sparse_flop_per_s", "links", "efficiency", "sources"):
            object.__setattr__(self, mapping, dict(getattr(self, mapping)))
        owner = f"hardware {self.name!r}"
        if self.kind not in get_args(DeviceKind):
            raise ValueError(f"{owner}: kind must be 'cpu', 'gpu' or 'tpu': got {self.kind!r}.")
        _check_positive(
            owner,
            memory_bytes=self.memory_bytes,
            memory_bytes_per_s=self.memory_bytes_per_s,
            launch_latency_s=self.launch_latency_s,
            power_watts=self.power_watts,
            idle_power_watts=self.idle_power_watts,
            **{f"peak_flop_per_s.{dtype}": rate for dtype, rate in self.peak_flop_per_s.items()},
            **{f"sparse_flop_per_s.{dtype}": rate for dtype, rate in self.sparse_flop_per_s.items()},
        )
        if not isinstance(self.memory_bytes, int):
            raise ValueError(f"{owner}: memory_bytes must be a whole number: got {self.memory_bytes!r}.")
        if (self.num_cores is None) == (self.kind == "cpu"):
            raise ValueError(f"{owner}: a cpu states num_cores, all else does not: got {self.num_cores!r}.")
        if self.num_cores is not None:
            _check_cores(owner, self.num_cores)
        if self.socket_memory_bytes_per_s is not None:
            _check_positive(owner, socket_memory_bytes_per_s=self.socket_memory_bytes_per_s)
        if self.idle_power_watts > self.power_watts:
            raise ValueError(
                f"{owner}: idle_power_watts must be at most power_watts, {self.power_watts:g} W: "
                f"got {self.idle_power_watts!r}."
            )
        self._check_keys(owner)
        for dtype, rate in self.sparse_flop_per_s.items():
            dense = self.peak_flop_per_s.get(dtype, math.inf)
            if dense > rate:
                raise ValueError(
                    f"{owner}: peak_flop_per_s.{dtype} must be at most the sparse rate, {rate:g} FLOP/s: "
                    f"got {dense:g}."
                )

    def _check_keys(self, owner: str) -> None:
        if "float32" not in self.peak_flop_per_s:
            got = ", ".join(self.peak_flop_per_s) or "none"
            raise ValueError(f"{owner}: peak_flop_per_s lacks the required float32 rate: got {got}.")
        for mapping, known in (
            ("peak_flop_per_s", RATE_DTYPES),
            ("sparse_flop_per_s", tuple(self.peak_flop_per_s)),
            ("links", ("host", "peer")),
            ("efficiency", tuple(kind for kind in WORK_KINDS if kind != "view")),
        ):
            unknown = [key for key in getattr(self, mapping) if key not in known]
            if unknown:
                raise ValueError(
                    f"{owner}: {mapping} has the unknown key {unknown[0]!r}. Give one of {', '.join(known)}."
                )

    @property
    def place(self) -> str:
        """What `load_hardware` finds it by: the path of its own file, or its name."""
        return self.path or self.name

    def matrix_rate(self, dtype: str) -> Rate:
        """Rate of matrix products in a dtype.

        The listed rate of the dtype or of its family. Where none is listed: float64 and complex128 run at
        half of float32 (operands twice as wide on the same units), all else at the rate of float32.
        The result names the dtype that was used, so that a fallback shows.

        Raises:
            ValueError: unknown dtype.
        """
        if dtype not in DTYPES:
            raise ValueError(f"the dtype {dtype!r} is unknown. Give one of {', '.join(DTYPES)}.")
        listed = _FAMILY.get(dtype, dtype)
        if listed in self.peak_flop_per_s:
            return Rate(listed, self.peak_flop_per_s[listed])
        float32 = self.peak_flop_per_s["float32"]
        if dtype == "complex128":
            return self.matrix_rate("float64")
        return Rate("float32", float32 / 2 if dtype == "float64" else float32)

    def vector_rate(self, dtype: str) -> Rate:
        """Rate of all that is no matrix product: that of the dtype, at most that of float32.

        Matrix units do not help an addition, and the listed rates of narrow dtypes are theirs.

        Raises:
            ValueError: unknown dtype.
        """
        return min(self.matrix_rate(dtype), self.matrix_rate("float32"), key=lambda rate: rate.flop_per_s)

    def with_num_cores(self, num_cores: int) -> "HardwareSpec":
        """The same CPU with another number of cores.

        Rates, memory and power are proportional to the cores; so is the bandwidth, up to that of the socket.

        Raises:
            ValueError: the device is no CPU, or num_cores < 1.
        """
        if self.num_cores is None:
            raise ValueError(f"hardware {self.name!r} is a {self.kind} and has no number of cores to change.")
        _check_cores(f"hardware {self.name!r}", num_cores)
        factor = num_cores / self.num_cores
        return replace(
            self,
            num_cores=num_cores,
            peak_flop_per_s={dtype: rate * factor for dtype, rate in self.peak_flop_per_s.items()},
            memory_bytes=self.memory_bytes * num_cores // self.num_cores,
            memory_bytes_per_s=min(
                self.memory_bytes_per_s * factor, self.socket_memory_bytes_per_s or math.inf
            ),
            power_watts=self.power_watts * factor,
            idle_power_watts=self.idle_power_watts * factor,
        )

    def divided(self, num_parts: int) -> "HardwareSpec":
        """What one of several processes has of a CPU that they share in equal parts.

        Rates, bandwidths, memory and power are the whole by the number of parts, whether or not the cores can
        be dealt out evenly; num_cores is rounded down, to 1 at the least. One part is the whole.

        Raises:
            ValueError: the device is no CPU, or num_parts < 1.
        """
        if self.num_cores is None:
            raise ValueError(f"hardware {self.name!r} is a {self.kind}, which processes do not share.")
        if num_parts < 1:
            raise ValueError(f"hardware {self.name!r}: num_parts must be at least 1: got {num_parts!r}.")
        socket = self.socket_memory_bytes_per_s
        return replace(
            self,
            num_cores=max(1, self.num_cores // num_parts),
            peak_flop_per_s={dtype: rate / num_parts for dtype, rate in self.peak_flop_per_s.items()},
            memory_bytes=self.memory_bytes // num_parts,
            memory_bytes_per_s=self.memory_bytes_per_s / num_parts,
            socket_memory_bytes_per_s=None if socket is None else socket / num_parts,
            power_watts=self.power_watts / num_parts,
            idle_power_watts=self.idle_power_watts / num_parts,
        )
