"""Write checkpoints beside the training: copy the state, write it in a thread, decide what a failure means."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from orchestrator.checkpoint import CheckpointStore
from orchestrator.checkpoint_places import Place
from orchestrator.checkpoint_shards import Part
from orchestrator.checkpoint_sharing import SharedStore
from orchestrator.failures import CheckpointError
from orchestrator.ranks import Ranks

logger = logging.getLogger(__name__)

# After so many checkpoints in a row that could not be written, going on would lose more than stopping.
_MOST_FAILURES = 3


class CheckpointWriteError(CheckpointError):
    """Checkpoints cannot be written, and training stops for it; to try again would not make room."""


class Saver(Protocol):
    """Where a state goes; see `CheckpointStore.save`."""

    def save(self, state: dict[str, Any], *, step: int, validation_loss: float | None) -> Place | None:
        """Write one checkpoint."""
        ...


def writer_of(store: CheckpointStore[Any], ranks: Ranks, *, is_sharded: bool) -> CheckpointWriter:
    """What a rank writes of a checkpoint: its share of a sharded state; of another one rank 0 writes all."""
    if is_sharded:
        return CheckpointWriter(SharedStore(store, is_first=ranks.is_first))
    return CheckpointWriter(store if ranks.is_first else None)


class CheckpointWriter:
    """Writes one checkpoint at a time beside the training.

    A crash while it writes leaves the checkpoint before; a full disk too, and the next checkpoint is another try.

    Args:
        store: where they go; None for a rank that writes nothing.
    """

    def __init__(self, store: Saver | None) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._written: Future[Place | None] | None = None
        self._step = 0
        self._num_failures = 0

    def start(self, state: dict[str, Any], *, step: int, validation_loss: float | None) -> None:
        """Copy a state and begin to write the copy; the one before must be settled.

        Args:
            state: see `CheckpointStore.save`; the caller may change it as soon as this returns.
            step: steps done.
            validation_loss: of these weights; None where it is not known.
        """
        store = self._store
        if store is None:
            return
        assert self._written is None
        self._step = step
        # The thread has the only reference, so that the copy is freed as soon as it is written.
        job = [copied(state)]
        self._written = self._thread.submit(
            lambda: store.save(job.pop(), step=step, validation_loss=validation_loss)
        )

    def settle(self, *, is_last: bool) -> Place | None:
        """Wait for the checkpoint that is being written.

        Args:
            is_last: no other one will follow.

        Returns:
            Its place; None where none was being written, by another rank, or it could not be, which is logged.

        Raises:
            CheckpointWriteError: it could not be written, and it was the last, or one failure too many.
        """
        if is_last:
            self._thread.shutdown(wait=True)
        written, self._written = self._written, None
        if written is None:
            return None
        try:
            place = written.result()
        except OSError as error:
            self._num_failures += 1
            reason = error.strerror or str(error)
            if is_last or self._num_failures >= _MOST_FAILURES:
                raise CheckpointWriteError(
                    f"the checkpoint of step {self._step} could not be written ({reason}), {self._num_failures} in "
                    "a row; those before it are whole. Make room and continue with --resume"
                ) from error
            logger.warning(
                "the checkpoint of step %d could not be written (%s); those before it stay, and the next one is "
                "another try",
                self._step,
                reason,
            )
            return None
        self._num_failures = 0
        return place


def copied(value: Any) -> Any:
    """A state that shares no memory with another one; tensors come to the host, and those that share stay so.

    Of a tensor that ranks share it has this rank's `Part`.
    """
    return _copied(value, {})


def _copied(value: Any, done: dict[tuple[Any, ...], torch.Tensor]) -> Any:
    if isinstance(value, DTensor):
        return Part(value, _on_host(value.to_local()))
    if isinstance(value, torch.Tensor):
        key = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() == 0 or key not in done:
            done[key] = _on_host(value)
        return done[key]
    if isinstance(value, dict):
        return {name: _copied(part, done) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(part, done) for part in value)
    return value


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same bits and strides.

    Its memory is numpy's: what torch's allocator gives out is what plans promise, and this is none of it.
    """
    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        return tensor.cpu()
    if not tensor.is_contiguous() or tensor.dtype.is_complex or tensor.numel() == 0:
        return tensor.clone()
    numbers = tensor.view(-1).view(torch.uint8).numpy()
    return torch.from_numpy(np.array(numbers)).view(tensor.dtype).view(tensor.shape)
