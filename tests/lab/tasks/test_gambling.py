"""The gambling task's formulas against sampling through the public gate."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparkjoy as sj
from sparkjoy_lab.tasks.bandit import method_weight
from sparkjoy_lab.tasks.gambling import Gambling, draw_actions, draw_rewards, mean_above_zero, normal_cdf, tipping_sigma

CHANCE = st.floats(0.05, 0.95)
SIGMA = st.floats(0.05, 10)
GAP = st.floats(0.5, 2)
NOISE = st.sampled_from(["bad", "all"])
DRAWS = 40_000


def drawn(task, p, seed):
    """Actions, advantages over the expected reward, and delight of `DRAWS` draws."""
    generator = torch.Generator().manual_seed(seed)
    actions = draw_actions(torch.tensor([p], dtype=torch.float64), DRAWS, generator)
    sigmas = torch.tensor([task.arm_sigmas], dtype=torch.float64)
    advantages = draw_rewards(actions, sigmas, task.gap, generator)[0] - p * task.gap
    log_probs = torch.tensor([math.log(p), math.log(1 - p)], dtype=torch.float64)[actions[0]]
    return actions[0], advantages, sj.delight(advantages, log_probs)


@given(sigma=SIGMA, gap=GAP, p=CHANCE, noise=NOISE)
@settings(derandomize=True, max_examples=40)
def test_the_gate_keeps_as_many_bad_draws_as_the_normal_tail_says(sigma, gap, p, noise):
    task = Gambling(sigma, gap, noise)
    actions, _, chi = drawn(task, p, seed=1)
    bad = actions == 1
    kept = sj.KondoGate(price=0)(chi).keep[bad].double().mean()
    expected = task.lucky_probability(p)
    error = math.sqrt(expected * (1 - expected) / int(bad.sum()))
    assert abs(float(kept) - expected) <= 4 * error + 1e-9


@given(
    sigma=SIGMA,
    gap=GAP,
    p=CHANCE,
    noise=NOISE,
    method=st.sampled_from([("pg", 1.0), ("dg", 0.5), ("dg", 1.0), ("kondo", 1.0)]),
)
@settings(derandomize=True, max_examples=60)
def test_drift_is_the_mean_of_sampled_steps(sigma, gap, p, noise, method):
    task = Gambling(sigma, gap, noise)
    actions, advantages, chi = drawn(task, p, seed=2)
    # The gradient of log π with respect to (good logit − bad logit), both moving: 2 ((a = good) − p).
    steps = 2 * method_weight(*method)(chi) * advantages * ((actions == 0).double() - p)
    error = float(steps.std()) / math.sqrt(DRAWS)
    assert abs(float(steps.mean()) - task.drift(p, *method)) <= 4 * error + 1e-9


def test_noiseless_arms_do_not_gamble():
    task = Gambling(sigma=0.0)
    assert task.lucky_probability(0.01) == 0
    assert task.settling_point("kondo") == 1
    assert mean_above_zero(-0.5, 0.0) == 0


def test_noise_traps_the_gate_on_the_bad_arm_only_when_it_is_there():
    assert Gambling(sigma=3.0).settling_point("kondo") == 0
    assert Gambling(sigma=3.0, noise="all").settling_point("kondo") == 1
    assert Gambling(sigma=3.0).settling_point("pg") == 1
    # Equal noise still traps DG: its weight depends on surprisal, which is larger for the arm taken less often.
    assert 0.6 < Gambling(sigma=3.0, noise="all").settling_point("dg") < 0.8


@given(p=CHANCE, gap=GAP, method=st.sampled_from(["dg", "kondo"]))
@settings(derandomize=True, max_examples=5)
def test_the_drift_turns_round_at_the_tipping_point(p, gap, method):
    sigma = tipping_sigma(p, gap, method)
    assert sigma is not None
    assert Gambling(0.99 * sigma, gap).drift(p, method) > 0 > Gambling(1.01 * sigma, gap).drift(p, method)


def test_normal_tail_keeps_its_digits():
    # Φ(−10) = 7.619853024160527e-24 (Abramowitz and Stegun 26.2)
    assert normal_cdf(-10) == pytest.approx(7.619853024160527e-24, rel=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": -1.0}, "sigma is -1.0; expected a standard deviation, a finite number of at least 0."),
        ({"sigma": math.inf}, "sigma is inf; expected a standard deviation, a finite number of at least 0."),
        ({"sigma": 1.0, "gap": 0.0}, "gap is 0.0; expected a number above 0."),
        ({"sigma": 1.0, "noise": "good"}, "noise is 'good'; expected 'bad' or 'all'."),
    ],
)
def test_impossible_tasks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Gambling(**arguments)
