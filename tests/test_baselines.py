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
