"""Parse and print bytes, seconds, bytes a second and FLOP, always with a unit."""

import re
from collections.abc import Mapping
from decimal import Decimal

BYTE_UNITS: Mapping[str, int] = {
    "B": 1,
    "KB": 10**3,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}

SECOND_UNITS: Mapping[str, Decimal] = {
    "ns": Decimal("1e-9"),
    "us": Decimal("1e-6"),
    "µs": Decimal("1e-6"),
    "ms": Decimal("1e-3"),
    "s": Decimal(1),
    "min": Decimal(60),
    "h": Decimal(3600),
}

# Bytes a second; networks are sold in bits.
BANDWIDTH_UNITS: Mapping[str, Decimal] = {
    **{f"{unit}/s": Decimal(size_bytes) for unit, size_bytes in BYTE_UNITS.items()},
    "Mbit/s": Decimal(10**6) / 8,
    "Gbit/s": Decimal(10**9) / 8,
    "Tbit/s": Decimal(10**12) / 8,
}

# No quantity here has more digits before its point.
_MAX_EXPONENT = 60
_QUANTITY = re.compile(
    r"\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>[^\W\d_]*(?:/[^\W\d_]+)?)\s*"
)


def _split(text: str, *, what: str, units: Mapping[str, object], example: str) -> tuple[Decimal, str]:
    """Number and unit of a quantity such as "40GiB", or one sentence that says what to write instead."""
    advice = f"Write a number with one of the units {', '.join(units)}, for example {example!r}."
    match = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        bare = isinstance(text, int | float) and not isinstance(text, bool)
        problem = f"{what} has no unit" if bare else f"{what} is not a number with a unit"
        raise ValueError(f"{problem}: got {text!r}. {advice}")
    number, unit = Decimal(match["number"]), match["unit"]
    if number.adjusted() > _MAX_EXPONENT:
        raise ValueError(f"{what} is too large: got {text[:40]!r}. {advice}")
    if not unit:
        raise ValueError(f"{what} has no unit: got {text!r}. {advice}")
    if unit not in units:
        raise ValueError(f"{what} has the unknown unit {unit!r}: got {text!r}. {advice}")
    if number < 0:
        raise ValueError(f"{what} is negative: got {text!r}. {advice}")
    return number, unit


def parse_bytes(text: str) -> int:
    """Bytes of a quantity such as "40GiB" or "1.5 GB".

    KB, MB, GB, TB are powers of 1000; KiB, MiB, GiB, TiB powers of 1024. A fraction of a byte is dropped,
    so that a budget never grows by being parsed. Units are case-sensitive: "Gb" would be a gigabit.

    Raises:
        ValueError: no unit, an unknown unit, a negative number, or not a number.

    >>> parse_bytes("1.5KiB")
    1536
    """
    number, unit = _split(text, what="the size", units=BYTE_UNITS, example="40GiB")
    return int(number * BYTE_UNITS[unit])


def parse_seconds(text: str) -> float:
    """Seconds of a duration such as "90s", "500ms", "2min" or "1h".

    Raises:
        ValueError: no unit, an unknown unit, a negative number, or not a number.

    >>> parse_seconds("2min")
    120.0
    """
    number, unit = _split(text, what="the duration", units=SECOND_UNITS, example="90s")
    return float(number * SECOND_UNITS[unit])


def parse_bytes_per_s(text: str) -> float:
    """Bytes a second of a bandwidth such as "25GB/s" or "200Gbit/s".

    Raises:
        ValueError: no unit, an unknown unit, a negative number, or not a number.

    >>> parse_bytes_per_s("200Gbit/s")
    25000000000.0
    """
    number, unit = _split(text, what="the bandwidth", units=BANDWIDTH_UNITS, example="25GB/s")
    return float(number * BANDWIDTH_UNITS[unit])


def _scaled(value: float, *, step: float, units: tuple[str, ...]) -> str:
    """The value in the largest unit whose printed number stays below the step."""
    for unit in units[:-1]:
        if abs(round(value, 2)) < step:
            return f"{value:.2f} {unit}"
        value /= step
    return f"{value:.2f} {units[-1]}"


def format_bytes(size_bytes: int) -> str:
    """Bytes for people, in powers of 1024; a negative difference keeps its sign.

    >>> format_bytes(1_610_612_736)
    '1.50 GiB'
    """
    if abs(size_bytes) < 1024:
        return f"{size_bytes} B"
    return _scaled(size_bytes / 1024, step=1024, units=("KiB", "MiB", "GiB", "TiB"))


def format_seconds(time_s: float) -> str:
    """Seconds for people: ns, µs, ms, s below two minutes, then min and h.

    >>> format_seconds(0.0125)
    '12.50 ms'
    """
    if time_s == 0:
        return "0 s"
    if abs(time_s) >= 7200:
        return f"{time_s / 3600:.2f} h"
    if abs(time_s) >= 120:
        return f"{time_s / 60:.2f} min"
    if abs(round(time_s, 2)) >= 1:
        return f"{time_s:.2f} s"
    return _scaled(time_s * 1e9, step=1000, units=("ns", "µs", "ms"))


def format_flop(flop: float) -> str:
    """A count of floating-point operations for people, in powers of 1000.

    >>> format_flop(2.5e12)
    '2.50 TFLOP'
    """
    return _scaled(flop, step=1000, units=("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))
