"""Read a TOML file of numbers: known keys only, a source beside every number, no number out of its range."""

import tomllib
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple


class Range(NamedTuple):
    """What a number may be; beyond it the file is in error, not the device remarkable."""

    low: float
    high: float
    unit: str

    def __str__(self) -> str:
        """As in an error sentence: "a number from 1 to 2000 W"."""
        return f"a number from {self.low:g} to {self.high:g} {self.unit}".rstrip()


def own_file(path: Path, *, what: str, known: Collection[str]) -> Path:
    """The path of a file of one's own, absolute.

    Args:
        path: of a TOML file.
        what: it describes: "hardware".
        known: names that the file must not have, for they are those of others.

    Raises:
        ValueError: there is no such file, it cannot be read, or its name is known; one sentence.
    """
    try:
        with path.open("rb"):
            pass
    except FileNotFoundError as error:
        raise ValueError(f"there is no {what} file {path}. Name one that is there.") from error
    except (OSError, ValueError) as error:  # no name of a file may hold a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"the {what} file {path} cannot be read: {reason}.") from error
    if path.stem in known:
        raise ValueError(f"{path.name}: {path.stem!r} is the name of known {what}. Rename the file.")
    return path.absolute()


def read_table(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ValueError: not a TOML file; the sentence names the file and the line.
        OSError: the file cannot be read.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: not a TOML file: {error}.") from error


def leaves(table: Mapping[str, Any], *, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted name and value of all that is no table, in a nested table."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value, prefix=f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_tables(table: Mapping[str, Any], keys: Collection[str], *, where: str) -> None:
    """Refuse a value where a table belongs.

    Raises:
        ValueError: it names the file, the key and what was got.
    """
    for key in keys:
        if not isinstance(table.get(key, {}), Mapping):
            raise ValueError(f"{where}: {key} must be a table [{key}]: got {table[key]!r}.")


def check_keys(
    table: Mapping[str, Any],
    *,
    required: Collection[str],
    optional: Collection[str],
    where: str,
    ranges: Mapping[str, Range],
    prefix: str = "",
) -> None:
    """Refuse a key that is not known and a required one that is not there.

    Args:
        table: one table of a file.
        required: keys that it must have.
        optional: keys that it may have.
        where: name of the file.
        ranges: dotted name or pattern -> what its number may be; tells what to write for a missing key.
        prefix: dotted name of the table with a dot behind it; empty for the whole file.

    Raises:
        ValueError: it names the file, the key and what belongs there.
    """
    at = prefix.removesuffix(".") or "the top level"
    unknown = [key for key in table if key not in required and key not in optional]
    if unknown:
        known = ", ".join((*required, *optional))
        raise ValueError(f"{where}: {at} has the unknown key {unknown[0]!r}. Give one of {known}.")
    missing = [key for key in required if key not in table]
    if missing:
        allowed = range_of(f"{prefix}{missing[0]}", ranges)
        hint = "" if allowed is None else f": {allowed}"
        raise ValueError(f"{where}: {at} lacks the key {missing[0]!r}. Add it{hint}.")


def check_texts(table: Mapping[str, Any], names: Collection[str], *, where: str) -> None:
    """Refuse what is no text, or an empty one, where text belongs.

    Args:
        table: the file.
        names: dotted names, or patterns such as "links.*.name", of its texts.
        where: its name.

    Raises:
        ValueError: it names the file, the key and what was got.
    """
    for dotted, value in leaves(table):
        is_text = isinstance(value, str) and bool(value.strip())
        if not is_text and any(fnmatchcase(dotted, name) for name in names):
            raise ValueError(f"{where}: {dotted} must be text: got {value!r}.")


def range_of(dotted: str, ranges: Mapping[str, Range]) -> Range | None:
    """The range of a dotted name; None where it is not the name of a number."""
    return next((allowed for pattern, allowed in ranges.items() if fnmatchcase(dotted, pattern)), None)


def check_ranges(
    table: Mapping[str, Any], ranges: Mapping[str, Range], *, where: str, prefix: str = ""
) -> None:
    """Refuse what is no number where one belongs, and a number out of its range.

    Args:
        table: nested.
        ranges: dotted name, or pattern such as "links.*.latency_s" -> what the number may be.
        where: name of the file.
        prefix: dotted name of the table with a dot behind it; empty for the whole file.

    Raises:
        ValueError: it names the file, the key, what was got and the range.
    """
    for key, value in table.items():
        dotted = f"{prefix}{key}"
        allowed = range_of(dotted, ranges)
        if allowed is not None and not _is_within(value, allowed):
            raise ValueError(f"{where}: {dotted} must be {allowed}: got {value!r}.")
        if isinstance(value, Mapping):
            check_ranges(value, ranges, where=where, prefix=f"{dotted}.")


def _is_within(value: object, allowed: Range) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return allowed.low <= value <= allowed.high  # false for what is not a number ("nan")


def checked_sources(table: Mapping[str, Any], *, where: str, apart: Collection[str] = ()) -> dict[str, str]:
    """Dotted name -> source, from the table [sources] of a file.

    Args:
        table: the file.
        where: its name.
        apart: top-level tables that carry their source beside their numbers.

    Raises:
        ValueError: a number without a source, a source that is no text, or a source without a number.
    """
    sources = dict(leaves(table.get("sources", {})))
    stated = {key: value for key, value in table.items() if key not in ("sources", *apart)}
    numbers = [dotted for dotted, value in leaves(stated) if isinstance(value, int | float)]
    bare = [dotted for dotted in numbers if not str(sources.get(dotted, "")).strip()]
    if bare:
        raise ValueError(f"{where}: {bare[0]} has no source. Add it under [sources].")
    check_texts(table, ("sources.*",), where=where)
    idle = [dotted for dotted in sources if dotted not in numbers]
    if idle:
        raise ValueError(f"{where}: sources.{idle[0]} belongs to no number of the file. Remove it.")
    return {dotted: str(source) for dotted, source in sources.items()}
