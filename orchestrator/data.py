"""The order in which ranks read a data set: a function of the position, so that any run continues exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import default_collate

from planner.inputs.strict import WorkloadError
from planner.inputs.targets import TargetSpec
from planner.inputs.workload import Tensors, TensorSpec

# A dataset's seeds are drawn apart from every other seed of the run.
_STREAM = 0xDA7A


class MapDataset(Protocol):
    """A data set whose samples are found by their index; a sample is the pair (input, target)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@dataclass
class SampleStream:
    """The endless sequence of a training set's samples, epoch after epoch.

    Position p holds sample p mod N of epoch p div N; an epoch is one permutation of all samples. A batch may
    begin in one epoch and end in the next, so within each epoch every sample is read exactly once, by exactly
    one rank, whatever the batch size and the number of ranks. The only state of a reader is the number of
    samples read before.

    Args:
        num_samples: N.
        seed: of the permutations.
        shuffle: False reads every epoch in the order of the data set.

    >>> [SampleStream(3, seed=0, shuffle=False).indices(start, 2) for start in (0, 2, 4)]
    [[0, 1], [2, 0], [1, 2]]
    """

    num_samples: int
    seed: int
    shuffle: bool = True
    _epoch: int = field(default=-1, init=False, repr=False)
    _order: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), init=False, repr=False)

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise WorkloadError("the training set is empty; give at least one sample")

    def indices(self, start: int, count: int) -> list[int]:
        """Indices into the data set of the positions start, ..., start + count - 1."""
        found: list[int] = []
        while len(found) < count:
            epoch, offset = divmod(start + len(found), self.num_samples)
            found += self._permutation(epoch)[offset : offset + count - len(found)].tolist()
        return found

    def _permutation(self, epoch: int) -> np.ndarray:
        """Sample of each position; in numpy's memory, as an epoch may begin in a step whose peak is promised."""
        if not self.shuffle:
            epoch = 0
        if epoch != self._epoch:
            if self.shuffle:
                seed = int(
                    np.random.SeedSequence([_STREAM, self.seed, epoch]).generate_state(1, np.uint64)[0] >> 1
                )
                generator = torch.Generator().manual_seed(seed)
                self._order = np.empty(self.num_samples, np.int64)
                torch.randperm(self.num_samples, generator=generator, out=torch.from_numpy(self._order))
            else:
                self._order = np.arange(self.num_samples)
            self._epoch = epoch
        return self._order


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is cut: micro-batch by micro-batch, and within one, rank by rank.

    Attributes:
        micro_batch: samples of one rank's micro-batch.
        accumulation: micro-batches per rank and step.
        world_size: ranks.
        num_longer: the first so many ranks have one micro-batch more.

    >>> layout = BatchLayout.of(8, micro_batch=1, world_size=3)
    >>> [layout.num_micro_batches(rank) for rank in range(3)]
    [3, 3, 2]
    """

    micro_batch: int
    accumulation: int
    world_size: int
    num_longer: int = 0

    @classmethod
    def of(cls, global_batch: int, *, micro_batch: int, world_size: int) -> BatchLayout:
        """Whole micro-batches of a step shared among the ranks as evenly as can be."""
        accumulation, num_longer = divmod(global_batch // micro_batch, world_size)
        return cls(micro_batch, accumulation, world_size, num_longer)

    @property
    def global_batch(self) -> int:
        """Samples of one step."""
        return self.micro_batch * (self.accumulation * self.world_size + self.num_longer)

    def num_micro_batches(self, rank: int) -> int:
        """Of one rank in a step."""
        return self.accumulation + (rank < self.num_longer)

    @property
    def mean_micro_batches(self) -> float:
        """Of a rank in a step: what each loss is divided by, so that the mean over ranks is that of all samples."""
        return self.accumulation + self.num_longer / self.world_size

    def start(self, position: int, *, micro: int, rank: int) -> int:
        """Position of the first sample of a rank's micro-batch, in the step that begins at `position`."""
        return position + (micro * self.world_size + rank) * self.micro_batch


def validation_indices(num_samples: int, *, wanted: int) -> list[int]:
    """At most `wanted` indices, evenly spread over the set, always the same.

    >>> validation_indices(10, wanted=5)
    [0, 2, 4, 6, 8]
    >>> validation_indices(3, wanted=5)
    [0, 1, 2]
    """
    count = min(num_samples, wanted)
    return [index * num_samples // count for index in range(count)]


def rank_batches(indices: list[int], *, micro_batch: int, rank: int, world_size: int) -> Iterator[list[int]]:
    """One rank's share of a fixed list of indices, in micro-batches; the last may be smaller."""
    mine = indices[rank::world_size]
    for start in range(0, len(mine), micro_batch):
        yield mine[start : start + micro_batch]


def load_datasets(target: TargetSpec) -> tuple[MapDataset, MapDataset]:
    """The training and the validation set that a job's `data` callable returns.

    Raises:
        WorkloadError: the callable fails or does not return two map-style data sets.
    """
    pair = target.call()
    ok = isinstance(pair, tuple) and len(pair) == 2
    if not ok or not all(hasattr(part, "__len__") and hasattr(part, "__getitem__") for part in pair):
        raise WorkloadError(
            f"train.data: target {target.target!r} must return the pair (training set, validation set) "
            f"of map-style data sets, got {type(pair).__name__}"
        )
    if len(pair[1]) == 0:
        raise WorkloadError(
            f"train.data: target {target.target!r}: the validation set is empty; give a sample"
        )
    return pair


def collate(dataset: MapDataset, indices: list[int], *, device: torch.device) -> tuple[Any, Any]:
    """(inputs, targets) of the given samples, stacked along dim 0."""
    samples = [dataset[index] for index in indices]
    if not all(isinstance(sample, tuple | list) and len(sample) == 2 for sample in samples):
        raise WorkloadError("train.data: a sample must be the pair (input, target)")
    try:
        inputs, targets = default_collate([tuple(sample) for sample in samples])
    except (RuntimeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WorkloadError(f"train.data: samples do not make a batch: {reason}. Make them alike") from error
    return _to(inputs, device), _to(targets, device)


def check_batch(inputs: Any, expected: Tensors, *, what: str) -> None:
    """Refuse data of another shape or dtype than the batch that was planned.

    Raises:
        WorkloadError: it differs; the sentence names both.
    """
    for place, got, want in _paired(inputs, expected, what):
        if (
            not isinstance(got, torch.Tensor)
            or tuple(got.shape) != want.shape
            or str(got.dtype) != f"torch.{want.dtype}"
        ):
            seen = f"{list(got.shape)} {got.dtype}" if isinstance(got, torch.Tensor) else type(got).__name__
            raise WorkloadError(
                f"{place} of the data is {seen}, but the batch says {list(want.shape)} torch.{want.dtype}; "
                "make them agree"
            )


def _paired(value: Any, spec: Tensors, place: str) -> Iterator[tuple[str, Any, TensorSpec]]:
    if isinstance(spec, TensorSpec):
        yield place, value, spec
    elif isinstance(spec, dict):
        got = value if isinstance(value, Mapping) else {}
        for name, part in spec.items():
            yield f"{place}.{name}", got.get(name), part
    else:
        got = value if isinstance(value, tuple | list) else ()
        for index, part in enumerate(spec):
            yield f"{place}.{index}", got[index] if index < len(got) else None, part


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(part, device) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_to(part, device) for part in value)
    return value
