"""What a job's settings forbid of a division of its step, whatever its plan: in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from cost_models.cluster import ClusterSpec
from orchestrator.job import JobSpec
from orchestrator.step_shape import Shape
from orchestrator.techniques.normalization import batch_norm_of

# The fewest samples that batch statistics are good for.
LEAST_BATCH_NORM = 32


@dataclass(frozen=True)
class Limits:
    """What divisions may not do.

    Attributes:
        batch_norm: name of a layer that normalizes over the micro-batch of one rank, "" where there is none.
        largest_micro_batch: of the divisions in question, samples.
        has_sync: the devices can synchronize batch norm over the ranks.
        has_average: an average of the weights is kept.
    """

    batch_norm: str
    largest_micro_batch: int
    has_sync: bool
    has_average: bool

    def refusal(self, shape: Shape) -> str:
        """Why a division cannot be run, the same words for all alike; "" where it can."""
        if self.has_average and shape.sharding != "ddp":
            return (
                "train.average needs the whole weights on every rank, and these share them: leave train.average "
                "out to have them priced"
            )
        if self.batch_norm and shape.micro_batch < LEAST_BATCH_NORM:
            return self._batch_norm_sentence()
        return ""

    def _batch_norm_sentence(self) -> str:
        largest = self.largest_micro_batch
        more = "a larger global batch" + (" or fewer workers" if largest >= LEAST_BATCH_NORM else "")
        sync = ", or to sync, which looks at that of all ranks" if self.has_sync else ""
        return (
            f"batch norm ({self.batch_norm}) needs micro-batches of at least {LEAST_BATCH_NORM} samples, and the "
            f"largest possible has {largest}: give each rank more by {more}, or set train.batch_norm to "
            f"group_norm, which does not look at the batch{sync}"
        )


def limits_of(job: JobSpec, model: nn.Module, cluster: ClusterSpec, shapes: Sequence[Shape]) -> Limits:
    """The limits of a job on a cluster.

    Args:
        job: that is sized.
        model: of it, without memory.
        cluster: that it runs on.
        shapes: the divisions in question.
    """
    return Limits(
        batch_norm="" if job.train.batch_norm == "local" else batch_norm_of(model),
        largest_micro_batch=max((shape.micro_batch for shape in shapes), default=0),
        has_sync=cluster.device.kind == "gpu",
        has_average=job.train.average is not None,
    )
