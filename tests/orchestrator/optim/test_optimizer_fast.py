"""The fast implementations equal the reference, and are really what runs."""

import random
import tomllib
from pathlib import Path

import pytest
import torch
from small_training import OWN, over_own
from torch import nn

import orchestrator
from orchestrator.optim import LAMB, LARS, Ranger, RangerLARS
from orchestrator.optim.fast import build
from planner.capturing.optimizer_step import optimizer_bytes
from planner.capturing.rank_memory import whole_shape

FAST = ["fused", "foreach"]
SETTINGS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.05, "maximize": True},
    {"weight_decay": 0.1, "layer_adaptation": False},
]


@pytest.fixture(autouse=True)
def needs_a_compiler(request):
    if "fused" in request.node.name and build.kernel().functions is None:
        pytest.skip(f"the kernel cannot be built here: {build.kernel().reason}")


def over9000(params, lr=0.1, **options):
    return RangerLARS(params, lr=lr, compat="over9000", **options)


def random_weights(seed):
    """Tensors of 0 to 4 dims and 1 to some thousand elements, of norms from 1e-3 to 1e3, one of them zero."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shapes = [tuple(rng.randint(1, 9) for _ in range(rng.randint(0, 4))) for _ in range(9)]
    shapes += [(300, 70), (16,), (5, 3, 33)]
    weights = [10 ** rng.uniform(-3, 2) * torch.randn(shape, generator=generator) for shape in shapes]
    return [nn.Parameter(w) for w in [*weights, torch.zeros(3, 5)]]


def tensors_of(weights, optimizer):
    states = [optimizer.state[weight].values() for weight in weights]
    return [w.detach() for w in weights] + [v for s in states for v in s if isinstance(v, torch.Tensor)]


def steps(weights, optimizer, num_steps):
    """The largest element of each weight and state tensor in all these steps."""
    largest = [0.0]
    generator = torch.Generator().manual_seed(7)
    for _ in range(num_steps):
        for weight in weights:
            scale = 10 ** (4 * torch.rand((), generator=generator) - 3)
            weight.grad = scale * (torch.randn(weight.shape, generator=generator) + 0.3)
            if weight.ndim > 1:
                weight.grad[0] = 0.0  # rows that no gradient has reached
        optimizer.step()
        now = [tensor.abs().max().item() for tensor in tensors_of(weights, optimizer)]
        largest = [max(a, b) for a, b in zip(now, largest if len(largest) == len(now) else now)]
    return largest


def assert_close(left, right, scales=None):
    """To 1e-6 of the largest element that each tensor had: both have rounded at that size, in other orders."""
    scales = scales or [b.abs().max().item() for b in right]
    for a, b, scale in zip(left, right, scales, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("make", [*OWN, over9000], ids=lambda make: make.__name__)
def test_fast_equals_reference_over_100_steps_on_random_shapes(make, settings, implementation):
    if (
        "layer_adaptation" in settings
        and "ranger" in make.__name__.lower()
        and "lars" not in make.__name__.lower()
    ):
        settings = {"weight_decay": 0.1, "sync_every": 4}
    ends = []
    for chosen in ("reference", implementation):
        weights = random_weights(seed=len(make.__name__))
        optimizer = make(weights, lr=0.01, implementation=chosen, **settings)
        scales = steps(weights, optimizer, 100)
        assert optimizer.last_step == {chosen: len(weights)}
        ends.append((tensors_of(weights, optimizer), scales))
    assert_close(ends[1][0], *ends[0])


@over_own
def test_fused_does_not_depend_on_the_number_of_threads(make):
    ends = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape)) for shape in ((400, 301), (70, 1000), (17,))]
        steps(weights, make(weights, implementation="fused", weight_decay=0.1), 7)
        ends.append(weights)
    torch.set_num_threads(1)
    for a, b in zip(*ends):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", [LARS, LAMB, Ranger, RangerLARS])
def test_fused_takes_transposed_and_channels_last_tensors_and_leaves_others_to_the_reference(make):
    def weights():
        torch.manual_seed(0)
        return [
            nn.Parameter(torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last)),
            nn.Parameter(torch.randn(30, 20).t()),
            nn.Parameter(torch.randn(9, 8)[:, ::2]),  # gaps
            nn.Parameter(torch.randn(4, 4, dtype=torch.float64)),
            nn.Parameter(torch.randn(4, 4, dtype=torch.bfloat16)),
            nn.Parameter(torch.randn(4, 4, dtype=torch.complex64)),
        ]

    ends = []
    for implementation in ("reference", "fused"):
        some = weights()
        optimizer = make(some, lr=0.01, weight_decay=0.1, implementation=implementation)
        for step in range(13):
            for weight in some:
                generator = torch.Generator().manual_seed(step)
                gradient = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                weight.grad = torch.empty_like(weight).copy_(gradient)
            optimizer.step()
        ends.append(some)
    assert optimizer.last_step == {"fused": 2, "reference": 4}
    assert_close([w.detach().abs() for w in ends[1]], [w.detach().abs() for w in ends[0]])


@pytest.mark.parametrize("make", [LARS, LAMB, Ranger, RangerLARS])
def test_fused_on_gradients_of_other_strides_is_the_reference(make):
    weight = nn.Parameter(torch.ones(4, 6))
    weight.grad = torch.arange(24.0).reshape(6, 4).t()
    optimizer = make([weight], implementation="fused")
    optimizer.step()
    assert optimizer.last_step == {"reference": 1}


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("value", [1e-30, 1e25, float("inf"), float("nan")])
def test_extreme_gradients_do_to_the_fast_path_what_they_do_to_the_reference(implementation, value):
    # 1e-30 squared is 0, 1e25 squared infinite: no estimate of a root may stand in for these.
    ends = []
    for chosen in ("reference", implementation):
        weight = nn.Parameter(torch.ones(40))
        optimizer = Ranger([weight], lr=0.1, implementation=chosen)
        for _ in range(8):
            weight.grad = torch.where(torch.arange(40) < 20, value, 1.0)
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-6, atol=1e-6, equal_nan=True)


def test_fused_is_the_default_on_the_processor():
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = RangerLARS([weight])
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    assert optimizer.last_step == {"fused": 1}


def test_without_a_compiler_the_reference_runs_and_says_so(monkeypatch, caplog):
    def no_compiler():
        raise RuntimeError("Error compiling\nno C++ compiler")

    build.kernel.cache_clear()
    monkeypatch.setattr(build, "_load", no_compiler)
    try:
        weight = nn.Parameter(torch.ones(3, 3))
        optimizer = LAMB([weight], implementation="fused")
        weight.grad = torch.ones(3, 3)
        optimizer.step()
        optimizer.step()
    finally:
        build.kernel.cache_clear()
    assert optimizer.last_step == {"reference": 1}
    assert [record.message for record in caplog.records if "no C++ compiler" in record.message] != []
    assert len(caplog.records) == 1


@pytest.mark.parametrize("make", [LARS, LAMB, Ranger, RangerLARS])
def test_fused_allocates_no_tensor_after_the_first_step(make):
    weights = [nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64))]
    optimizer = (
        make(weights, implementation="fused", sync_every=2) if "Ranger" in make.__name__ else make(weights)
    )
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    assert max((event.cpu_memory_usage for event in profile.events()), default=0) < 64


@pytest.mark.parametrize("implementation", ["fused", "foreach", "reference"])
def test_the_planner_predicts_the_bytes_of_the_implementation_that_runs(implementation):
    # 80 x 50 and 80 elements of 4 bytes, three state tensors each. The reference makes the direction of one
    # tensor, and with before_rectify a second vector for the norm; foreach those of a bucket; fused nothing.
    model = nn.Linear(50, 80)
    state, temporary = optimizer_bytes(
        model,
        lambda module: RangerLARS(module.parameters(), implementation=implementation),
        shape=whole_shape,
    )
    assert state == 3 * 4 * (80 * 50 + 80)
    least, most = {"fused": (0, 0), "reference": (16000, 16000 + 64), "foreach": (16320, 16320 + 256)}[
        implementation
    ]
    assert least <= temporary <= most


def test_what_the_kernel_is_built_from_is_in_the_wheel():
    package = Path(orchestrator.__file__).parent
    pyproject = tomllib.loads((package.parent / "pyproject.toml").read_text())
    patterns = pyproject["tool"]["setuptools"]["package-data"]["orchestrator"]
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    folder = build.SOURCE.parent
    assert {build.SOURCE, build.HEADER} == shipped == {*folder.glob("*.cpp"), *folder.glob("*.h")}
