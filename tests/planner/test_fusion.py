"""Kernels in place of operations, on graphs made by hand: sizes in bytes, one byte an element."""

from __future__ import annotations

import random

import pytest

from cost_models.work import Work
from planner.capturing.fusion import fuse
from planner.capturing.loops import ALONE, Loop, Reduced, Role
from planner.graph import Graph, Node, Phase, Value, ValueKind

F, B = Phase.FORWARD, Phase.BACKWARD


def point(num: int) -> Loop:
    return Loop(Role.POINTWISE, num, num)


def row_sum(num_read: int, num_made: int) -> Loop:
    return Loop(Role.REDUCTION, num_read, num_made, Reduced.INNER)


def column_sum(num_read: int, num_made: int) -> Loop:
    return Loop(Role.REDUCTION, num_read, num_made, Reduced.OUTER)


def graph_of(
    *rows: tuple[str, Phase, Loop, int, list[int]], held: tuple[int, ...] = ()
) -> tuple[Graph, list[Loop]]:
    """Node k makes value k: (name, phase, loop, bytes of its value, values read); it does 1 FLOP a byte."""
    nodes, values = [], []
    for index, (name, phase, _, size, inputs) in enumerate(rows):
        read = sum(rows[v][3] for v in inputs)
        work = Work(float(size), read, size, "float32", "elementwise")
        forward = phase is F
        nodes.append(Node(name, f"aten.{name}.default", phase, tuple(inputs), (index,), work, forward))
        kind = ValueKind.GRADIENT if index in held else ValueKind.ACTIVATION
        values.append(Value(name, size, index, kind))
    return Graph(tuple(nodes), tuple(values)), [row[2] for row in rows]


def test_a_chain_between_two_products_is_one_kernel_that_writes_its_end():
    graph, loops = graph_of(
        ("mm", F, ALONE, 8, []),
        ("exp", F, point(8), 8, [0]),
        ("neg", F, point(8), 8, [1]),
        ("mm2", F, ALONE, 8, [2]),
    )
    fused = fuse(graph, loops)
    assert fused.members == ((0,), (1, 2), (3,))
    assert [value.name for value in fused.graph.values] == ["mm", "neg", "mm2"]
    # It reads mm (8 B), writes neg (8 B), and computes both.
    work = fused.graph.nodes[1].work
    assert (work.flop, work.read_bytes, work.written_bytes) == (16.0, 8, 8)
    assert fused.graph.nodes[1].can_rematerialize


def test_what_a_product_reads_is_written_and_what_follows_joins_the_kernel():
    graph, loops = graph_of(
        ("mm", F, ALONE, 8, []),
        ("exp", F, point(8), 8, [0]),
        ("neg", F, point(8), 8, [1]),
        ("mm2", F, ALONE, 8, [1]),
        ("mm3", F, ALONE, 8, [2]),
    )
    fused = fuse(graph, loops)
    assert fused.members == ((0,), (1, 2), (3,), (4,))
    assert [value.name for value in fused.graph.values] == ["mm", "exp", "neg", "mm2", "mm3"]


def test_no_kernel_needs_its_own_result():
    # add reads exp and a product of exp: it cannot run in the kernel of exp.
    graph, loops = graph_of(
        ("mm", F, ALONE, 8, []),
        ("exp", F, point(8), 8, [0]),
        ("mm2", F, ALONE, 8, [1]),
        ("add", F, point(8), 8, [1, 2]),
        ("mm3", F, ALONE, 8, [3]),
    )
    assert fuse(graph, loops).members == ((0,), (1,), (2,), (3,), (4,))


def test_backward_reads_what_a_value_is_made_of_where_that_takes_no_more_bytes():
    # exp comes of mm alone: backward computes it again from mm, 8 B, and neither kernel writes it.
    graph, loops = graph_of(
        ("mm", F, ALONE, 8, []),
        ("exp", F, point(8), 8, [0]),
        ("neg", F, point(8), 8, [1]),
        ("mm2", F, ALONE, 8, [2]),
        ("mm3", B, ALONE, 8, [3]),
        ("mul", B, point(8), 8, [4, 1]),
        held=(5,),
    )
    fused = fuse(graph, loops)
    assert fused.members == ((0,), (1, 2), (3,), (4,), (1, 5))
    assert [value.name for value in fused.graph.values] == ["mm", "neg", "mm2", "mm3", "mul"]
    assert not fused.graph.nodes[4].can_rematerialize


def test_a_sum_of_two_tensors_that_backward_reads_is_written():
    # add comes of two products, 16 B: it takes 8 B.
    graph, loops = graph_of(
        ("mm", F, ALONE, 8, []),
        ("mm2", F, ALONE, 8, []),
        ("add", F, point(8), 8, [0, 1]),
        ("neg", F, point(8), 8, [2]),
        ("mm3", F, ALONE, 8, [3]),
        ("mul", B, point(8), 8, [4, 2]),
        held=(5,),
    )
    fused = fuse(graph, loops)
    assert [value.name for value in fused.graph.values] == ["mm", "mm2", "add", "neg", "mm3", "mul"]
    assert fused.members[2] == (2, 3)


@pytest.mark.parametrize(
    ("reduction", "members"),
    [
        (row_sum(8, 2), ((0,), (1, 2, 3), (4,))),
        # The sums of columns are there only when all rows were read.
        (column_sum(8, 2), ((0,), (1, 2), (1, 3), (4,))),
    ],
)
def test_what_follows_a_sum_of_rows_runs_in_its_kernel(reduction: Loop, members: tuple[tuple[int, ...], ...]):
    graph, loops = graph_of(
        ("mm", F, ALONE, 8, []),
        ("exp", F, point(8), 8, [0]),
        ("sum", F, reduction, 2, [1]),
        ("div", F, point(8), 8, [1, 2]),
        ("mm2", F, ALONE, 8, [3]),
    )
    fused = fuse(graph, loops)
    assert fused.members == members
    names = [value.name for value in fused.graph.values]
    assert names == (
        ["mm", "div", "mm2"] if reduction.reduced is Reduced.INNER else ["mm", "sum", "div", "mm2"]
    )


def test_two_sums_of_the_same_tensor_share_a_kernel():
    graph, loops = graph_of(
        ("mm", B, ALONE, 8, []),
        ("sum", B, column_sum(8, 2), 2, [0]),
        ("sum2", B, column_sum(8, 2), 2, [0]),
        held=(1, 2),
    )
    assert fuse(graph, loops).members == ((0,), (1, 2))


def test_kernels_compute_what_the_operations_compute():
    for seed in range(300):
        graph, loops = _drawn(random.Random(seed))
        fused = fuse(graph, loops)
        made: dict[int, int] = {}
        for node in graph.nodes:
            made[node.outputs[0]] = _apply(node, made)
        memory: dict[int, int] = {}
        for node, members in zip(fused.graph.nodes, fused.members, strict=True):
            # A kernel sees the values that it names, and what it computes itself.
            inside = {fused.values[v]: memory[v] for v in node.inputs}
            for member in members:
                inside[graph.nodes[member].outputs[0]] = _apply(graph.nodes[member], inside)
                assert member == members[-1] or len(members) == 1 or loops[member].role is not Role.ALONE
            memory |= {v: inside[fused.values[v]] for v in node.outputs}
        assert all(memory[v] == made[old] for v, old in enumerate(fused.values))
        held = {v for v, value in enumerate(graph.values) if value.is_held}
        assert held <= set(fused.values)
        assert {m for members in fused.members for m in members} == set(range(len(graph.nodes)))


def _apply(node: Node, values: dict[int, int]) -> int:
    return hash((node.name, *(values[v] for v in node.inputs)))


def _drawn(generator: random.Random) -> tuple[Graph, list[Loop]]:
    """A graph of 40 operations; all that nothing reads is held by the caller."""
    rows: list[tuple[str, Phase, Loop, int, list[int]]] = []
    for index in range(40):
        loop, size = generator.choice(
            [
                (ALONE, 8),
                (point(8), 8),
                (point(8), 8),
                (row_sum(8, 2), 2),
                (column_sum(8, 2), 2),
                (point(2), 2),
            ]
        )
        inputs = sorted({generator.randrange(max(0, index - 8), index) for _ in range(2)} if index else [])
        rows.append((f"n{index}", F if index < 20 else B, loop, size, inputs))
    read = {v for row in rows for v in row[4]}
    return graph_of(*rows, held=tuple(set(range(40)) - read))
