"""Several devices and the links between them as plain data: ClusterSpec."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cost_models.device import HardwareSpec, LinkSpec


@dataclass(frozen=True)
class ClusterSpec:
    """Equal nodes of equal devices.

    Ranks are packed node by node: rank r runs on device r % devices_per_node of node r // devices_per_node.

    Args:
        name: exact name, the stem of its file.
        device: each device.
        num_nodes: machines.
        devices_per_node: devices of one machine, one rank to each.
        node_link: between two devices of one node. If it is not given, the "peer" link of the device; None where
            there is one device to a node.
        network_link: between nodes, one direction: what ONE device gets while all devices of its node talk to
            other nodes at once. `node_network_bytes_per_s` is what the node has in all. None for a single node.
        usd_per_node_hour: price; None where none is stated.
        sources: dotted field name -> where its number is from.

    Raises:
        ValueError: no node, no device, or a link that is missing.
    """

    name: str
    device: HardwareSpec
    num_nodes: int
    devices_per_node: int
    node_link: LinkSpec | None = None
    network_link: LinkSpec | None = None
    usd_per_node_hour: float | None = None
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        owner = f"cluster {self.name!r}"
        object.__setattr__(self, "sources", dict(self.sources))
        for count in ("num_nodes", "devices_per_node"):
            number = getattr(self, count)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{owner}: {count} must be a whole number of at least 1: got {number!r}.")
        price = self.usd_per_node_hour
        if price is not None and not (math.isfinite(price) and price > 0):
            raise ValueError(f"{owner}: usd_per_node_hour must be positive and finite: got {price!r}.")
        if self.devices_per_node == 1:
            object.__setattr__(self, "node_link", None)
        elif self.node_link is None:
            object.__setattr__(self, "node_link", self.device.links.get("peer"))
            if self.node_link is None:
                raise ValueError(
                    f"{owner}: {self.device.name} has no link to a second device of its node. State node_link, "
                    f"or 1 for devices_per_node: got {self.devices_per_node}."
                )
        if self.num_nodes > 1 and self.network_link is None:
            raise ValueError(f"{owner}: {self.num_nodes} nodes need a network between them. State it.")

    @property
    def world_size(self) -> int:
        """Devices in all."""
        return self.num_nodes * self.devices_per_node

    @property
    def node_network_bytes_per_s(self) -> float | None:
        """Bytes a second that leave one node while all of its devices talk; None for a single node."""
        return None if self.network_link is None else self.network_link.bytes_per_s * self.devices_per_node

    def with_num_nodes(self, num_nodes: int) -> "ClusterSpec":
        """The same cluster with another number of nodes.

        Raises:
            ValueError: num_nodes < 1, or several nodes and no network.
        """
        return replace(self, num_nodes=num_nodes)

    def link_between(self, world_size: int) -> LinkSpec:
        """The slowest link of a ring over the first world_size ranks.

        Such a ring leaves and enters each node once, so what crosses has all that the node has. With an adapter
        to each device that takes as many rings as adapters, each leaving through another one, as NCCL builds
        them. A step of the ring ends when its slowest message has arrived: the link has the smaller bandwidth
        and the larger latency of the two.

        Args:
            world_size: ranks of the ring, at least 2.

        Raises:
            ValueError: fewer than 2 ranks, or more than there are devices.
        """
        self.check_world_size(world_size)
        if world_size == 1:
            raise ValueError(
                f"cluster {self.name!r}: a single rank has no link to another: got world_size 1."
            )
        node, network = self.node_link, self.network_link
        if node is not None and world_size <= self.devices_per_node:
            return node
        assert network is not None  # more ranks than one node holds
        crossing = replace(network, bytes_per_s=network.bytes_per_s * self.devices_per_node)
        if node is None:
            return crossing
        slower = min(node, crossing, key=lambda link: link.bytes_per_s)
        return replace(slower, latency_s=max(node.latency_s, crossing.latency_s))

    def check_world_size(self, world_size: int) -> None:
        """Refuse a number of ranks that the cluster has no devices for.

        Raises:
            ValueError: it names both numbers.
        """
        if not 1 <= world_size <= self.world_size:
            raise ValueError(
                f"cluster {self.name!r}: world_size must be from 1 to {self.world_size}, "
                f"{self.num_nodes} x {self.devices_per_node} devices: got {world_size!r}."
            )
