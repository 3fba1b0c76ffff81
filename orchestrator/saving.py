"""The checkpoints of a run as its ranks see them: rank 0 chooses and tells, every rank takes part."""

from __future__ import annotations

from typing import Any

from orchestrator.checkpoint import CheckpointStore, open_state, step_of
from orchestrator.checkpoint_writer import writer_of
from orchestrator.failures import CheckpointError
from orchestrator.metrics import Reporter
from orchestrator.ranks import Ranks


class Saving:
    """Begins, ends and reads the checkpoints of one run.

    Args:
        store: where they are.
        ranks: who takes part.
        reporter: that is told of each.
        is_sharded: ranks have parts of the state, and each writes its own.
    """

    def __init__(
        self, store: CheckpointStore[Any], *, ranks: Ranks, reporter: Reporter, is_sharded: bool
    ) -> None:
        self._store, self._ranks, self._reporter = store, ranks, reporter
        self._writer, self._step = writer_of(store, ranks, is_sharded=is_sharded), None

    def start(self, state: dict[str, Any], *, step: int, validation_loss: float | None) -> None:
        """Begin to write a state while training goes on; the one before must be settled."""
        self._writer.start(state, step=step, validation_loss=validation_loss)
        self._step = step

    def settle(self, *, is_last: bool) -> None:
        """Wait for the checkpoint that is being written, and tell of it."""
        if self._step is None:
            return
        place = self._writer.settle(is_last=is_last)
        if place is not None:
            self._reporter.emit({"event": "checkpoint", "step": self._step, "path": str(place)})
        self._reporter.checkpoint_saved(place, step=self._step)
        self._step = None

    def newest(self, *, is_needed: bool) -> dict[str, Any] | None:
        """The state of the newest valid checkpoint, which rank 0 chooses for all; None where there is none.

        Args:
            is_needed: the run has written one before, so to begin without one would lose what it has done.

        Raises:
            CheckpointError: there is none but one is needed, or this rank does not see it.
        """
        chosen = None
        if self._ranks.is_first:
            self._store.remove_partial()
            chosen = self._store.newest_valid()
        chosen = self._ranks.from_first(chosen)
        if chosen is None and is_needed:
            raise CheckpointError(
                f"no valid checkpoint is left in {self._store.folder}, though the run has written some; put one "
                "back, or start a new run without --resume"
            )
        if chosen is None:
            return None
        if not self._store.sees(chosen):
            raise CheckpointError(
                f"rank {self._ranks.rank} does not see {chosen}; train.checkpoint_dir must be storage that all "
                "nodes share"
            )
        state = open_state(chosen)
        assert state["progress"]["step"] == step_of(chosen)
        return state
