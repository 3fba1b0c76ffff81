"""Clusters as data: load one by name and number of nodes ("dgx-a100-40gb x8"), or read one out of a job."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cost_models.cluster import ClusterSpec
from cost_models.device import HardwareSpec, LinkSpec
from cost_models.hardware import HOST, OWN_FILE, link_from_table, load_hardware
from cost_models.names import did_you_mean
from cost_models.spec_file import (
    Range,
    check_keys,
    check_ranges,
    check_tables,
    check_texts,
    checked_sources,
    own_file,
    read_table,
)
from cost_models.units import parse_bytes_per_s, parse_seconds

_CLUSTERS: Final = Path(__file__).parent / "clusters"
_NAME: Final = re.compile(r"(?P<name>\S+|.+\.toml)(?: x(?P<count>[1-9]\d{0,5}))?")

CLUSTER_RANGES: Final[Mapping[str, Range]] = {
    "nodes": Range(1, 100_000, "nodes"),
    "max_nodes": Range(1, 100_000, "nodes"),
    "devices_per_node": Range(1, 1024, "devices"),
    "usd_per_node_hour": Range(0.001, 10_000, "US dollars"),
    "node_link.bytes_per_s": Range(1e8, 2e13, "B/s"),
    "node_link.latency_s": Range(1e-7, 1e-2, "s"),
    "network.node_bytes_per_s": Range(1e6, 1e14, "B/s"),
    "network.latency_s": Range(1e-7, 1.0, "s"),
}
_OPTIONAL: Final = ("node_link", "network", "usd_per_node_hour")
_QUANTITIES: Final = {
    "bytes_per_s": parse_bytes_per_s,
    "node_bytes_per_s": parse_bytes_per_s,
    "latency_s": parse_seconds,
}


class UnknownClusterError(ValueError):
    """No cluster has this name; the sentence lists all names."""


def _device(name: object, devices_per_node: int, *, where: str, folder: Path | None) -> HardwareSpec:
    """A device by its name or file; the host is divided among the workers that run on it."""
    try:
        device = load_hardware(name if isinstance(name, str) else repr(name), folder=folder)
    except ValueError as error:
        raise ValueError(f"{where}: device: {error}") from error
    return device.divided(devices_per_node) if name == HOST else device


def _made(
    name: str,
    table: Mapping[str, Any],
    *,
    num_nodes: int,
    sources: Mapping[str, str],
    where: str,
    folder: Path | None,
) -> ClusterSpec:
    """A cluster from a table of checked SI numbers; what the network gives to one device is worked out here."""
    devices_per_node = table["devices_per_node"]
    if isinstance(devices_per_node, float):
        raise ValueError(f"{where}: devices_per_node must be a whole number: got {devices_per_node!r}.")
    node_link = network_link = None
    if "node_link" in table:
        own = {"name": "node_link", **table["node_link"]}
        node_link = link_from_table(own, where=where, at="node_link", ranges=CLUSTER_RANGES)
    if "network" in table:
        keys = ("node_bytes_per_s", "latency_s")
        network = table["network"]
        check_keys(
            network, required=keys, optional=("name",), where=where, ranges=CLUSTER_RANGES, prefix="network."
        )
        share_bytes_per_s = network["node_bytes_per_s"] / devices_per_node
        network_link = LinkSpec(network.get("name", "network"), share_bytes_per_s, network["latency_s"])
    device = _device(table["device"], devices_per_node, where=where, folder=folder)
    try:
        return ClusterSpec(
            name=name,
            device=device,
            num_nodes=num_nodes,
            devices_per_node=devices_per_node,
            node_link=node_link,
            network_link=network_link,
            usd_per_node_hour=table.get("usd_per_node_hour"),
            sources=sources,
        )
    except ValueError as error:
        raise error if where == name else ValueError(f"{where}: {error}") from error


def read_cluster_file(path: Path, *, num_nodes: int = 1) -> ClusterSpec:
    """A cluster from a TOML file, named by the stem of the file.

    The file states device, devices_per_node, [network] with node_bytes_per_s (of the whole node, one direction)
    and latency_s, and if need be [node_link], max_nodes, usd_per_node_hour; and a source beside each number. A
    device that is a file (ends in ".toml") is relative to the folder of this one.

    Args:
        path: the file.
        num_nodes: machines.

    Raises:
        ValueError: no TOML, an unknown or a missing key, a number without a source or out of its range, or more
            nodes than the fabric holds.
        OSError: the file cannot be read.
    """
    table, where = read_table(path), path.name
    check_tables(table, ("node_link", "network", "sources"), where=where)
    required, optional = ("device", "devices_per_node"), ("max_nodes", "sources", *_OPTIONAL)
    check_keys(table, required=required, optional=optional, where=where, ranges=CLUSTER_RANGES)
    check_ranges(table, CLUSTER_RANGES, where=where)
    check_texts(table, ("device", "node_link.name", "network.name"), where=where)
    sources = checked_sources(table, where=where)
    if num_nodes > table.get("max_nodes", num_nodes):
        raise ValueError(f"{where}: at most {table['max_nodes']} nodes share one fabric: got {num_nodes}.")
    return _made(path.stem, table, num_nodes=num_nodes, sources=sources, where=where, folder=path.parent)


def read_cluster(
    table: Mapping[str, Any], *, name: str = "cluster", folder: Path | None = None
) -> ClusterSpec:
    """A cluster from the form in which a job writes it, where every quantity has a unit.

        {device: a100-40gb, nodes: 4, devices_per_node: 8,
         network: {node_bytes_per_s: 200GB/s, latency_s: 14us}}

    Args:
        table: device, nodes, devices_per_node; network (of one whole node, one direction) where there are
            several nodes; optionally node_link: {bytes_per_s, latency_s}, the link between two devices of one
            node instead of the device's own, and usd_per_node_hour.
        name: of the cluster, for messages.
        folder: that a device that is a file (ends in ".toml") is relative to; None for the working folder.

    Raises:
        ValueError: an unknown or a missing key, a quantity without a unit, a number out of its range, or a
            network that is missing.
    """
    if not isinstance(table, Mapping):
        raise ValueError(f"{name}: a cluster must be a name or a table: got {table!r}.")
    check_tables(table, ("node_link", "network"), where=name)
    required = ("device", "nodes", "devices_per_node")
    check_keys(table, required=required, optional=_OPTIONAL, where=name, ranges=CLUSTER_RANGES)
    numbers: dict[str, Any] = dict(table)
    for link in ("node_link", "network"):
        if link in table:
            numbers[link] = {
                key: _quantity(key, own, at=f"{name}: {link}.{key}") for key, own in table[link].items()
            }
    check_ranges(numbers, CLUSTER_RANGES, where=name)
    nodes = numbers.pop("nodes")
    return _made(name, numbers, num_nodes=nodes, sources={}, where=name, folder=folder)


def _quantity(key: str, value: object, *, at: str) -> object:
    if key not in _QUANTITIES:
        return value
    try:
        return _QUANTITIES[key](value)  # pyright: ignore[reportArgumentType]  (it refuses what is no text)
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from error


def host_cluster(num_workers: int) -> ClusterSpec:
    """This machine as a cluster of one node: its cores, memory and power divided among so many processes.

    Raises:
        ValueError: num_workers < 1.
    """
    host = load_hardware(HOST)
    return ClusterSpec(HOST, host.divided(num_workers), num_nodes=1, devices_per_node=num_workers)


def known_clusters() -> tuple[str, ...]:
    """All names that `load_cluster` takes, sorted, and "host"."""
    return (*sorted(path.stem for path in _CLUSTERS.glob("*.toml")), HOST)


def load_cluster(text: str, *, folder: Path | None = None) -> ClusterSpec:
    """A cluster by its exact name and its number of nodes: "dgx-a100-40gb x8"; the name alone is one node.

    "host x4" is this machine with four workers on it: one node, four devices that share its cores. "mine.toml x8"
    reads a file of one's own.

    Args:
        text: the name or file, and the number of nodes.
        folder: that the file is relative to; None for the working folder.

    Raises:
        UnknownClusterError: no such name; the sentence lists all.
        ValueError: more nodes than the fabric holds, several without a network, or a file that is not there or is
            none of a cluster.
    """
    known = known_clusters()
    match = _NAME.fullmatch(text.strip()) if isinstance(text, str) else None
    is_own = match is not None and match["name"].endswith(OWN_FILE)
    if match is None or not (is_own or match["name"] in known):
        near = "" if match is None else did_you_mean(match["name"], known)
        raise UnknownClusterError(
            f"no cluster is named {text!r}.{near} Write a name, or a name and a number of nodes such as "
            f"'dgx-a100-40gb x8'. Known names: {', '.join(known)}; or name a file of your own that ends in "
            f"{OWN_FILE}."
        )
    count, allowed = int(match["count"] or 1), CLUSTER_RANGES["nodes"]
    if not allowed.low <= count <= allowed.high:
        raise ValueError(f"{text!r}: the number after x must be {allowed}: got {count}.")
    if match["name"] == HOST:
        return host_cluster(count)
    if is_own:
        path = own_file((folder or Path()) / match["name"], what="cluster", known=known)
        return read_cluster_file(path, num_nodes=count)
    return read_cluster_file(_CLUSTERS / f"{match['name']}.toml", num_nodes=count)
