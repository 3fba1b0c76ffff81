"""LookAhead: slow weights that follow the fast ones of any optimizer every few steps."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor

from orchestrator.optim.checks import check_choice, check_count, check_is_group, check_share
from orchestrator.optim.fast import multi_tensor
from orchestrator.optim.fast.items import local_part
from orchestrator.optim.loading import check_settings_of, check_state_of, load_with_wide_state
from orchestrator.optim.per_tensor import AbstractPerTensorOptimizer
from orchestrator.optim.wide_state import copy_of

SLOW = "slow"
COUNT = "lookahead_step"
IMPLEMENTATIONS = ("auto", "reference", "foreach")


def check_lookahead(group: dict[str, Any]) -> None:
    """Raise ValueError if `sync_every` or `slow_step_size` of `group` is out of its range."""
    check_count("sync_every", group["sync_every"], low=1)
    check_share("slow_step_size", group["slow_step_size"])


def remember_slow_weight(weight: Tensor, state: dict[str, Any]) -> None:
    """Start the slow weights at the present ones, unless they are there; call it before the weight moves."""
    if SLOW not in state:
        state[SLOW] = copy_of(weight)


def synchronize(weight: Tensor, slow: Tensor, *, count: int, group: dict[str, Any]) -> None:
    """After every `sync_every`-th of `count` updates: slow <- slow + a (w - slow), w <- slow."""
    if count % group["sync_every"] == 0:
        slow.lerp_(weight.to(slow.dtype), group["slow_step_size"])
        weight.copy_(slow)


def slow_step(count: int, group: dict[str, Any]) -> float:
    """a in the updates after which `synchronize` acts, 0 in the others."""
    return group["slow_step_size"] if count % group["sync_every"] == 0 else 0.0


@contextlib.contextmanager
def slow_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block the model has its slow weights, as the paper evaluates it; afterwards the fast ones.

    For `Lookahead`, `Ranger` and `RangerLARS`. Costs one temporary copy of the largest tensor, at entry and
    at exit, and a copy of the 16-bit weights in between. Do not step inside.
    """
    fast = _swap_slow_weights(optimizer)
    try:
        yield
    finally:
        _swap_slow_weights(optimizer)
        with torch.no_grad():
            for weight, values in fast:
                weight.copy_(values)


@torch.no_grad()
def _swap_slow_weights(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Exchange slow and fast weights; 16-bit ones, which cannot hold the slow, are overwritten and returned."""
    fast_weights = []
    for weight, state in optimizer.state.items():
        if SLOW in state:
            fast = weight.detach().clone()
            weight.copy_(state[SLOW])
            if state[SLOW].dtype == weight.dtype:
                state[SLOW].copy_(fast)
            else:
                fast_weights.append((weight, fast))
    return fast_weights


class Lookahead(torch.optim.Optimizer):
    """Wrap an optimizer: it makes the fast steps, and every few of them the slow weights follow.

        every `sync_every` steps: slow <- slow + a (w - slow),  w <- slow,   slow starts at w0

    The wrapper and the wrapped optimizer share `param_groups` and `state`: a schedule of either acts on both,
    and the wrapper's state_dict holds all there is, the place within a cycle included. Step the wrapper only.
    The slow weights are made at a tensor's first gradient, so wrapping and then loading weights into the
    model is safe; the cycle of a tensor counts the steps in which it had a gradient.

    State: that of the wrapped optimizer, one tensor (the slow weights), and the count as a Python int.

    Args:
        optimizer: makes the fast steps; any torch optimizer, with state or groups already in it or not.
        sync_every: fast steps between two synchronizations, k in the paper.
        slow_step_size: a, in (0, 1].
        implementation: of the synchronization: "reference", tensor by tensor; "foreach", torch's operations on
            lists of tensors, which leave tensors of 16 bits and complex ones to the reference; "auto", foreach but
            on the processor, where the copy of one tensor after its step finds it in the cache, and lists are 6 %
            slower (ResNet-50's and GPT-2's tensors). The fast steps are the wrapped optimizer's business.

    Attributes:
        last_step: how many tensors each implementation synchronized in the last step.

    Raises:
        ValueError: a hyper-parameter out of its range, or an optimizer with slow weights of its own.

    Reference: Zhang et al., 2019, arXiv 1907.08610, algorithm 1.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        sync_every: int = 6,
        slow_step_size: float = 0.5,
        implementation: Literal["auto", "reference", "foreach"] = "auto",
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"optimizer must be a torch optimizer, got {optimizer!r}")
        if any("sync_every" in group for group in optimizer.param_groups):
            raise ValueError(
                f"{type(optimizer).__name__} has slow weights already: wrap an optimizer without LookAhead"
            )
        own = {"sync_every": sync_every, "slow_step_size": slow_step_size}
        check_lookahead(own)
        check_choice("implementation", implementation, IMPLEMENTATIONS)
        self.optimizer = optimizer
        self.implementation = implementation
        self.last_step: Counter[str] = Counter()
        super().__init__(optimizer.param_groups, {**optimizer.defaults, **own})
        self._share(optimizer)
        optimizer.register_load_state_dict_post_hook(self._share)

    def _share(self, optimizer: torch.optim.Optimizer) -> None:
        """Have the groups and the state of the wrapped optimizer, which are new ones after it has loaded."""
        for group in optimizer.param_groups:
            # A checkpoint of the bare optimizer has no cycle in it: this wrapper's begins with the next step.
            group.setdefault("sync_every", self.defaults["sync_every"])
            group.setdefault("slow_step_size", self.defaults["slow_step_size"])
        self.param_groups = optimizer.param_groups
        self.state = optimizer.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer, and so to this one."""
        check_is_group(param_group)
        check_lookahead({**self.defaults, **param_group})
        param_group.setdefault("sync_every", self.defaults["sync_every"])
        param_group.setdefault("slow_step_size", self.defaults["slow_step_size"])
        if self.param_groups is self.optimizer.param_groups:
            self.optimizer.add_param_group(param_group)
        else:
            # Under construction: torch hands over the wrapped optimizer's own groups, one by one.
            super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One fast step, and a synchronization of every tensor whose cycle is complete.

        Args:
            closure: evaluates the model again and returns the loss; the wrapped optimizer calls it.

        Returns:
            What the wrapped optimizer's step returned.
        """
        self.last_step = Counter()
        first_weights: dict[Tensor, Tensor] = {}
        skipped_before = self._num_skipped()
        if closure is None:
            self._remember_first_weights(first_weights)
            loss = self.optimizer.step()
        else:

            def remembering_closure() -> float:
                # The gradients are there only now, and no weight that gets its first one has moved yet.
                value = closure()
                self._remember_first_weights(first_weights)
                return value

            loss = self.optimizer.step(remembering_closure)
        # Not before the step: torch's optimizers take a state that is not empty for one that they have made.
        for weight, first_weight in first_weights.items():
            self.state[weight][SLOW] = first_weight
        if self._num_skipped() == skipped_before:
            self._synchronize()
        return loss

    def _num_skipped(self) -> int:
        """Steps that the wrapped optimizer has left out; only those of this project count them."""
        return max((group.get("skipped_steps", 0) for group in self.param_groups), default=0)

    def _weights_with_gradient(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    yield weight, group

    def _remember_first_weights(self, first_weights: dict[Tensor, Tensor]) -> None:
        for weight, _ in self._weights_with_gradient():
            if weight not in first_weights and SLOW not in self.state.get(weight, {}):
                first_weights[weight] = copy_of(weight)

    @torch.no_grad()
    def _synchronize(self) -> None:
        due: dict[tuple[float, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        for weight, group in self._weights_with_gradient():
            state = self.state[weight]
            state[COUNT] = state.get(COUNT, 0) + 1
            step = slow_step(state[COUNT], group)
            if not step:
                continue
            if self._takes_lists(weight):
                pair = (local_part(weight.detach()), local_part(state[SLOW]))
                due.setdefault((step, weight.dtype), []).append(pair)
                self.last_step["foreach"] += 1
            else:
                synchronize(weight, state[SLOW], count=state[COUNT], group=group)
                self.last_step["reference"] += 1
        for (step, _), pairs in due.items():
            multi_tensor.synchronize(pairs, step)

    def _takes_lists(self, weight: Tensor) -> bool:
        """Whether a tensor is synchronized in a list, by the choice of the user and by its kind."""
        if self.implementation == "reference" or weight.dtype not in (torch.float32, torch.float64):
            return False
        return self.implementation == "foreach" or weight.device.type not in ("cpu", "meta")

    def __getstate__(self) -> dict[str, Any]:
        own = {"optimizer": self.optimizer, "implementation": self.implementation, "last_step": Counter()}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state, from `load_state_dict` or a pickle, if the wrapped optimizer can go on from it.

        Raises:
            ValueError: it cannot, and nothing has been taken over.
        """
        if "optimizer" in state:  # out of a pickle, or a copy
            super().__setstate__(state)
            self.optimizer.register_load_state_dict_post_hook(self._share)
        else:
            self._load(state["state"], state["param_groups"])

    def _load(self, state: dict[Tensor, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        """Give the wrapped optimizer the new state and the new groups that torch's load_state_dict has made."""
        for group in groups:
            check_lookahead({**self.defaults, **group})
            for weight in group["params"]:
                counts = COUNT in state.get(weight, {})  # not where the first step was skipped
                check_state_of(
                    weight, state.get(weight), expected={SLOW: weight, COUNT: 0} if counts else {SLOW: weight}
                )
        before = {"state": self.optimizer.state, "param_groups": self.optimizer.param_groups}
        try:
            self.optimizer.__setstate__({"state": state, "param_groups": groups})
            for group, own_group in zip(groups, before["param_groups"]):
                # Not before: __setstate__ of torch's optimizers fills in what older checkpoints lack.
                name, settings = type(self.optimizer).__name__, self.optimizer.defaults
                check_settings_of(name, group, own_group=own_group, settings=settings)
        except (KeyError, ValueError):
            self.optimizer.__dict__.update(before)
            raise
        self._share(self.optimizer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`; as torch's, but the float32 state of 16-bit parameters stays float32.

        Raises:
            ValueError: the wrapped optimizer cannot go on from it, or a value is out of its range.
        """
        # An optimizer of torch's keeps its own state as the parameters are.
        only = None if isinstance(self.optimizer, AbstractPerTensorOptimizer) else SLOW
        load_with_wide_state(self, state_dict, load=super().load_state_dict, only=only)
