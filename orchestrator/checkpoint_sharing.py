"""Save a state that ranks share: each writes its part through DCP, and rank 0 makes the checkpoint visible."""

from __future__ import annotations

import dataclasses
import errno
import json
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from orchestrator.checkpoint import CheckpointStore
from orchestrator.checkpoint_files import NewCheckpoint, write_file
from orchestrator.checkpoint_places import Place
from orchestrator.checkpoint_shards import INDEX, Part, Stored, without_parts


class SharedStore:
    """Saves what several ranks hold together; all of them must make one, and call it alike.

    The ranks agree in a process group of their own, so that training can go on meanwhile.

    Args:
        store: of the run.
        is_first: whether this is rank 0.
    """

    def __init__(self, store: CheckpointStore[Any], *, is_first: bool) -> None:
        self._store = store
        self._is_first = is_first
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)  # this rank is in it
        self._group = group

    def save(self, state: dict[str, Any], *, step: int, validation_loss: float | None = None) -> Place | None:
        """Write this rank's parts; see `CheckpointStore.save`.

        Args:
            state: as there, with a `Part` for each tensor that ranks share.
            step: steps done.
            validation_loss: of the same weights; None where it was not measured at this step.

        Returns:
            The checkpoint's place on rank 0, None elsewhere.

        Raises:
            OSError: one of the ranks could not write; on all of them.
        """
        plain, parts = without_parts(state)
        new, failure = None, None
        if self._is_first:
            try:
                new = self._store.begin(step)
            except OSError as error:
                failure = error
        self._agree(failure)
        try:
            try:
                dcp.save(
                    {name: part.of for name, part in parts.items()},
                    storage_writer=_Writer(new),
                    planner=_Planner(parts),
                    process_group=self._group,
                )
            except CheckpointException as error:
                raise _as_os_error(error) from error
            if new is not None:
                try:
                    new.finish(plain, validation_loss=validation_loss)
                    self._store.remove_old()
                except OSError as error:
                    failure = error
            self._agree(failure)
        except OSError:
            if new is not None:
                new.abandon()
            raise
        return None if new is None else new.place

    def _agree(self, failure: OSError | None) -> None:
        """Raise rank 0's failure on every rank."""
        box = [None if failure is None else (failure.errno or errno.EIO, failure.strerror or str(failure))]
        dist.broadcast_object_list(box, src=0, group=self._group)
        if box[0] is not None:
            raise OSError(*box[0])


@dataclass(frozen=True)
class _Share:
    """What the first rank tells another one: which file it writes, and where."""

    rank: int
    folder: Any


class _Writer(StorageWriter):
    """One checkpoint's shards, as DCP's storage; every rank has one, rank 0's has the checkpoint.

    Args:
        new: the checkpoint; None on all ranks but 0.
    """

    def __init__(self, new: NewCheckpoint | None) -> None:
        self._new = new

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""
        assert is_coordinator == (self._new is not None)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As DCP has it."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell every rank its file."""
        assert self._new is not None
        folder = self._new.partial
        return [
            dataclasses.replace(plan, storage_data=_Share(rank, folder)) for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's parts one after the other into one file."""
        share: _Share = plan.storage_data
        name = f"shard-{share.rank:05d}.bin"
        written: list[WriteResult] = []

        def write(file: BinaryIO) -> None:
            start = 0
            for item in plan.items:
                data = planner.resolve_data(item)
                assert isinstance(data, torch.Tensor)
                content = _bytes_of(data)
                file.write(content)
                where = Stored(name, start, len(content))
                written.append(WriteResult(item.index, len(content), where))
                start += len(content)

        digest = write_file(share.folder / name, write)
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(MetadataIndex(""), 0, (name, digest)), *written])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write what lies where, on rank 0, when all ranks have written."""
        assert self._new is not None
        places: dict[MetadataIndex, Stored] = {}
        for summed, *written in results:
            self._new.add_written(*summed.storage_data)
            places |= {result.index: result.storage_data for result in written}
        index = {
            name: {
                "dtype": str(tensor.properties.dtype).removeprefix("torch."),
                "shape": list(tensor.size),
                "chunks": [
                    {
                        "offset": list(chunk.offsets),
                        "shape": list(chunk.sizes),
                        **dataclasses.asdict(places[MetadataIndex(name, chunk.offsets)]),
                    }
                    for chunk in tensor.chunks
                ],
            }
            for name, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        self._new.add(INDEX, json.dumps(index).encode())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """None is given to DCP."""
        return False


class _Planner(DefaultSavePlanner):
    """Takes the copies that were made when the checkpoint was begun for what the tensors hold by now."""

    def __init__(self, parts: dict[str, Part]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = parts

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._parts[index.fqn].copy


def _as_os_error(error: CheckpointException) -> OSError:
    """What kept a rank from writing; anything but the system's own refusal is a mistake and stays as it is."""
    for rank, (cause, _) in sorted(error.failures.items()):
        if not isinstance(cause, OSError):
            raise error
        reason = cause.strerror or str(cause)
        return OSError(cause.errno or errno.EIO, f"rank {rank}: {reason}")
    raise error


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in host memory."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
