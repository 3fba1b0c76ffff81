"""Export a module's joint graph, check it against a plan, and compile it under the plan's schedule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch._functorch.aot_autograd import aot_compile_joint_with_descriptors

from planner.capture import export, reading_of
from planner.errors import PlanMismatchError
from planner.lower.executor import Executor
from planner.lower.fakes import fake_mode_of, fake_module, fake_tree
from planner.lower.inductor import executor_of
from planner.lower.other_batch import why_not_smaller
from planner.lower.out_of_memory import explaining
from planner.lower.partition import partition
from planner.lower.signature import device_of, input_words, parameter_words, signature_of
from planner.lower.trace import TORCH_VERSION
from planner.lower.unread_outputs import without_unread
from planner.plan_file import Plan, Signature

Compiled = Callable[[list[torch.Tensor], tuple[Any, ...], dict[str, Any]], Any]


def compile_step(
    model: nn.Module,
    inputs: Any,
    plan: Plan,
    *,
    executor: Executor | None = None,
    replaced: set[str] | None = None,
    other_batch: bool = False,
) -> tuple[list[str], Compiled]:
    """Capture the module once more under fake tensors and compile it under the plan.

    Args:
        model: the module that will run; only its shapes are read here.
        inputs: its inputs, as for `planner.capture.capture` without a loss.
        plan: made for this module, batch and torch.
        executor: makes the function of each half; None for the one that the plan was made for.
        replaced: gets the type names of the outputs that will be None because a graph cannot return them.
        other_batch: the inputs may have other sizes, as long as the plan's schedule keeps its peak on them.

    Returns:
        Names of the parameters and buffers that the function takes, in order; and a function of those tensors
        and the inputs that returns the module's outputs and runs the plan in forward and backward.

    Raises:
        PlanMismatchError: the captured graph is not the plan's.
    """
    with ExitStack() as stack, torch.random.fork_rng(devices=[]):
        mode = fake_mode_of(model, inputs)
        fake = fake_module(model, mode, replaced=replaced)
        fake_inputs = fake_tree(inputs, mode)
        if not other_batch:
            # What the shapes already tell is said in their words, before the capture.
            check_inputs(plan, inputs)
        layouts, name = plan.signature.gradient_layouts, plan.provenance.executor
        joint = export(stack, fake, fake_inputs, gradients=layouts, executor=name)
        reading = reading_of(joint, executor=name)
        found = signature_of(joint, fake, fake_inputs, gradients=layouts, reading=reading)
        if other_batch:
            of_batch = {"inputs": plan.signature.inputs, "model_digest": plan.signature.model_digest}
            found = found.model_copy(update=of_batch)
            difference = why_not_smaller(plan, reading.graph)
            if difference:
                raise PlanMismatchError(f"the batch does not fit the plan: {difference}. Plan for this one.")
        check_signature(plan.signature, found)
        schedule = plan.schedule_of_model()

        def partition_fn(module: Any, joint_inputs: Any, **_: Any) -> Any:
            assert module is joint.graph_module, "the exported graph was changed before the partition"
            return partition(reading, schedule)

        explained = explaining(executor or executor_of(plan), plan)
        run = aot_compile_joint_with_descriptors(
            joint,
            partition_fn=partition_fn,
            fw_compiler=explained,  # pyright: ignore[reportArgumentType]
            bw_compiler=explained,  # pyright: ignore[reportArgumentType]
        )
    names = [*joint.params_spec, *joint.buffers_spec]
    run = without_unread(run, reading, len(joint.params_spec))

    def call(tensors: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return run(*tensors, *args, **kwargs)

    return names, call


def check_model(plan: Plan, model: nn.Module) -> None:
    """Raise PlanMismatchError unless torch, device, parameters and buffers are those of the plan."""
    found = plan.signature.model_copy(
        update={
            "torch_version": TORCH_VERSION,
            "device": device_of(model),
            "parameters": parameter_words(model),
        }
    )
    check_signature(plan.signature, found)


def check_inputs(plan: Plan, inputs: Any) -> None:
    """Raise PlanMismatchError if the inputs are not those of the plan."""
    _first_difference("input", plan.signature.inputs, input_words(inputs))


def check_signature(planned: Signature, found: Signature) -> None:
    """Raise PlanMismatchError with the first difference between two signatures."""
    for name in Signature.model_fields:
        old, new = getattr(planned, name), getattr(found, name)
        if name == "model_digest" and old != new:
            raise PlanMismatchError(
                "the plan was made for another computation: parameters and inputs have the plan's shapes, but the "
                "operations are others: a submodule's mode, a hook, autocast, the layout of an input, or code has "
                "changed. Plan again for the model as it is."
            )
        if isinstance(old, tuple):
            _first_difference(name.removesuffix("s"), old, new)
        elif old != new:
            raise PlanMismatchError(
                f"the plan was made for another {name.replace('_', ' ')}: plan has {old}, here is {new}. "
                "Plan again for this model, batch and torch."
            )


def _first_difference(what: str, old: tuple[str, ...], new: tuple[str, ...]) -> None:
    for a, b in zip(old, new, strict=False):
        if a != b:
            raise PlanMismatchError(
                f"the plan was made for another {what}: plan has {a}, here is {b}. Plan again for this one."
            )
    if len(old) != len(new):
        raise PlanMismatchError(
            f"the plan was made for {len(old)} {what}s, here are {len(new)}. Plan again for this one."
        )
