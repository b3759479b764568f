"""What the gate decides from signs and few log-probs is what it decides from all of them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparkjoy as sj
from sparkjoy.integrations.sizes import score_of_rows
from sparkjoy.integrations.trl.advantages import centred_advantages, other_score
from sparkjoy.integrations.trl.deciding import Scored, draws, figures
from sparkjoy.signs import undecided

advantages = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=30)
shares = st.sampled_from([0.0, 0.25, 0.5])


def with_surprisal(values, seed):
    surprisal = torch.rand(len(values), generator=torch.Generator().manual_seed(seed)) * 3
    surprisal[::5] = 0  # as certain as can be
    return torch.tensor(values), -surprisal[:, None]


@given(
    advantages, st.floats(0.01, 0.99) | st.none(), st.sampled_from([None, -0.5, 0.0, 0.4]), shares, st.integers(0, 9)
)
def test_only_rows_in_doubt_need_log_probs(values, rate, price, share, seed):
    if (rate is None and price is None) or (share and price is not None and price < 0):
        return
    gate = sj.KondoGate(rate, price, negative_share=share)
    worth, log_probs = with_surprisal(values, seed)
    full = score_of_rows(sj.delight, worth, log_probs, torch.ones_like(log_probs))
    doubt = undecided(gate.rule, worth)
    assert torch.equal(gate(full.where(doubt, worth)).keep, gate(full).keep)


def test_signs_alone_settle_most_of_it():
    worth = torch.tensor([1.0, 0.5, -1.0, -0.5, 0.0])

    def in_doubt(**options):
        return undecided(sj.KondoGate(**options).rule, worth)

    assert not in_doubt(price=0).any()
    assert not in_doubt(rate=0.4).any()  # 2 are wanted, 2 are positive
    assert in_doubt(rate=0.2).tolist() == [True, True, False, False, False]
    assert in_doubt(rate=0.6).tolist() == [False, False, True, True, False]
    assert in_doubt(price=0.1).tolist() == [True, True, False, False, False]
    assert in_doubt(price=-0.1).tolist() == [False, False, True, True, False]  # positive ones pass for certain


def test_centred_advantages_are_exactly_zero_where_a_group_teaches_nothing():
    rewards = torch.tensor([[0.1], [0.1], [0.1], [1.0], [0.0], [math.nan], [math.nan], [math.nan], [math.nan]])
    centred = centred_advantages(rewards, torch.ones(1), group_size=3)
    assert centred.tolist() == [0, 0, 0, 0.5, -0.5, 0, 0, 0, 0]


def test_centred_advantages_weigh_several_rewards():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert centred_advantages(rewards, torch.tensor([1.0, 3.0]), group_size=2).tolist() == [-1.0, 1.0]


def test_centred_advantages_of_sums_that_differ_by_rounding_are_zero():
    # 0.1 + 0.2 + 0.7 in another order each: the sums of the float32 rewards differ by their last digits.
    rewards = torch.tensor([[0.1, 0.2, 0.7], [0.7, 0.1, 0.2], [1.0, 0.0, 0.0]])
    assert len(rewards.double().sum(dim=1).unique()) > 1
    assert centred_advantages(rewards, torch.ones(3), group_size=3).tolist() == [0, 0, 0]
    # A bonus and a malus of 1000 leave their rounding behind; with an answer that no function scored beside them.
    rewards = torch.tensor([[1000.1, -1000.0], [1000.3, -1000.2], [math.nan, math.nan]])
    assert centred_advantages(rewards, torch.ones(2), group_size=3).tolist() == [0, 0, 0]


def test_a_lone_success_does_not_saturate_the_gate():
    # Standardised, one success in 8 has an advantage of 7 / √8 = 2.5 and one in 2 of 0.7; centred, 0.875 and 0.5.
    lone = torch.tensor([1.0] + [0.0] * 7)
    even = torch.tensor([1.0] * 4 + [0.0] * 4)
    rewards = torch.cat([lone, even])[:, None]
    centred = centred_advantages(rewards, torch.ones(1), group_size=8)
    assert centred[0] == 0.875
    assert centred[8] == 0.5
    # A success of the even group that surprises twice as much is worth more than the lone one, centred only.
    log_probs = torch.full((16, 1), -1.0)
    log_probs[8] = -2.0
    assert score_of_rows(sj.delight, centred, log_probs, torch.ones(16, 1)).argmax() == 8
    standardised = sj.group_standardised_advantage(rewards[:, 0], group_size=8)
    assert score_of_rows(sj.delight, standardised, log_probs, torch.ones(16, 1)).argmax() == 0


@pytest.mark.parametrize("name", ["advantage", "absolute-advantage", "uniform"])
def test_other_scores_are_zero_where_nothing_is_taught(name):
    score = other_score(name, torch.tensor([1.0, 0.0, -2.0]), draws(0, 1, 2))
    assert score[1] == 0
    assert (score[[0, 2]] != 0).all()
    assert torch.equal(score, other_score(name, torch.tensor([1.0, 0.0, -2.0]), draws(0, 1, 2)))


def test_figures_tell_what_was_kept():
    worth = torch.tensor([1.0, 1.0, -1.0, 0.0])
    scored = Scored(torch.tensor([2.0, 1.0, -3.0, 0.0]), worth, worth != 0, screened=3)
    found = figures(scored, sj.KondoGate(rate=0.25)(scored.score), sized=False)
    assert found["kept_rate"] == 0.25
    assert found["kept_rate_positive"] == 0.5
    assert found["kept_rate_negative"] == 0
    assert found["screened_rate"] == 0.75
    assert found["price"] == 2
    assert found["delight_p50"] == 1
    assert found["delight_std"] == pytest.approx(math.sqrt(14 / 3))
    assert "price" not in figures(scored, sj.KondoGate(price=1e9)(scored.score), sized=False)
