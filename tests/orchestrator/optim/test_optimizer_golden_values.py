"""The update rules against numbers computed independently of this code (float64)."""

import math
from typing import Any

import pytest
import torch

from orchestrator.optim import LAMB, LARS, Lookahead, Ranger, RangerLARS
from orchestrator.optim.adam_direction import rectification

NEVER = 10**9  # a LookAhead cycle longer than any test: the fast optimizer alone


def sum_of_squares_after_each_step(make, num_steps):
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    optimizer = make([x])
    values = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        (x * x).sum().backward()
        optimizer.step()
        values.append((x * x).sum().item())
    return values


def weights_under_constant_gradient(make, num_steps, *, start=1.0, gradient=1.0):
    w = torch.tensor([start], dtype=torch.float64, requires_grad=True)
    optimizer = make([w])
    weights = []
    for _ in range(num_steps):
        w.grad = torch.full_like(w, gradient)
        optimizer.step()
        weights.append(w.item())
    return weights


def test_lamb_matches_its_golden_values():
    values = sum_of_squares_after_each_step(lambda params: LAMB(params, lr=0.003), 5)
    assert values == pytest.approx([13.922357, 13.845179, 13.768463, 13.692203, 13.616398], rel=1e-6 / 13)


def test_radam_within_ranger_matches_its_golden_values():
    def make(params):
        return Ranger(params, lr=0.003, betas=(0.9, 0.999), eps=1e-8, sync_every=NEVER)

    golden = [13.832504, 13.666540, 13.502115, 13.339235, 13.177905, 13.177005]
    assert sum_of_squares_after_each_step(make, 6) == pytest.approx(golden, rel=1e-6 / 13)


def test_lars_matches_its_golden_values():
    values = sum_of_squares_after_each_step(lambda params: LARS(params, lr=0.003), 5)
    golden = [13.999916000, 13.999756401, 13.999528765, 13.999239898, 13.998895925]
    assert values == pytest.approx(golden, rel=1e-10)


def test_radam_under_constant_gradient_matches_its_golden_values():
    def make(params):
        return Ranger(params, lr=0.1, betas=(0.9, 0.999), eps=1e-8, sync_every=NEVER)

    golden = [0.9, 0.8, 0.7, 0.6, 0.5, 0.49742, 0.49414, 0.49027]
    assert weights_under_constant_gradient(make, 8) == pytest.approx(golden, abs=5.1e-6)


def test_radam_step_multipliers_match_their_golden_values():
    # lr r_t / (1 - b1^t) per unit of m: with r_t sqrt(1 - b2^t) once rectified, 1 before.
    multipliers = []
    for t in range(1, 11):
        factor = rectification(t, 0.999, rectify_above=5.0)
        damping = 1.0 if factor is None else factor * math.sqrt(1 - 0.999**t)
        multipliers.append(damping / (1 - 0.9**t))
    golden = [10, 5.2632, 3.6900, 2.9078, 2.4419, 0.004263, 0.005242, 0.006073, 0.006817, 0.007506]
    assert multipliers == pytest.approx(golden, rel=1.5e-4)  # the digits printed


@pytest.mark.parametrize("beta2", [0.9, 0.95, 0.98, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize(("rectify_above", "first"), [(5.0, 6), (4.0, 5)])
def test_first_rectified_step(beta2, rectify_above, first):
    assert rectification(first - 1, beta2, rectify_above=rectify_above) is None
    assert rectification(first, beta2, rectify_above=rectify_above) is not None


def test_lookahead_matches_its_golden_values():
    def make(params):
        return Lookahead(torch.optim.SGD(params, lr=1.0), sync_every=3, slow_step_size=1 / 3)

    weights = weights_under_constant_gradient(make, 6, start=3.0)
    assert [3.0, *weights] == pytest.approx([3, 2, 1, 2, 1, 0, 1], abs=1e-12)


def test_lookahead_at_half_step_matches_its_golden_values():
    def make(params):
        return Lookahead(torch.optim.SGD(params, lr=1.0), sync_every=5, slow_step_size=0.5)

    weights = weights_under_constant_gradient(make, 10, start=0.0)
    assert (weights[4], weights[9]) == (-2.5, -5.0)


def test_ranger_is_torch_radam_within_lookahead():
    # Two implementations of the same rule; torch adds eps outside the bias correction, hence eps = 0.
    torch.manual_seed(0)
    start, target = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    ends = []
    for make in (
        lambda params: Ranger(params, lr=0.05, betas=(0.95, 0.999), eps=0.0),
        lambda params: Lookahead(torch.optim.RAdam(params, lr=0.05, betas=(0.95, 0.999), eps=0.0)),
    ):
        w = start.clone().requires_grad_()
        optimizer = make([w])
        for _ in range(20):
            optimizer.zero_grad()
            ((w - target) ** 4).sum().backward()
            optimizer.step()
        ends.append(w.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=0)


def test_lars_rate_inside_and_outside_the_momentum_differ_only_when_the_rate_changes():
    # w = 1, g = 1, eta = 1, mu = 0.5, lambda = 0: ratio = |w|. lr 0.1, then 0.2.
    # inside:  v = 0.1, w = 0.9; v = 0.05 + 0.2 * 0.9 = 0.23, w = 0.67
    # outside: v = 1, w = 0.9;   v = 0.5 + 0.9 = 1.4,         w = 0.9 - 0.28 = 0.62
    for lr_in_momentum, expected in ((True, 0.67), (False, 0.62)):
        w = torch.ones(1, dtype=torch.float64, requires_grad=True)
        optimizer = LARS([w], momentum=0.5, trust_coefficient=1.0, lr_in_momentum=lr_in_momentum)
        for lr in (0.1, 0.2):
            optimizer.param_groups[0]["lr"] = lr
            w.grad = torch.ones_like(w)
            optimizer.step()
        assert w.item() == pytest.approx(expected, abs=1e-12)


def test_lars_nesterov_and_weight_decay_by_hand():
    # w = 2, g = 1, eta = 1, lambda = 0.5: l = 2 / (1 + 1) = 1; g + lambda w = 2; v = lr l 2 = 0.2
    # nesterov: w -= mu v + 0.2 = 0.1 + 0.2; plain: w -= v.
    for nesterov, momentum, expected in ((True, 0.5, 1.7), (False, 0.5, 1.8), (False, 0.0, 1.8)):
        w = torch.full((1,), 2.0, dtype=torch.float64, requires_grad=True)
        optimizer = LARS(
            [w], lr=0.1, momentum=momentum, weight_decay=0.5, trust_coefficient=1.0, nesterov=nesterov
        )
        w.grad = torch.ones_like(w)
        optimizer.step()
        assert w.item() == pytest.approx(expected, abs=1e-12)


def test_ranger_lars_steps_by_hand():
    options: dict[str, Any]
    # w = (3, 4), ||w|| = 5; g = (0, 2), t = 1: m^ = g, a = (0, 1), not rectified, so s = m^ = (0, 2).
    # "direction": ||s|| = 2, step = lr 5 / 2 (0, 2) = (0, 0.5). "before_rectify": ||a|| = 1, step = (0, 1).
    # Without adaptation: lr (0, 2) = (0, 0.2).
    for options, step in (
        ({"trust": "direction"}, 0.5),
        ({"trust": "before_rectify"}, 1.0),
        ({"layer_adaptation": False}, 0.2),
        ({"trust_coefficient": 0.1}, 0.05),
    ):
        w = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
        optimizer = RangerLARS([w], lr=0.1, eps=1e-300, **options)
        w.grad = torch.tensor([0.0, 2.0], dtype=torch.float64)
        optimizer.step()
        assert w.tolist() == pytest.approx([3.0, 4.0 - step], abs=1e-12)


@pytest.mark.parametrize("trust", ["direction", "before_rectify"])
def test_ranger_lars_agrees_with_its_definition_written_out(trust):
    lr, decay, eta, beta1, beta2, eps, k, alpha = 0.01, 0.1, 0.7, 0.95, 0.999, 1e-5, 6, 0.5
    torch.manual_seed(1)
    gradients = torch.randn(14, 3, 2, dtype=torch.float64)
    w = torch.randn(3, 2, dtype=torch.float64)
    ours = w.clone().requires_grad_()
    optimizer = RangerLARS([ours], lr=lr, weight_decay=decay, trust_coefficient=eta, trust=trust)

    m, v, slow = torch.zeros_like(w), torch.zeros_like(w), w.clone()
    for t, g in enumerate(gradients, start=1):
        ours.grad = g
        optimizer.step()

        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        adam = m_hat / (v_hat.sqrt() + eps)
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        s = m_hat
        if rho > 5:
            s = adam * math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        normed = (s if trust == "direction" else adam) + decay * w
        w = w - lr * eta * w.norm() / normed.norm() * (s + decay * w)
        if t % k == 0:
            slow = slow + alpha * (w - slow)
            w = slow
        torch.testing.assert_close(ours.detach(), w, rtol=1e-11, atol=0)


@pytest.mark.parametrize("trust", ["direction", "before_rectify"])
def test_direction_trust_cancels_rectification_and_before_rectify_keeps_it(trust):
    # Without decay an adapted layer moves by lr ||w|| ("direction") or r_t lr ||w|| ("before_rectify").
    torch.manual_seed(0)
    w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    optimizer = RangerLARS([w], lr=0.01, trust=trust, sync_every=NEVER)
    before = w.detach().clone()
    for _ in range(6):
        before = w.detach().clone()
        w.grad = torch.randn(4, 4, dtype=torch.float64)
        optimizer.step()
    moved = (w.detach() - before).norm() / before.norm()
    # r_6 = 0.004263 (1 - 0.9^6) / sqrt(1 - 0.999^6), from the golden step multipliers.
    damping = 0.004263 * 0.468559 / 0.0773632 if trust == "before_rectify" else 1.0
    assert moved.item() == pytest.approx(0.01 * damping, rel=1.5e-4)
