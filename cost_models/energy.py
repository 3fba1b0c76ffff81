"""Electric energy of work: power between rest and board power, by how busy arithmetic and memory are."""

import math
from collections.abc import Mapping
from typing import Final

from cost_models.device import HardwareSpec
from cost_models.roofline import Roofline, RooflineEstimate
from cost_models.work import Work

# Power of memory at full bandwidth beside that of arithmetic at full rate, both above the power at rest.
# Choi, Bedard, Fowler and Vuduc, 2013, A Roofline Model of Energy, IPDPS, in single precision:
#   GPU, GTX 580: 513 pJ/B * 192.4 GB/s = 98.7 W of 99.7 pJ/FLOP * 1581 GFLOP/s = 157.6 W
#   CPU, i7-950:  795 pJ/B *  25.6 GB/s = 20.4 W of  371 pJ/FLOP *  106.6 GFLOP/s = 39.5 W
# Ratios of two old devices, taken over for all: no vendor states these energies for a new one.
MEMORY_POWER_SHARE: Final[Mapping[str, float]] = {"gpu": 0.63, "tpu": 0.63, "cpu": 0.52}


def energy_j(time_s: float, *, hardware: HardwareSpec, utilization: float) -> float:
    """Energy of one device over some time.

        E = time_s * (idle_power_watts + (power_watts - idle_power_watts) * utilization)

    Args:
        time_s: seconds, at least 0.
        hardware: the device, with its two powers.
        utilization: 0.0 at rest, 1.0 at board power.

    Returns:
        Joules.

    Raises:
        ValueError: a time below 0 or not finite, or a utilization outside [0, 1].

    Reference: Fan, Weber and Barroso, 2007, Power Provisioning for a Warehouse-sized Computer, ISCA: power is
    nearly linear in utilization.
    """
    if not (math.isfinite(time_s) and time_s >= 0):
        raise ValueError(f"time_s must be finite and at least 0: got {time_s!r}.")
    if not 0 <= utilization <= 1:
        raise ValueError(f"utilization must lie in [0, 1]: got {utilization!r}.")
    idle, busy = hardware.idle_power_watts, hardware.power_watts
    return time_s * (idle + (busy - idle) * utilization)


def power_utilization(estimate: RooflineEstimate, *, time_s: float, hardware: HardwareSpec) -> float:
    """How far the power of a device is from rest to board power while it does a piece of work.

        u = min(1, (compute_s + share * memory_s + serial_s / num_cores) / time_s)

    What is bound by arithmetic draws board power, what is bound by memory the share of it that memory takes
    (`MEMORY_POWER_SHARE`) and what its arithmetic adds, what is done one after the other that of one core; a launch
    draws nothing. The minimum is the board's own: it lowers its clock rather than draw more.

    Args:
        estimate: roofline terms of the work on this hardware.
        time_s: seconds that the work takes, by whatever cost model; longer ones at less power.
        hardware: the device.

    Returns:
        A fraction in [0, 1]; 0.0 for work that takes no time.

    Raises:
        ValueError: a time below 0 or not finite.

    Reference: Choi, Bedard, Fowler and Vuduc, 2013, A Roofline Model of Energy, IPDPS.
    """
    if not (math.isfinite(time_s) and time_s >= 0):
        raise ValueError(f"time_s must be finite and at least 0: got {time_s!r}.")
    if time_s == 0:
        return 0.0
    busy_s = estimate.compute_s + MEMORY_POWER_SHARE[hardware.kind] * estimate.memory_s
    return min(1.0, (busy_s + estimate.serial_s / (hardware.num_cores or 1)) / time_s)


def step_energy_j(
    compute_j: float, *, hardware: HardwareSpec, exposed_s: float, world_size: int = 1
) -> float:
    """Energy of a training step on all of its devices.

    While a device waits for a message that nothing hides it is at rest:

        E = world_size * (compute_j + exposed_s * idle_power_watts)

    Args:
        compute_j: joules of the operations of one rank.
        hardware: each device.
        exposed_s: seconds of one rank in communication or host transfers that no computation hides.
        world_size: number of ranks.

    Returns:
        Joules of the devices alone, without hosts, switches or cooling.

    Raises:
        ValueError: a negative or infinite energy or time, or world_size < 1.
    """
    if not (math.isfinite(compute_j) and compute_j >= 0):
        raise ValueError(f"compute_j must be finite and at least 0: got {compute_j!r}.")
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1: got {world_size!r}.")
    return world_size * (compute_j + energy_j(exposed_s, hardware=hardware, utilization=0.0))


def work_energy_j(work: Work, *, time_s: float, hardware: HardwareSpec) -> float:
    """Energy of a piece of work on one device: its time at the power of its utilization.

    Args:
        work: what is done.
        time_s: seconds that it takes, by whatever cost model.
        hardware: the device.

    Returns:
        Joules.

    Raises:
        ValueError: a time below 0 or not finite.
    """
    busy = power_utilization(Roofline(hardware).estimate(work), time_s=time_s, hardware=hardware)
    return energy_j(time_s, hardware=hardware, utilization=busy)
