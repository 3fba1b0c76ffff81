"""One test for each private name of torch that the project leans on: it fails first when torch moves."""

from __future__ import annotations

import gc
import os
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn

from planner import capture
from planner.lower import fakes, signature, trace
from planner.measure import PeakMeter, live_tensors


def exported():
    """The joint graph of a linear layer."""
    with ExitStack() as stack:
        mode = fakes.FakeTensorMode()
        model = fakes.fake_module(nn.Linear(3, 2), mode)
        joint = trace.export_joint(stack, model, (fakes.fake_tree(torch.zeros(4, 3), mode),), {})
        return joint


def test_export_joint_gives_a_graph_with_descriptors_and_specs():
    joint = exported()
    placeholders = [n for n in joint.graph_module.graph.nodes if n.op == "placeholder"]
    assert [type(n.meta["desc"]).__name__ for n in placeholders] == [
        "ParamAOTInput",
        "ParamAOTInput",
        "PlainAOTInput",
        "TangentAOTInput",
    ]
    assert joint.params_spec == ["weight", "bias"]
    assert joint.buffers_spec == []
    assert joint.out_spec.num_leaves == 1


def test_descriptors_name_the_output_of_a_tangent_and_the_input_of_a_gradient():
    traced = trace.traced_of(exported().graph_module)
    assert list(traced.tangents.values()) == [0]
    assert [f.role.value for f in traced.outputs] == ["plain", "gradient", "gradient", "gradient"]


def test_backward_calls_carry_the_partitioner_tag():
    traced = trace.traced_of(exported().graph_module)
    assert {str(n.target) for n in traced.backward} >= {"aten.mm.default", "aten.sum.dim_IntList"}


def test_views_share_the_identity_of_their_storage():
    a = torch.zeros(4, 4)
    assert trace.storage_key(a.t()) == trace.storage_key(a)
    assert trace.storage_key(a.clone()) != trace.storage_key(a)
    with fakes.building_without_memory():
        b = torch.zeros(4, 4)
        assert trace.storage_key(b[0]) == trace.storage_key(b)


def test_operators_tell_whether_they_draw_random_numbers_or_write_their_arguments():
    assert torch.Tag.nondeterministic_seeded in torch.ops.aten.bernoulli.p.tags
    assert trace._is_opaque(torch.ops.aten.add_.Tensor)
    assert not trace._is_opaque(torch.ops.aten.add.Tensor)


def test_pytree_paths_name_the_leaves():
    words = signature.input_words({"x": torch.zeros(2), "y": [torch.zeros(3, dtype=torch.int64)]})
    assert words == ("['x']: float32 [2]", "['y'][0]: int64 [3]")
    assert signature.input_words(torch.zeros(2)) == ("[0]: float32 [2]",)


def test_the_dispatch_mode_sees_every_operation():
    seen = []

    class Mode(trace.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.zeros(2) + 1
    assert seen == ["aten.zeros.default", "aten.add.Tensor"]


def test_the_profiler_reports_allocations_and_releases_in_order():
    from planner.measure import PeakMeter

    with PeakMeter("cpu").step() as measured:
        a = torch.zeros(1000)
        b = a.clone()
        del a
        c = b.clone()
        del b, c
    # a and b, then b and c: 8000 bytes at once, never three.
    assert measured.peak_bytes == 8000


def test_batch_norm_has_an_operator_without_running_statistics():
    x, w, b = torch.randn(4, 3, 2, 2), torch.rand(3), torch.rand(3)
    functional = torch.ops.aten._native_batch_norm_legit_functional.default
    first = functional(x, w, b, torch.zeros(3), torch.ones(3), True, 0.1, 1e-5)
    again = torch.ops.aten._native_batch_norm_legit.no_stats(x, w, b, True, 0.1, 1e-5)
    for a, c in zip(first[:3], again, strict=True):
        assert torch.equal(a, c)


def test_boxed_code_empties_the_list_of_its_arguments():
    from planner.lower.executor import aten

    graph = torch.fx.Graph()
    graph.set_codegen(torch.fx.graph._BoxedCodeGen())
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.add, (x, 1)))
    arguments = [torch.zeros(1)]
    out = aten(torch.fx.GraphModule(nn.Module(), graph), None)(arguments)
    assert arguments == []
    assert out.item() == 1


def test_values_that_depend_on_no_input_are_known_while_tracing():
    with fakes.building_without_memory():
        positions = torch.arange(5).unsqueeze(0).expand(2, -1)
        assert bool((torch.diff(positions) == 1).all())
        assert [x.item() for x in torch.linspace(0, 1, 3)] == [0.0, 0.5, 1.0]
        assert torch.full((2,), 3).tolist() == [3, 3]


def test_values_that_depend_on_an_input_or_were_written_are_not_known():
    with fakes.building_without_memory():
        unknown = torch.randn(3)
        flags = torch.zeros(3)
        flags[0:1].copy_(unknown[0:1])
        for tensor in (unknown, torch.arange(3) + unknown, flags):
            with pytest.raises(RuntimeError):
                tensor.sum().item()


def test_a_module_may_branch_on_constants():
    class Masked(nn.Linear):
        def forward(self, x):
            steps = torch.arange(x.shape[1], device=x.device)
            return super().forward(x) if (steps.diff() == 1).all() else x

    batch = (torch.zeros(4, 3), torch.zeros(4, 2))
    graph = capture.capture(Masked(3, 2), batch, loss=nn.functional.mse_loss).graph
    assert any(node.op == "aten.addmm.default" for node in graph.nodes)


def test_a_running_profiler_is_seen():
    assert not trace.profiler_is_on()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert trace.profiler_is_on()
    assert not trace.profiler_is_on()


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="Linux alone says here what a process holds"
)
def test_measuring_a_peak_keeps_no_memory():
    """Some 40 kB of every step would be gone for good with torch.profiler's own `profile`."""
    module = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(10)))
    batch, meter = torch.randn(32, 64), PeakMeter(torch.device("cpu"))

    def resident_bytes() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def measure(count: int) -> None:
        for _ in range(count):
            with meter.step(live=live_tensors(module)):
                module(batch).sum().backward()
            module.zero_grad()

    measure(100)
    before = resident_bytes()
    measure(300)
    assert resident_bytes() - before < 300 * 10_000
