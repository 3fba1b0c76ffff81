"""Schedules at points computed by hand."""

import io

import pytest
import torch
from torch import nn

from orchestrator.optim import Lookahead, RangerLARS
from orchestrator.techniques.schedules import build_schedule, rate_factor


def rates(num_steps, *, lr=1.0, **options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr)
    schedule = build_schedule(optimizer, **options)
    seen = []
    for _ in range(num_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_warm_up_rises_linearly_from_a_twentieth_over_the_first_tenth():
    # T = 40, W = 4: 1/20 + 19/20 t/4.
    expected = [0.05, 0.2875, 0.525, 0.7625, 1.0, 1.0]
    assert rates(6, name="constant", total_steps=40) == pytest.approx(expected, abs=1e-15)


def test_polynomial_decay_by_hand():
    # T = 10, W = 1; x = (t - 1) / 9; 2 (1 - x)^2 at t = 1, 4, 7, 9: 2, 2 (2/3)^2, 2 (1/3)^2, 2 (1/9)^2.
    seen = rates(12, lr=2.0, name="polynomial", total_steps=10)
    assert seen[0] == pytest.approx(0.1)
    assert [seen[t] for t in (1, 4, 7, 9)] == pytest.approx([2.0, 8 / 9, 2 / 9, 2 / 81])
    assert seen[10:] == [0.0, 0.0]


def test_polynomial_of_power_one_is_a_line():
    seen = rates(5, name="polynomial", total_steps=4, warmup_fraction=0.0, power=1.0)
    assert seen == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


def test_cosine_by_hand_with_a_final_fraction():
    # W = 0, T = 6: (1 + cos(pi t / 6)) / 2 at t = 0, 2, 3, 4, 6 is 1, 3/4, 1/2, 1/4, 0; then 0.1 + 0.9 of it.
    seen = rates(8, name="cosine", total_steps=6, warmup_fraction=0.0, final_fraction=0.1)
    assert [seen[t] for t in (0, 2, 3, 4, 6, 7)] == pytest.approx([1.0, 0.775, 0.55, 0.325, 0.1, 0.1])


@pytest.mark.parametrize("name", ["constant", "polynomial", "cosine"])
def test_the_shortest_runs_stay_within_the_base_rate(name):
    for total_steps in (1, 2, 3):
        for warmup_fraction in (0.0, 0.1, 1.0):
            factors = [
                rate_factor(t, name=name, total_steps=total_steps, warmup_fraction=warmup_fraction)
                for t in range(5)
            ]
            assert all(0.0 <= factor <= 1.0 for factor in factors)
            assert factors[0] == (1.0 if warmup_fraction == 0.0 else 0.05)


def test_groups_keep_their_proportion():
    optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (1.0, 0.1)], lr=1.0
    )
    build_schedule(optimizer, name="constant", total_steps=100)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.005])


@pytest.mark.parametrize("make", [RangerLARS, lambda p, lr: Lookahead(torch.optim.SGD(p, lr=lr))])
def test_resume_from_disk_continues_the_rates_exactly(make):
    def build():
        optimizer = make([nn.Parameter(torch.ones(1))], lr=0.3)
        return optimizer, build_schedule(optimizer, name="cosine", total_steps=30)

    def run(optimizer, schedule, num_steps):
        seen = []
        for _ in range(num_steps):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return seen

    straight = run(*build(), 30)
    optimizer, schedule = build()
    run(optimizer, schedule, 13)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    resumed_optimizer, resumed_schedule = build()
    optimizer_state, schedule_state = torch.load(file, weights_only=True)
    resumed_optimizer.load_state_dict(optimizer_state)
    resumed_schedule.load_state_dict(schedule_state)
    assert run(resumed_optimizer, resumed_schedule, 17) == straight[13:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "linear"}, "unknown schedule 'linear'; known: constant, cosine, polynomial"),
        ({"total_steps": 0}, "total_steps must be an integer >= 1, got 0"),
        ({"warmup_fraction": 1.5}, r"warmup_fraction must be in \[0, 1\], got 1.5"),
        ({"final_fraction": -0.1}, "final_fraction"),
        ({"power": 0.0}, "power"),
    ],
)
def test_bad_settings_are_refused(options, message):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(ValueError, match=message):
        build_schedule(optimizer, **{"name": "constant", "total_steps": 10, **options})
