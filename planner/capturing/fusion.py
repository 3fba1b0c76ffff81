"""Which operations of a captured graph a code generator fuses into one kernel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from planner.capturing.fused_graph import Fused, Kernel, fused_graph
from planner.capturing.loops import Loop, Reduced, Role, joint_loop
from planner.graph import Graph

# Operations in one kernel at most, and values that one may read in place of an inlined one.
_MOST_MEMBERS, _MOST_LEAVES = 64, 8
# Operations that may be computed again where their result is read.
_MOST_INLINED = 32
# What is read in place of an inlined value may take this much more than the value: the mean beside a tensor.
_ABOUT = 1.125
# An output this many times smaller than what its operation reads costs nothing to make early.
_SMALL = 8


def fuse(graph: Graph, loops: Sequence[Loop]) -> Fused:
    """Fuse pointwise operations and reductions, greedily and in the order of the graph.

    First, a pointwise result is *inlined* - computed again in each kernel that reads it, never in memory - where
    that costs no memory: its one reader comes next, or what it is made of takes no more bytes than it. Then each
    operation that is left joins the kernel of its last input if the loops fit: equal lengths, or a row's reduction
    and what follows it in the row. Forward and backward are never mixed. A kernel stands where its first operation
    stood, later only where it takes in the kernel of another input; so the order stays one in which every input is
    made before it is read.

    Args:
        graph: operations, forward and backward.
        loops: of each operation.

    Returns:
        The kernels. One can run again where all its operations can.
    """
    builder = _Builder(graph, loops)
    for index in range(len(graph.nodes)):
        builder.decide_inlined(index)
    for index in range(len(graph.nodes)):
        if index not in builder.cones:
            builder.place(index)
    return fused_graph(graph, builder.kernels)


class _Builder:
    def __init__(self, graph: Graph, loops: Sequence[Loop]) -> None:
        self.graph, self.loops = graph, loops
        # Inlined node -> the inlined nodes that it is made of, itself included.
        self.cones: dict[int, frozenset[int]] = {}
        # Number of operations that stand alone before each one.
        self.num_alone = [0]
        for loop in loops:
            self.num_alone.append(self.num_alone[-1] + (loop.role is Role.ALONE))
        self.kernels: list[Kernel] = []
        self.kernel_of: dict[int, int] = {}
        self.readers: dict[int, set[int]] = {}
        self.last_alone = -1

    # -- what is never in memory

    def decide_inlined(self, index: int) -> None:
        """Inline the node if that costs no memory."""
        node, loop = self.graph.nodes[index], self.loops[index]
        if loop.role is not Role.POINTWISE or len(node.outputs) != 1 or node.keeps_place:
            return
        value = self.graph.values[node.outputs[0]]
        users = self.graph.users[node.outputs[0]]
        if value.is_held or not users or any(self.loops[u].role is Role.ALONE for u in users):
            return
        cone = frozenset({index}).union(*(self.cones.get(self._maker(v), frozenset()) for v in node.inputs))
        leaves = self._leaves(cone)
        if len(cone) > _MOST_INLINED or len(leaves) > _MOST_LEAVES:
            return
        reader = self.graph.nodes[users[0]]
        near = (
            len(users) == 1
            and reader.phase is node.phase
            and reader.can_rematerialize == node.can_rematerialize
            and self.num_alone[index] == self.num_alone[users[0]]
        )
        if near or self._bytes(leaves) <= _ABOUT * value.size_bytes:
            self.cones[index] = cone

    def _maker(self, value: int) -> int:
        return self.graph.values[value].node

    def _leaves(self, members: Iterable[int]) -> set[int]:
        """Values that these nodes read and that are not inlined."""
        return {
            v
            for m in members
            for v in self.graph.nodes[m].inputs
            if self._maker(v) not in self.cones and v not in self._made(members)
        }

    def _made(self, members: Iterable[int]) -> set[int]:
        return {v for m in members for v in self.graph.nodes[m].outputs}

    # -- which kernel

    def place(self, index: int) -> None:
        """Put a node with what is inlined into it in a kernel: that of its last input, or one of its own."""
        node, loop = self.graph.nodes[index], self.loops[index]
        inlined = set().union(*(self.cones.get(self._maker(v), frozenset()) for v in node.inputs))
        reads = {
            v
            for m in (index, *inlined)
            for v in self.graph.nodes[m].inputs
            if self._maker(v) not in self.cones
        }
        new = Kernel([index], inlined, reads, loop, loop.role is not Role.ALONE)
        sources = sorted({self.kernel_of[self._maker(v)] for v in reads}, reverse=True)
        at = next((k for k in self._candidates(new, sources) if self._may_join(new, k)), None)
        if at is None:
            at = len(self.kernels)
            self.kernels.append(new)
            if not new.is_free:
                self.last_alone = at
        else:
            self._take_in(at, new)
        self._note(at, new)
        for source in sources:
            if source != at and self._may_delay(source, at):
                self._merge(source, at)

    def _candidates(self, new: Kernel, sources: list[int]) -> list[int]:
        """Kernels that a new one may join: that of its last input; for a sum any later one that reads the same."""
        latest = sources[0] if sources else -1
        found = [latest] if latest >= 0 else []
        if new.loop.role is Role.REDUCTION:
            later = range(len(self.kernels) - 1, max(latest, self.last_alone), -1)
            found += [k for k in later if self.kernels[k].reads & new.reads]
        return found

    def _may_join(self, new: Kernel, at: int) -> bool:
        kernel = self.kernels[at]
        if not self._alike(new, kernel) or joint_loop(kernel.loop, new.loop) is None:
            return False
        inside = self._made(kernel.roots)
        if (
            kernel.loop.reduced is Reduced.OUTER
            and new.loop.num_read > kernel.loop.num_made
            and new.reads & inside
        ):
            return False  # the sum is not there before the kernel has ended
        made_bytes = self._bytes(self._made(new.roots))
        gone = {
            v
            for v in new.reads & inside
            if not self.graph.values[v].is_held and self._unit_readers(v) <= set(new.roots)
        }
        near = self.last_alone < at
        small = _SMALL * made_bytes <= self._bytes(new.reads)
        return near or small or made_bytes <= self._bytes(gone)

    def _unit_readers(self, value: int) -> set[int]:
        """Nodes in memory's order that read a value, directly or through inlined ones."""
        found: set[int] = set()
        stack = list(self.graph.users[value])
        while stack:
            user = stack.pop()
            if user in self.cones:
                stack.extend(u for v in self.graph.nodes[user].outputs for u in self.graph.users[v])
            else:
                found.add(user)
        return found

    def _may_delay(self, source: int, at: int) -> bool:
        """Whether the kernel of an input can run as part of a later one: nothing between them reads its results."""
        a, b = self.kernels[source], self.kernels[at]
        if source > at or self.last_alone > source or not self._alike(a, b):
            return False
        if joint_loop(a.loop, b.loop) is None:
            return False
        made = self._made(a.roots)
        if a.loop.reduced is Reduced.OUTER and b.loop.num_read > a.loop.num_made and made & b.reads:
            return False
        return all(k == source or k >= at for v in made for k in self.readers.get(v, ()))

    def _alike(self, a: Kernel, b: Kernel) -> bool:
        x, y = self.graph.nodes[a.roots[0]], self.graph.nodes[b.roots[0]]
        return (
            a.is_free
            and b.is_free
            and x.phase is y.phase
            and x.can_rematerialize == y.can_rematerialize
            and x.keeps_place == y.keeps_place
            and len(a.roots) + len(a.inlined | b.inlined) + len(b.roots) <= _MOST_MEMBERS
        )

    def _take_in(self, at: int, new: Kernel) -> None:
        kernel = self.kernels[at]
        joint = joint_loop(kernel.loop, new.loop)
        assert joint is not None
        kernel.loop = joint
        kernel.roots += new.roots
        kernel.inlined |= new.inlined
        kernel.reads |= new.reads

    def _merge(self, source: int, at: int) -> None:
        old = self.kernels[source]
        self._take_in(at, old)
        self._note(at, old)
        for v in old.reads:
            self.readers[v].discard(source)
        old.merged, old.is_free = True, False

    def _note(self, at: int, new: Kernel) -> None:
        for root in new.roots:
            self.kernel_of[root] = at
        for v in new.reads:
            self.readers.setdefault(v, set()).add(at)

    def _bytes(self, values: Iterable[int]) -> int:
        return sum(self.graph.values[v].size_bytes for v in values)
