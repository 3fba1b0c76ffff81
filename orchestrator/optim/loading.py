"""Loading a state_dict: what is of another optimizer or of other tensors is refused before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from orchestrator.optim.wide_state import restore_wide_state

# What a group of an optimizer with slow weights has, a `Lookahead`'s too.
CYCLE = "sync_every"
# Torch adds it to the defaults of an optimizer that has loaded something, but not to its groups.
ADDED_BY_TORCH = "differentiable"


def load_with_wide_state(
    optimizer: torch.optim.Optimizer,
    state_dict: Any,
    *,
    load: Callable[[dict[str, Any]], None],
    only: str | None = None,
) -> None:
    """Load as torch does, but leave the float32 state of 16-bit parameters in float32.

    Args:
        optimizer: whose state is loaded.
        state_dict: as its user hands it over; hooks may make another one of it.
        load: torch's `load_state_dict` of the optimizer.
        only: name of the one tensor of a state that is in float32; None for all.

    Raises:
        ValueError: it is no state_dict of an optimizer.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        found = (
            ", ".join(map(repr, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        )
        raise ValueError(
            f"a state_dict of an optimizer has 'state' and 'param_groups', got {found or 'nothing'}"
        )
    loaded: list[dict[str, Any]] = []
    handle = optimizer.register_load_state_dict_pre_hook(lambda _, final: loaded.append(final))
    try:
        load(dict(state_dict))
    finally:
        handle.remove()
    restore_wide_state(optimizer, loaded[0], only=only)


def check_settings_of(
    optimizer: str, group: dict[str, Any], *, own_group: dict[str, Any], settings: Iterable[str]
) -> None:
    """Raise ValueError if a group that is loaded was another optimizer's.

    Args:
        optimizer: which one loads.
        group: what is loaded.
        own_group: what it replaces; it has a cycle of slow weights where `Lookahead` wraps the optimizer.
        settings: names of the optimizer's hyper-parameters.
    """
    missing = [name for name in settings if name not in group and name != ADDED_BY_TORCH]
    if missing:
        raise ValueError(
            f"the state_dict is of another optimizer than {optimizer}: its groups lack {', '.join(missing)}"
        )
    if CYCLE in group and CYCLE not in own_group:
        raise ValueError(
            f"the state_dict is of an optimizer with slow weights, which {optimizer} has not. Load it into that "
            f"one, or into Lookahead({optimizer}(...))"
        )


def check_state_of(weight: Tensor, state: dict[str, Any] | None, *, expected: dict[str, Any]) -> None:
    """Raise ValueError if a state that is loaded is not one of `weight`.

    Args:
        weight: whose state.
        state: what is loaded; None, or without any of the expected names, for a tensor that has made no step.
        expected: as the optimizer makes it for such a tensor, of any values.
    """
    if state is None or not set(expected) & set(state):
        return
    for name, value in expected.items():
        where = f"{name!r} of a parameter of shape {tuple(weight.shape)}"
        if name not in state:
            raise ValueError(f"the state_dict has no {where}")
        found = state[name]
        if isinstance(value, Tensor):
            if not isinstance(found, Tensor) or found.shape != weight.shape:
                what = tuple(found.shape) if isinstance(found, Tensor) else repr(found)
                raise ValueError(f"the state_dict's {where} must be a tensor of that shape, got {what}")
        elif not isinstance(found, int) or isinstance(found, bool) or found < 0:
            raise ValueError(f"the state_dict's {where} must be an integer >= 0, got {found!r}")
