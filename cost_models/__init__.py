"""How long operations take and how much memory devices have: plain data, no device, no framework."""

from cost_models.cluster import ClusterSpec
from cost_models.cluster_collectives import (
    cluster_collective_s,
    two_level_all_gather_s,
    two_level_all_reduce_s,
    two_level_reduce_scatter_s,
)
from cost_models.cluster_file import (
    UnknownClusterError,
    host_cluster,
    known_clusters,
    load_cluster,
    read_cluster,
    read_cluster_file,
)
from cost_models.collectives import (
    collective_s,
    host_transfer_s,
    ring_all_gather_s,
    ring_all_reduce_s,
    ring_reduce_scatter_s,
    tree_all_reduce_s,
    tree_broadcast_s,
)
from cost_models.efficiency import DEFAULT_EFFICIENCY, Efficiency
from cost_models.energy import energy_j, power_utilization, step_energy_j, work_energy_j
from cost_models.hardware import (
    HardwareSpec,
    LinkSpec,
    Rate,
    UnknownHardwareError,
    known_hardware,
    load_hardware,
    read_hardware,
)
from cost_models.roofline import CostModel, Roofline, RooflineEstimate
from cost_models.units import (
    format_bytes,
    format_flop,
    format_seconds,
    parse_bytes,
    parse_bytes_per_s,
    parse_seconds,
)
from cost_models.work import DTYPES, WORK_KINDS, Collective, Work

__all__ = [
    "DEFAULT_EFFICIENCY",
    "DTYPES",
    "WORK_KINDS",
    "ClusterSpec",
    "Collective",
    "CostModel",
    "Efficiency",
    "HardwareSpec",
    "LinkSpec",
    "Rate",
    "Roofline",
    "RooflineEstimate",
    "UnknownClusterError",
    "UnknownHardwareError",
    "Work",
    "cluster_collective_s",
    "collective_s",
    "energy_j",
    "format_bytes",
    "format_flop",
    "format_seconds",
    "host_cluster",
    "host_transfer_s",
    "known_clusters",
    "known_hardware",
    "load_cluster",
    "load_hardware",
    "parse_bytes",
    "parse_bytes_per_s",
    "parse_seconds",
    "power_utilization",
    "read_cluster",
    "read_cluster_file",
    "read_hardware",
    "ring_all_gather_s",
    "ring_all_reduce_s",
    "ring_reduce_scatter_s",
    "step_energy_j",
    "tree_all_reduce_s",
    "tree_broadcast_s",
    "two_level_all_gather_s",
    "two_level_all_reduce_s",
    "two_level_reduce_scatter_s",
    "work_energy_j",
]
