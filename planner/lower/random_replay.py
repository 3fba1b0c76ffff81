"""Random operations: drawn as eager draws them, and again, from the generator state of their first run."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, library
from torch.utils import _pytree as pytree

# On a call that draws random numbers: the call before it that saves the state of the generator.
STATE = "lowtide_generator_state"
_PROBABILITIES = ("dropout_p",)
_MASK = "lowtide::bernoulli_like"


@library.custom_op(_MASK, mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def bernoulli_like(like: torch.Tensor, p: float) -> torch.Tensor:
    """Zeros and ones in the layout of a tensor, each one with probability p: ``empty_like(like).bernoulli_(p)``.

    Writing numbers into a tensor fills it in the order of its memory. The functional ``aten.bernoulli.p`` makes a
    contiguous one, and so draws other numbers where the layout is another.
    """
    return torch.empty_like(like).bernoulli_(p)


@bernoulli_like.register_fake
def _(like: torch.Tensor, p: float) -> torch.Tensor:
    return torch.empty_like(like)


def _bernoulli_p(
    like: torch.Tensor, p: float = 0.5, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    return NotImplemented if generator is not None else bernoulli_like(like, p)


# What a trace writes in place of operators that draw other numbers than eager.
AS_EAGER_DRAWS = {torch.ops.aten.bernoulli.p: _bernoulli_p}


def generator_state(device: str) -> torch.Tensor:
    """A copy of the state of a device's default generator: a uint8 tensor [bytes] on the CPU.

    Args:
        device: type of the device; the current one of its type is asked.
    """
    if device == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state()


def replay(state: torch.Tensor, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function as if the generator of a device were in an earlier state; the generator does not move.

    Args:
        state: from `generator_state`.
        function: an operator that draws from the default generator of the device of its outputs.
        args: its arguments.
        kwargs: its named arguments; ``replayed_device`` is the type of that device.
    """
    device = kwargs.pop("replayed_device")
    before = generator_state(device)
    _set_state(device, state)
    try:
        return function(*args, **kwargs)
    finally:
        _set_state(device, before)


def _set_state(device: str, state: torch.Tensor) -> None:
    if device == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state)


def draws(call: fx.Node) -> bool:
    """Whether a call moves the default generator of its device."""
    if torch.Tag.nondeterministic_seeded not in getattr(call.target, "tags", ()):
        return False
    schema = call.target._schema  # type: ignore[union-attr]
    for position, argument in enumerate(schema.arguments):
        if argument.name in _PROBABILITIES:
            given = call.args[position] if position < len(call.args) else call.kwargs.get(argument.name, 0.0)
            return not (isinstance(given, int | float) and given == 0)
    return True


def can_replay(call: fx.Node) -> bool:
    """Whether a call draws from the default generator and from nothing else."""
    return draws(call) and not call.target._schema.is_mutable and call.kwargs.get("generator") is None  # type: ignore[union-attr]


def draw_like_sources(module: fx.GraphModule) -> None:
    """Masks take their layout from the tensor that an ``empty_like`` before them took it from."""
    for call in module.graph.nodes:
        if call.target is bernoulli_like._opoverload:
            like = call.args[0]
            if like.target is torch.ops.aten.empty_like.default and "memory_format" not in like.kwargs:
                call.args = (like.args[0], *call.args[1:])


def save_states(module: fx.GraphModule) -> None:
    """Before every call in forward that can be replayed, write one that saves the generator's state.

    The state is a value of the step like any other: it lives as long as the call may run again.

    Args:
        module: a joint graph with fake tensors in its metadata; changed in place.
    """
    for call in list(module.graph.nodes):
        if call.op != "call_function" or call.meta.get("partitioner_tag") == "is_backward":
            continue
        if STATE in call.meta or not can_replay(call):
            continue
        tensors = [t for t in pytree.tree_leaves(call.meta["val"]) if isinstance(t, torch.Tensor)]
        device = tensors[0].device.type
        with module.graph.inserting_before(call):
            state = module.graph.call_function(generator_state, (device,))
        state.meta["val"] = _fake_state(tensors[0], device)
        for key in ("nn_module_stack", "fwd_nn_module_stack"):
            if key in call.meta:
                state.meta[key] = call.meta[key]
        call.meta[STATE] = state


def state_bytes(device: str) -> int:
    """Bytes of memory of the planned device that a saved state takes; the CPU's memory is none of a GPU's."""
    return torch.get_rng_state().nbytes if device == "cpu" else 0


def _fake_state(like: torch.Tensor, device: str) -> torch.Tensor:
    with like.fake_mode:  # type: ignore[attr-defined]
        return torch.empty(state_bytes(device), dtype=torch.uint8)
