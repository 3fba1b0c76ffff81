"""The largest batch in 16 GB at no more than one extra forward, cost in FLOP, beside the figures of Checkmate.

    python -m tests.bench.largest_batch [--time-limit 10] [--out results.json]

U-Net and MobileNet are the published graphs with their published costs, whose bytes and costs are proportional to
the batch: memory there is activations and gradients of activations, as the graphs list them. VGG19 is captured from
torchvision: memory is that and the parameters, their gradients and the batch, in bytes of PyTorch's allocator.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cost_models.work import Work
from planner.bare_graph import read_bare_graph
from planner.costed import CostedGraph, annotate
from planner.graph import Graph
from planner.prepared import Prepared
from planner.problem import Problem
from planner.report.text_table import text_table
from planner.simulate import Trace
from planner.solution import Solution
from planner.tradeoff.largest_batch import AllowedTime, largest_batch

INSTANCES = Path(__file__).resolve().parents[3] / "shared" / "instances"
BUDGET = "16GB"
# Samples of the published graph, and the published largest batches: Checkmate, and everything retained.
PUBLISHED = {"u-net": (32, 61, 16), "mobilenet": (512, 1105, 217), "vgg19": (16, 289, 167)}


class FlopCount:
    """A cost model that counts floating-point operations."""

    def time_s(self, work: Work) -> float:
        """FLOP in place of seconds."""
        return work.flop


def extra_time(problem: Problem, solution: Solution, trace: Trace, retained_all: Trace) -> dict[str, Any]:
    """What a row of the table says of a plan."""
    step_s = problem.costed.step_s
    return {
        "peak_bytes": trace.peak_bytes,
        "extra_time_fraction": (trace.time_s - step_s) / step_s,
        "solver": solution.solver,
    }


def of_instance(name: str, samples: int) -> Callable[[int], Prepared[Any]]:
    """The published graph with another batch; its costs become FLOP."""
    costed = read_bare_graph(INSTANCES / f"{name}.json")

    def prepare(size: int) -> Prepared[Any]:
        nodes = tuple(
            dataclasses.replace(node, work=dataclasses.replace(node.work, flop=time_s * size / samples))
            for node, time_s in zip(costed.graph.nodes, costed.time_s, strict=True)
        )
        values = tuple(
            dataclasses.replace(value, size_bytes=value.size_bytes * size // samples)
            for value in costed.graph.values
        )
        graph = annotate(Graph(nodes, values), FlopCount())
        return Prepared.of(Problem(graph, 0), hardware=None, written=extra_time)

    return prepare


def vgg19(size: int) -> Prepared[Any]:
    """VGG19 of torchvision at 224 x 224, captured without memory."""
    import torch
    import torch.nn.functional as F
    import torchvision

    from planner.lower.fakes import building_without_memory
    from planner.prepare import prepare
    from planner.step import StepModule

    with building_without_memory():
        model = StepModule(torchvision.models.vgg19(), F.cross_entropy).train()
        batch = torch.randn(size, 3, 224, 224), torch.randint(0, 1000, (size,))
    captured = prepare(model, batch, hardware="a100-40gb")
    costed: CostedGraph = annotate(captured.problem.costed.graph, FlopCount())
    problem = dataclasses.replace(captured.problem, costed=costed)
    return Prepared.of(problem, hardware=None, written=extra_time)


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds of one search")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, (samples, published, retained_all) in PUBLISHED.items():
        found = largest_batch(
            vgg19 if name == "vgg19" else of_instance(name, samples),
            size=samples,
            budget=BUDGET,
            allowed=AllowedTime.parse("forward"),
            cost_model=FlopCount(),
            solver="auto",
            time_limit_s=options.time_limit,
        )
        rows.append(
            {
                "graph": name,
                "largest_batch": found.size,
                "checkmate": published,
                "everything_retained": retained_all,
                **found.plan,
                "one_more": found.refused.reason,
                "proven": found.refused.proven,
            }
        )
    table = [
        (
            r["graph"],
            str(r["largest_batch"]),
            str(r["checkmate"]),
            f"{r['extra_time_fraction']:.1%}",
            r["one_more"],
        )
        for r in rows
    ]
    print("\n".join(text_table(("graph", "ours", "Checkmate", "extra time", "one sample more"), table)))
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
