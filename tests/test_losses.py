import math

import pytest
import torch

import sparkjoy as sj
from sparkjoy_lab.losses import importance_weighted


def test_reinforce_has_the_policy_gradient():
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    sj.reinforce(log_probs, torch.tensor([0.5, -0.25])).sum().backward()
    assert log_probs.grad.tolist() == [-0.5, 0.25]


def test_delightful_weighs_by_a_sigmoid_that_is_not_differentiated():
    log_probs = torch.tensor([-2.0], requires_grad=True)
    sj.delightful(temperature=0.5)(log_probs, torch.tensor([1.5]), None, None).sum().backward()
    # χ = 1.5 · 2 = 3; σ(3 / 0.5) · 1.5
    assert log_probs.grad.item() == pytest.approx(-1.5 / (1 + math.exp(-6)))


def test_delightful_by_sample_shares_the_answers_delight():
    log_probs = torch.tensor([[-1.0, -2.0, math.nan]])
    terms = sj.delightful(unit="sample")(log_probs, torch.tensor([1.0]), None, torch.tensor([[1, 1, 0]]))
    weight = 1 / (1 + math.exp(-3))
    assert terms[0, :2].tolist() == pytest.approx([weight * 1, weight * 2])


@pytest.mark.parametrize("arguments", [{"temperature": 0}, {"temperature": math.nan}, {"unit": "row"}])
def test_delightful_refuses_what_it_does_not_know(arguments):
    with pytest.raises(ValueError, match="expected"):
        sj.delightful(**arguments)


def test_clipped_has_reinforces_gradient_on_policy_and_none_beyond_the_clip():
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    log_probs = torch.tensor([-1.0, -1.0, -0.5, -1.5], requires_grad=True)
    behavior = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    sj.clipped(0.2)(log_probs, advantages, behavior, None).sum().backward()
    # On policy −U; beyond the clip, in the direction of the advantage, 0.
    assert log_probs.grad.tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_clipped_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="epsilon"):
        sj.clipped(1.5)
    with pytest.raises(ValueError, match="behavior_log_probs"):
        sj.clipped()(torch.zeros(1), torch.ones(1), None, None)


def test_clipped_stays_finite_far_from_the_behavior():
    log_probs = torch.tensor([-0.1, -0.1], requires_grad=True)
    sj.clipped()(log_probs, torch.tensor([1.0, -1.0]), torch.tensor([-200.0, -1.0]), None).sum().backward()
    assert log_probs.grad.isfinite().all()


def test_importance_weights_are_the_ratio_and_have_the_gradient_of_reinforce_on_the_policy_that_sampled():
    log_probs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 2.0])
    importance_weighted(log_probs, advantages, log_probs.detach()).sum().backward()
    assert log_probs.grad.tolist() == [-1.0, 1.0, -2.0]
    log_probs.grad = None
    importance_weighted(log_probs, advantages, torch.tensor([-2.0, -2.0, -50.0])).sum().backward()
    assert log_probs.grad.tolist() == pytest.approx([-math.e, 1.0, 0.0])  # beyond e^20 the ratio stays what it is
    with pytest.raises(ValueError, match="importance_weighted needs behavior_log_probs"):
        importance_weighted(log_probs, advantages)
