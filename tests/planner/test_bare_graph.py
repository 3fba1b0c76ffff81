"""Bare cost graphs: what is read, and the sentence for what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner.bare_graph import read_bare_graph
from planner.graph import Phase
from planner.problem import Problem
from planner.simulate import simulate
from planner.solvers.retain_all import retain_all_schedule
from tests.bench.machine import INSTANCES

NODE = {"cost": 1, "bytes": 2}


def bare(*nodes: dict[str, Any], edges: Any = ()) -> str:
    return json.dumps({"nodes": nodes, "edges": list(edges)})


def read(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "graph.json"
    path.write_text(text)
    return read_bare_graph(path)


def flagged(*flags: bool | None) -> str:
    return bare(*({**NODE, "backward": flag} for flag in flags))


def test_each_node_makes_one_value_that_its_edges_read(tmp_path):
    costed = read(tmp_path, bare({"cost": 0.5, "bytes": 3}, NODE, NODE, edges=[[0, 2], [1, 2], [0, 2]]))
    assert [node.inputs for node in costed.graph.nodes] == [(), (), (0, 1)]
    assert [node.outputs for node in costed.graph.nodes] == [(0,), (1,), (2,)]
    assert [value.size_bytes for value in costed.graph.values] == [3, 2, 2]
    assert [node.name for node in costed.graph.nodes] == ["0", "1", "2"]
    assert costed.time_s == (0.5, 1.0, 1.0)
    assert all(node.can_rematerialize for node in costed.graph.nodes)


@pytest.mark.parametrize(
    ("flags", "num_forward"),
    [
        ((False, False, True), 2),
        ((None, True, True), 1),
        ((True, True), 0),
        ((None, None), 2),
        ((False, True, False), 3),
        ((True, None), 2),
    ],
)
def test_backward_begins_at_the_first_flag_where_all_after_it_have_one(tmp_path, flags, num_forward: int):
    graph = read(tmp_path, flagged(*flags)).graph
    assert graph.num_forward == num_forward
    assert {node.phase for node in graph.nodes[num_forward:]} <= {Phase.BACKWARD}


def test_other_keys_are_not_read(tmp_path):
    text = json.dumps({"name": "x", "nodes": [{**NODE, "label": "conv"}], "edges": [], "order": 3})
    assert len(read(tmp_path, text).graph.nodes) == 1


def test_a_whole_number_may_be_written_with_an_exponent(tmp_path):
    costed = read(
        tmp_path, '{"nodes": [{"cost": 1e-3, "bytes": 1e15}, {"cost": 0, "bytes": 1}], "edges": []}'
    )
    assert [value.size_bytes for value in costed.graph.values] == [10**15, 1]


def test_the_peak_is_inputs_and_output_and_what_is_still_needed(tmp_path):
    # 0 (2 B) -> 1 (3 B) -> 3 (1 B), 0 -> 3; 2 (7 B) is read by nobody and gone when it has run.
    # 0: 2; 1: 2 + 3; 2: 2 + 3 + 7; 3: 2 + 3 + 1.
    sizes = (2, 3, 7, 1)
    nodes = [{"cost": 1, "bytes": size} for size in sizes]
    asked = Problem(read(tmp_path, bare(*nodes, edges=[[0, 1], [1, 3], [0, 3]])), 0)
    assert simulate(asked, retain_all_schedule(asked)).timeline_bytes == (2, 5, 12, 6)


@pytest.mark.parametrize("name", ["u-net", "mobilenet", "vgg16", "resnet50", "rl100", "rl250", "rl500"])
def test_published_instances_have_their_published_peak_and_cost(name: str):
    path = INSTANCES / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    stated = json.loads(path.read_text())
    asked = Problem(read_bare_graph(path), 0)
    assert simulate(asked, retain_all_schedule(asked)).peak_bytes == stated["peak_all_retained"]
    assert asked.costed.step_s == stated["total_cost"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not JSON: line 1, column 1"),
        ('{"nodes": [', "not JSON"),
        ("[1]", "must be an object with 'nodes' and 'edges', got a list"),
        ("[" * 100_000, "nested too deeply"),
        ('{"edges": []}', "required key 'nodes' is missing"),
        ('{"nodes": []}', "required key 'edges' is missing"),
        (bare(), "no nodes"),
        (bare({"bytes": 1}), "nodes.0: the required key 'cost' is missing"),
        (bare({"cost": 1}), "nodes.0: the required key 'bytes' is missing"),
        (bare(NODE, {"cost": -1, "bytes": 1}), "nodes.1.cost: .*got -1"),
        (bare({"cost": 1, "bytes": -1}), "nodes.0.bytes: .*got -1"),
        (bare({"cost": float("nan"), "bytes": 1}), "nodes.0.cost: .*finite"),
        (bare({"cost": float("inf"), "bytes": 1}), "nodes.0.cost: .*finite"),
        (bare({"cost": 1, "bytes": 1.5}), "nodes.0.bytes: .*integer, got 1.5"),
        (bare({"cost": True, "bytes": 1}), "nodes.0.cost: .*number, got True"),
        (bare({"cost": 1, "bytes": True}), "nodes.0.bytes: .*integer, got True"),
        (bare({"cost": "1", "bytes": 1}), "nodes.0.cost: .*number, got '1'"),
        (bare({**NODE, "backward": 1}), "nodes.0.backward: .*boolean, got 1"),
        (bare({"cost": 1e308, "bytes": 1}, {"cost": 1e308, "bytes": 1}), "larger unit"),
        (bare({"cost": 1, "bytes": 10**300}), "larger unit"),
        ('{"nodes": [{"cost": 1, "bytes": ' + "9" * 5000 + "}]}", "number that is too long"),
        (bare(NODE, NODE, edges=[[0, 2]]), r"edges.0 is \[0, 2\], but nodes are numbered 0 to 1"),
        (bare(NODE, NODE, edges=[[-1, 1]]), "numbered 0 to 1"),
        (bare(NODE, NODE, edges=[[0, 1, 1]]), "edges.0: .*at most 2"),
        (bare(NODE, NODE, edges=[[0]]), "edges.0: .*at least 2"),
        (bare(NODE, NODE, edges=[[False, True]]), "edges.0.0: .*integer, got False"),
        (bare(NODE, NODE, edges=["01"]), "edges.0: .*list, got '01'"),
        (bare(NODE, NODE, edges=[[1, 1]]), "cycle: 1 -> 1"),
        (bare(NODE, NODE, NODE, edges=[[0, 1], [1, 2], [2, 0]]), "cycle: 0 -> 1 -> 2 -> 0"),
        (bare(NODE, NODE, NODE, edges=[[2, 0]]), "not listed in topological order: .*It has no cycle"),
    ],
)
def test_a_malformed_graph_gets_one_sentence_that_says_where(tmp_path, text: str, complaint: str):
    with pytest.raises(ValueError, match=complaint) as caught:
        read(tmp_path, text)
    assert type(caught.value) is ValueError
    assert str(caught.value).startswith(f"the graph {tmp_path / 'graph.json'}")
    assert len(str(caught.value)) < 600


def test_what_is_no_text_file_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path, complaint in (
        (tmp_path, "Is a directory"),
        (tmp_path / "none.json", "No such file"),
        (tmp_path / "binary", "not UTF-8"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=complaint):
            read_bare_graph(path)
