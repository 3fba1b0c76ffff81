"""Tensors that ranks share, in checkpoints: every rank writes its part, and reads what it will hold.

The division of the work is that of `torch.distributed.checkpoint` (DCP): who writes which part of which tensor, and
which saved parts make up the part that a rank now needs, however many ranks there are. The files are our own, by
DCP's storage interface: bytes of tensors in `shard-RRRRR.bin`, one file a rank, and `shards.json`, which says what
lies where. DCP's own storage keeps that in a pickle, and reading it would run whatever somebody has put there;
here nothing is unpickled.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor
from torch.futures import Future

from orchestrator.checkpoint_files import verify_file
from orchestrator.checkpoint_places import Place, files_at

INDEX = "shards.json"
_SHARED = "lowtide.shared_tensor"


@dataclass(frozen=True)
class Part:
    """One rank's part of a tensor that ranks share.

    Attributes:
        of: the tensor, which says how it is shared.
        copy: what this rank held of it when the checkpoint was begun, in host memory.
    """

    of: DTensor
    copy: torch.Tensor


@dataclass(frozen=True)
class SavedTensor:
    """A tensor in a checkpoint's shards, not read yet.

    Attributes:
        name: in the checkpoint.
        reader: of the checkpoint.
    """

    name: str
    reader: ShardReader

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""
        return self.reader.described(self.name).size

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        return self.reader.described(self.name).properties.dtype

    def read_into(self, tensor: torch.Tensor) -> None:
        """Fill a tensor of this shape; of one that ranks share, this rank's part.

        Raises:
            CheckpointError: a file that it lies in does not match its checksum.
        """
        with warnings.catch_warnings():  # that the ranks do not agree is meant: each reads what it needs
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            try:
                dcp.load({self.name: tensor}, storage_reader=self.reader, no_dist=True)
            except CheckpointException as error:
                (cause, _) = error.failures[0]
                raise cause from error

    def whole(self) -> torch.Tensor:
        """All of it, in host memory."""
        tensor = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        self.read_into(tensor)
        return tensor


def without_parts(state: Any) -> tuple[Any, dict[str, Part]]:
    """A state with a mark in the place of each part, and the parts by name."""
    parts: dict[str, Part] = {}

    def marked(value: Any, name: str) -> Any:
        if isinstance(value, Part):
            parts[name] = value
            return {_SHARED: name}
        if isinstance(value, dict):
            return {key: marked(entry, f"{name}/{key}" if name else str(key)) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(marked(entry, f"{name}/{number}") for number, entry in enumerate(value))
        return value

    return marked(state, ""), parts


def with_saved_tensors(state: Any, reader: ShardReader) -> Any:
    """A state as it was read, with a `SavedTensor` in the place of each mark."""
    if isinstance(state, dict):
        if state.keys() == {_SHARED}:
            return SavedTensor(state[_SHARED], reader)
        return {key: with_saved_tensors(value, reader) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(with_saved_tensors(value, reader) for value in state)
    return state


def with_whole_tensors(state: Any) -> Any:
    """A state with every `SavedTensor` read."""
    if isinstance(state, SavedTensor):
        return state.whole()
    if isinstance(state, dict):
        return {key: with_whole_tensors(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(with_whole_tensors(value) for value in state)
    return state


@dataclass(frozen=True)
class Stored:
    """Where one part of a tensor lies."""

    file: str
    start_bytes: int
    size_bytes: int


class ShardReader(StorageReader):
    """One checkpoint's shards, as DCP's storage.

    Args:
        checkpoint: its place.
    """

    def __init__(self, checkpoint: Place) -> None:
        self._checkpoint = checkpoint
        self._metadata: Metadata | None = None
        self._verified: set[str] = set()

    def described(self, name: str) -> TensorStorageMetadata:
        """Shape and dtype of a tensor."""
        found = self.read_metadata().state_dict_metadata[name]
        assert isinstance(found, TensorStorageMetadata)
        return found

    def reset(self, checkpoint_id: Any = None) -> None:
        """What is known of the checkpoint stays true."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What lies where."""
        if self._metadata is None:
            self._verify(INDEX)
            with files_at(self._checkpoint).reading(self._checkpoint / INDEX) as file:
                self._metadata = _read_index(json.loads(file.read()))
        return self._metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As DCP has it."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As DCP has it."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the saved parts that overlap with what this rank will hold."""
        metadata = self.read_metadata()
        for item in plan.items:
            where = metadata.storage_data[item.storage_index]
            self._verify(where.file)
            with files_at(self._checkpoint).reading(self._checkpoint / where.file) as file:
                file.seek(where.start_bytes)
                content = bytearray(file.read(where.size_bytes))
            tensor = self.described(item.storage_index.fqn)
            offset = item.storage_index.offset
            (chunk,) = (chunk for chunk in tensor.chunks if chunk.offsets == offset)
            part = _tensor_of(content, chunk.sizes, tensor.properties.dtype)
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """None is given to DCP."""
        return False

    def _verify(self, name: str) -> None:
        """Compare a file with its checksum before anything in it is used."""
        if name in self._verified:
            return
        verify_file(self._checkpoint, name)
        self._verified.add(name)


def _read_index(index: dict[str, Any]) -> Metadata:
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, Stored] = {}
    for name, entry in index.items():
        chunks = []
        for chunk in entry["chunks"]:
            offset = torch.Size(chunk["offset"])
            chunks.append(ChunkStorageMetadata(offset, torch.Size(chunk["shape"])))
            places[MetadataIndex(name, offset)] = Stored(
                chunk["file"], chunk["start_bytes"], chunk["size_bytes"]
            )
        properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
        tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
    return Metadata(tensors, storage_data=places)


def _tensor_of(content: bytearray, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A tensor over so many bytes."""
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).view(shape)
