"""What `batch_size: auto` begins with: a probe of the noise, then the best way to divide the batch it calls for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from cost_models.cluster import ClusterSpec
from orchestrator.backends.local_tasks import local_tasks
from orchestrator.backends.protocol import RunFailedError
from orchestrator.backends.ray_connection import folder_on_workers
from orchestrator.backends.ray_tasks import ray_tasks
from orchestrator.batch_size.batch_range import MOST_GROWTH, BatchRange
from orchestrator.batch_size.own_rate import own_rate
from orchestrator.batch_size.probe import Probed, ProbeRequest, Unanswered, probe
from orchestrator.batch_size.short_run import RunFailure, RunRequest
from orchestrator.job import JobSpec
from orchestrator.size_job import size_batches
from planner.problem import Budget, BudgetKind

_PROBE_LIMIT_S = 20.0
_WATCHED_BATCHES = 8
Say = Callable[[str], None]


def started(job: JobSpec, *, address: str | None, say: Say) -> JobSpec:
    """The job with a range in the place of "auto"; any other job as it is.

    The range begins where the share of the noise scale is that a controlled batch follows, and at the job's own
    batch where the probe does not know. The step is divided as sizing prices it best, which may change the
    micro-batch, the workers and the sharding; with a budget that is a share, and so differs between micro-batches,
    it is divided as the job says.

    Args:
        job: as it was asked for.
        address: of a running Ray cluster.
        say: called with a line for each decision.

    Raises:
        RunFailedError: the probe could not be made.
        WorkloadError, CaptureError: as of `size_batches`.
    """
    if job.train.batch_size != "auto":
        return job
    own = job.global_batch
    first = _first_batch(job, _probed(job, address), say)
    shaped = _divided(job, first, say)
    unit = shaped.micro_batch * shaped.train.workers
    # One gradient a step says nothing of the noise.
    least = unit * max(math.ceil(own / unit), 2 if shaped.train.workers == 1 else 1)
    first = max(least, first // unit * unit)
    sizes = BatchRange(min=least, max=max(MOST_GROWTH * own, first), start=first, rate_batch=own)
    data = shaped.to_data()
    data["train"] |= {"accumulation": 1, "batch_size": sizes.model_dump(mode="json")}
    say(
        f"batch size: {first} at first, then {sizes.min} to {sizes.max} as the noise has it: "
        f"{shaped.train.workers} x {shaped.micro_batch}, {first // unit} at a time; the rate belongs to {own}"
    )
    return JobSpec.from_data(data, folder=job.model.folder, source="batch_size: auto")


def _probed(job: JobSpec, address: str | None) -> Probed:
    task = ProbeRequest(
        RunRequest(
            job=job.to_data(),
            folder=folder_on_workers(job, address),
            batch=job.global_batch,
            rate=own_rate(job),
            seed=job.train.seed,
            limit=0,
            target_loss=None,
            num_evaluated=_WATCHED_BATCHES * job.micro_batch,
        ),
        before=0,
        time_limit_s=_PROBE_LIMIT_S,
    )
    # A process of its own: what the probe holds is gone when training begins.
    pool: Any = functools.partial(local_tasks, probe, num_slots=2)
    if job.train.backend == "ray":
        pool = functools.partial(ray_tasks, probe, job, num_slots=1, address=address)
    with pool() as slots:
        slots.submit(task)
        found = slots.next_result()[1]
    if isinstance(found, RunFailure):
        raise RunFailedError(found.message, bad_input=found.bad_input)
    if isinstance(found, Unanswered):
        raise RunFailedError(found.message, bad_input=True)
    return found


def _first_batch(job: JobSpec, found: Probed, say: Say) -> int:
    """The job's own batch, doubled while it stays within the share of the noise that is known."""
    own, noise = job.global_batch, found.noise
    sizes = job.batch_range
    assert sizes is not None
    low, high = noise.interval
    known = noise.value if noise.reliable else low
    wanted = sizes.share * known
    first = own * 2 ** max(0, math.floor(math.log2(wanted / own))) if wanted > 0 else own
    value = "unknown" if math.isnan(noise.value) else f"{noise.value:.4g}"
    say(f"probe: noise scale {value} ({low:.4g} to {high:.4g}) at step {found.point.step}: {noise.reason}")
    return min(first, sizes.max)


def _divided(job: JobSpec, batch: int, say: Say) -> JobSpec:
    """The job with its step divided as sizing finds it best for a batch."""
    if Budget.parse(job.budget).kind not in (BudgetKind.NONE, BudgetKind.BYTES):
        say(f"not sized: the budget {job.budget!r} is a share, which differs between micro-batches")
        return job
    cluster: ClusterSpec = job.cluster_spec()
    found, _ = size_batches(job, cluster, global_batches=[batch], objective="time")
    best = found[0]
    if best.refused:
        say(f"not sized: no way to divide a batch of {batch} fits: {best.refused}")
        return job
    say(f"sized: {best.samples_per_s:.4g} samples/s predicted, the best of {len(found)} ways")
    return job.with_shape(best.shape, is_blockwise=best.is_blockwise)
