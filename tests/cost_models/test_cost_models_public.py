import doctest
import subprocess
import sys
from pathlib import Path

import cost_models
from cost_models import units


def test_public_names_are_pinned():
    assert set(cost_models.__all__) == {
        *("ClusterSpec", "UnknownClusterError", "host_cluster", "known_clusters", "load_cluster"),
        *("read_cluster", "read_cluster_file", "cluster_collective_s", "host_transfer_s"),
        *("two_level_all_gather_s", "two_level_all_reduce_s", "two_level_reduce_scatter_s"),
        *("energy_j", "step_energy_j", "power_utilization", "work_energy_j"),
        *("DEFAULT_EFFICIENCY", "DTYPES", "WORK_KINDS"),
        *("Collective", "CostModel", "Efficiency", "HardwareSpec", "LinkSpec", "Rate", "Roofline"),
        *("RooflineEstimate", "UnknownHardwareError", "Work"),
        *("collective_s", "ring_all_gather_s", "ring_all_reduce_s", "ring_reduce_scatter_s"),
        *("tree_all_reduce_s", "tree_broadcast_s"),
        *("format_bytes", "format_flop", "format_seconds", "parse_bytes", "parse_bytes_per_s"),
        "parse_seconds",
        *("known_hardware", "load_hardware", "read_hardware"),
    }
    assert all(hasattr(cost_models, name) for name in cost_models.__all__)


def test_examples_in_docstrings_run():
    result = doctest.testmod(units)
    assert result.attempted >= 5
    assert result.failed == 0


def test_importing_loads_neither_torch_nor_ray():
    code = "import cost_models, sys; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    root = Path(cost_models.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
