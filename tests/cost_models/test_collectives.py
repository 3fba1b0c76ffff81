import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models import (
    Collective,
    LinkSpec,
    collective_s,
    ring_all_gather_s,
    ring_all_reduce_s,
    ring_reduce_scatter_s,
    tree_all_reduce_s,
    tree_broadcast_s,
)

LINK = LinkSpec(name="test", bytes_per_s=100.0, latency_s=1.0)
TIMES = (ring_all_reduce_s, ring_reduce_scatter_s, ring_all_gather_s, tree_all_reduce_s, tree_broadcast_s)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        # 4 ranks, 800 B: a share is 200 B = 2 s on the link, a ring step 1 + 2 = 3 s.
        (ring_reduce_scatter_s, 9.0),  # 3 steps
        (ring_all_gather_s, 9.0),  # 3 steps
        (ring_all_reduce_s, 18.0),  # 6 steps
        # The whole buffer takes 8 s on the link, a tree round 1 + 8 = 9 s; log2 4 = 2 rounds.
        (tree_broadcast_s, 18.0),
        (tree_all_reduce_s, 36.0),
    ],
)
def test_four_ranks_take_the_time_computed_by_hand(time, seconds: float):
    assert time(800, LINK, world_size=4) == seconds


def test_a_tree_of_five_ranks_needs_three_rounds():
    # ceil(log2 5) = 3 rounds of 1 + 1 s.
    assert tree_broadcast_s(100, LINK, world_size=5) == 6.0


@pytest.mark.parametrize("time", TIMES)
def test_one_rank_communicates_nothing(time):
    assert time(10**9, LINK, world_size=1) == 0.0


@pytest.mark.parametrize("time", TIMES)
def test_no_ranks_and_negative_sizes_are_refused(time):
    with pytest.raises(ValueError, match=r"^world_size must be at least 1: got 0\.$"):
        time(8, LINK, world_size=0)
    with pytest.raises(ValueError, match=r"^size_bytes must be at least 0: got -8\.$"):
        time(-8, LINK, world_size=2)


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [("reduce_scatter", 9.0), ("all_gather", 9.0), ("broadcast", 18.0), ("all_reduce", 18.0)],
)
def test_each_kind_of_collective_has_its_time(kind, seconds: float):
    # As above: 4 ranks, 800 B; the ring (18 s) beats the tree (36 s).
    assert collective_s(Collective(kind, 800, 4), LINK) == seconds


def test_a_small_all_reduce_on_many_ranks_takes_the_tree():
    # 64 ranks, 0 B: ring 2 * 63 * 1 = 126 s, tree 2 * 6 * 1 = 12 s.
    assert collective_s(Collective("all_reduce", 0, 64), LINK) == 12.0


@given(st.integers(0, 10**12), st.integers(1, 4096))
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(size_bytes: int, world_size: int):
    parts = ring_reduce_scatter_s(size_bytes, LINK, world_size=world_size) + ring_all_gather_s(
        size_bytes, LINK, world_size=world_size
    )
    # The two sides round differently in the last digit.
    assert ring_all_reduce_s(size_bytes, LINK, world_size=world_size) == pytest.approx(parts, rel=1e-12)
