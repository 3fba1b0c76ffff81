"""Latency-bandwidth times of ring and tree collectives, and of a transfer to or from the host."""

import math

from cost_models.device import HardwareSpec, LinkSpec
from cost_models.work import Collective


def _ring_steps_s(num_steps: int, size_bytes: int, link: LinkSpec, world_size: int) -> float:
    """num_steps messages, one after the other, of one rank's share of the buffer."""
    return num_steps * (link.latency_s + size_bytes / (world_size * link.bytes_per_s))


def _check(size_bytes: int, world_size: int) -> None:
    if size_bytes < 0:
        raise ValueError(f"size_bytes must be at least 0: got {size_bytes!r}.")
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1: got {world_size!r}.")


def ring_reduce_scatter_s(size_bytes: int, link: LinkSpec, *, world_size: int) -> float:
    """Time until each of p ranks holds the sum of its own p-th part.

        t = (p - 1) (latency_s + size_bytes / (p * bytes_per_s))

    Args:
        size_bytes: buffer of one rank, before the reduction.
        link: slowest link of the ring.
        world_size: p. One rank costs 0.0.

    Returns:
        Seconds; the additions themselves are not counted.

    Raises:
        ValueError: world_size < 1 or size_bytes < 0.

    Reference: Patarasuk and Yuan, 2009, J. Parallel Distrib. Comput. 69(2).
    """
    _check(size_bytes, world_size)
    return _ring_steps_s(world_size - 1, size_bytes, link, world_size)


def ring_all_gather_s(size_bytes: int, link: LinkSpec, *, world_size: int) -> float:
    """Time until each of p ranks holds the parts of all.

        t = (p - 1) (latency_s + size_bytes / (p * bytes_per_s))

    Args:
        size_bytes: buffer of one rank, after the gathering: p equal parts.
        link: slowest link of the ring.
        world_size: p. One rank costs 0.0.

    Returns:
        Seconds.

    Raises:
        ValueError: world_size < 1 or size_bytes < 0.

    Reference: Patarasuk and Yuan, 2009, J. Parallel Distrib. Comput. 69(2).
    """
    _check(size_bytes, world_size)
    return _ring_steps_s(world_size - 1, size_bytes, link, world_size)


def ring_all_reduce_s(size_bytes: int, link: LinkSpec, *, world_size: int) -> float:
    """Time of a ring all-reduce: a reduce-scatter, then an all-gather of the sums.

        t = 2 (p - 1) (latency_s + size_bytes / (p * bytes_per_s))

    Args:
        size_bytes: buffer of one rank, before the reduction.
        link: slowest link of the ring.
        world_size: p. One rank costs 0.0.

    Returns:
        Seconds; the additions themselves are not counted.

    Raises:
        ValueError: world_size < 1 or size_bytes < 0.

    Reference: Patarasuk and Yuan, 2009, J. Parallel Distrib. Comput. 69(2).
    """
    _check(size_bytes, world_size)
    return _ring_steps_s(2 * (world_size - 1), size_bytes, link, world_size)


def tree_broadcast_s(size_bytes: int, link: LinkSpec, *, world_size: int) -> float:
    """Time of a binomial-tree broadcast: each round doubles the ranks that hold the buffer.

        t = ceil(log2 p) (latency_s + size_bytes / bytes_per_s)

    Args:
        size_bytes: the buffer.
        link: slowest link of the tree.
        world_size: p. One rank costs 0.0.

    Returns:
        Seconds.

    Raises:
        ValueError: world_size < 1 or size_bytes < 0.

    Reference: Thakur, Rabenseifner and Gropp, 2005, Int. J. High Perform. Comput. Appl. 19(1).
    """
    _check(size_bytes, world_size)
    num_rounds = math.ceil(math.log2(world_size))
    return num_rounds * (link.latency_s + size_bytes / link.bytes_per_s)


def tree_all_reduce_s(size_bytes: int, link: LinkSpec, *, world_size: int) -> float:
    """Time of an all-reduce over a binomial tree: sums go up to the root, the result comes down.

        t = 2 ceil(log2 p) (latency_s + size_bytes / bytes_per_s)

    Fewer messages than the ring, each with the whole buffer: faster for small buffers on many ranks.

    Args:
        size_bytes: buffer of one rank, before the reduction.
        link: slowest link of the tree.
        world_size: p. One rank costs 0.0.

    Returns:
        Seconds; the additions themselves are not counted.

    Raises:
        ValueError: world_size < 1 or size_bytes < 0.

    Reference: Thakur, Rabenseifner and Gropp, 2005, Int. J. High Perform. Comput. Appl. 19(1).
    """
    return 2 * tree_broadcast_s(size_bytes, link, world_size=world_size)


def collective_s(collective: Collective, link: LinkSpec) -> float:
    """Time of a collective over one kind of link; an all-reduce takes the faster of ring and tree.

    Args:
        collective: what is asked for.
        link: slowest link between the ranks.

    Returns:
        Seconds.
    """
    size_bytes, world_size = collective.size_bytes, collective.world_size
    if collective.kind == "reduce_scatter":
        return ring_reduce_scatter_s(size_bytes, link, world_size=world_size)
    if collective.kind == "all_gather":
        return ring_all_gather_s(size_bytes, link, world_size=world_size)
    if collective.kind == "broadcast":
        return tree_broadcast_s(size_bytes, link, world_size=world_size)
    assert collective.kind == "all_reduce", collective.kind
    return min(
        ring_all_reduce_s(size_bytes, link, world_size=world_size),
        tree_all_reduce_s(size_bytes, link, world_size=world_size),
    )


def host_transfer_s(size_bytes: int, hardware: HardwareSpec) -> float:
    """Time of a copy between a device and the memory of its host, in either direction.

        t = latency_s + size_bytes / bytes_per_s

    Args:
        size_bytes: what is copied. Nothing costs 0.0.
        hardware: the device; its link "host" counts.

    Returns:
        Seconds.

    Raises:
        ValueError: size_bytes < 0, or a device without a link to a host, such as a CPU.

    Reference: Hockney, 1994, Parallel Comput. 20(3).
    """
    _check(size_bytes, world_size=1)
    link = hardware.links.get("host")
    if link is None:
        raise ValueError(f"hardware {hardware.name!r} has no link to a host: its memory is the host's.")
    return link.latency_s + size_bytes / link.bytes_per_s if size_bytes else 0.0
