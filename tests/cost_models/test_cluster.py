import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from cost_models import (
    ClusterSpec,
    HardwareSpec,
    LinkSpec,
    UnknownClusterError,
    host_cluster,
    known_clusters,
    load_cluster,
    load_hardware,
    read_cluster,
    read_cluster_file,
)

NODE = LinkSpec("inside", bytes_per_s=300.0, latency_s=1.0)
NETWORK = LinkSpec("across", bytes_per_s=25.0, latency_s=2.0)
DEVICE = HardwareSpec(
    name="round",
    kind="gpu",
    peak_flop_per_s={"float32": 1.0},
    memory_bytes=1,
    memory_bytes_per_s=1.0,
    launch_latency_s=1.0,
    power_watts=1.0,
    idle_power_watts=1.0,
    links={"peer": NODE},
)
CLUSTER = ClusterSpec("round", DEVICE, num_nodes=4, devices_per_node=8, network_link=NETWORK)


def test_a_cluster_counts_its_devices_and_what_a_node_sends():
    # 4 x 8 devices; eight of them share what a node sends: 8 * 25 B/s.
    assert (CLUSTER.world_size, CLUSTER.node_network_bytes_per_s) == (32, 200.0)
    assert CLUSTER.with_num_nodes(2).world_size == 16


def test_devices_of_a_node_talk_over_the_link_of_the_device_if_no_other_is_given():
    assert CLUSTER.node_link == NODE
    assert replace(CLUSTER, node_link=NETWORK).node_link == NETWORK


def test_a_ring_within_a_node_stays_off_the_network():
    assert CLUSTER.link_between(2) == CLUSTER.link_between(8) == NODE


def test_a_ring_that_leaves_a_node_has_the_bandwidth_of_the_node_and_the_latency_of_the_network():
    # The node sends 200 B/s, less than the 300 B/s inside.
    assert CLUSTER.link_between(9) == LinkSpec("across", bytes_per_s=200.0, latency_s=2.0)


def test_a_network_faster_than_the_node_does_not_speed_up_the_ring():
    # 8 * 50 = 400 B/s across, 300 B/s inside.
    cluster = replace(CLUSTER, network_link=replace(NETWORK, bytes_per_s=50.0))
    assert cluster.link_between(32) == LinkSpec("inside", bytes_per_s=300.0, latency_s=2.0)


def test_nodes_of_one_device_have_only_the_network_between_them():
    cluster = ClusterSpec("single", DEVICE, num_nodes=3, devices_per_node=1, network_link=NETWORK)
    assert (cluster.node_link, cluster.link_between(2)) == (None, NETWORK)


@pytest.mark.parametrize("world_size", [0, 33])
def test_ranks_without_a_device_are_refused(world_size: int):
    sentence = rf"^cluster 'round': world_size must be from 1 to 32, 4 x 8 devices: got {world_size}\.$"
    with pytest.raises(ValueError, match=sentence):
        CLUSTER.link_between(world_size)


def test_one_rank_has_no_link():
    with pytest.raises(ValueError, match=r"^cluster 'round': a single rank has no link to another"):
        CLUSTER.link_between(1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_nodes": 0}, "num_nodes must be a whole number of at least 1: got 0."),
        ({"devices_per_node": 2.0}, "devices_per_node must be a whole number of at least 1: got 2.0."),
        ({"num_nodes": True}, "num_nodes must be a whole number of at least 1: got True."),
        ({"network_link": None}, "4 nodes need a network between them. State it."),
        ({"usd_per_node_hour": -1.0}, "usd_per_node_hour must be positive and finite: got -1.0."),
        (
            {"node_link": None, "device": replace(DEVICE, links={})},
            "round has no link to a second device of its node. State node_link, or 1 for devices_per_node: got 8.",
        ),
    ],
)
def test_impossible_clusters_are_refused(changes: dict, sentence: str):
    with pytest.raises(ValueError, match=r"^cluster 'round': ") as refusal:
        replace(CLUSTER, **changes)
    assert str(refusal.value) == f"cluster 'round': {sentence}"


def test_a_cluster_survives_pickling():
    assert pickle.loads(pickle.dumps(CLUSTER)) == CLUSTER
    assert hash(CLUSTER) == hash(replace(CLUSTER))


def test_a_name_alone_is_one_node():
    assert (load_cluster("dgx-a100-40gb").num_nodes, load_cluster("dgx-a100-40gb x8").num_nodes) == (1, 8)


@pytest.mark.parametrize(
    "text",
    [
        "dgx",
        "DGX-H100",
        "dgx-h100 8",
        "dgx-h100 x0",
        "dgx-h100 x-1",
        "dgx-h100x8",
        "dgx-h100  x8",
        "../dgx-h100",
        "",
    ],
)
def test_an_unknown_cluster_is_answered_with_all_known_names(text: str):
    with pytest.raises(UnknownClusterError) as refusal:
        load_cluster(text)
    assert str(refusal.value).startswith(f"no cluster is named {text!r}.")
    assert ". Write a name" in str(refusal.value).replace("? W", ". W")
    assert all(name in str(refusal.value) for name in known_clusters())


def test_a_pod_has_an_end():
    assert load_cluster("tpu-v5e-slice x32").world_size == 256
    with pytest.raises(
        ValueError, match=r"^tpu-v5e-slice\.toml: at most 32 nodes share one fabric: got 33\.$"
    ):
        load_cluster("tpu-v5e-slice x33")


def test_workers_of_the_host_share_its_cores():
    host, two = load_hardware("host"), load_cluster("host x2")
    assert (two.num_nodes, two.devices_per_node, two.device.kind) == (1, 2, "cpu")
    assert two.device.peak_flop_per_s["float32"] == host.peak_flop_per_s["float32"] / 2
    assert (two.device.memory_bytes, two.device.power_watts) == (host.memory_bytes // 2, host.power_watts / 2)
    assert two.device.memory_bytes_per_s == host.memory_bytes_per_s / 2
    assert load_cluster("host") == host_cluster(1)
    assert host_cluster(1).device == host


def test_more_workers_than_cores_get_a_part_of_one_each():
    cpu = load_hardware("cpu-x86-avx2").with_num_cores(2)
    part = cpu.divided(4)
    # Two cores of 78.4 GFLOP/s between four.
    assert (part.num_cores, part.peak_flop_per_s["float32"]) == (1, pytest.approx(39.2e9, rel=1e-12))
    with pytest.raises(ValueError, match=r"^hardware 'cpu-x86-avx2': num_parts must be at least 1: got 0\.$"):
        cpu.divided(0)
    with pytest.raises(ValueError, match=r"^hardware 'round' is a gpu, which processes do not share\.$"):
        DEVICE.divided(2)


INLINE = {
    "device": "a100-40gb",
    "nodes": 4,
    "devices_per_node": 8,
    "network": {"node_bytes_per_s": "200GB/s", "latency_s": "14us"},
}


def test_a_job_describes_the_same_cluster_as_the_file():
    described, named = read_cluster(INLINE), load_cluster("dgx-a100-40gb x4")
    assert described.world_size == named.world_size == 32
    assert described.device == named.device
    assert described.link_between(16).bytes_per_s == named.link_between(16).bytes_per_s
    assert described.network_link == LinkSpec("network", bytes_per_s=25e9, latency_s=14e-6)


def test_a_job_may_state_the_link_inside_a_node_and_a_price():
    described = read_cluster(
        {**INLINE, "node_link": {"bytes_per_s": "80Gbit/s", "latency_s": "5us"}, "usd_per_node_hour": 32.5}
    )
    assert described.node_link == LinkSpec("node_link", bytes_per_s=10e9, latency_s=5e-6)
    assert described.usd_per_node_hour == 32.5


def test_a_workstation_needs_no_network():
    assert read_cluster({"device": "rtx-4090", "nodes": 1, "devices_per_node": 1}).world_size == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"device": "a100"},
            "device: no hardware is named 'a100'. Did you mean 'a100-40gb' or 'a100-80gb'? Known names: ",
        ),
        ({"device": 7}, "device: no hardware is named '7'."),
        ({"device": "jetson-orin"}, "jetson-orin has no link to a second device"),
        ({"nodes": 0}, "nodes must be a number from 1 to 100000 nodes: got 0."),
        ({"nodes": "4"}, "nodes must be a number from 1 to 100000 nodes: got '4'."),
        ({"nodes": 2.5}, "num_nodes must be a whole number of at least 1: got 2.5."),
        ({"devices_per_node": 8.0}, "devices_per_node must be a whole number: got 8.0."),
        ({"network": None}, "network must be a table [network]: got None."),
        (
            {"network": {}},
            "network lacks the key 'node_bytes_per_s'. Add it: a number from 1e+06 to 1e+14 B/s.",
        ),
        (
            {"network": {"bytes_per_s": "25GB/s", "latency_s": "14us"}},
            "network has the unknown key 'bytes_per_s'. Give one of node_bytes_per_s, latency_s, name.",
        ),
        (
            {"network": {"node_bytes_per_s": 2e11, "latency_s": "14us"}},
            "network.node_bytes_per_s: the bandwidth has no unit: got 200000000000.0. Write a number with",
        ),
        (
            {"network": {"node_bytes_per_s": "200GB/s", "latency_s": "14 parsec"}},
            "network.latency_s: the duration has the unknown unit 'parsec'",
        ),
        (
            {"network": {"node_bytes_per_s": "200B/s", "latency_s": "14us"}},
            "network.node_bytes_per_s must be a number from 1e+06 to 1e+14 B/s: got 200.0.",
        ),
        (
            {"node_link": {"bytes_per_s": "1GB/s", "latency_s": "1h"}},
            "node_link.latency_s must be a number from 1e-07 to 0.01 s: got 3600.0.",
        ),
        ({"colour": "red"}, "the top level has the unknown key 'colour'. Give one of device, nodes, "),
        (
            {"usd_per_node_hour": "free"},
            "usd_per_node_hour must be a number from 0.001 to 10000 US dollars: got",
        ),
    ],
)
def test_a_bad_description_is_refused_with_its_key(changes: dict, sentence: str):
    with pytest.raises(ValueError, match=r"^cluster( 'cluster')?: ") as refusal:
        read_cluster({**INLINE, **changes})
    assert str(refusal.value).partition(": ")[2].startswith(sentence)


def test_several_nodes_without_a_network_are_refused():
    table = {key: value for key, value in INLINE.items() if key != "network"}
    with pytest.raises(ValueError, match=r"^cluster 'cluster': 4 nodes need a network between them\."):
        read_cluster(table)
    for key in ("devices_per_node", "usd_per_node_hour"):
        for wrong in ({}, {"a": 1}):
            with pytest.raises(ValueError, match=rf"^cluster: {key} must be a number from"):
                read_cluster({**INLINE, key: wrong})
    with pytest.raises(ValueError, match=r"^cluster: a cluster must be a name or a table: got \['x'\]\.$"):
        read_cluster(["x"])  # pyright: ignore[reportArgumentType]


GOOD_FILE = """
device = "a100-40gb"
devices_per_node = 8
[network]
node_bytes_per_s = 2.0e11
latency_s = 1.0e-5
[sources]
devices_per_node = "a"
[sources.network]
node_bytes_per_s = "a"
latency_s = "a"
"""


def test_a_file_is_named_by_its_stem(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD_FILE)
    cluster = read_cluster_file(path, num_nodes=2)
    assert (cluster.name, cluster.world_size, cluster.node_network_bytes_per_s) == ("mine", 16, 2e11)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('device = "a100-40gb"', "", "the top level lacks the key 'device'. Add it."),
        (
            "devices_per_node = 8",
            "",
            "the top level lacks the key 'devices_per_node'. Add it: a number from 1 to 1024",
        ),
        (
            "devices_per_node = 8",
            "devices_per_node = 8\nnodes = 2",
            "the top level has the unknown key 'nodes'.",
        ),
        ("latency_s = 1.0e-5\n[s", "[s", "sources.network.latency_s belongs to no number of the file."),
        ('latency_s = "a"', "", "network.latency_s has no source. Add it under [sources]."),
        ("2.0e11", "2.0e15", "network.node_bytes_per_s must be a number from 1e+06 to 1e+14 B/s: got 2"),
        (
            "2.0e11",
            '"200GB/s"',
            "network.node_bytes_per_s must be a number from 1e+06 to 1e+14 B/s: got '200GB/s'.",
        ),
        ("a100-40gb", "a100", "device: no hardware is named 'a100'. Did you mean "),
        ("[network]", "[network", "not a TOML file: "),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_field(tmp_path: Path, old: str, new: str, sentence: str):
    path = tmp_path / "mine.toml"
    assert old in GOOD_FILE
    path.write_text(GOOD_FILE.replace(old, new, 1))
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  (the sentence is compared below)
        read_cluster_file(path)
    assert str(refusal.value).startswith(f"mine.toml: {sentence}")
