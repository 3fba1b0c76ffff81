"""Hardware as data: HardwareSpec, LinkSpec, and how to load one by its exact name."""

import copy
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar

from cost_models.efficiency import Efficiency
from cost_models.host import read_host
from cost_models.work import DTYPES, WORK_KINDS

HOST: Final = "host"
_SPECS: Final = Path(__file__).parent / "specs"

# Rates are listed per family: both float8 formats run at one rate, as do signed and unsigned bytes.
RATE_DTYPES: Final = (*(d for d in DTYPES if not d.startswith("float8")), "float8")
_FAMILY: Final[Mapping[str, str]] = {"float8_e4m3fn": "float8", "float8_e5m2": "float8", "uint8": "int8"}


class UnknownHardwareError(ValueError):
    """No spec has this name; the sentence lists all names."""


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
        kind: "cpu" or "gpu".
        peak_flop_per_s: dtype -> dense rate of the fastest units for it; "float32" is required.
        memory_bytes: memory of the device.
        memory_bytes_per_s: bandwidth of that memory.
        launch_latency_s: time from one small operation to the next.
        num_cores: cores that the numbers are for; None for a GPU.
        socket_memory_bytes_per_s: bandwidth that all cores share; None where it does not limit.
        links: "host" (to host memory) and "peer" (to a device of the same machine), one direction each.
        efficiency: kind of work -> fractions that replace the default ones.
        sources: dotted field name -> where its number is from.

    Raises:
        ValueError: a number out of range, an unknown dtype, kind or link, or no float32 rate.
    """

    name: str
    kind: Literal["cpu", "gpu"]
    peak_flop_per_s: Mapping[str, float] = field(hash=False)
    memory_bytes: int
    memory_bytes_per_s: float
    launch_latency_s: float
    num_cores: int | None = None
    socket_memory_bytes_per_s: float | None = None
    links: Mapping[str, LinkSpec] = field(default_factory=dict, hash=False)
    efficiency: Mapping[str, Efficiency] = field(default_factory=dict, hash=False)
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for mapping in ("peak_flop_per_s", "links", "efficiency", "sources"):
            object.__setattr__(self, mapping, dict(getattr(self, mapping)))
        owner = f"hardware {self.name!r}"
        if self.kind not in ("cpu", "gpu"):
            raise ValueError(f"{owner}: kind must be 'cpu' or 'gpu': got {self.kind!r}.")
        _check_positive(
            owner,
            memory_bytes=self.memory_bytes,
            memory_bytes_per_s=self.memory_bytes_per_s,
            launch_latency_s=self.launch_latency_s,
            **{f"peak_flop_per_s.{dtype}": rate for dtype, rate in self.peak_flop_per_s.items()},
        )
        if not isinstance(self.memory_bytes, int):
            raise ValueError(f"{owner}: memory_bytes must be a whole number: got {self.memory_bytes!r}.")
        if (self.num_cores is None) == (self.kind == "cpu"):
            raise ValueError(f"{owner}: a cpu states num_cores, a gpu does not: got {self.num_cores!r}.")
        if self.num_cores is not None and self.num_cores < 1:
            raise ValueError(f"{owner}: num_cores must be at least 1: got {self.num_cores!r}.")
        if self.socket_memory_bytes_per_s is not None:
            _check_positive(owner, socket_memory_bytes_per_s=self.socket_memory_bytes_per_s)
        if "float32" not in self.peak_flop_per_s:
            got = ", ".join(self.peak_flop_per_s) or "none"
            raise ValueError(f"{owner}: peak_flop_per_s lacks the required float32 rate: got {got}.")
        for mapping, known in (
            ("peak_flop_per_s", RATE_DTYPES),
            ("links", ("host", "peer")),
            ("efficiency", tuple(kind for kind in WORK_KINDS if kind != "view")),
        ):
            unknown = [key for key in getattr(self, mapping) if key not in known]
            if unknown:
                raise ValueError(
                    f"{owner}: {mapping} has the unknown key {unknown[0]!r}. Give one of {', '.join(known)}."
                )

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

        Rates and memory are proportional to the cores; so is the bandwidth, up to that of the socket.

        Raises:
            ValueError: the device is no CPU, or num_cores < 1.
        """
        if self.num_cores is None:
            raise ValueError(f"hardware {self.name!r} is a gpu and has no number of cores to change.")
        if num_cores < 1:
            raise ValueError(f"hardware {self.name!r}: num_cores must be at least 1: got {num_cores!r}.")
        bandwidth = self.memory_bytes_per_s * num_cores / self.num_cores
        return replace(
            self,
            num_cores=num_cores,
            peak_flop_per_s={d: r * num_cores / self.num_cores for d, r in self.peak_flop_per_s.items()},
            memory_bytes=self.memory_bytes * num_cores // self.num_cores,
            memory_bytes_per_s=min(bandwidth, self.socket_memory_bytes_per_s or math.inf),
        )


def number_fields(table: Mapping[str, Any], *, prefix: str = "") -> Iterator[str]:
    """Dotted names of all numbers in a nested table."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from number_fields(value, prefix=f"{prefix}{key}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}"


def _flat(table: Mapping[str, Any], *, prefix: str = "") -> dict[str, str]:
    """Nested sources with dotted names."""
    flat: dict[str, str] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, prefix=f"{name}.") if isinstance(value, Mapping) else {name: str(value)})
    return flat


_T = TypeVar("_T", LinkSpec, Efficiency, HardwareSpec)


def _made(made: type[_T], table: Mapping[str, Any], *, at: str) -> _T:
    """A dataclass from a table that has all of its required fields and no other."""
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(made)}
    unknown = [key for key in table if key not in known]
    if unknown:
        raise ValueError(f"{at} has the unknown key {unknown[0]!r}. Give one of {', '.join(known)}.")
    missing = [key for key, required in known.items() if required and key not in table]
    if missing:
        raise ValueError(f"{at} lacks the key {missing[0]!r}. Add it.")
    return made(**table)


def _from_table(name: str, table: Mapping[str, Any], *, where: str) -> HardwareSpec:
    """The spec of a parsed file; a CPU states clock_hz and flop_per_cycle instead of the product."""
    sources = _flat(table.get("sources", {}))
    body = {key: value for key, value in table.items() if key != "sources"}
    # An [efficiency.<kind>] table carries its own source.
    stated = {key: value for key, value in body.items() if key != "efficiency"}
    missing = [field_ for field_ in number_fields(stated) if not sources.get(field_, "").strip()]
    if missing:
        raise ValueError(f"{where}: {missing[0]} has no source. Add it under [sources].")
    if "flop_per_cycle" in body:
        clock_hz, per_cycle = body.pop("clock_hz", None), body.pop("flop_per_cycle")
        _check_positive(where, clock_hz=clock_hz, **per_cycle)
        body["peak_flop_per_s"] = {dtype: flop * clock_hz for dtype, flop in per_cycle.items()}
        for dtype in per_cycle:
            sources[f"peak_flop_per_s.{dtype}"] = "flop_per_cycle * clock_hz"
    try:
        links, efficiency = body.get("links", {}), body.get("efficiency", {})
        body["links"] = {key: _made(LinkSpec, own, at=f"links.{key}") for key, own in links.items()}
        body["efficiency"] = {
            key: _made(Efficiency, own, at=f"efficiency.{key}") for key, own in efficiency.items()
        }
        return _made(HardwareSpec, {"name": name, "sources": sources, **body}, at="the file")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _read_table(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: not a TOML file: {error}.") from error


def read_hardware(path: Path) -> HardwareSpec:
    """A spec from a TOML file, named by the stem of the file.

    Raises:
        ValueError: no TOML, a number without a source, or a number that `HardwareSpec` refuses.
        OSError: the file cannot be read.
    """
    return _from_table(path.stem, _read_table(path), where=path.name)


def known_hardware() -> tuple[str, ...]:
    """All names that `load_hardware` takes, sorted, and "host"."""
    return (*sorted(path.stem for path in _SPECS.glob("*.toml")), HOST)


def load_hardware(name: str) -> HardwareSpec:
    """A spec by its exact name; "host" is the machine that asks.

    Raises:
        UnknownHardwareError: no such name; the sentence lists all.
    """
    if name not in known_hardware():
        raise UnknownHardwareError(
            f"no hardware is named {name!r}. Known names: {', '.join(known_hardware())}."
        )
    return _host() if name == HOST else read_hardware(_SPECS / f"{name}.toml")


def _host() -> HardwareSpec:
    """The spec file with this machine's vector units, with this machine's clock, cores and memory."""
    host = read_host()
    stem = {"avx512": "cpu-x86-avx512", "neon": "cpu-arm-neon"}.get(host.vector_units or "", "cpu-x86-avx2")
    table = copy.deepcopy(_read_table(_SPECS / f"{stem}.toml"))
    if host.clock_hz is not None:
        table["clock_hz"], table["sources"]["clock_hz"] = host.clock_hz, host.sources["clock_hz"]
    if host.has_amx_bfloat16:
        table["flop_per_cycle"]["bfloat16"] = 420
        table["sources"]["flop_per_cycle"]["bfloat16"] = (
            "sustained by AMX through PyTorch 2.13 at n = 1024: 0.41 of the 1024 that Intel states"
        )
    spec = _from_table(HOST, table, where=HOST).with_num_cores(host.num_cores)
    sources = {**spec.sources, "num_cores": host.sources["num_cores"]}
    if host.vector_units is None:
        sources["flop_per_cycle.float32"] = f"assumed as {stem}: this system does not list its vector units"
    if host.memory_bytes is None:
        return replace(spec, sources=sources)
    sources["memory_bytes"] = host.sources["memory_bytes"]
    return replace(spec, memory_bytes=host.memory_bytes, sources=sources)
