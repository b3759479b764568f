import pytest
import torch

import sparkjoy as sj


def test_group_mean_per_prompt():
    rewards = torch.tensor([1, 0, 0, 0, 1, 1])
    expected = torch.tensor([2 / 3, -1 / 3, -1 / 3, -2 / 3, 1 / 3, 1 / 3])
    torch.testing.assert_close(sj.group_mean_advantage(rewards, 3), expected)


@pytest.mark.parametrize("baseline", [sj.group_mean_advantage, sj.leave_one_out_advantage])
def test_equal_rewards_give_exact_zeros(baseline):
    rewards = torch.full((7,), 0.1)
    assert (rewards - rewards.mean()).abs().sum() > 0  # a float mean would leave something
    assert torch.equal(baseline(rewards), torch.zeros(7))


def test_leave_one_out_is_the_mean_of_the_others():
    rewards = torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.stack([rewards[i] - torch.cat([rewards[:i], rewards[i + 1 :]]).mean() for i in range(6)])
    torch.testing.assert_close(sj.leave_one_out_advantage(rewards), expected)


def test_expected_confidence_is_the_chance_that_two_draws_agree():
    advantage = sj.expected_confidence_advantage(torch.tensor([1.0]), torch.tensor([[0.7, 0.2, 0.1]]))
    assert advantage.item() == pytest.approx(1 - (0.49 + 0.04 + 0.01))


@pytest.mark.parametrize(
    ("rewards", "group_size", "message"),
    [
        (torch.ones(5), 2, "does not divide"),
        (torch.ones(0), None, "at least one reward"),
        (torch.ones(2, 2), None, "expected"),
        (torch.ones(4), 0, "does not divide"),
    ],
)
def test_wrong_groups_are_refused(rewards, group_size, message):
    with pytest.raises(ValueError, match=message):
        sj.group_mean_advantage(rewards, group_size)


def test_leave_one_out_refuses_groups_of_one():
    with pytest.raises(ValueError, match="no others"):
        sj.leave_one_out_advantage(torch.ones(3), 1)


def test_expected_confidence_refuses_shapes_that_do_not_go_together():
    with pytest.raises(ValueError, match="probabilities"):
        sj.expected_confidence_advantage(torch.ones(3), torch.ones(2, 4))


def test_group_standardised_has_unit_spread_and_exact_zeros():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5, 0.5, 0.5])
    advantage = sj.group_standardised_advantage(rewards, 3)
    assert advantage[:3].std().item() == pytest.approx(1)
    assert torch.equal(advantage[3:], torch.zeros(3))
    with pytest.raises(ValueError, match="no spread"):
        sj.group_standardised_advantage(rewards, 1)


def test_good_and_bad_average_to_pmpos_loss():
    advantages = torch.tensor([0.3, -0.2, 0.0, -0.9, -0.1])
    log_probs = -torch.rand(5, generator=torch.Generator().manual_seed(0))
    loss = sj.reinforce(log_probs, sj.good_and_bad_advantage(advantages, alpha=0.25)).mean()
    assert loss.item() == pytest.approx((-0.25 * log_probs[0] + 0.75 * log_probs[[1, 3, 4]].mean()).item())
    assert torch.equal(sj.good_and_bad_advantage(torch.zeros(3)), torch.zeros(3))
    with pytest.raises(ValueError, match="alpha"):
        sj.good_and_bad_advantage(advantages, alpha=2)
