"""A plan's file explains itself: layers, seconds, and what holds the peak."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import planner
from orchestrator.cli import app
from planner.bare_plan import bare_step
from planner.costed import CostedGraph
from planner.graph import Graph
from planner.just_in_time import just_in_time
from planner.plan_file import Plan, Provenance, Signature, instructions_of
from planner.report.explain import Explanation, LayerRow, explain, explanation_lines
from planner.report.plots import memory_figure, saved
from planner.report.replayed import Replayed, layer_timelines
from planner.simulate import simulate
from planner.solvers.retain_all import RetainAll
from planner.step_table import StepTable
from tests.graphs import chain, priced, problem, training_chain
from tests.models import TinyGPT, token_loss


def with_layers(graph: Graph, layers: list[str]) -> Graph:
    nodes = tuple(
        dataclasses.replace(node, layer=layer) for node, layer in zip(graph.nodes, layers, strict=True)
    )
    return Graph(nodes, graph.values)


def chain_plan() -> Plan:
    """v0 = 5 bytes dropped and made again, v1 = v2 = 1 retained; 3 bytes static; f0 and f1 in a, f2 in b."""
    costed = priced(with_layers(chain((5, 1, 1)), ["a.x", "a.y", "b", "b", "a.y", "a.x"]))
    return plan_of(costed, (1, 2))


def plan_of(costed: CostedGraph, retained: tuple[int, ...]) -> Plan:
    asked = problem(costed, 20, parameter_bytes=3)
    schedule = just_in_time(costed.graph, retained)
    trace = simulate(asked, schedule)
    return Plan(
        graph_hash="", signature=Signature(
            torch_version="2", training=True, device="cpu", inputs=(), parameters=(), model_digest=""
        ),
        provenance=Provenance(
            lowtide_version="0", hardware="host", cost_model="", workspace="", world_size=1, accumulation=1
        ),
        status="optimal", solver="test", gap=0.0, solve_s=0.0, num_nodes=6, num_forward=3, num_loss=0,
        num_forward_values=3, num_loss_values=0, num_rematerialized=1, budget_bytes=20,
        predicted_peak_bytes=trace.peak_bytes, retained_all_peak_bytes=12, static_bytes=3, step_s=6.0,
        extra_time_fraction=1 / 6, peak_owner="b1", instructions=instructions_of(schedule),
        timeline_bytes=trace.timeline_bytes, retained_all_timeline_bytes=trace.timeline_bytes,
        table=StepTable.of(costed),
    )  # fmt: skip


def rows(explanation: Explanation) -> dict[str, LayerRow]:
    return {row.layer: row for row in explanation.rows}


def test_a_layer_is_charged_with_what_it_retains_and_makes_again():
    # f0 5, f1 5+1, f2 1+1, b2 1+1+1; f0 again; b1 reads v1, v0, g2 and makes g1: 1 + 5 + 1 + 1 + 3 static = 11.
    got = rows(explain(chain_plan(), depth=1))
    assert got["a"] == LayerRow(
        "a", 1, 1, 5, 1, 1.0, 4.0, 7
    )  # v1 retained; v0 made again; v0, v1, g1 at the peak
    assert got["b"] == LayerRow("b", 1, 1, 0, 0, 0.0, 2.0, 1)  # v2 retained; g2 at the peak


def test_depth_rolls_layers_up_and_without_one_the_table_stays_short():
    assert list(rows(explain(chain_plan(), depth=2))) == ["a.x", "a.y", "b"]
    assert list(rows(explain(chain_plan(), depth=1))) == ["a", "b"]
    assert list(rows(explain(chain_plan()))) == ["a.x", "a.y", "b"]
    with pytest.raises(ValueError, match="must be 1 or more, got 0"):
        explain(chain_plan(), depth=0)


def test_many_equal_blocks_are_not_rolled_up_into_one_row():
    # Depth 2 has the rows m.layers and m.norm; depth 3 has 32 layers and m.norm.
    layers = [*(f"m.layers.{i}.up" for i in range(32)), "m.norm"]
    graph = chain(tuple(1 for _ in layers))
    costed = priced(with_layers(graph, [*layers, *reversed(layers)]))
    replayed = Replayed(
        chain_plan(),
        costed,
        chain_plan().schedule,
        simulate(problem(costed, 0), just_in_time(costed.graph, ())),
    )
    assert len(set(replayed.groups(None))) == 33


def test_the_owners_of_the_peak_sum_to_it():
    explanation = explain(chain_plan(), depth=1)
    assert explanation.owners == (("a", 7), ("static memory", 3), ("b", 1))
    assert explanation.peak_bytes == 11
    largest = explanation.holders[0]
    assert (largest.name, largest.layer, largest.size_bytes) == ("f0", "a.x", 5)


def test_layers_sum_to_the_timeline_at_every_computation():
    plan = chain_plan()
    timelines = layer_timelines(plan, depth=1)
    assert tuple(np.sum(list(timelines.values()), axis=0)) == plan.timeline_bytes
    assert tuple(timelines["static memory"]) == (3,) * 7


@pytest.fixture(scope="module")
def gpt_plan() -> Plan:
    tokens = torch.randint(0, 64, (4, 64))
    return planner.plan(TinyGPT(), (tokens, tokens), loss=token_loss, budget="60% of activations")


def test_a_captured_models_operations_belong_to_its_modules(gpt_plan: Plan):
    table = gpt_plan.table
    assert table is not None
    assert "" not in table.layer_names
    modules = {name for name, _ in TinyGPT().named_modules()}
    assert set(table.layer_names) <= modules | {"loss"}
    layer = dict(zip(table.names, (table.layer_names[i] for i in table.layers), strict=True))
    assert layer["gelu_2"] == layer["gelu_backward"] == "blocks.2"
    assert layer["embedding_dense_backward"] == "embedding"
    assert layer["nll_loss_forward"] == "loss"


def test_an_explanation_sums_to_what_the_plan_promises(gpt_plan: Plan):
    explanation = explain(gpt_plan)
    assert sum(size for _, size in explanation.owners) == gpt_plan.predicted_peak_bytes
    assert sum(row.num_rematerialized for row in explanation.rows) == gpt_plan.num_rematerialized > 0
    again_s = sum(row.rematerialized_s for row in explanation.rows)
    assert again_s == pytest.approx(gpt_plan.extra_time_fraction * gpt_plan.step_s)
    assert sum(row.time_s for row in explanation.rows) == pytest.approx(gpt_plan.step_s)
    timelines = layer_timelines(gpt_plan)
    assert tuple(np.sum(list(timelines.values()), axis=0)) == gpt_plan.timeline_bytes
    assert {row.layer for row in explanation.rows} >= {"blocks.0", "blocks.2", "head", "loss"}
    assert explanation_lines(explanation)[0].split()[:2] == ["layer", "retained"]


def test_explain_needs_neither_torch_nor_the_model(gpt_plan: Plan, tmp_path: Path):
    gpt_plan.save(tmp_path / "plan.json")
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['lowtide', 'explain', 'plan.json', '--json']\n"
        "from orchestrator.cli import main\nmain()"
    )
    root = Path(__file__).resolve().parents[3]
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(root)},
    )
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout)["peak_bytes"] == gpt_plan.predicted_peak_bytes


def command(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["explain", *(str(word) for word in words)])


def test_the_command_prints_a_table_and_draws(gpt_plan: Plan, tmp_path: Path):
    gpt_plan.save(tmp_path / "plan.json")
    result = command(tmp_path / "plan.json", "--depth", "1", "--picture", tmp_path / "memory.png")
    assert result.exit_code == 0, result.output
    assert "blocks" in result.stdout
    assert "held by" in result.stdout
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_a_plan_of_format_1_is_still_read_but_cannot_be_explained(gpt_plan: Plan, tmp_path: Path):
    old = json.loads(gpt_plan.to_json()) | {"format": 1}
    del old["table"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert Plan.load(tmp_path / "old.json").instructions == gpt_plan.instructions
    result = command(tmp_path / "old.json")
    assert result.exit_code == 2
    assert "format 1, which has no table" in result.stderr


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"makers": [0]}, "a size and a maker"),
        ({"time_s": [1.0]}, "one entry for each"),
        ({"ops": [99] * 6}, "not between 0 and"),
        ({"inputs": [[5]] * 6}, "does not fit its table"),
    ],
)
def test_a_table_that_contradicts_the_plan_is_refused(tmp_path: Path, change: dict[str, Any], complaint: str):
    data = json.loads(chain_plan().to_json())
    data["table"] |= change
    (tmp_path / "plan.json").write_text(json.dumps(data))
    result = command(tmp_path / "plan.json")
    assert result.exit_code == 2
    assert complaint in result.stderr


def test_instructions_beyond_the_step_are_refused(tmp_path: Path):
    data = json.loads(chain_plan().to_json())
    for instructions, complaint in (([99], "beyond the 6"), ([0, -90], "frees a value beyond")):
        (tmp_path / "plan.json").write_text(json.dumps(data | {"instructions": instructions}))
        result = command(tmp_path / "plan.json")
        assert result.exit_code == 2
        assert complaint in result.stderr


def test_the_picture_of_memory_has_units_a_budget_and_the_layers():
    figure = memory_figure(chain_plan())
    (axes,) = figure.axes
    assert axes.get_ylabel() == "memory of one rank (B)"
    assert axes.get_xlabel() == "operations of the step (%)"
    assert axes.get_ylim()[0] == 0
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {
        "retained all",
        "plan",
        "budget",
        "static",
        "a.x",
        "a.y",
        "b",
        "peak: " + chain_plan().peak_owner,
    }
    assert saved(figure, "pdf").startswith(b"%PDF")


def test_the_picture_of_a_graph_marks_its_peak_and_lists_no_static_memory(tmp_path: Path):
    path = tmp_path / "graph.json"
    path.write_text(training_chain())
    prepared = bare_step(path)
    budgeted = prepared.budgeted("none")
    plan = prepared.answer(budgeted, RetainAll().solve(budgeted))
    figure = memory_figure(plan)
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"retained all", "plan", "budget", f"peak: node {plan.peak_owner}"}
    (mark,) = (line for line in figure.axes[0].get_lines() if str(line.get_label()).startswith("peak"))
    # 15 B, as in the tests of the command.
    assert np.asarray(mark.get_ydata()).tolist() == [15]
