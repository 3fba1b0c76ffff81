"""Memory of one rank that no plan can change: parameters, gradients, optimizer state, buckets, batch."""

from __future__ import annotations

from torch import nn

from planner.capture import Captured
from planner.capturing.optimizer_step import Optimizers
from planner.capturing.rank_memory import Sharding, rank_memory
from planner.graph import Graph, Phase, ValueKind
from planner.lower.trace import TANGENTS_STAY
from planner.problem import StaticMemory


def static_memory(
    captured: Captured,
    model: nn.Module,
    *,
    optimizer: Optimizers | None,
    world_size: int,
    accumulation: int,
    sharding: Sharding = "ddp",
    blocks: tuple[str, ...] = (),
) -> StaticMemory:
    """Resident bytes of one rank, and the peak of its optimizer step.

    Data-parallel gradients lie in buckets that stay (``gradient_as_bucket_view=True``); with accumulation on one
    rank they stay between micro-batches; otherwise backward makes them, and they are part of the schedule. Under
    FSDP2 the most that gathering and reducing holds at any time is charged all the time, in place of buckets: a
    plan covers the step, not when its messages are sent. It is an upper bound.

    Args:
        captured: the step.
        model: the module that it was captured from.
        optimizer: builds the optimizer of a module, or several do, one after the other; None charges nothing.
        world_size: data-parallel ranks.
        accumulation: micro-batches in one step of the optimizer.
        sharding: how several ranks share the model; see `rank_memory`.
        blocks: names of what is gathered by itself; () where all is gathered together, as around a planned step.

    Returns:
        Bytes by owner; of rank 0, which has the most.

    Raises:
        ValueError, CaptureError: as for `rank_memory`.
    """
    memory = rank_memory(
        model,
        optimizer=optimizer,
        world_size=world_size,
        sharding=sharding,
        blocks=blocks,
        accumulation=accumulation,
        staging=captured.signature.device == "cpu",
    )
    state_bytes, temporary_bytes = memory.optimizer_bytes, memory.optimizer_temporary_bytes
    if sharding != "ddp":
        between = memory.resident_bytes + captured.batch_bytes + outputs_bytes(captured.graph)
        return StaticMemory(
            parameter_bytes=memory.parameter_bytes + memory.buffer_bytes,
            optimizer_bytes=state_bytes,
            bucket_bytes=memory.communication_bytes + memory.late_bytes,
            batch_bytes=captured.batch_bytes,
            optimizer_step_peak_bytes=between + temporary_bytes if optimizer is not None else 0,
        )
    gradient_bytes = captured.trainable_bytes
    buckets = gradient_bytes if world_size > 1 else 0
    resident_gradients = gradient_bytes if world_size == 1 and accumulation > 1 else 0
    resident = captured.parameter_bytes + state_bytes + captured.batch_bytes + gradient_bytes
    resident += outputs_bytes(captured.graph)
    return StaticMemory(
        parameter_bytes=captured.parameter_bytes,
        gradient_bytes=resident_gradients,
        optimizer_bytes=state_bytes,
        bucket_bytes=buckets,
        batch_bytes=captured.batch_bytes,
        optimizer_step_peak_bytes=resident + temporary_bytes if optimizer is not None else 0,
    )


def outputs_bytes(graph: Graph) -> int:
    """Bytes of outputs and loss, which the caller holds to the end of the step."""
    phases = (Phase.FORWARD,) if TANGENTS_STAY else (Phase.FORWARD, Phase.LOSS)
    return sum(
        value.size_bytes
        for value in graph.values
        if value.kind is ValueKind.OUTPUT and graph.nodes[value.node].phase in phases
    )
