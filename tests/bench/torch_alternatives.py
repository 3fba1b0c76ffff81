"""What torch offers a step that needs less memory, each beside a plan for the peak that it has.

Plain, an alternative and ours take turns; ours is planned with the alternative's measured peak as its budget.
"""

from __future__ import annotations

import copy
import functools
import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import checkpoint

from planner.checking.calibrated import Calibrated, calibrated_plan
from planner.checking.compare import first_difference
from planner.checking.node_times import with_measured_times
from planner.checking.real_step import Left, RealStep, Running
from planner.errors import InfeasibleError
from planner.inputs.workload import SolverSpec
from planner.lower.trace import pytree
from planner.plan_file import Plan
from planner.prepare import prepare
from planner.prepared import Prepared
from tests.bench.zoo import on_device
from tests.bench.zoo_models import zoo_step

AMB, CHECKPOINT, PLAIN, OURS = "activation_memory_budget", "checkpoint", "plain", "ours"
# Tried in this order in place of a ratio whose peak is that of one before.
OTHER_RATIOS = (0.65, 0.35, 0.1, 0.9)
EVERY = (1, 2, 3)
# Peaks closer than this share are one budget.
SAME_PEAK = 0.001


@dataclass(frozen=True)
class Blocks:
    """A model of the zoo whose repeated blocks can be checkpointed.

    Attributes:
        class_name: of the blocks.
        config: for the zoo. Dropout is off in all: a step that draws the same numbers twice is another subject.
    """

    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)


MODELS: Mapping[str, Blocks] = MappingProxyType(
    {
        "resnet50": Blocks("Bottleneck"),
        "densenet121": Blocks("_DenseLayer"),
        "convnext": Blocks("ConvNeXtBlock"),
        "vit": Blocks("Block"),
        # At the zoo's batch of 8 its peak is that of the gradients alone.
        "mlp_mixer": Blocks("MixerBlock", {"batch_size": 32}),
        "gpt2": Blocks("GPT2Block", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
        "bert": Blocks("BertLayer", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
        "llama": Blocks("LlamaDecoderLayer"),
    }
)


def checkpointed(model: nn.Module, class_name: str, *, every: int) -> nn.Module:
    """A copy whose blocks 0, every, 2 every, ... run under ``torch.utils.checkpoint``, not reentrant.

    There is no dropout, so no generator state is kept for the second run: that is the quicker way.

    Args:
        model: it stays as it is.
        class_name: of the blocks, in the order of ``model.modules()``.
        every: 1 for all blocks.

    Raises:
        ValueError: the model has no such block.
    """
    model = copy.deepcopy(model)
    blocks = [module for module in model.modules() if type(module).__name__ == class_name]
    if not blocks:
        raise ValueError(f"the model has no block of class {class_name!r}. Name one that it has.")
    for block in blocks[::every]:
        block.forward = functools.partial(_checkpoint, block.forward)
    return model


def _checkpoint(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # Containers are copied: densenet lengthens its list of features between the first run and the second.
    args, kwargs = pytree.tree_map(lambda leaf: leaf, (args, kwargs))
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@dataclass
class Partitioned:
    """What the partitioner decided; filled at the first step.

    Attributes:
        saved_bytes: activations that forward hands to backward, parameters and inputs left out.
        num_graphs: joint graphs that were cut; 1 where all of the model was compiled in one piece.
    """

    saved_bytes: int = 0
    num_graphs: int = 0


def activation_budgeted(model: nn.Module, *, ratio: float) -> tuple[nn.Module, Partitioned]:
    """A copy under ``torch.compile`` with ``activation_memory_budget = ratio``; no code is generated.

    Dynamo and AOTAutograd trace it; ``min_cut_rematerialization_partition``, with its default solver ("dp") and
    estimator ("flops"), cuts the joint graph; both halves then run operation by operation, with the code that
    fx writes for a list of arguments that is emptied as it is read: what runs planned modules too. No
    decomposition is asked for, since a kernel made of several would be slower without generated code.

    Args:
        model: it stays as it is.
        ratio: 0 saves nothing but inputs; 1 is the partitioner's default, which rematerializes what inductor
            could fuse.

    Returns:
        The module, which compiles at its first call, and what the partitioner decided then.
    """
    decided = Partitioned()

    def partition(
        joint: fx.GraphModule, inputs: Any, **options: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        with functorch_config.patch(activation_memory_budget=ratio):
            forward, backward = min_cut_rematerialization_partition(joint, inputs, **options)
        decided.num_graphs += 1
        decided.saved_bytes += _saved_bytes(forward, num_outputs=options["num_fwd_outputs"])
        return forward, backward

    # What another model left behind would be looked through at each call.
    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=boxed_nop,
        bw_compiler=boxed_nop,
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )
    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True, dynamic=False)
    assert isinstance(compiled, nn.Module)
    return compiled, decided


def _saved_bytes(forward: fx.GraphModule, *, num_outputs: int) -> int:
    """Bytes of the storages that a forward graph returns beyond its outputs, its own inputs left out."""
    (output,) = forward.graph.find_nodes(op="output")
    saved = [node for node in output.args[0][num_outputs:] if node.op != "placeholder"]
    tensors = [value for node in saved if isinstance(value := node.meta["val"], torch.Tensor)]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@dataclass
class Bench:
    """One model: what all its cells share."""

    name: str
    model: nn.Module
    step: RealStep
    prepared: Prepared[Plan]
    plain: Running
    plain_left: Left
    plain_peak_bytes: int
    solver: SolverSpec
    rounds: int


def bench_of(name: str, *, solver: SolverSpec, rounds: int, device: str) -> Bench:
    """Capture a model, time its operations, and run it once as it is."""
    model, step = on_device(zoo_step(name, config=MODELS[name].config), device)
    prepared = prepare(model, (step.inputs, step.targets), loss=step.loss)
    prepared = with_measured_times(prepared, copy.deepcopy(model), step)
    plain = step.on(copy.deepcopy(model))
    left = plain.measured(seed=0)
    peak_bytes = plain.measured(seed=1).peak_bytes
    return Bench(name, model, step, prepared, plain, left, peak_bytes, solver, rounds)


def rows_of(bench: Bench, ratios: Sequence[float]) -> Iterator[dict[str, Any]]:
    """All cells of one model: plain, checkpointed blocks, the partitioner at 1 and at as many other ratios.

    A ratio whose peak is that of an earlier one is not timed; one of OTHER_RATIOS takes its place.
    """
    yield _cell(bench, PLAIN, "", bench.plain, bench.plain_peak_bytes)
    for every in EVERY:
        module = checkpointed(bench.model, MODELS[bench.name].class_name, every=every)
        setting = "every block" if every == 1 else f"every {every} blocks"
        yield _cell(bench, CHECKPOINT, setting, *_warm(bench.step, module))
    yield _budgeted_cell(bench, 1.0, ())
    peaks: list[int] = []
    for ratio in (*ratios, *(other for other in OTHER_RATIOS if other not in ratios)):
        if len(peaks) < len(ratios):
            row = _budgeted_cell(bench, ratio, peaks)
            if not row.get("same_peak"):
                peaks.append(row["peak_bytes"])
            yield row


def _budgeted_cell(bench: Bench, ratio: float, others: Sequence[int]) -> dict[str, Any]:
    """The partitioner at one ratio; where its peak is one of the others', that alone is said."""
    module, decided = activation_budgeted(bench.model, ratio=ratio)
    running, peak_bytes = _warm(bench.step, module)
    facts = {"ratio": ratio, "saved_bytes": decided.saved_bytes, "num_graphs": decided.num_graphs}
    assert decided.num_graphs == 1, f"{bench.name} was compiled in {decided.num_graphs} pieces"
    if any(abs(peak_bytes - other) <= SAME_PEAK * other for other in others):
        same = {"method": AMB, "setting": f"{ratio:g}", "peak_bytes": peak_bytes, "same_peak": True}
        return {"model": bench.name, **same, **facts}
    return {**_cell(bench, AMB, f"{ratio:g}", running, peak_bytes), **facts}


def _warm(step: RealStep, module: nn.Module) -> tuple[Running, int]:
    """The step on a module and its peak; the first run compiles."""
    running = step.on(module)
    running.timed(seed=0)
    return running, running.measured(seed=1).peak_bytes


def _cell(bench: Bench, method: str, setting: str, theirs: Running, peak_bytes: int) -> dict[str, Any]:
    """Plan within the peak of an alternative, then time plain, the alternative and the plan in turns."""
    row = {"model": bench.name, "method": method, "setting": setting, "peak_bytes": peak_bytes}
    try:
        ours = calibrated_plan(
            bench.prepared, bench.model, bench.step, budget=f"{peak_bytes}B", solver=bench.solver
        )
    except InfeasibleError as error:
        return {**row, "failed": str(error)}
    runs = {PLAIN: bench.plain, OURS: ours.running}
    if theirs is not bench.plain:
        runs[method] = theirs
    seconds = in_turns(runs, rounds=bench.rounds)
    plain_s = statistics.median(seconds[PLAIN])
    return {
        **row,
        "extra": statistics.median(seconds[method]) / plain_s - 1.0,
        "ours_extra": statistics.median(seconds[OURS]) / plain_s - 1.0,
        "plain_peak_bytes": bench.plain_peak_bytes,
        "plain_s": plain_s,
        "seconds": seconds,
        **_ours_object(ours, first_difference(bench.plain_left, ours.first)),
    }


def _ours_object(ours: Calibrated, different: Mapping[str, str]) -> dict[str, Any]:
    plan = ours.plan
    return {
        "ours_peak_bytes": ours.measured_peak_bytes,
        "ours_within": ours.measured_peak_bytes <= plan.budget_bytes,
        "ours_different": {what: name for what, name in different.items() if name},
        "ours_planned_extra": plan.extra_time_fraction,
        "ours_status": plan.status,
        "ours_solver": plan.solver,
        "ours_gap": plan.gap,
        "ours_num_rematerialized": plan.num_rematerialized,
        "ours_plans": ours.rounds,
        "ours_solve_s": plan.solve_s,
    }


def in_turns(runs: Mapping[str, Running], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of every step of each; who begins changes from round to round; the first round is dropped."""
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        gc.collect()
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            taken = runs[name].timed(seed=turn)
            if turn:
                times[name].append(taken)
    return times
