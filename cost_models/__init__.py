"""How long operations take and how much memory devices have: plain data, no device, no framework."""

from cost_models.collectives import (
    collective_s,
    ring_all_gather_s,
    ring_all_reduce_s,
    ring_reduce_scatter_s,
    tree_all_reduce_s,
    tree_broadcast_s,
)
from cost_models.efficiency import DEFAULT_EFFICIENCY, Efficiency
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
    "Collective",
    "CostModel",
    "Efficiency",
    "HardwareSpec",
    "LinkSpec",
    "Rate",
    "Roofline",
    "RooflineEstimate",
    "UnknownHardwareError",
    "Work",
    "collective_s",
    "format_bytes",
    "format_flop",
    "format_seconds",
    "known_hardware",
    "load_hardware",
    "parse_bytes",
    "parse_bytes_per_s",
    "parse_seconds",
    "read_hardware",
    "ring_all_gather_s",
    "ring_all_reduce_s",
    "ring_reduce_scatter_s",
    "tree_all_reduce_s",
    "tree_broadcast_s",
]
