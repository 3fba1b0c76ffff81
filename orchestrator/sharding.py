"""How the ranks of a run share a model: DDP, or FSDP2 with or without freeing gathered blocks after forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from orchestrator.checkpoint_shards import SavedTensor
from orchestrator.failures import CheckpointError
from planner.inputs.strict import WorkloadError

Sharding = Literal["ddp", "fsdp", "fsdp_keep"]


def data_parallel(module: nn.Module) -> nn.Module:
    """Wrap for data parallelism, with gradient buckets that stay as they are from the first step on.

    By default DDP makes its buckets anew in the second step of a process. With three or more ranks the sums then
    round differently, so a resumed run would leave the undisturbed one in the last bit. Looking for unused
    parameters keeps the buckets; the look costs nothing where the plan's step is one node of autograd.
    """
    return DistributedDataParallel(module, gradient_as_bucket_view=True, find_unused_parameters=True)


def shard(
    root: nn.Module, *, blocks: Sequence[str], reshard_after_forward: bool, device: torch.device
) -> nn.Module:
    """Shard the parameters of each block, and of the root the rest, over all ranks in dim 0 (FSDP2).

    A block is gathered when its forward or backward begins. The root is gathered from the beginning of forward to
    the end of backward: to free it in between would only fetch it back at once.

    Args:
        root: module that the step calls; changed in place.
        blocks: names of the modules below it that are gathered one by one; () gathers everything together.
        reshard_after_forward: free a block's parameters between its forward and its backward.
        device: of this rank.

    Returns:
        The root.

    Raises:
        WorkloadError: a parameter cannot be sharded.
    """
    for name, parameter in root.named_parameters():
        if parameter.ndim == 0:
            raise WorkloadError(
                f"the parameter {name!r} is a scalar, which has no dim to shard; give it the shape [1], or set "
                "train.sharding to ddp"
            )
        if not parameter.is_contiguous():
            raise WorkloadError(
                f"the parameter {name!r} is not contiguous and cannot be sharded; call .contiguous() where the "
                "model makes it, or set train.sharding to ddp"
            )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for name in blocks:
        fully_shard(root.get_submodule(name), mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(root, mesh=mesh, reshard_after_forward=False)
    return root


def is_sharded(module: nn.Module) -> bool:
    """Whether any part of a module is under FSDP2."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


@contextlib.contextmanager
def without_reduction(module: nn.Module) -> Iterator[None]:
    """Backward inside adds to this rank's own gradients, which the next backward outside will reduce."""
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
        return
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_requires_gradient_sync(True, recurse=False)


def free_gathered(module: nn.Module) -> None:
    """Free what a forward without a backward has left gathered."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def sharded_like(tensor: torch.Tensor | SavedTensor, like: DTensor, *, what: str) -> DTensor:
    """This rank's part of a tensor, whole or in a checkpoint, laid out like a sharded one.

    Raises:
        CheckpointError: the shapes differ, or the layout is none of FSDP2's.
    """
    if tensor.shape != like.shape:
        raise CheckpointError(
            f"the checkpoint has {what} with shape {list(tensor.shape)}, this model needs {list(like.shape)}; "
            "resume with the model and optimizer of the run"
        )
    (placement,) = like.placements
    if not isinstance(placement, Shard | Replicate):
        raise CheckpointError(f"{what} is laid out as {placement}, which cannot be restored")
    if isinstance(tensor, SavedTensor):
        own = torch.empty_like(like.to_local(), dtype=tensor.dtype)
        sharded = DTensor.from_local(
            own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        tensor.read_into(sharded)
        return sharded
    part = tensor
    if isinstance(placement, Shard):
        parts = tensor.chunk(like.device_mesh.size(), placement.dim)
        rank = like.device_mesh.get_local_rank()
        part = parts[rank] if rank < len(parts) else tensor.narrow(placement.dim, 0, 0)
    own = torch.empty_like(part, device=like.device, memory_format=torch.contiguous_format).copy_(part)
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def model_state_like(saved: Mapping[str, Any], live: Mapping[str, Any]) -> dict[str, Any]:
    """A saved model state, sharded where the live one is."""
    return {name: _like(value, live.get(name), what=name) for name, value in saved.items()}


def optimizer_state_like(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A saved optimizer state, sharded where the parameters of the live optimizer are.

    Raises:
        CheckpointError: a tensor of a sharded parameter's state is neither a scalar nor of its shape.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    of_number = dict(zip(numbers, parameters, strict=False))
    state = {
        number: {
            key: _like(value, of_number.get(number), what=f"{key!r} of parameter {number}")
            for key, value in entries.items()
        }
        for number, entries in saved["state"].items()
    }
    return {**saved, "state": state}


def _like(value: Any, live: Any, *, what: str) -> Any:
    """A saved value as a rank needs it: the part of a tensor that it shares, all of any other."""
    is_tensor = isinstance(value, SavedTensor) or (isinstance(value, torch.Tensor) and value.ndim > 0)
    if isinstance(live, DTensor) and is_tensor:
        return sharded_like(value, live, what=what)
    return value.whole() if isinstance(value, SavedTensor) else value
