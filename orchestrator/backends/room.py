"""Whether a Ray cluster has room for a job's ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.failures import RunFailedError
from orchestrator.job import JobSpec


def check_room(ray: Any, job: JobSpec, *, address: str | None) -> str:
    """Whether a cluster has, or could get, the nodes that a job's ranks need.

    Args:
        ray: the module, connected to the cluster.
        job: whose ranks they are.
        address: of the cluster, for the sentence; None for this machine.

    Returns:
        A sentence where the run must wait for others to leave; "" where it need not.

    Raises:
        RunFailedError: it never will; Ray itself would wait for ever.
    """
    need = resources_per_worker(job)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(_workers_on(resources, need) for resources in nodes)
    each = " and ".join(f"{amount:g} {kind}" for kind, amount in need.items())
    fewest = job.train.fewest_workers
    asked = f"{fewest} {'worker' if fewest == 1 else 'workers'} of {each} each"
    if job.train.elastic is not None:
        asked = f"at least {asked}"
    place = f"the cluster at {address}" if address else "this machine"
    has = ", ".join(f"{sum(node.get(kind, 0) for node in nodes):g} {kind}" for kind in need)
    on = f"{has} on {len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}"
    if room < fewest:
        limit = _most_of_autoscaler(ray)
        if limit is None or _workers_on(limit, need) < fewest:
            more = (
                "no autoscaler that could add nodes" if limit is None else "its autoscaler may not add enough"
            )
            raise RunFailedError(
                f"the job asks for {asked}; {place} has room for {room} ({on}), and {more}. Lower train.workers "
                "or add nodes",
                bad_input=True,
            )
        return f"the job asks for {asked}; {place} has {on} and adds nodes, which the run waits for"
    free = _workers_on(ray.available_resources(), need)
    if free < fewest:
        return f"the job asks for {asked}; {place} has {on}, free for {free}: the run waits for the others"
    return ""


def check_room_is_left(ray: Any, job: JobSpec, *, address: str | None) -> None:
    """Whether ranks that were lost can be placed again; asked where nothing was heard of a run for a while.

    Raises:
        RunFailedError: there is no room any more; Ray Train itself would wait for ever.
    """
    try:
        check_room(ray, job, address=address)
    except RunFailedError as error:
        raise RunFailedError(f"the cluster has lost nodes: {error}") from error


def resources_per_worker(job: JobSpec) -> dict[str, float]:
    """What Ray keeps free for one rank."""
    return {"CPU": 1, **({"GPU": 1} if job.train.device == "cuda" else {})}


def _workers_on(resources: Mapping[str, float], need: Mapping[str, float]) -> int:
    """How many workers find a place in so much of each resource."""
    return int(min(resources.get(kind, 0) // amount for kind, amount in need.items()))


def _most_of_autoscaler(ray: Any) -> dict[str, float] | None:
    """All that the cluster's autoscaler may ever provide; None where there is none. Ray Train asks here too."""
    return ray._private.state.state.get_max_resources_from_cluster_config()
