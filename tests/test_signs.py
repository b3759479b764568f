"""What signs decide alone, and that whoever says the same of itself gets the same."""

import pytest
import torch
from gates_of_users import BestOfAll, my_delight
from hypothesis import given, settings
from hypothesis import strategies as st

import sparkjoy as sj
from sparkjoy.signs import Rule, fates, mixed, undecided, with_sign, worth
from sparkjoy_lab.prices import RollingQuantile

GATES = st.one_of(
    st.builds(sj.KondoGate, rate=st.sampled_from([0.05, 0.3, 0.5, 0.8])),
    st.builds(sj.KondoGate, rate=st.sampled_from([0.3, 0.6]), negative_share=st.sampled_from([0.2, 0.5, 0.9])),
    st.builds(sj.KondoGate, price=st.sampled_from([-1.0, 0.0, 0.5])),
    st.builds(sj.KondoGate, price=st.sampled_from([0.0, 0.5]), negative_share=st.sampled_from([0.2, 0.5, 0.9])),
    st.builds(
        sj.KondoGate, rate=st.sampled_from([0.2, 0.6]), price=st.sampled_from([-1.0, 0.0, 0.5]),
    ),
)  # fmt: skip


@settings(max_examples=400)
@given(
    gate=GATES,
    advantages=st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0]), min_size=1, max_size=14),
    surprisals=st.lists(st.sampled_from([0.0, 0.2, 0.6, 3.0]), min_size=14, max_size=14),
)
def test_whatever_the_log_probs_signs_are_right(gate, advantages, surprisals):
    value = torch.tensor(advantages)
    score = with_sign(value * torch.tensor(surprisals[: len(advantages)]), value)
    keep = gate(score).keep
    good, bad = value > 0, value < 0
    of_signs = fates(gate.rule, int(good.sum()), int(bad.sum()), len(value))
    kept = good & (of_signs[0] is True) | bad & (of_signs[1] is True)
    open_ = undecided(gate.rule, value)
    assert bool(keep[kept].all())
    assert not bool(keep[~kept & ~open_].any())
    assert not bool((kept & open_).any())
    # What is not open may stand aside with its advantage in place of its score.
    assert torch.equal(gate(torch.where(open_, score, value)).keep, keep)


def test_signs_settle_what_they_can():
    value = torch.tensor([1.0, 0.5, -1.0, -0.5, 0.0])
    assert fates(Rule(floor=0.0), good=2, bad=2, total=5) == (True, False)
    assert not undecided(Rule(floor=0.0), value).any()
    assert undecided(Rule(rate=0.2), value).tolist() == [True, True, False, False, False]
    assert undecided(Rule(rate=0.6), value).tolist() == [False, False, True, True, False]
    assert undecided(Rule(floor=0.1), value).tolist() == [True, True, False, False, False]
    assert undecided(None, value).tolist() == [True, True, True, True, False]


def test_rows_of_tokens_have_the_sign_of_their_sum():
    advantages = torch.tensor([[1.0, -1.0], [-3.0, 1.0], [0.0, 0.0], [5.0, 5.0]])
    assert worth(advantages).tolist() == [2, -2, 0, 10]
    assert worth(advantages, torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]])).tolist() == [1, 1, 0, 0]
    assert mixed(advantages)
    assert not mixed(advantages[2:])


def run(gate, score=None):
    advantages = torch.tensor([1.0, -1.0] * 10)
    parameter = (-torch.linspace(0.5, 1.5, 20)).requires_grad_()
    options = {} if score is None else {"score": score}
    report = sj.gated_backward(lambda rows: parameter[rows], torch.arange(20), advantages, gate, **options)
    return report, parameter.grad


def test_a_users_own_gate_and_score_get_the_same_shortcuts():
    expected, gradient = run(sj.KondoGate(rate=0.1))
    for gate in (sj.KondoGate(rate=0.1), BestOfAll(0.1)):
        for score in (None, my_delight):
            report, own = run(gate, score)
            assert (report.plan, report.screened_rows) == (expected.plan, expected.screened_rows) == ("screen", 10)
            assert torch.equal(own, gradient)
    assert run(BestOfAll(1.0))[0].plan == "dense"
    assert run(BestOfAll(0.5))[0].plan == "signs"
    shy, own = run(BestOfAll(0.1, says_its_rule=False))
    assert shy.screened_rows == 20
    assert torch.equal(own, gradient)
    silent, own = run(sj.KondoGate(rate=0.1), lambda advantages, log_probs: my_delight(advantages, log_probs))
    assert silent.screened_rows == 20
    assert torch.equal(own, gradient)


@pytest.mark.parametrize("gate", [sj.KondoGate, sj.UnbiasedGate, sj.SoftGate, sj.BudgetGate])
def test_a_gate_of_the_library_is_held_not_subclassed(gate):
    with pytest.raises(TypeError, match=f"Mine subclasses {gate.__name__}; write a gate of your own that holds one"):
        type("Mine", (gate,), {})


@pytest.mark.parametrize("price", [RollingQuantile(0.1), 0.5])
def test_only_a_price_that_stays_is_a_floor(price):
    rule = sj.KondoGate(price=price).rule
    assert rule == (Rule(floor=0.5) if price == 0.5 else None)
