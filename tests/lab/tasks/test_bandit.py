"""The bandit's formulas against enumeration, Monte Carlo and the engine."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparkjoy as sj
from sparkjoy_lab.tasks.bandit import (
    SoftmaxBandit,
    arm_gradients,
    closed_form,
    enumerated,
    method_weight,
    perpendicular_square,
    sampled,
)

ARMS = st.integers(2, 30)
CHANCE = st.floats(0.01, 0.95)
BASELINE = st.floats(0.05, 0.95)
METHOD = st.sampled_from([("pg", 0.0), ("dg", 0.1), ("dg", 1.0), ("dg", 10.0), ("kondo", 0.0)])
DRAWS = 20_000


def projected_perpendicular_square(bandit, gradients):
    """The obvious way: what is left of each gradient after taking out its part along ∇J."""
    unit = bandit.direction / bandit.direction.norm()
    return (gradients - (gradients @ unit).unsqueeze(-1) * unit).square().sum(-1)


@given(arms=ARMS, p=CHANCE, baseline=BASELINE, method=METHOD)
@settings(derandomize=True, max_examples=100)
def test_closed_form_equals_enumeration(arms, p, baseline, method):
    bandit = SoftmaxBandit(arms, p)
    formula = closed_form(bandit, baseline, *method)
    summed = enumerated(bandit, baseline, method_weight(*method))
    assert summed.scale == pytest.approx(formula.scale, rel=1e-9, abs=1e-12)
    assert summed.cosine == pytest.approx(1, abs=1e-12)
    assert summed.perpendicular_variance == pytest.approx(formula.perpendicular_variance, rel=1e-9, abs=1e-14)
    assert summed.backward_fraction == pytest.approx(formula.backward_fraction, abs=1e-12)


@given(arms=ARMS, p=CHANCE, baseline=BASELINE, method=METHOD)
@settings(derandomize=True, max_examples=40)
def test_monte_carlo_through_the_gate_is_within_four_standard_errors(arms, p, baseline, method):
    bandit = SoftmaxBandit(arms, p)
    weight = method_weight(*method)
    formula = closed_form(bandit, baseline, *method)
    drawn = sampled(bandit, baseline, weight, DRAWS, torch.Generator().manual_seed(1))

    gradients, _ = arm_gradients(bandit, baseline, weight)
    truth = p * bandit.direction
    along = gradients @ truth / (truth @ truth)
    squares = projected_perpendicular_square(bandit, gradients)
    for measured, exact, values in (
        (drawn.scale, formula.scale, along),
        # Sampling error of the mean's own square, left out of the standard error, is below 1/DRAWS of the variance.
        (drawn.perpendicular_variance, formula.perpendicular_variance, squares),
    ):
        variance = bandit.probabilities @ values.square() - (bandit.probabilities @ values).square()
        error = math.sqrt(max(float(variance), 0) / DRAWS)
        assert abs(measured - exact) <= 4 * error + 5 / DRAWS * abs(exact) + 1e-12
    fraction = formula.backward_fraction
    error = math.sqrt(fraction * (1 - fraction) / DRAWS)
    assert abs(drawn.backward_fraction - fraction) <= 4 * error + 1e-12


@given(arms=st.integers(3, 30), p=CHANCE, baseline=BASELINE)
@settings(derandomize=True, max_examples=50)
def test_the_gate_has_exactly_no_perpendicular_variance_and_keeps_the_direction(arms, p, baseline):
    bandit = SoftmaxBandit(arms, p)
    weight = method_weight("kondo")
    generator = torch.Generator().manual_seed(2)
    for moments in (
        closed_form(bandit, baseline, "kondo"),
        enumerated(bandit, baseline, weight),
        sampled(bandit, baseline, weight, 2_000, generator),
    ):
        assert moments.perpendicular_variance == 0
        assert abs(moments.cosine - 1) < 1e-12


@given(arms=st.integers(3, 30), p=CHANCE)
@settings(derandomize=True, max_examples=50)
def test_one_ungated_draw_has_the_variance_of_the_formula(arms, p):
    bandit = SoftmaxBandit(arms, p)
    expected = (1 - p) * p**2 * (arms - 2) / (arms - 1)
    assert enumerated(bandit, p, method_weight("pg")).perpendicular_variance == pytest.approx(expected, rel=1e-9)


@given(arms=ARMS, p=CHANCE, baseline=BASELINE, method=METHOD)
@settings(derandomize=True, max_examples=30)
def test_differences_of_wrong_arms_are_what_a_projection_leaves(arms, p, baseline, method):
    bandit = SoftmaxBandit(arms, p)
    gradients, _ = arm_gradients(bandit, baseline, method_weight(*method))
    expected = projected_perpendicular_square(bandit, gradients)
    assert torch.allclose(perpendicular_square(gradients), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("loss", [sj.reinforce, sj.delightful(1.0)])
@pytest.mark.parametrize("gate", [None, sj.KondoGate(price=0)])
def test_the_engine_computes_the_same_gradient(loss, gate):
    """GatedBackward on logits, over each arm once, weighed by its probability: the enumerated expectation."""
    bandit = SoftmaxBandit(5, 0.3)
    logits = bandit.probabilities.log().requires_grad_()
    actions = bandit.sample(4_000, torch.Generator().manual_seed(3))
    advantages = bandit.reward(actions) - bandit.p
    gated = sj.GatedBackward(gate, loss=loss)
    report = gated(lambda rows: logits.log_softmax(0)[rows], actions, advantages)

    weights = method_weight("pg" if loss is sj.reinforce else "dg", 1.0)
    gradients, _ = arm_gradients(bandit, bandit.p, weights)
    kept = actions == 0 if gate is not None else torch.ones_like(actions, dtype=torch.bool)
    expected = gradients[actions][kept].sum(0) / len(actions)
    assert torch.allclose(-logits.grad, expected, atol=1e-12)
    assert report.kept == int(kept.sum())
    if gate is not None:
        cosine = torch.cosine_similarity(-logits.grad, bandit.direction, dim=0)
        assert abs(float(cosine) - 1) < 1e-12


def test_a_wrong_arm_still_teaches_where_there_are_two():
    """With two arms every gradient lies along ∇J: the ungated draw has no perpendicular noise to remove."""
    assert closed_form(SoftmaxBandit(2, 0.3), 0.5, "pg").perpendicular_variance == 0


@pytest.mark.parametrize(
    ("arms", "p", "message"),
    [
        (1, 0.5, "arms is 1; expected a whole number of at least 2."),
        (3, 0.0, "p is 0.0; expected a probability strictly between 0 and 1."),
        (3, 1.5, "p is 1.5; expected a probability strictly between 0 and 1."),
        (3, math.nan, "p is nan; expected a probability strictly between 0 and 1."),
    ],
)
def test_impossible_bandits_are_refused(arms, p, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SoftmaxBandit(arms, p)
