"""The validation loss of a run's weights, and of their average."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import swa_utils

from orchestrator import sharding
from orchestrator.data import MapDataset, collate, rank_batches, validation_indices
from orchestrator.job import JobSpec
from orchestrator.optim.averaging import averaged_weights
from orchestrator.ranks import Ranks
from planner.step import call_model


class _CallsModel(nn.Module):
    """A model called with one batch of inputs, whatever their structure."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Any:
        return call_model(self.model, inputs)


@dataclass(frozen=True)
class Validation:
    """Validates on one rank; all ranks take part.

    Attributes:
        job: whose validation set, and how much of it.
        ranks: who else takes part.
        module: returns the loss of (inputs, targets), or of the inputs alone.
        model: the part of it that holds the weights.
        train_set: that batch-norm statistics of averaged weights are made with.
        validation_set: that losses are taken of.
    """

    job: JobSpec
    ranks: Ranks
    module: nn.Module
    model: nn.Module
    train_set: MapDataset
    validation_set: MapDataset

    @torch.no_grad()
    def loss(self) -> float:
        """Mean loss per sample over a fixed part of the validation set, all ranks together."""
        wanted = self.job.train.validation_batches * self.job.micro_batch * self.ranks.world_size
        indices = validation_indices(len(self.validation_set), wanted=wanted)
        total, count = 0.0, 0
        modes = {module: module.training for module in self.module.modules()}
        self.module.eval()
        for batch in rank_batches(
            indices,
            micro_batch=self.job.micro_batch,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        ):
            inputs, targets = collate(self.validation_set, batch, device=self.ranks.device)
            total += batch_loss(self.job, self.module, inputs, targets).item() * len(batch)
            count += len(batch)
        for module, training in modes.items():
            module.training = training
        sharding.free_gathered(self.module)
        rows = self.ranks.gather([total, float(count)])
        return sum(row[0] for row in rows) / sum(row[1] for row in rows)

    def average_loss(self, optimizer: torch.optim.Optimizer, path: Path) -> float:
        """The loss of the averaged weights, which rank 0 writes to `path`; the run's own weights stay.

        Batch-norm statistics are made anew with the averaged weights, in one walk over the training set. Every
        rank walks all of it, and so has the same statistics.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with averaged_weights(optimizer):
            mode = self.model.training
            # update_bn calls model(batch), and takes the first of a list: several inputs need call_model.
            swa_utils.update_bn(self._training_inputs(), _CallsModel(self.model))
            self.model.train(mode)
            loss = self.loss()
            if self.ranks.is_first:
                torch.save(self.model.state_dict(), path)
        with torch.no_grad():
            for buffer, values in buffers:
                buffer.copy_(values)
        return loss

    def _training_inputs(self) -> Iterator[Any]:
        size = self.job.micro_batch
        for start in range(0, len(self.train_set) - size + 1, size):
            yield collate(self.train_set, list(range(start, start + size)), device=self.ranks.device)[0]


def batch_loss(job: JobSpec, module: nn.Module, inputs: Any, targets: Any) -> torch.Tensor:
    """The mean loss of a micro-batch; a model that returns its own is called with the inputs alone."""
    return call_model(module, inputs) if job.loss is None else module(inputs, targets)
