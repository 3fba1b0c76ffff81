"""Few names for most of the bytes: layers rolled up, and equal siblings joined, for a figure's legend."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from planner.report.replayed import rolled_up

MAX_LAYERS = 8
# Between the first and the last of joined siblings.
TO = "\u2013"
# Of the largest sum of all layers: what may stay without a name, and what needs none.
_UNNAMED_SHARE, _SLIVER_SHARE = 0.1, 0.01


def few_layers(timelines: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """At most eight owners that hold most of the bytes at every time, named as deeply as that allows.

    A layer counts with the most that it holds at any time of the step. Siblings with numbers for names are joined
    ("blocks.0-3") until they are few.

    Args:
        timelines: layer's qualified name -> bytes at each computation, in the order in which they first run.

    Returns:
        Owner -> bytes at each computation, in the same order; and those of all others together.
    """
    whole = np.sum(list(timelines.values()), axis=0)
    top = whole.max(initial=0)
    deepest = max((name.count(".") + 1 for name in timelines), default=1)
    named: dict[str, np.ndarray] = {}
    rest = whole
    for depth in range(deepest, 0, -1):
        owners = _joined(_rolled(timelines, depth), sliver_bytes=_SLIVER_SHARE * top)
        ranked = sorted(owners, key=lambda owner: -owners[owner].max(initial=0))[:MAX_LAYERS]
        named = {owner: area for owner, area in owners.items() if owner in ranked}
        rest = whole - np.sum(list(named.values()), axis=0)
        if rest.max(initial=0) <= _UNNAMED_SHARE * top:
            break
    return named, rest


def _rolled(timelines: Mapping[str, np.ndarray], depth: int) -> dict[str, np.ndarray]:
    rolled: dict[str, np.ndarray] = {}
    for name, area in timelines.items():
        owner = rolled_up(name, depth)
        rolled[owner] = rolled[owner] + area if owner in rolled else area
    return rolled


def _joined(owners: Mapping[str, np.ndarray], *, sliver_bytes: float) -> dict[str, np.ndarray]:
    """Owners with neighbouring siblings joined, those first that hold least together, until they are few."""
    groups = [
        ([name], area) for name, area in owners.items() if _number(name) or area.max(initial=0) > sliver_bytes
    ]
    while len(groups) > MAX_LAYERS:
        pairs = [(i, j) for i in range(len(groups)) if (j := _next_sibling(groups, i)) is not None]
        if not pairs:
            break
        i, j = min(pairs, key=lambda pair: (groups[pair[0]][1] + groups[pair[1]][1]).max(initial=0))
        groups[i] = ([*groups[i][0], *groups[j][0]], groups[i][1] + groups[j][1])
        del groups[j]
    return {_joint_name(names): area for names, area in groups}


def _next_sibling(groups: list[tuple[list[str], np.ndarray]], i: int) -> int | None:
    """The group that follows a group's last number under the same parent; None without one."""
    last = groups[i][0][-1]
    later = [
        (int(_number(names[0])), j)
        for j, (names, _) in enumerate(groups)
        if _number(names[0]) and _parent(names[0]) == _parent(last)
    ]
    after = [one for one in later if _number(last) and one[0] > int(_number(last))]
    return min(after)[1] if after else None


def _number(name: str) -> str:
    """The last part of a qualified name if it is a number, "" otherwise."""
    last = name.rpartition(".")[2]
    return last if last.isdecimal() else ""


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _joint_name(names: list[str]) -> str:
    """The first name and the last number.

    >>> _joint_name(["blocks.0", "blocks.1"]) == "blocks.0" + TO + "1"
    True
    """
    return names[0] if len(names) == 1 else f"{names[0]}{TO}{_number(names[-1])}"
