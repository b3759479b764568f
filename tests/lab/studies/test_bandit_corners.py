"""Leaving a corner, and two states of one parameter: the flow against its closed forms, the draws against the flow."""

import math

import matplotlib as mpl
import numpy as np
import pytest
import torch

from sparkjoy_lab.studies import bandit_corners as corners

mpl.use("Agg")


def test_two_arms_leave_in_the_closed_form():
    """By z = θ₁ − θ₀, of which dz/dt = −2 σ(z) σ(−z) Δ, so that t = (L + sinh L) / Δ; Δ = 0.2."""
    for log_ratio in (1.0, 3.0, 6.0):
        exact = (log_ratio + math.sinh(log_ratio)) / 0.2
        assert corners.exit_time(corners.start(log_ratio, None), (1.0, 0.8), None) == pytest.approx(exact, rel=0.02)


def test_every_exit_time_grows_with_one_over_the_best_arms_probability():
    records = corners.exit_records((6.0, 8.0, 10.0))
    slopes = {(r["case"], r["method"]): r["slope"] for r in corners.exit_slopes(records)}
    none, _, often, most = corners.WORSE
    for method in corners.TEMPERATURES:
        assert slopes[none, method] == pytest.approx(1, abs=0.06)
    assert slopes[often, "pg"] == pytest.approx(1.5, abs=0.03)  # drawn into the corner by the worse arm's failures
    assert slopes[most, "pg"] == pytest.approx(2, abs=0.03)
    assert slopes[often, "gate, price 0"] == pytest.approx(1, abs=0.03)
    times = {(r["method"], r["log_ratio"]): r["time"] for r in records if r["case"] == often}
    assert times["pg", 10.0] > 50 * times["dg", 10.0]


def test_shared_speeds_are_those_of_autograd():
    theta = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    p = theta.sigmoid().item()
    probabilities = torch.stack([-theta, theta]).sigmoid()
    total = sum((probabilities * torch.tensor([0.0, gap])).sum() for gap in (1.0, -0.6)) / 2
    assert corners.shared_speed(p, None) == pytest.approx(torch.autograd.grad(total, theta)[0].item())


def test_the_counterexample_stops_dg_and_the_gate_inside_and_not_pg():
    assert all(corners.shared_speed(p, None) > 0 for p in np.linspace(0.01, 0.99, 20))
    assert corners.shared_speed(0.62, 0.0) > 0 > corners.shared_speed(0.63, 0.0)  # p* = 1 / 1.6
    assert corners.shared_speed(0.71, 1.0) > 0 > corners.shared_speed(0.73, 1.0)


@pytest.mark.slow
def test_a_budget_moves_as_its_own_loss_does():
    rest = {r["method"]: r["p"] for r in corners.shared_records(2, 600) if not r["exact"]}
    assert rest["noise 0.3 of dg"] == pytest.approx(rest["dg"], abs=0.01)
    assert rest["noise 0.3 of pg"] == pytest.approx(rest["pg"], abs=0.01)
    assert rest["pg"] > 0.95 > 0.8 > rest["dg"] > rest["gate, price 0"]
    exits = {method: corners.sampled_exits(method, 2.0, 3, 300)["steps"] for method in corners.SAMPLED}
    assert exits["noise 0.3 of dg"] == pytest.approx(exits["dg"], rel=0.15)
    assert exits["gate, price 0"] < exits["dg"] < 1.2 * exits["pg"]


def test_a_corner_that_is_never_left_has_no_time():
    record = corners.sampled_exits("pg", 10.0, 2, 3)
    assert (record["steps"], record["left"], record["seeds"]) == (None, 0, 2)
