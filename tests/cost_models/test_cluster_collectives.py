import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models import (
    ClusterSpec,
    Collective,
    HardwareSpec,
    LinkSpec,
    cluster_collective_s,
    collective_s,
    host_transfer_s,
    load_cluster,
    load_hardware,
    two_level_all_gather_s,
    two_level_all_reduce_s,
    two_level_reduce_scatter_s,
)

NODE = LinkSpec("inside", bytes_per_s=200.0, latency_s=1.0)
NETWORK = LinkSpec("across", bytes_per_s=50.0, latency_s=2.0)
DEVICE = HardwareSpec(
    name="round",
    kind="gpu",
    peak_flop_per_s={"float32": 1.0},
    memory_bytes=1,
    memory_bytes_per_s=1.0,
    launch_latency_s=1.0,
    power_watts=1.0,
    idle_power_watts=1.0,
    links={"host": LinkSpec("bus", bytes_per_s=10.0, latency_s=3.0), "peer": NODE},
)
# 3 nodes of 2 devices; 50 B/s to a device, 100 B/s to a node.
CLUSTER = ClusterSpec("round", DEVICE, num_nodes=3, devices_per_node=2, network_link=NETWORK)
LEVELS = {"node_link": NODE, "network_link": NETWORK, "devices_per_node": 2, "num_nodes": 3}


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        # 1200 B. Inside: 1 step of 600 B, 1 + 3 = 4 s. Across: 600 B in three parts of 200 B, 2 steps of 2 + 4 s.
        (two_level_reduce_scatter_s, 4.0 + 12.0),
        (two_level_all_gather_s, 4.0 + 12.0),
        # Inside twice 4 s. Across: ring 4 steps of 6 s = 24 s; tree 4 rounds of 2 + 12 s = 56 s.
        (two_level_all_reduce_s, 8.0 + 24.0),
    ],
)
def test_two_levels_take_the_time_computed_by_hand(time, seconds: float):
    assert time(1200, **LEVELS) == seconds


def test_a_small_all_reduce_crosses_the_network_in_a_tree():
    # 0 B on 2 x 9: inside 2 * 1 = 2 s; across ring 2 * 8 * 2 = 32 s, tree 2 * 4 * 2 = 16 s.
    assert two_level_all_reduce_s(0, **{**LEVELS, "num_nodes": 9}) == 18.0


@pytest.mark.parametrize("time", [two_level_reduce_scatter_s, two_level_all_gather_s, two_level_all_reduce_s])
def test_one_device_on_one_node_communicates_nothing(time):
    assert time(10**9, **{**LEVELS, "devices_per_node": 1, "num_nodes": 1}) == 0.0
    with pytest.raises(ValueError, match=r"world_size must be at least 1: got 0\.$"):
        time(8, **{**LEVELS, "num_nodes": 0})


@pytest.mark.parametrize(
    ("kind", "world_size", "seconds"),
    [
        # Two ranks of one node: ring of 2 over 200 B/s: 1 step of 600 B, 4 s; twice for an all-reduce.
        ("all_reduce", 2, 8.0),
        ("all_gather", 2, 4.0),
        # Four ranks fill two nodes. One level over 100 B/s, 2 s: steps of 300 B, 5 s each. An all-reduce takes 6
        # of them, 30 s, its tree 4 rounds of 14 s. Two levels: inside 2 * 4 s; across 600 B between 2, 2 steps
        # of 300 B at 50 B/s, 2 * 8 s: 24 s.
        ("all_reduce", 4, 24.0),
        # One level 3 * 5 = 15 s; two levels 4 + 8 = 12 s.
        ("all_gather", 4, 12.0),
        ("reduce_scatter", 4, 12.0),
        # Three ranks leave a node half empty: one level, 2 steps of 400 B, 2 + 4 = 6 s each.
        ("all_gather", 3, 12.0),
        # A tree of 4: 2 rounds of 2 + 12 s.
        ("broadcast", 4, 28.0),
        ("all_reduce", 1, 0.0),
    ],
)
def test_a_cluster_takes_the_faster_way(kind, world_size: int, seconds: float):
    assert cluster_collective_s(Collective(kind, 1200, world_size), CLUSTER) == seconds


def test_more_ranks_than_devices_are_refused():
    with pytest.raises(ValueError, match=r"^cluster 'round': world_size must be from 1 to 6, .*: got 7\.$"):
        cluster_collective_s(Collective("all_reduce", 8, 7), CLUSTER)


def test_nodes_of_one_device_have_only_the_network():
    # Ring of 2 over 50 B/s: 2 steps of 600 B, 2 + 12 = 14 s.
    single = ClusterSpec("single", DEVICE, num_nodes=2, devices_per_node=1, network_link=NETWORK)
    assert cluster_collective_s(Collective("all_reduce", 1200, 2), single) == 28.0


def test_the_gradients_of_a_billion_parameters_on_64_devices_take_the_time_computed_by_hand():
    # 2e9 B in bfloat16 on 8 x DGX A100. One level over 64: 126 steps of 14 us + 2e9 / (64 * 200e9) = 170.25 us:
    # 21.45 ms. Two levels: inside 14 steps of 3.4 us + 2.5e8 / 300e9 = 836.73 us, 11.71 ms; across 14 steps of
    # 14 us + 3.125e7 / 25e9 = 1264 us, 17.70 ms: 29.41 ms.
    cluster = load_cluster("dgx-a100-40gb x8")
    assert cluster_collective_s(Collective("all_reduce", 2 * 10**9, 64), cluster) == pytest.approx(
        21.45e-3, rel=1e-3
    )


@given(
    st.sampled_from(("all_reduce", "all_gather", "reduce_scatter", "broadcast")),
    st.integers(0, 10**10),
    st.integers(1, 6),
)
def test_no_way_is_slower_than_one_level_or_free(kind, size_bytes: int, world_size: int):
    collective = Collective(kind, size_bytes, world_size)
    seconds = cluster_collective_s(collective, CLUSTER)
    if world_size == 1:
        assert seconds == 0.0
    else:
        assert 0 < seconds <= collective_s(collective, CLUSTER.link_between(world_size))


def test_a_transfer_to_the_host_takes_its_latency_and_its_bytes():
    # 3 s + 50 B / (10 B/s).
    assert host_transfer_s(50, DEVICE) == 8.0
    assert host_transfer_s(0, DEVICE) == 0.0


def test_what_cannot_be_transferred_is_refused():
    with pytest.raises(ValueError, match=r"^size_bytes must be at least 0: got -1\.$"):
        host_transfer_s(-1, DEVICE)
    with pytest.raises(ValueError, match=r"^hardware 'cpu-x86-avx2' has no link to a host"):
        host_transfer_s(1, load_hardware("cpu-x86-avx2"))
