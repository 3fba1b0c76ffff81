"""Read a bare cost graph: nodes with seconds and bytes in topological order, and edges; no model, no operators."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cost_models.work import Work
from planner.costed import CostedGraph
from planner.graph import Graph, Node, Phase, Value
from planner.inputs.strict import sentence

_NO_WORK = Work(flop=0.0, read_bytes=0, written_bytes=0, dtype="float32", kind="elementwise")
_OP = "bare"
_MAX_FILE_BYTES = 1 << 28
# Sums of all nodes stay exact in 64-bit integers, and finite in floating point.
_MAX_TOTAL_BYTES = 2**62
_MAX_TOTAL_S = 1e100
_EXACT_FLOAT = 2.0**53


def _whole(number: Any) -> Any:
    """1e15 is a whole number although JSON reads it as a float."""
    if isinstance(number, float) and number.is_integer() and abs(number) <= _EXACT_FLOAT:
        return int(number)
    return number


_Bytes = Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=0)]
_Seconds = Annotated[float, Field(strict=True, ge=0.0, allow_inf_nan=False)]
_Index = Annotated[int, Field(strict=True)]


class _BareNode(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    cost: _Seconds
    bytes: _Bytes
    backward: Annotated[bool, Field(strict=True)] | None = None


class _BareGraph(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    nodes: list[_BareNode]
    edges: list[Annotated[list[_Index], Field(min_length=2, max_length=2)]]


def read_bare_graph(path: str | Path) -> CostedGraph:
    """The graph of a JSON file ``{"nodes": [{"cost", "bytes", "backward"}, ...], "edges": [[i, j], ...]}``.

    Node i makes one value of ``bytes`` bytes in ``cost`` seconds (or any other unit of time); an edge [i, j] says
    that node j reads it. Nodes are listed in a topological order. Where every node from the first with
    ``"backward": true`` on has that flag, they are the backward phase; otherwise the graph is one forward phase.
    Every node may run again. Other keys are not read.

    Args:
        path: of the file.

    Returns:
        Graph and seconds; nodes and values are named "0", "1", ...

    Raises:
        ValueError: the file cannot be read or is no such graph; one sentence says where and what to do.
    """
    source = str(path)
    bare = _parsed(_text(Path(path)), source=source)
    num_nodes = len(bare.nodes)
    edges = [(edge[0], edge[1]) for edge in bare.edges]
    _check_edges(edges, num_nodes=num_nodes, source=source)
    _check_totals(bare.nodes, source=source)
    inputs: list[set[int]] = [set() for _ in bare.nodes]
    for i, j in edges:
        inputs[j].add(i)
    first_backward = _first_backward([node.backward for node in bare.nodes])
    nodes = tuple(
        Node(
            name=str(k),
            op=_OP,
            phase=Phase.FORWARD if k < first_backward else Phase.BACKWARD,
            inputs=tuple(sorted(inputs[k])),
            outputs=(k,),
            work=_NO_WORK,
        )
        for k in range(num_nodes)
    )
    values = tuple(Value(str(k), node.bytes, k) for k, node in enumerate(bare.nodes))
    return CostedGraph(Graph(nodes, values), tuple(abs(node.cost) for node in bare.nodes))


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"the graph {path} cannot be read: {reason}. Name a JSON file.") from error
    if len(raw) > _MAX_FILE_BYTES:
        raise ValueError(f"the graph {path} has more than {_MAX_FILE_BYTES} bytes. Give a smaller one.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the graph {path} is not UTF-8 text: byte {error.start}. Give a JSON file."
        ) from error


def _parsed(text: str, *, source: str) -> _BareGraph:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"the graph {source} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}. "
            "Correct it there."
        ) from error
    except RecursionError as error:
        raise ValueError(
            f"the graph {source} is nested too deeply. Give lists of nodes and edges."
        ) from error
    except ValueError as error:  # a whole number of thousands of digits
        raise ValueError(f"the graph {source} has a number that is too long. Write a smaller one.") from error
    if not isinstance(data, dict):
        raise ValueError(
            f"the graph {source} must be an object with 'nodes' and 'edges', got {_kind(data)}. "
            'Write {"nodes": [{"cost": 1, "bytes": 1}], "edges": []}.'
        )
    try:
        bare = _BareGraph.model_validate(data)
    except ValidationError as error:
        raise ValueError(
            f"the graph {_short(_fault(error, source=source))}. A node is "
            '{"cost": seconds >= 0, "bytes": whole number >= 0, "backward": true or false}, an edge [i, j].'
        ) from error
    if not bare.nodes:
        raise ValueError(f"the graph {source} has no nodes, so there is nothing to plan. Give at least one.")
    return bare


def _fault(error: ValidationError, *, source: str) -> str:
    """The first fault, in JSON's words."""
    text = sentence(error, source=source).replace(" after validation", "")
    return re.sub(r"valid dictionary or instance of \w+", "valid object", text)


def _check_edges(edges: Sequence[tuple[int, int]], *, num_nodes: int, source: str) -> None:
    """Raise ValueError unless every edge joins two nodes and runs forward in the listing."""
    for position, (i, j) in enumerate(edges):
        for end in (i, j):
            if not 0 <= end < num_nodes:
                raise ValueError(
                    f"the graph {source}: edges.{position} is [{_short(str(i))}, {_short(str(j))}], but nodes are "
                    f"numbered 0 to {num_nodes - 1}. Correct the edge or add the node."
                )
    wrong = next(((p, i, j) for p, (i, j) in enumerate(edges) if i >= j), None)
    if wrong is None:
        return
    position, i, j = wrong
    cycle = _cycle(edges, num_nodes)
    if cycle:
        way = [str(k) for k in cycle]
        shown = way if len(way) <= 8 else [*way[:4], "...", *way[-3:]]
        raise ValueError(
            f"the graph {source} has a cycle: {' -> '.join(shown)}. No order can run it; remove one of these edges."
        )
    raise ValueError(
        f"the graph {source} is not listed in topological order: edges.{position} is [{i}, {j}], so node {j} "
        f"reads node {i}, which is listed after it. It has no cycle; list each node after those that it reads."
    )


def _cycle(edges: Sequence[tuple[int, int]], num_nodes: int) -> list[int]:
    """Nodes along a cycle, the first one again at the end; empty if there is none."""
    readers: list[list[int]] = [[] for _ in range(num_nodes)]
    makers: list[list[int]] = [[] for _ in range(num_nodes)]
    for i, j in edges:
        readers[i].append(j)
        makers[j].append(i)
    waiting = [len(row) for row in makers]
    ready = [k for k in range(num_nodes) if not waiting[k]]
    while ready:
        for reader in readers[ready.pop()]:
            waiting[reader] -= 1
            if not waiting[reader]:
                ready.append(reader)
    # Each node that is left reads another one that is left: going back meets a node twice.
    left = next((k for k in range(num_nodes) if waiting[k]), None)
    way: list[int] = []
    seen: dict[int, int] = {}
    while left is not None and left not in seen:
        seen[left] = len(way)
        way.append(left)
        left = next(k for k in makers[left] if waiting[k])
    return [] if left is None else [left, *reversed(way[seen[left] :])]


def _check_totals(nodes: Sequence[_BareNode], *, source: str) -> None:
    """Raise ValueError where sums would not be exact."""
    total_bytes, total_s = sum(node.bytes for node in nodes), sum(node.cost for node in nodes)
    if total_bytes > _MAX_TOTAL_BYTES:
        raise ValueError(
            f"the graph {source}: all nodes together have more than {_MAX_TOTAL_BYTES:.3g} bytes. "
            "Give the bytes in a larger unit, such as KiB."
        )
    if total_s > _MAX_TOTAL_S:
        raise ValueError(
            f"the graph {source}: all nodes together cost {total_s:.3g}, more than {_MAX_TOTAL_S:.3g}. "
            "Give the costs in a larger unit."
        )


def _first_backward(flags: Sequence[bool | None]) -> int:
    """Index of the first backward node; the number of nodes where the flags name no two phases in order."""
    first = next((k for k, flag in enumerate(flags) if flag), len(flags))
    return first if all(flags[first:]) else len(flags)


def _kind(data: object) -> str:
    kinds = {list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(data), "a number")


def _short(text: str) -> str:
    """At most 300 characters of a text."""
    return text if len(text) <= 300 else f"{text[:280]}... ({len(text)} characters)"
