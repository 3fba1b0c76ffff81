"""Times of collectives over a cluster: in one level over the slowest link, or inside nodes and then across."""

from cost_models.cluster import ClusterSpec
from cost_models.collectives import (
    collective_s,
    ring_all_gather_s,
    ring_all_reduce_s,
    ring_reduce_scatter_s,
)
from cost_models.device import LinkSpec
from cost_models.work import Collective


def two_level_reduce_scatter_s(
    size_bytes: int, *, node_link: LinkSpec, network_link: LinkSpec, devices_per_node: int, num_nodes: int
) -> float:
    """Time of a reduce-scatter inside each node, then across nodes.

    With d devices on each of n nodes, every device first sums a d-th part inside its node, then, together with
    the device of the same place in each other node, an n-th part of that:

        t = (d - 1) (latency_s + size_bytes / (d * bytes_per_s))              on node_link
          + (n - 1) (latency_s + size_bytes / (d * n * bytes_per_s))          on network_link

    Args:
        size_bytes: buffer of one rank, before the reduction.
        node_link: between two devices of one node.
        network_link: between nodes, the share of one device while all d of its node talk at once.
        devices_per_node: d.
        num_nodes: n.

    Returns:
        Seconds; the additions themselves are not counted.

    Raises:
        ValueError: d < 1, n < 1 or size_bytes < 0.

    Reference: Cho, Finkler, Serrano, Kung and Hunter, 2019, BlueConnect, MLSys.
    """
    inside_s = ring_reduce_scatter_s(size_bytes, node_link, world_size=devices_per_node)
    part_bytes = -(-size_bytes // devices_per_node)
    return inside_s + ring_reduce_scatter_s(part_bytes, network_link, world_size=num_nodes)


def two_level_all_gather_s(
    size_bytes: int, *, node_link: LinkSpec, network_link: LinkSpec, devices_per_node: int, num_nodes: int
) -> float:
    """Time of an all-gather across nodes, then inside each: `two_level_reduce_scatter_s` backwards.

        t = (n - 1) (latency_s + size_bytes / (d * n * bytes_per_s))          on network_link
          + (d - 1) (latency_s + size_bytes / (d * bytes_per_s))              on node_link

    Args:
        size_bytes: buffer of one rank, after the gathering: d * n equal parts.
        node_link: between two devices of one node.
        network_link: between nodes, the share of one device while all d of its node talk at once.
        devices_per_node: d.
        num_nodes: n.

    Returns:
        Seconds.

    Raises:
        ValueError: d < 1, n < 1 or size_bytes < 0.

    Reference: Cho, Finkler, Serrano, Kung and Hunter, 2019, BlueConnect, MLSys.
    """
    inside_s = ring_all_gather_s(size_bytes, node_link, world_size=devices_per_node)
    part_bytes = -(-size_bytes // devices_per_node)
    return inside_s + ring_all_gather_s(part_bytes, network_link, world_size=num_nodes)


def two_level_all_reduce_s(
    size_bytes: int, *, node_link: LinkSpec, network_link: LinkSpec, devices_per_node: int, num_nodes: int
) -> float:
    """Time of a reduce-scatter inside each node, an all-reduce across nodes, an all-gather inside each node.

    With d devices on each of n nodes, S = size_bytes, and T(s) the faster of `ring_all_reduce_s` and
    `tree_all_reduce_s` of s bytes over n ranks on network_link:

        t = 2 (d - 1) (latency_s + S / (d * bytes_per_s)) + T(S / d)

    Args:
        size_bytes: buffer of one rank, before the reduction.
        node_link: between two devices of one node.
        network_link: between nodes, the share of one device while all d of its node talk at once.
        devices_per_node: d.
        num_nodes: n.

    Returns:
        Seconds; the additions themselves are not counted.

    Raises:
        ValueError: d < 1, n < 1 or size_bytes < 0.

    Reference: Cho, Finkler, Serrano, Kung and Hunter, 2019, BlueConnect, MLSys.
    """
    inside_s = ring_all_reduce_s(size_bytes, node_link, world_size=devices_per_node)
    across = Collective("all_reduce", -(-size_bytes // devices_per_node), num_nodes)
    return inside_s + collective_s(across, network_link)


def cluster_collective_s(collective: Collective, cluster: ClusterSpec) -> float:
    """Time of a collective over the first ranks of a cluster, in the fastest way there is.

    In one level over the slowest link (`collective_s`: ring or tree), or in two where the ranks fill several
    nodes. A broadcast goes in one level.

    Args:
        collective: what is asked for.
        cluster: whose ranks are packed node by node.

    Returns:
        Seconds; 0.0 for one rank.

    Raises:
        ValueError: more ranks than devices.
    """
    world_size, devices_per_node = collective.world_size, cluster.devices_per_node
    cluster.check_world_size(world_size)
    if world_size == 1:
        return 0.0
    one_level_s = collective_s(collective, cluster.link_between(world_size))
    two_level = {
        "all_reduce": two_level_all_reduce_s,
        "all_gather": two_level_all_gather_s,
        "reduce_scatter": two_level_reduce_scatter_s,
    }.get(collective.kind)
    num_nodes, left_over = divmod(world_size, devices_per_node)
    node_link, network_link = cluster.node_link, cluster.network_link
    if two_level is None or left_over or num_nodes < 2 or node_link is None or network_link is None:
        return one_level_s
    two_level_s = two_level(
        collective.size_bytes,
        node_link=node_link,
        network_link=network_link,
        devices_per_node=devices_per_node,
        num_nodes=num_nodes,
    )
    return min(one_level_s, two_level_s)
