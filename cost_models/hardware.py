"""Devices as data: read a HardwareSpec from its TOML file, and load one by its exact name or its own file."""

import copy
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from cost_models.device import RATE_DTYPES, HardwareSpec, LinkSpec, Rate
from cost_models.efficiency import Efficiency
from cost_models.host import read_host
from cost_models.names import did_you_mean
from cost_models.spec_file import (
    Range,
    check_keys,
    check_ranges,
    check_tables,
    check_texts,
    checked_sources,
    own_file,
    read_table,
)

__all__ = [
    "HOST",
    "RANGES",
    "HardwareSpec",
    "LinkSpec",
    "Rate",
    "UnknownHardwareError",
    "known_hardware",
    "link_from_table",
    "load_hardware",
    "read_hardware",
]

HOST: Final = "host"
_SPECS: Final = Path(__file__).parent / "specs"
# What the name of a file of one's own ends with.
OWN_FILE: Final = ".toml"
_TEXTS: Final = ("kind", "links.*.name", "efficiency.*.source")
_TABLES: Final = ("flop_per_cycle", "peak_flop_per_s", "sparse_flop_per_s", "links", "efficiency")

# A spec file with a number beyond these is refused: a unit was mistaken, or a zero lost.
RANGES: Final[Mapping[str, Range]] = {
    "peak_flop_per_s.*": Range(1e9, 1e16, "FLOP/s"),
    "sparse_flop_per_s.*": Range(1e9, 1e16, "FLOP/s"),
    "flop_per_cycle.*": Range(1, 1e5, "FLOP"),
    "clock_hz": Range(1e8, 1e10, "Hz"),
    "num_cores": Range(1, 1024, "cores"),
    "memory_bytes": Range(1e9, 1e12, "B"),
    "memory_bytes_per_s": Range(1e9, 2e13, "B/s"),
    "socket_memory_bytes_per_s": Range(1e9, 2e13, "B/s"),
    "launch_latency_s": Range(1e-7, 1e-3, "s"),
    "efficiency.*.compute": Range(0, 1, ""),
    "efficiency.*.memory": Range(0, 1, ""),
    "efficiency.*.serial_s": Range(0, 1e-6, "s"),
    "power_watts": Range(1, 2000, "W"),
    "idle_power_watts": Range(0.1, 2000, "W"),
    "links.*.bytes_per_s": Range(1e8, 2e13, "B/s"),
    "links.*.latency_s": Range(1e-7, 1e-2, "s"),
}


class UnknownHardwareError(ValueError):
    """No spec has this name; the sentence lists all names."""


class _Keys(NamedTuple):
    required: tuple[str, ...]
    optional: tuple[str, ...]


def _keys(made: type[LinkSpec | Efficiency | HardwareSpec]) -> _Keys:
    """Keys of a table from which a dataclass is made; those without a default are required."""
    required = [f.name for f in fields(made) if f.default is MISSING and f.default_factory is MISSING]
    return _Keys(tuple(required), tuple(f.name for f in fields(made) if f.name not in required))


def link_from_table(
    table: Mapping[str, Any], *, where: str, at: str, ranges: Mapping[str, Range]
) -> LinkSpec:
    """A link from the table of that dotted name in a file.

    Raises:
        ValueError: an unknown or a missing key, no number, or a number out of its range.
    """
    prefix = f"{at}."
    check_keys(table, **_keys(LinkSpec)._asdict(), where=where, ranges=ranges, prefix=prefix)
    check_ranges(table, ranges, where=where, prefix=prefix)
    return LinkSpec(**table)


def _check_keys(table: Mapping[str, Any], *, where: str) -> None:
    """Every table of a file of hardware has the keys that it needs and no other."""
    required, optional = _keys(HardwareSpec)
    required = [key for key in required if key not in ("name", "peak_flop_per_s")]
    optional = [key for key in optional if key != "path"]
    rates = "flop_per_cycle" if "flop_per_cycle" in table else "peak_flop_per_s"
    required += [rates, "clock_hz"] if rates == "flop_per_cycle" else [rates]
    check_tables(table, ("sources", *_TABLES), where=where)
    check_keys(table, required=required, optional=optional, where=where, ranges=RANGES)
    dtypes = tuple(dtype for dtype in RATE_DTYPES if dtype != "float32")
    check_keys(
        table[rates], required=("float32",), optional=dtypes, where=where, ranges=RANGES, prefix=f"{rates}."
    )
    for outer, made in (("links", LinkSpec), ("efficiency", Efficiency)):
        inner = {f"{outer}.{key}": own for key, own in table.get(outer, {}).items()}
        check_tables(inner, inner, where=where)
        for at, own in inner.items():
            check_keys(own, **_keys(made)._asdict(), where=where, ranges=RANGES, prefix=f"{at}.")


def _from_table(name: str, table: Mapping[str, Any], *, where: str) -> HardwareSpec:
    """The spec of a parsed file; a CPU states clock_hz and flop_per_cycle instead of the product."""
    _check_keys(table, where=where)
    check_texts(table, _TEXTS, where=where)
    check_ranges(table, RANGES, where=where)
    sources = checked_sources(table, where=where, apart=("efficiency",))
    body = {key: value for key, value in table.items() if key != "sources"}
    per_cycle, clock_hz = body.pop("flop_per_cycle", {}), body.pop("clock_hz", None)
    if per_cycle:
        body["peak_flop_per_s"] = {dtype: flop * clock_hz for dtype, flop in per_cycle.items()}
        sources |= {f"peak_flop_per_s.{dtype}": "flop_per_cycle * clock_hz" for dtype in per_cycle}
    body["links"] = {key: LinkSpec(**own) for key, own in body.get("links", {}).items()}
    try:
        body["efficiency"] = {key: Efficiency(**own) for key, own in body.get("efficiency", {}).items()}
        return HardwareSpec(name=name, **body, sources=sources)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def read_hardware(path: Path) -> HardwareSpec:
    """A spec from a TOML file, named by the stem of the file.

    Raises:
        ValueError: no TOML, a number without a source, or a number that `HardwareSpec` refuses.
        OSError: the file cannot be read.
    """
    return _from_table(path.stem, read_table(path), where=path.name)


def known_hardware() -> tuple[str, ...]:
    """All names that `load_hardware` takes, sorted, and "host"."""
    return (*sorted(path.stem for path in _SPECS.glob("*.toml")), HOST)


def load_hardware(name: str, *, folder: Path | None = None) -> HardwareSpec:
    """A spec by its exact name, or from a file of one's own; "host" is the machine that asks.

    Args:
        name: an exact name, or a path that ends in ".toml".
        folder: that the path is relative to; None for the working folder.

    Raises:
        UnknownHardwareError: no such name; the sentence lists all.
        ValueError: the file is not there, or is none of hardware; as for `read_hardware`.
    """
    known = known_hardware()
    if name.endswith(OWN_FILE):
        path = own_file((folder or Path()) / name, what="hardware", known=known)
        return replace(read_hardware(path), path=str(path))
    if name not in known:
        raise UnknownHardwareError(
            f"no hardware is named {name!r}.{did_you_mean(name, known)} Known names: {', '.join(known)}; or name a "
            f"file of your own that ends in {OWN_FILE}."
        )
    return _host() if name == HOST else read_hardware(_SPECS / f"{name}.toml")


def _host() -> HardwareSpec:
    """The spec file with this machine's vector units, with this machine's clock, cores and memory."""
    host = read_host()
    stem = {"avx512": "cpu-x86-avx512", "neon": "cpu-arm-neon"}.get(host.vector_units or "", "cpu-x86-avx2")
    table = copy.deepcopy(read_table(_SPECS / f"{stem}.toml"))
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
