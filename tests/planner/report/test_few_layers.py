"""Which layers a figure names: those that hold most at any time, as deeply as few names allow."""

from __future__ import annotations

import numpy as np

from planner.report.few_layers import few_layers


def held(*names: str) -> dict[str, np.ndarray]:
    """Each layer holds 10 bytes, one after the other."""
    return {name: 10 * np.eye(len(names), dtype=np.int64)[k] for k, name in enumerate(names)}


def test_few_layers_keep_their_full_names():
    named, rest = few_layers(held("a.x", "a.y", "b"))
    assert list(named) == ["a.x", "a.y", "b"]
    assert not rest.any()


def test_numbered_siblings_are_joined_until_they_are_few():
    named, rest = few_layers(held(*map(str, range(12))))
    assert len(named) == 8
    assert next(iter(named)).startswith("0")
    assert list(named)[-1].endswith("11")
    assert not rest.any()
    assert (np.sum(list(named.values()), axis=0) == 10).all()


def test_many_parts_of_few_blocks_are_rolled_up_to_the_blocks():
    parts = [f"blocks.{i}.{part}" for i in range(4) for part in ("norm", "up", "down")]
    assert list(few_layers(held(*parts))[0]) == ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]


def test_a_layer_counts_with_its_largest_bytes_whenever_that_is():
    # Ten layers of which two hold little; one of the others holds its bytes at the last operation alone.
    timelines = {name: np.array([9, 9, 0]) for name in "abcdefg"}
    timelines |= {"early": np.array([1, 0, 0]), "late": np.array([0, 0, 50]), "small": np.array([2, 2, 2])}
    named, rest = few_layers(timelines)
    assert list(named) == [*"abcdefg", "late"]
    # early and small: 1 + 2, 2, 2.
    assert rest.tolist() == [3, 2, 2]
