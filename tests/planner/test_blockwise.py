"""Steps taken apart into blocks and the rest: one block stands for all, and what is promised is held."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from cost_models.roofline import Roofline
from orchestrator.worker import with_block_plans
from planner.blocks import block_names
from planner.blockwise.options import Option, alone, option_of, options_of, pareto
from planner.blockwise.pieces import pieces_of
from planner.blockwise.plans import BlockwisePlan, plan_of_option
from planner.blockwise.prepare import Profiles
from planner.blockwise.profile import Profile, Rest
from planner.errors import CaptureError, PlanMismatchError
from planner.measure import PeakMeter, live_tensors
from planner.prepare import prepare
from planner.pricing import hardware_of
from planner.schedule import Schedule
from planner.step import StepModule
from tests.models import TinyGPT, token_loss

LAYERS = 6


def step_at(size: int, *, dropout: float = 0.0) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    words = torch.randint(0, 64, (size, 64), generator=torch.Generator().manual_seed(1))
    return StepModule(TinyGPT(layers=LAYERS, dropout=dropout), token_loss).train(), (words, words)


def option(saved_bytes: int, forward_s: float, backward_s: float, *, most: int = 0) -> Option:
    return Option(Schedule(()), saved_bytes, most, max(most, saved_bytes), forward_s, backward_s)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def profiles() -> Profiles:
    names = block_names(step_at(2)[0])
    model = Roofline(hardware_of("host"))
    return Profiles(step_at, blocks=names, sizes=(2, 4), cost_model=model, workspaces=True)


def test_alike_blocks_are_one_but_for_the_first_where_no_gradient_comes_in():
    module, batch = step_at(2)
    pieces = pieces_of(module, batch, blocks=block_names(module))
    assert pieces.order == tuple(f"model.blocks.{at}" for at in range(LAYERS))
    assert [len(block.names) for block in pieces.blocks] == [LAYERS]


def test_taking_apart_leaves_the_module_as_it_is():
    module, batch = step_at(2)
    before = [type(part) for part in module.modules()]
    pieces_of(module, batch, blocks=block_names(module))
    assert [type(part) for part in module.modules()] == before
    module(*batch).backward()


class Twice(nn.Module):
    """Calls its first block twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](self.blocks[0](x))).sum()


def test_a_block_that_is_called_twice_is_refused_by_name():
    with pytest.raises(CaptureError, match=r"'blocks.0' is called more than once"):
        pieces_of(Twice(), torch.zeros(2, 8), blocks=("blocks.0", "blocks.1"))


class Widening(nn.Module):
    """Its blocks change the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8 << at, 16 << at)) for at in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](x)).sum()


def test_a_block_that_changes_the_shape_is_refused():
    with pytest.raises(CaptureError, match="same shape"):
        pieces_of(Widening(), torch.zeros(2, 8), blocks=("blocks.0", "blocks.1"))


def test_everything_retained_takes_about_what_the_whole_step_takes(profiles: Profiles):
    module, batch = step_at(4)
    whole = prepare(module, batch)
    fastest = profiles.profile(4).fastest
    static = whole.problem.static.resident_bytes
    gradients = sum(4 * p.numel() for p in module.parameters())
    whole_bytes = whole.retained_all.peak_bytes - static
    # Gradients belong to the rank there and to the step here; a place stands for one more operation a block.
    assert abs(fastest.peak_bytes - whole_bytes) < 0.15 * whole_bytes + gradients
    assert fastest.time_s == pytest.approx(whole.problem.costed.step_s, rel=0.15)


def test_a_profile_between_two_sizes_is_that_of_a_capture(profiles: Profiles):
    names = block_names(step_at(2)[0])
    model = Roofline(hardware_of("host"))
    there = Profiles(step_at, blocks=names, sizes=(3, 6), cost_model=model, workspaces=True).profile(3)
    scaled = profiles.profile(3)
    assert scaled.rest.place_bytes == there.rest.place_bytes
    assert [o.saved_bytes for o in scaled.options[0]][:1] == [o.saved_bytes for o in there.options[0]][:1]


def test_options_fall_in_bytes_as_they_rise_in_time(profiles: Profiles):
    (options,) = profiles.profile(4).options
    assert len(options) >= 4
    assert list(options) == sorted(options, key=lambda o: o.time_s)
    saved = [o.saved_bytes for o in options]
    assert saved == sorted(saved, reverse=True)
    assert saved[-1] < 0.1 * saved[0]


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.35])
def test_a_chosen_step_is_within_its_budget_and_no_block_can_go_back(profiles: Profiles, share: float):
    profile = profiles.profile(4)
    budget = int(share * profile.fastest.peak_bytes)
    chosen = profile.within(budget)
    assert chosen is not None
    assert chosen.peak_bytes <= budget
    assert chosen.time_s > profile.fastest.time_s
    for at, number in enumerate(chosen.options):
        if number:
            faster = [*chosen.options]
            faster[at] = number - 1
            # Either it does not fit, or it saves no time.
            other = profile.chosen(faster)
            assert other.peak_bytes > budget or other.time_s >= chosen.time_s - 1e-12


def test_no_budget_below_the_least_has_a_choice(profiles: Profiles):
    profile = profiles.profile(4)
    assert profile.within(profile.smallest_bytes - 1) is None
    assert profile.within(profile.smallest_bytes) is not None


def test_the_peak_adds_up_what_blocks_retain():
    # Two blocks that retain 10 bytes, or none for 2 s more; the rest holds 1 byte everywhere, 5 in the middle.
    rest = Rest(time_s=(0.0,) * 5, peak_bytes=(1, 1, 5, 1, 1), place_bytes=(1, 1, 1, 1))
    options = (option(10, 1.0, 2.0), option(0, 1.0, 4.0, most=6))
    profile = Profile(rest, kinds=(0, 0), options=(options,))
    assert profile.fastest.peak_bytes == 25  # 5 in the middle, 10 of each block
    one = profile.within(20)
    assert one is not None
    # The first block gives up its bytes: the second has 10 there in the middle, and 5 + 10 fit.
    assert (one.options, one.peak_bytes, one.time_s) == ((1, 0), 15, 8.0)
    none = profile.within(14)
    assert none is not None
    assert (none.options, none.peak_bytes) == ((1, 1), 7)  # 1 + 6 while a block runs
    assert profile.within(6) is None


def test_no_option_that_another_beats_is_kept():
    best, slower, smaller = option(10, 1.0, 1.0), option(10, 1.0, 2.0), option(5, 1.0, 2.0)
    assert pareto([slower, smaller, best]) == (best, smaller)


def test_an_option_says_what_its_schedule_retains():
    module, batch = step_at(2)
    (block,) = pieces_of(module, batch, blocks=block_names(module)).blocks
    from planner.block_plan import half_square
    from planner.capture import capture
    from planner.costed import annotate
    from planner.problem import Problem, StaticMemory

    graph = capture(block.module, (block.inputs, ()), loss=half_square).graph
    problem = alone(Problem(annotate(graph, Roofline(hardware_of("host"))), 0, StaticMemory()))
    options = options_of(problem, time_limit_s=1.0)
    for found in options:
        again = option_of(problem, found.schedule)
        assert again == found
        assert found.backward_bytes >= found.saved_bytes


def test_a_step_whose_blocks_run_their_options_is_exact_and_within_the_prediction(profiles: Profiles):
    module, batch = step_at(4)
    profile = profiles.profile(4)
    chosen = profile.within(int(0.5 * profile.fastest.peak_bytes))
    assert chosen is not None
    pieces = pieces_of(module, batch, blocks=block_names(module))
    (block,) = pieces.blocks
    plans = {
        number: plan_of_option(block, profile.option(0, number)).to_json()
        for number in set(chosen.options)
        if number
    }
    planned = with_block_plans(
        copy.deepcopy(module),
        {name: plans[number] for name, number in zip(pieces.order, chosen.options, strict=True) if number},
    )
    eager = copy.deepcopy(module)
    peaks = {}
    for name, step in (("eager", eager), ("planned", planned)):
        for turn in range(2):
            torch.manual_seed(turn)
            step.zero_grad()
            live = live_tensors(step, batch=batch)
            with PeakMeter("cpu").step(live=live) as measured:
                step(*batch).backward()
            peaks[name] = measured.peak_bytes - measured.live_bytes
    for a, b in zip(eager.parameters(), planned.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
    gradients = sum(4 * p.numel() for p in module.parameters())
    assert peaks["planned"] < 0.75 * peaks["eager"]
    # The prediction counts gradients of parameters with the rank, not with the step.
    assert peaks["planned"] - gradients <= chosen.peak_bytes


def test_a_plan_of_blocks_is_read_back_and_nothing_else_is(tmp_path: Any):
    plan = BlockwisePlan(
        budget_bytes=10,
        predicted_peak_bytes=9,
        retained_all_peak_bytes=20,
        extra_time_fraction=0.1,
        plans=("{}",),
        blocks={"blocks.0": 0},
    )
    plan.save(tmp_path / "plan.json")
    assert BlockwisePlan.load(tmp_path / "plan.json") == plan
    assert plan.of_blocks() == {"blocks.0": "{}"}
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(PlanMismatchError, match="no plan of blocks"):
        BlockwisePlan.load(tmp_path / "other.json")


class Scaled(nn.Module):
    """A block with plain attributes that its printed form does not tell: one is computed with, one is not."""

    def __init__(self, *, layer: int, factor: float) -> None:
        super().__init__()
        self.inner, self.layer, self.factor = nn.Linear(8, 8), layer, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.factor * torch.tanh(self.inner(x))


class Stack(nn.Module):
    """Blocks of the factors that are given, behind a layer, so that a gradient comes into all of them."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Scaled(layer=at, factor=factor) for at, factor in enumerate(factors))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x.sum()


def test_blocks_that_compute_with_another_attribute_are_of_another_kind():
    names = tuple(f"blocks.{at}" for at in range(4))
    x = torch.zeros(2, 8)
    pieces = pieces_of(Stack(1.0, 0.5, 1.0, 0.5), x, blocks=names)
    assert [block.names for block in pieces.blocks] == [names[0::2], names[1::2]]
    # The number of a layer changes no operation.
    assert [block.names for block in pieces_of(Stack(1.0, 1.0, 1.0, 1.0), x, blocks=names).blocks] == [names]
