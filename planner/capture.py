"""A module and an example batch -> the joint forward/backward graph of one step, nothing allocated."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._functorch._aot_autograd.schemas import JointWithDescriptors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from planner.capturing.in_place import with_overwrites
from planner.capturing.joint_reader import read_joint
from planner.capturing.kernels import in_kernels
from planner.capturing.reading import Calls, OutputRole, Reading
from planner.capturing.stitch import stitch
from planner.errors import CaptureError
from planner.graph import Graph
from planner.lower.decompositions import decompositions
from planner.lower.fakes import fake_mode_of, fake_module, fake_tree
from planner.lower.signature import call_arguments, describe, signature_of
from planner.lower.tangents import Layouts, layout_of
from planner.lower.trace import (
    TANGENTS_STAY,
    export_joint,
    storage_bytes,
    storage_key,
    tangents_of,
    traced_of,
)
from planner.plan_file import ExecutorName, Signature
from planner.step import StepModule

_HERE = Path(__file__).resolve().parent
_TORCH = Path(torch.__file__).resolve().parent


@dataclass(frozen=True)
class Captured:
    """One captured training step.

    Attributes:
        graph: nodes and storages of forward, loss and backward.
        calls: for each node the FX calls that run for it; None for nodes without one.
        signature: what it was captured from.
        parameter_bytes: parameters and buffers.
        trainable_bytes: parameters that get a gradient.
        batch_bytes: inputs, targets, and the gradient of the loss by itself, which autograd holds.
    """

    graph: Graph
    calls: tuple[Calls, ...]
    signature: Signature
    parameter_bytes: int
    trainable_bytes: int
    batch_bytes: int


def capture(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    executor: ExecutorName = "aten",
) -> Captured:
    """Trace one training step under fake tensors.

    The joint graph comes from AOTAutograd without decompositions, so every operator is the one that eager
    runs. For the executor inductor, operators that it can fuse are taken apart and a node is a fused kernel; the
    loss runs in eager mode all the same. Parameters may be real, fake, or on the meta device; nothing of their size
    is allocated.

    Args:
        model: the module, in training mode.
        batch: with a loss, a pair (inputs, targets); without one, the inputs. Inputs are a tensor, a sequence
            of positional arguments, or a mapping of named ones.
        loss: ``loss(outputs, targets)`` -> scalar; None if the model returns its loss.
        executor: that will run the step.

    Returns:
        The step as plain data.

    Raises:
        CaptureError: the step cannot be traced (data-dependent control flow, nothing to train, a loss that is
            not a scalar); the message names the line.
    """
    inputs, targets = _split_batch(batch, has_loss=loss is not None)
    with ExitStack() as stack, torch.random.fork_rng(devices=[]):
        fake_mode = fake_mode_of(model, batch)
        fake_model = fake_module(model, fake_mode)
        fake_inputs = fake_tree(inputs, fake_mode)
        joint = export(stack, fake_model, fake_inputs, executor=executor)
        reading = reading_of(joint, executor=executor)
        graph, calls = reading.graph, tuple(map(reading.calls_run, range(len(reading.calls))))
        layouts: Layouts = ()
        if loss is None:
            root_bytes = _scalar(reading, model).element_size()
        else:
            fake_targets = fake_tree(targets, fake_mode)
            loss_reading, scalar = _read_loss(stack, joint, reading, loss, fake_targets, fake_mode)
            root_bytes = scalar.element_size()
            layouts = _gradient_layouts(reading, loss_reading)
            if layouts:
                fake_model = fake_module(model, fake_mode)  # the first one has been called
                joint = export(stack, fake_model, fake_inputs, gradients=layouts, executor=executor)
                reading = reading_of(joint, executor=executor)
            graph, calls = stitch(reading, loss_reading, tangents_stay=TANGENTS_STAY)
        signature = signature_of(joint, fake_model, fake_inputs, gradients=layouts, reading=reading)
    tensors = dict.fromkeys((*fake_model.parameters(), *fake_model.buffers()))
    return Captured(
        graph=graph,
        calls=calls,
        signature=signature,
        parameter_bytes=sum(storage_bytes(t) for t in tensors),
        trainable_bytes=sum(p.numel() * p.element_size() for p in fake_model.parameters() if p.requires_grad),
        batch_bytes=_batch_bytes(batch) + root_bytes,
    )


def export(
    stack: ExitStack,
    model: nn.Module,
    inputs: Any,
    *,
    gradients: Layouts = (),
    executor: ExecutorName = "aten",
) -> JointWithDescriptors:
    """Export the joint graph of a module; it can be compiled while the stack is open.

    Args:
        stack: of what must stay while it is compiled.
        model: with fake parameters.
        inputs: fake ones.
        gradients: layouts of the gradients of its outputs; () for the outputs' own.

    Raises:
        CaptureError: as in `capture`.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise CaptureError(
            "there is nothing to train: no parameter of the model requires a gradient. "
            "Unfreeze a parameter, or run the model without a plan."
        )
    args, kwargs = call_arguments(inputs)
    try:
        parts = decompositions() if executor == "inductor" else {}
        return export_joint(stack, model, args, kwargs, gradients=gradients, decompositions=parts)
    except Exception as error:
        raise CaptureError(_explain(error)) from error


def reading_of(joint: JointWithDescriptors, *, executor: ExecutorName) -> Reading:
    """Nodes and values of an exported joint graph: a node is an operation with those in its place, or a kernel."""
    reading = read_joint(traced_of(joint.graph_module))
    return in_kernels(reading) if executor == "inductor" else with_overwrites(reading)


def _batch_bytes(batch: Any) -> int:
    """Bytes of inputs and targets; what is both, as the tokens of a language model, lies there once."""
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    return sum({storage_key(leaf): storage_bytes(leaf) for leaf in leaves}.values())


def _split_batch(batch: Any, *, has_loss: bool) -> tuple[Any, Any]:
    if not has_loss:
        return batch, None
    if not isinstance(batch, Sequence) or len(batch) != 2:
        raise CaptureError(
            f"with a loss the batch must be a pair (inputs, targets), got {type(batch).__name__}"
            + (f" of {len(batch)}" if isinstance(batch, Sequence) else "")
            + ". Pass (inputs, targets), or loss=None for a model that returns its loss."
        )
    return batch[0], batch[1]


def _scalar(reading: Reading, model: nn.Module) -> torch.Tensor:
    """The loss that the module returns: its first differentiable output."""
    first = min(reading.traced.tangents.values(), default=None)
    if first is None or reading.output_vals[first].numel() != 1:
        got = "nothing that has a gradient" if first is None else describe(reading.output_vals[first])
        if isinstance(model, StepModule):
            raise CaptureError(
                f"the loss must be one scalar, it is {got}. Reduce it, for instance with .mean()."
            )
        raise CaptureError(
            f"without loss= the model must return its loss, a scalar; it returns {got}. "
            "Pass loss=, a function of (outputs, targets)."
        )
    return reading.output_vals[first]


class _LossModule(nn.Module):
    """The loss as a module of the model's flat outputs."""

    def __init__(
        self, loss: Callable[[Any, Any], torch.Tensor], out_spec: pytree.TreeSpec, model: Reading
    ) -> None:
        super().__init__()
        self.loss = loss
        self.out_spec = out_spec
        self.views_out = model.views_out

    def forward(self, outputs: list[Any], targets: Any) -> torch.Tensor:
        leaves = list(outputs)
        for index, (root, calls) in self.views_out.items():
            leaves[index] = _viewed(outputs[root], calls)
        return self.loss(pytree.tree_unflatten(leaves[: self.out_spec.num_leaves], self.out_spec), targets)


def _viewed(tensor: torch.Tensor, calls: Sequence[fx.Node]) -> torch.Tensor:
    """The view of a tensor that calls of a graph make, each of the one before."""
    for call in calls:
        args, kwargs = map_arg((call.args, call.kwargs), lambda _, here=tensor: here)
        tensor = call.target(*args, **kwargs)  # type: ignore[operator]
    return tensor


def _gradient_layouts(model: Reading, loss: Reading) -> Layouts:
    """Layouts of the gradients that the loss gives, () where all are those of the outputs."""
    given = {
        f.index: f.node.meta["val"]
        for f in loss.traced.outputs
        if f.role is OutputRole.GRADIENT and f.node is not None
    }
    layouts = []
    for tangent in tangents_of(model.traced.module):
        gradient = given.get(model.traced.tangents.get(tangent))
        layout = "" if gradient is None else layout_of(gradient)
        layouts.append("" if layout == layout_of(tangent.meta["val"]) else layout)
    return tuple(layouts) if any(layouts) else ()


def _read_loss(
    stack: ExitStack,
    joint: JointWithDescriptors,
    reading: Reading,
    loss: Callable[[Any, Any], torch.Tensor],
    targets: Any,
    mode: FakeTensorMode,
) -> tuple[Reading, torch.Tensor]:
    """The loss as a function of the model's outputs, as eager runs it; and its value."""
    differentiable = set(reading.traced.tangents.values())
    with mode:
        outputs = [
            torch.empty_strided(tuple(v.shape), v.stride(), dtype=v.dtype, device=v.device).requires_grad_(
                index in differentiable
            )
            if isinstance(v, torch.Tensor)
            else v
            for index, v in enumerate(reading.output_vals)
        ]
    try:
        loss_joint = export_joint(
            stack, _LossModule(loss, joint.out_spec, reading), (outputs, targets), {}, root="loss"
        )
    except Exception as error:
        raise CaptureError(_explain(error, part="loss")) from error
    loss_reading = read_joint(traced_of(loss_joint.graph_module))
    values = [v for v in loss_reading.output_vals if isinstance(v, torch.Tensor)]
    if len(values) != 1 or values[0].numel() != 1:
        raise CaptureError(
            f"the loss must be one scalar, got {[describe(v) for v in loss_reading.output_vals]}. "
            "Reduce it, for instance with .mean()."
        )
    return loss_reading, values[0]


def _explain(error: Exception, *, part: str = "model") -> str:
    """One sentence: what stopped the trace, on which line of the user's code, and what to do."""
    place = ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename).resolve()
        if _TORCH not in file.parents and _HERE not in file.parents and file.exists():
            place = f" at {frame.filename}:{frame.lineno} ({(frame.line or '').strip()})"
            break
    cause = str(error).strip().split("\n")[0][:300]
    hint = (
        "The step depends on the values of tensors (data-dependent control flow); compute with torch.where or "
        "masks, or move the decision out of the module."
        if any(
            word in type(error).__name__
            for word in ("DataDependent", "DynamicOutputShape", "GuardOn", "UserError")
        )
        or "data-dependent" in cause
        else "Run one step of it without a plan first; if that works, this is worth a report."
    )
    return f"the {part} cannot be captured{place}: {type(error).__name__}: {cause}. {hint}"
