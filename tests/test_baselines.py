import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparkjoy as sj
from sparkjoy.baselines import as_tensor, centred
from sparkjoy_lab.baselines import expected_confidence_advantage, good_and_bad_advantage

WEIGHT = torch.zeros(9, requires_grad=True)
GROUP_BASELINES = [sj.group_mean_advantage, sj.leave_one_out_advantage, sj.group_standardised_advantage]


def test_group_mean_per_prompt():
    rewards = torch.tensor([1, 0, 0, 0, 1, 1])
    expected = torch.tensor([2 / 3, -1 / 3, -1 / 3, -2 / 3, 1 / 3, 1 / 3])
    torch.testing.assert_close(sj.group_mean_advantage(rewards, 3), expected)


@pytest.mark.parametrize("baseline", GROUP_BASELINES)
def test_equal_rewards_give_exact_zeros(baseline):
    rewards = torch.full((7,), 0.1)
    assert (rewards - rewards.mean()).abs().sum() > 0  # a float mean would leave something
    assert torch.equal(baseline(rewards), torch.zeros(7))


def test_leave_one_out_is_the_mean_of_the_others():
    rewards = torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.stack([rewards[i] - torch.cat([rewards[:i], rewards[i + 1 :]]).mean() for i in range(6)])
    torch.testing.assert_close(sj.leave_one_out_advantage(rewards), expected)


def test_expected_confidence_is_the_chance_that_two_draws_agree():
    advantage = expected_confidence_advantage(torch.tensor([1.0]), torch.tensor([[0.7, 0.2, 0.1]]))
    assert advantage.item() == pytest.approx(1 - (0.49 + 0.04 + 0.01))


@pytest.mark.parametrize(
    ("rewards", "group_size", "message"),
    [
        (torch.ones(5), 2, "does not divide"),
        (torch.ones(0), None, "at least one reward"),
        (torch.ones(2, 2), None, "expected"),
        (torch.ones(4), 0, "group_size is 0"),
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
        expected_confidence_advantage(torch.ones(3), torch.ones(2, 4))


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
    loss = sj.reinforce(log_probs, good_and_bad_advantage(advantages, alpha=0.25)).mean()
    assert loss.item() == pytest.approx((-0.25 * log_probs[0] + 0.75 * log_probs[[1, 3, 4]].mean()).item())
    assert torch.equal(good_and_bad_advantage(torch.zeros(3)), torch.zeros(3))
    with pytest.raises(ValueError, match="alpha"):
        good_and_bad_advantage(advantages, alpha=2)


@pytest.mark.parametrize("baseline", GROUP_BASELINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.1, 3.0, -7.7, 1e6])
def test_rewards_that_differ_by_their_last_digit_are_equal(baseline, dtype, offset):
    rewards = torch.full((8,), offset, dtype=dtype)
    rewards[3] = torch.nextafter(rewards[3], torch.tensor(math.inf, dtype=dtype))
    rewards[5] = torch.nextafter(rewards[5], torch.tensor(-math.inf, dtype=dtype))
    assert len(rewards.unique()) == 3
    assert torch.equal(baseline(rewards), torch.zeros(8, dtype=dtype))


@pytest.mark.parametrize("baseline", GROUP_BASELINES)
def test_the_order_of_a_sum_of_rewards_makes_no_difference(baseline):
    rewards = np.array([0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1, 0.6])
    assert len(set(rewards)) == 2
    assert baseline(rewards).tolist() == [0, 0, 0]
    assert baseline(rewards.tolist()).tolist() == [0, 0, 0]


@pytest.mark.parametrize("baseline", GROUP_BASELINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@given(data=st.data())
def test_advantages_are_those_of_the_rewards_in_float64(baseline, dtype, data):
    # Every reward and every sum is exact: multiples of 1/64 around an offset that leaves the dtype room for them.
    steps = data.draw(st.lists(st.integers(0, 1), min_size=8, max_size=8))
    offset = data.draw(st.sampled_from({torch.float16: [-8, 0, 8], torch.bfloat16: [0, 1]}.get(dtype, [0, 1e4, -1e4])))
    rewards = (torch.tensor(steps).double() / 64 + offset).to(dtype)
    assert torch.equal(rewards.double(), torch.tensor(steps).double() / 64 + offset)
    advantages, exact = baseline(rewards, 4), baseline(torch.tensor(steps).double() / 64, 4)
    assert advantages.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(advantages.sign().double(), exact.sign())
    torch.testing.assert_close(advantages.double(), exact, rtol=1e-6, atol=0)


def test_sums_beyond_float16_do_not_overflow():
    rewards = torch.tensor([60000.0, 60000.0, 60000.0, 59968.0], dtype=torch.float16)
    assert sj.group_mean_advantage(rewards).tolist() == [8, 8, 8, -24]
    assert good_and_bad_advantage(torch.ones(3001, dtype=torch.float16)).tolist() == [0.5] * 3001
    assert expected_confidence_advantage([1], torch.full((1, 300), 1 / 300).bfloat16()).item() == pytest.approx(
        1 - 1 / 300, rel=1e-4
    )


@pytest.mark.parametrize(
    "rewards",
    [
        [1.0, 0.0, 1.0, 1.0],
        (1, 0, 1, 1),
        [True, False, True, True],
        [np.float32(1), np.float32(0), np.float32(1), np.float32(1)],
        [torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0), torch.tensor(1.0)],
        np.array([1, 0, 1, 1]),
        np.array([1, 1, 0, 1], dtype=np.float16)[::-1],
        np.array([True, False, True, True]),
        torch.tensor([1, 0, 1, 1], dtype=torch.uint8),
        torch.tensor([True, False, True, True]),
        torch.tensor([1.0, 0.0, 1.0, 1.0], requires_grad=True),
    ],
    ids=str,
)
def test_rewards_may_be_what_reward_functions_return(rewards):
    advantages = sj.group_mean_advantage(rewards, 2)
    assert advantages.tolist() == [0.5, -0.5, 0, 0]
    assert advantages.dtype == torch.float32
    assert not advantages.requires_grad
    assert expected_confidence_advantage(rewards, torch.full((4, 2), 0.5)).tolist() == [0.5, -0.5, 0.5, 0.5]
    assert good_and_bad_advantage(rewards).shape == (4,)


def test_large_integers_are_exact():
    assert sj.group_mean_advantage(torch.tensor([10**9, 10**9 + 1])).tolist() == [-0.5, 0.5]


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (torch.tensor([1.0, math.nan, 1.0]), "rewards has 1 of 3 values NaN or infinite, the first at 1"),
        ([math.inf, 0.0], "the first at 0"),
        ([1.0, None], "rewards is a list that no tensor"),
        (["good"], "rewards is a list that no tensor"),
        ([[1.0], [1.0, 2.0]], "rewards is a list that no tensor"),
        ({"correct": 1.0}, "rewards is a dict that no tensor"),
        (None, "rewards is a NoneType that no tensor"),
        (np.array([1.0, "a"], dtype=object), "rewards is a ndarray that no tensor"),
        (torch.ones(2, dtype=torch.complex64), "real numbers"),
        (1.0, r"rewards has shape \(\)"),
    ],
)
@pytest.mark.parametrize("baseline", GROUP_BASELINES)
def test_what_is_no_reward_is_named(baseline, rewards, message):
    with pytest.raises(ValueError, match=message):
        baseline(rewards)


def test_as_tensor_leaves_the_callers_array_alone():
    array = np.zeros(2)
    as_tensor("rewards", array).fill_(1)
    assert array.tolist() == [0, 0]


def test_rounding_is_relative_to_what_was_summed():
    sums = torch.tensor([[0.0, 0.1]], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    assert centred(sums, eps).tolist() == [[-0.05, 0.05]]
    assert centred(sums, eps, size=torch.full((1, 2), 1e6)).tolist() == [[0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rewards", [[0.9013, 0.9021, 0.9027, 0.9009], [16777216.0, 16777217.0, 16777218.0], [3, 4, 9]])
@pytest.mark.parametrize("baseline", GROUP_BASELINES)
def test_lists_are_as_exact_as_arrays_whatever_torchs_default_is(baseline, rewards, dtype):
    expected = baseline(np.array(rewards, dtype=float))
    torch.set_default_dtype(dtype)
    try:
        found = baseline(rewards)
        report = sj.gated_backward(
            lambda rows: WEIGHT[rows] - 1, torch.arange(len(rewards)), rewards, sj.KondoGate(rate=1)
        )
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert float(report.loss) == pytest.approx(sum(rewards) / len(rewards), rel=1e-6)


def test_lists_of_float32s_are_equal_up_to_their_rounding():
    sums = torch.tensor([0.1, 0.2, 0.3]).sum(), torch.tensor([0.3, 0.2, 0.1]).sum()
    assert sj.group_mean_advantage([float(total) for total in (*sums, sums[0] + 1e-7)]).tolist() == [0, 0, 0]
