"""The step that LARS, LAMB and the Rangers share: which tensors move, and by which implementation."""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from orchestrator.optim.checks import (
    IMPLEMENTATIONS,
    NONFINITE,
    all_finite,
    check_choice,
    check_distinct,
    check_is_group,
    check_not_empty,
    check_rate,
    refuse_sparse,
)
from orchestrator.optim.fast import fused, multi_tensor
from orchestrator.optim.fast.build import kernel
from orchestrator.optim.fast.items import Item, has_no_data, is_sharded, make_item
from orchestrator.optim.fast.rules import Rule
from orchestrator.optim.loading import check_settings_of, check_state_of, load_with_wide_state
from orchestrator.optim.wide_state import SIXTEEN_BITS

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
"""Tensors, groups, or named tensors: what a torch optimizer takes."""

Implementation = Literal["auto", "reference", "foreach", "fused"]
NonFinite = Literal["propagate", "skip", "raise"]


class AbstractPerTensorOptimizer(torch.optim.Optimizer, abc.ABC):
    """A torch optimizer whose update of one tensor reads nothing of the others.

    A subclass says which hyper-parameters are valid (`check_group`), what it remembers of a tensor
    (`make_state`), and how one tensor moves, twice: as equations (`update_tensor`, the reference) and as
    coefficients for the fast implementations (`rule`). `step` never writes to a gradient. No decision within an
    update depends on the values of a tensor, so a step runs under fake tensors and never waits for a device,
    unless `nonfinite` asks for a look at the gradients.

    State of a tensor is made when its first gradient arrives: plain tensors of its shape and dtype (float32 for
    parameters of 16 bits), and the count of its updates as a Python int under "step".

    Every group has, besides the subclass's hyper-parameters:

        implementation: "reference"; "fused", a kernel compiled at the first step, for float32 on the processor;
            "foreach", torch's operations on lists of tensors; "auto", fused on the processor and foreach
            elsewhere. A tensor that the chosen one cannot take (16 bits, complex, float64 for the kernel, gaps,
            gradients of other strides) is stepped by the reference, and so are all where no kernel can be built;
            `last_step` tells. Fast and reference agree to rounding.
        nonfinite: what a gradient with an infinity or NaN does: "propagate" it; "skip" the whole step, which is
            then counted in `skipped_steps`; "raise" FloatingPointError before anything moves.

    Attributes:
        last_step: how many tensors each implementation stepped in the last step.
    """

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        self.last_step: Counter[str] = Counter()
        name = type(self).__name__
        if isinstance(params, Tensor | str) or not isinstance(params, Iterable):
            raise ValueError(
                f"{name} needs a list of tensors, groups or named tensors, got {type(params).__name__}"
            )
        super().__init__(cast(Any, check_not_empty(name, list(params))), defaults)
        check_not_empty(name, [weight for group in self.param_groups for weight in group["params"]])

    @abc.abstractmethod
    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError, with value and range, if a hyper-parameter of `group` is out of its range."""

    @abc.abstractmethod
    def make_state(self, weight: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Add to `state` what is missing, before `weight` moves; "step" starts at 0."""

    @abc.abstractmethod
    def update_tensor(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Move `weight` and `state` in place by one step along `gradient`, which must not be written to.

        All are real; `state["step"]` counts this step already.
        """

    @abc.abstractmethod
    def rule(self, step: int, group: dict[str, Any]) -> Rule:
        """The same update as coefficients; `step` is the count of updates, this one included, from 1."""

    @property
    def skipped_steps(self) -> int:
        """Steps left out because a gradient was not finite; kept in the state_dict."""
        return max(group["skipped_steps"] for group in self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its hyper-parameters; see `torch.optim.Optimizer.add_param_group`."""
        check_is_group(param_group)
        self._check_settings({**self.defaults, **param_group})
        if not isinstance(param_group["params"], Tensor | set):
            param_group["params"] = list(param_group["params"])
            check_distinct(param_group["params"])
        param_group.setdefault("skipped_steps", 0)
        super().add_param_group(param_group)

    def _check_settings(self, group: dict[str, Any]) -> None:
        check_rate(group["lr"])
        check_choice("implementation", group["implementation"], IMPLEMENTATIONS)
        check_choice("nonfinite", group["nonfinite"], NONFINITE)
        self.check_group(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state, from `load_state_dict` or a pickle, if it is one of this kind of optimizer.

        Raises:
            ValueError: it is not, and nothing has been taken over.
        """
        # Out of a pickle it has neither yet.
        settings = state.get("defaults") or self.defaults
        present = self.__dict__.get("param_groups", state["param_groups"])
        for group, own_group in zip(state["param_groups"], present):
            # From a checkpoint that was written before these settings were there.
            group.setdefault("implementation", "auto")
            group.setdefault("nonfinite", "propagate")
            group.setdefault("skipped_steps", 0)
            check_settings_of(type(self).__name__, group, own_group=own_group, settings=settings)
            self._check_settings(group)
            for weight in group["params"]:
                expected: dict[str, Any] = {}
                self.make_state(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), expected, group)
                check_state_of(weight, state["state"].get(weight), expected=expected)
        super().__setstate__(state)
        self.last_step = Counter()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`; as torch's, but the float32 state of 16-bit parameters stays float32.

        Raises:
            ValueError: it is of another optimizer or of other tensors, or a value is out of its range.
        """
        load_with_wide_state(self, state_dict, load=super().load_state_dict)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # What torch's own optimizers are marked with: within torch.compile a step runs as it is. Traced, it would build
    # its kernel under fake tensors, and be compiled again for every count of updates.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every tensor that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, None without one.

        Raises:
            ValueError: a gradient is sparse; nothing has been updated then.
            FloatingPointError: a gradient is not finite and `nonfinite` is "raise"; likewise.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.last_step = Counter()
        moving = [
            (weight, weight.grad, group)
            for group in map(_with_scalar_rate, self.param_groups)
            for weight in group["params"]
            if weight.grad is not None
        ]
        for weight, _, _ in moving:
            refuse_sparse(type(self).__name__, weight)
        if not self._may_step():
            return loss
        rules: dict[tuple[int, int], Rule] = {}
        chosen_on: dict[tuple[int, torch.device], str] = {}
        fast: dict[str, list[Item]] = {"fused": [], "foreach": []}
        moved_by_kernel: list[Tensor] = []
        for weight, gradient, group in moving:
            state = self.state[weight]
            self.make_state(weight, state, group)
            if "step" in state:
                state["step"] += 1
            chosen = chosen_on.get((id(group), weight.device))
            if chosen is None:
                chosen = chosen_on[id(group), weight.device] = _chosen(group["implementation"], weight.device)
            item = None
            if chosen != "reference":
                key = (id(group), state.get("step", 0))
                if key not in rules:
                    rules[key] = self.rule(key[1], group)
                by_rows = group.get("gradient_centralization", False)
                item = make_item(weight, gradient, state, rules[key], centralized=by_rows)
            if item is None or (chosen == "fused" and not fused.takes(item)):
                chosen = "reference"
                self._update_by_reference(weight, gradient, state, group)
            elif chosen == "foreach" or not has_no_data(weight):
                fast[chosen].append(item)
                if chosen == "fused":
                    moved_by_kernel.append(weight)
            self.last_step[chosen] += 1
        if fast["fused"]:
            fused.step(kernel(), fast["fused"])
            # As torch's operations do: a backward that saved these weights for itself is refused afterwards.
            torch.autograd.graph.increment_version(moved_by_kernel)
        if fast["foreach"]:
            multi_tensor.step(fast["foreach"])
        return loss

    def _may_step(self) -> bool:
        """False where the step is skipped."""
        looked_at = [group for group in self.param_groups if group["nonfinite"] != "propagate"]
        gradients = [
            weight.grad
            for group in looked_at
            for weight in group["params"]
            if weight.grad is not None and not has_no_data(weight)
        ]
        if not gradients or all_finite(gradients):
            return True
        if any(group["nonfinite"] == "raise" for group in looked_at):
            raise FloatingPointError(
                f"{type(self).__name__}: a gradient holds an infinity or NaN. Lower the rate, clip the gradients, "
                "or choose nonfinite='skip'"
            )
        for group in self.param_groups:
            group["skipped_steps"] += 1
        return False

    def _update_by_reference(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """`update_tensor` on real numbers of at least 32 bits."""
        wide = weight.float() if weight.dtype in SIXTEEN_BITS else weight
        gradient = gradient.to(wide.dtype)
        if group.get("gradient_centralization", False):
            gradient = centralized(gradient)
        if weight.is_complex():
            state = {
                key: torch.view_as_real(value) if isinstance(value, Tensor) and value.is_complex() else value
                for key, value in state.items()
            }
            wide, gradient = torch.view_as_real(weight), torch.view_as_real(gradient)
        self.update_tensor(wide, gradient, state, group)
        if weight.dtype in SIXTEEN_BITS:
            weight.copy_(wide)


def _chosen(implementation: Implementation, device: torch.device) -> str:
    if implementation == "reference":
        return "reference"
    if implementation == "foreach" or (implementation == "auto" and device.type not in ("cpu", "meta")):
        return "foreach"
    return "fused" if kernel().functions is not None else "reference"


def _with_scalar_rate(group: dict[str, Any]) -> dict[str, Any]:
    """The group, with a rate of no dims where it is a tensor of one element."""
    lr = group["lr"]
    return {**group, "lr": lr.reshape(())} if isinstance(lr, Tensor) and lr.ndim else group


def centralized(gradient: Tensor) -> Tensor:
    """The gradient without its mean over all dims but the first; vectors and scalars as they are.

    Reference: Yong et al., 2020, arXiv 2004.01461, equation 1.
    """
    if gradient.ndim <= 1:
        return gradient
    without_mean: Any = gradient - torch.mean(gradient, dim=tuple(range(1, gradient.ndim)), keepdim=True)
    if is_sharded(gradient):
        # Of uneven shards torch makes a whole tensor on every rank.
        return without_mean.redistribute(placements=cast(Any, gradient).placements)
    return without_mean


def move(weight: Tensor, direction: Tensor, rate: float | Tensor) -> None:
    """weight <- weight - rate direction, in place; a rate that is a tensor is not read."""
    if isinstance(rate, Tensor):
        weight.addcmul_(direction, rate.reshape(()).to(weight.device, weight.dtype), value=-1)
    else:
        weight.sub_(direction, alpha=rate)
