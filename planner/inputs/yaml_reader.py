"""Read a YAML file as plain data: YAML 1.2 scalars, no aliases, no repeated keys, bounded size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from planner.inputs.strict import WorkloadError

_MAX_BYTES = 1 << 20


class _PlainLoader(yaml.SafeLoader):
    """A safe loader without the surprises of YAML 1.1.

    PyYAML reads 1e-3 as a string, 1:30 as 90 and `no` as False; here 1e-3 is a number, the others strings.
    Aliases are refused, so that a short file cannot stand for a huge one.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise WorkloadError(f"line {mark.line + 1}: aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise WorkloadError(f"line {key.start_mark.line + 1}: a key must be a plain word")
            if key.value in seen:
                raise WorkloadError(f"line {key.start_mark.line + 1}: the key {key.value!r} is written twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
# PyYAML would read 012 as octal.
_PlainLoader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        WorkloadError: the file is missing, too large, not text, not YAML, or not one mapping.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise WorkloadError(
            f"{path} cannot be read: {error.strerror}. Give the path of a job file"
        ) from error
    if len(raw) > _MAX_BYTES:
        raise WorkloadError(f"{path} has {len(raw)} bytes; a job file has at most {_MAX_BYTES}")
    try:
        data = yaml.load(raw.decode("utf-8"), Loader=_PlainLoader)
    except UnicodeDecodeError as error:
        raise WorkloadError(f"{path} is not UTF-8 text. Give a YAML file") from error
    except WorkloadError as error:
        raise WorkloadError(f"{path}, {error}") from error
    except RecursionError as error:
        raise WorkloadError(f"{path} is nested too deeply. Write it flatter") from error
    except (yaml.YAMLError, ValueError, KeyError, AttributeError) as error:  # tags that do not fit their text
        raise WorkloadError(f"{path} is not valid YAML: {_where(error)}") from error
    if not isinstance(data, dict):
        raise WorkloadError(f"{path} must hold a mapping of keys to values, got {type(data).__name__}")
    return data


def _where(error: Exception) -> str:
    """The parser's complaint on one line, with the line it points at."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())
