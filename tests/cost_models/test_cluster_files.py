"""What every cluster file must satisfy; a new file is found by its name."""

import itertools
import tomllib
from pathlib import Path

import pytest

import cost_models
from cost_models import known_clusters, load_cluster
from tests.cost_models.test_specs import numbers, source_of

FOLDER = Path(cost_models.__file__).parent / "clusters"
NAMES = tuple(name for name in known_clusters() if name != "host")


def table_of(name: str) -> dict:
    return tomllib.loads((FOLDER / f"{name}.toml").read_text())


def test_the_promised_clusters_are_there():
    promised = (
        *(
            "dgx-a100-40gb",
            "dgx-a100-80gb",
            "dgx-h100",
            "hgx-h200",
            "dgx-b200",
            "p3.16xlarge",
            "p3dn.24xlarge",
        ),
        *("p4d.24xlarge", "p5.48xlarge", "g5.48xlarge", "g6.48xlarge", "nd-mi300x-v5", "tpu-v4-slice"),
        *("tpu-v5e-slice", "host"),
    )
    assert set(promised) <= set(known_clusters())


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_source(name: str):
    table = table_of(name)
    for dotted in numbers({key: value for key, value in table.items() if key != "sources"}):
        assert len(source_of(table, dotted)) > 10, f"{name}: {dotted}"


@pytest.mark.parametrize("name", NAMES)
def test_links_lie_in_the_range_of_real_ones(name: str):
    cluster = load_cluster(f"{name} x2")
    assert cluster.node_link is not None
    assert cluster.network_link is not None
    # No network gives a device more than its own node does, and none is slower than 1 Gbit/s to a device.
    assert 1.25e8 <= cluster.network_link.bytes_per_s <= cluster.node_link.bytes_per_s
    assert cluster.node_link.latency_s <= cluster.network_link.latency_s <= 1e-4
    assert 2 <= cluster.devices_per_node <= 16


def test_no_two_clusters_are_equal_in_every_number():
    def key(name: str):
        table = table_of(name)
        return (table["device"], numbers(table))

    for left, right in itertools.combinations(NAMES, 2):
        if {left, right} != {"p5.48xlarge", "dgx-h100"}:  # the same eight devices and as much network
            assert key(left) != key(right), f"{left} and {right}"


@pytest.mark.parametrize(
    ("name", "device", "node_gbit_per_s"),
    [
        # What the vendor prints for a whole node, in one direction.
        ("dgx-a100-40gb", "a100-40gb", 8 * 200),
        ("dgx-a100-80gb", "a100-80gb", 8 * 200),
        ("dgx-h100", "h100-sxm", 8 * 400),
        ("hgx-h200", "h200", 8 * 400),
        ("dgx-b200", "b200", 8 * 400),
        ("p3.16xlarge", "v100-16gb", 25),
        ("p3dn.24xlarge", "v100-32gb", 100),
        ("p4d.24xlarge", "a100-40gb", 400),
        ("p5.48xlarge", "h100-sxm", 3200),
        ("g5.48xlarge", "a10g", 100),
        ("g6.48xlarge", "l4", 100),
        ("nd-mi300x-v5", "mi300x", 8 * 400),
        ("tpu-v4-slice", "tpu-v4", 4 * 6 * 50 * 8),
        ("tpu-v5e-slice", "tpu-v5e", 8 * 4 * 50 * 8),
    ],
)
def test_nodes_have_the_network_that_the_vendor_states(name: str, device: str, node_gbit_per_s: float):
    cluster = load_cluster(name)
    assert cluster.device.name == device
    assert cluster.node_network_bytes_per_s == node_gbit_per_s * 1e9 / 8
