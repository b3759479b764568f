"""Whatever stands in the place of an argument is used, or is a ValueError or TypeError that names it."""

import random

import numpy as np
import pytest
import torch
from hostile_calls import calls, cases, outcome
from hostile_cases import log_probs, mask, per_row
from hostile_values import ROWS
from hypothesis import given, settings
from hypothesis import strategies as st

import sparkjoy as sj
from sparkjoy import checks
from sparkjoy.gates.soft import quantile
from sparkjoy.prices import EffectiveSize
from sparkjoy.testing import TinyPolicy
from sparkjoy_lab.baselines import expected_confidence_advantage, good_and_bad_advantage
from sparkjoy_lab.prices import RollingQuantile

FOREIGN_STATES = {
    "KondoGate": lambda: sj.KondoGate(price=RollingQuantile(0.5)),
    "KondoGate without memory": lambda: sj.KondoGate(rate=0.5),
    "UnbiasedGate": sj.UnbiasedGate,
    "BudgetGate": lambda: sj.BudgetGate(0.5),
    "RollingQuantile": lambda: RollingQuantile(0.5),
}


def step(**given):
    """A step of a small policy, whose `.grad` has to stay as it was where the call fails."""
    policy = TinyPolicy(4, 5)
    batch = {"state": torch.ones(ROWS, 4), "action": torch.ones(ROWS, dtype=torch.long)}
    arguments = {"log_prob_fn": policy.log_probs, "batch": batch, "advantages": per_row(), **given}
    try:
        return sj.gated_backward(**{"gate": sj.KondoGate(rate=0.5), **arguments})
    except Exception:
        assert all(parameter.grad is None for parameter in policy.parameters())
        raise


def tokens(**given):
    """Arguments of a step with tokens; only what is wrong about them is looked at."""
    batch = {"state": torch.ones(ROWS, 3, 4), "action": torch.ones(ROWS, 3, dtype=torch.long)}
    return step(batch=batch, **given)


@pytest.mark.parametrize("name", cases())
def test_the_calls_that_are_changed_are_valid(name):
    assert outcome(name, cases()[name], {}).kind == "fine"


def test_hostile_calls_end_in_an_error_that_names_the_argument():
    found = [outcome(*call) for call in calls(seed=3, count=300)]
    assert [seen for seen in found if seen.kind == "unclear" or seen.touched] == []


@pytest.mark.slow
def test_of_thousands_of_hostile_calls_few_are_unclear_and_none_touches_a_gradient():
    found = [outcome(*call) for call in calls(seed=4, count=5000)]
    unclear = [seen for seen in found if seen.kind == "unclear"]
    assert len(unclear) < 0.005 * len(found), unclear
    assert [seen for seen in found if seen.touched] == []


NAMED = {
    "a list for log-probs": (lambda: step(log_probs=[-1.0] * ROWS), TypeError, r"torch\.as_tensor\(log_probs\)"),
    "an array for log-probs": (lambda: step(log_probs=-np.ones(ROWS)), TypeError, r"torch\.as_tensor\(log_probs\)"),
    "a list for a score": (lambda: sj.KondoGate(0.5)([1.0]), TypeError, r"torch\.as_tensor\(score\)"),
    "a list for a mask": (lambda: tokens(mask=mask().tolist()), TypeError, r"torch\.as_tensor\(mask\)"),
    "a string for a loss": (lambda: step(loss="ppo"), TypeError, "loss is 'ppo'; expected a function"),
    "a string for a score function": (lambda: step(score="delight"), TypeError, "score is 'delight'"),
    "a string for a log-prob function": (lambda: step(log_prob_fn="policy"), TypeError, "log_prob_fn is 'policy'"),
    "a function of too few arguments": (lambda: step(loss=lambda p, a: p), TypeError, "cannot be called with 4 arg"),
    "a log-prob function of none": (lambda: step(log_prob_fn=lambda: None), TypeError, "log_prob_fn is .*cannot be"),
    "a class for a gate": (lambda: step(gate=sj.KondoGate), TypeError, r"class KondoGate.*write KondoGate\(\.\.\.\)"),
    "a class for a gate of select": (lambda: sj.select(sj.KondoGate, per_row()), TypeError, "not called"),
    "a class for a price": (lambda: sj.KondoGate(price=EffectiveSize), ValueError, "the class EffectiveSize"),
    "True for a rate": (lambda: sj.KondoGate(rate=True), ValueError, "rate is True"),
    "a NaN for a rate": (lambda: sj.KondoGate(rate=float("nan")), ValueError, "rate is nan"),
    "an int beyond floats": (lambda: sj.KondoGate(price=10**400), ValueError, "price is a int"),
    "a tensor for a rate": (lambda: sj.KondoGate(rate=torch.tensor(0.5)), ValueError, r"\.item\(\)"),
    "an array for a rate": (lambda: sj.KondoGate(rate=np.array(0.5)), ValueError, r"\.item\(\)"),
    "a mask of 2": (lambda: tokens(mask=2 * mask().long()), ValueError, "mask has values other than 0 and 1"),
    "a mask of -1": (lambda: tokens(mask=-mask().long()), ValueError, "mask has values other than 0 and 1"),
    "a mask of NaN": (lambda: tokens(mask=mask() * float("nan")), ValueError, "mask has values other than 0 and 1"),
    "a mask of 2 for a score": (
        lambda: sj.sequence_delight(per_row(), log_probs(), 2 * mask().long()),
        ValueError,
        "mask has values",
    ),
    "no tokens": (lambda: step(mask=torch.ones(ROWS, 0)), ValueError, r"shape \(6, 0\), without a token"),
    "no tokens of advantages": (lambda: step(advantages=torch.ones(ROWS, 0)), ValueError, "without a token"),
    "probabilities for log-probs": (lambda: step(log_probs=log_probs(False).exp()), ValueError, "give their logarithm"),
    "log-probs for probabilities": (
        lambda: expected_confidence_advantage(per_row(), log_probs()),
        ValueError,
        "expected probabilities",
    ),
    "a sparse tensor": (lambda: sj.delight(per_row().to_sparse(), log_probs()), ValueError, "layout torch.sparse_coo"),
    "whole numbers for log-probs": (lambda: sj.surprisal(torch.zeros(3, dtype=torch.long)), ValueError, "floating"),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_is_wrong_is_said(name):
    call, kind, message = NAMED[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, float])
def test_numbers_of_numpy_are_numbers(kind):
    half = kind(0.5)
    for gate in (
        sj.KondoGate(rate=half, negative_share=half),
        sj.KondoGate(price=half),
        sj.SoftGate(temperature=half, rate=half),
        sj.UnbiasedGate(noise=half, floor=half),
        sj.BudgetGate(half, tolerance=half, window=np.int32(4)),
    ):
        assert len(gate(per_row()).keep) == ROWS
    for loss in (sj.clipped(half), sj.delightful(half)):
        assert loss(log_probs(), per_row(), log_probs(), mask()).shape == log_probs().shape
    report = tokens(mask=mask(), normalizer=half, micro_batch_size=np.int64(4), backward_over_forward=half)
    assert report.kept == 3
    assert sj.group_mean_advantage(per_row(), np.int64(3)).shape == (ROWS,)


@pytest.mark.parametrize("into", FOREIGN_STATES)
@pytest.mark.parametrize("of", FOREIGN_STATES)
def test_a_state_of_another_gate_is_refused_and_changes_nothing(into, of):
    gate, other = FOREIGN_STATES[into](), FOREIGN_STATES[of]()
    gate(per_row())
    other(per_row() + 1)
    before = repr(gate.state_dict())
    if into == of:
        gate.load_state_dict(other.state_dict())
        assert repr(gate.state_dict()) == repr(other.state_dict())
        return
    with pytest.raises(ValueError, match=r"state has .*same kind and options"):
        gate.load_state_dict(other.state_dict())
    assert repr(gate.state_dict()) == before


def test_a_step_refuses_the_state_of_a_step_with_another_gate():
    saved = sj.GatedBackward(sj.BudgetGate(0.5)).state_dict()
    for gate in (sj.UnbiasedGate(), sj.KondoGate(rate=0.5), None):
        with pytest.raises(ValueError, match="state has scores, costs"):
            sj.GatedBackward(gate).load_state_dict(saved)


@pytest.mark.parametrize("gate", [None, sj.KondoGate(rate=0.5)])
@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 3)])
def test_an_infinite_log_prob_is_refused_where_the_loss_is_bounded(gate, shape):
    # exp(-inf) is 0 and so is its derivative, but not what log(0) makes of it: 0 times infinity.
    weight = torch.ones(shape, requires_grad=True)
    dead = torch.ones(shape).index_fill(0, torch.tensor([0]), 0)
    kept = torch.ones(shape, dtype=torch.bool) if len(shape) == 2 else None
    with pytest.raises(ValueError, match="from log-probs between -inf and"):
        sj.gated_backward(
            lambda rows: (0.5 * weight[rows] * dead[rows]).log(),
            torch.arange(ROWS),
            per_row().abs() + 1,
            gate,
            log_probs=torch.full(shape, -1.0) - torch.arange(ROWS, 0, -1).view(-1, *[1] * (len(shape) - 1)),
            mask=kept,
            loss=sj.clipped(),
        )
    assert weight.grad is None


@pytest.mark.parametrize("rate", [1e-12, 5e-324])
@pytest.mark.parametrize("options", [{}, {"price": -10.0}, {"negative_share": 0.5}])
def test_the_least_rate_keeps_one(rate, options):
    assert int(sj.KondoGate(rate=rate, **options)(per_row()).keep.sum()) == 1
    assert step(gate=sj.KondoGate(rate=rate, **options)).kept == 1


@pytest.mark.parametrize("level", [0.0, 0.3, 0.97, 1.0])
def test_a_quantile_beyond_torchs_limit_is_the_same(level, monkeypatch):
    score = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    expected = quantile(score, level)
    monkeypatch.setattr("sparkjoy.gates.soft.LARGEST_QUANTILE", 10)
    torch.testing.assert_close(quantile(score, level), expected)


@pytest.mark.slow
def test_more_scores_than_float32_can_count():
    score = torch.randperm(2**24 + 1000, generator=torch.Generator().manual_seed(0)).float() + 1
    for gate in (
        sj.KondoGate(rate=0.25),
        sj.UnbiasedGate(rate=0.25),
    ):
        kept = int(gate(score).keep.sum())
        assert abs(kept - 0.25 * len(score)) <= 2, gate
    assert sj.SoftGate(temperature=1e-3, rate=0.25)(score).keep.sum() == pytest.approx(0.25 * len(score), abs=100)
    assert good_and_bad_advantage(score)[0] == pytest.approx(0.5)


@given(st.one_of(st.floats(), st.integers(), st.text(), st.booleans(), st.lists(st.floats()), st.none()))
@settings(max_examples=200)
def test_a_number_is_one_in_range_or_an_error_that_names_it(value):
    if not isinstance(value, bool) and isinstance(value, int | float) and 0 < value <= 1:
        assert checks.rate(value) == value
    else:
        with pytest.raises(ValueError, match="rate is "):
            checks.rate(value)


def test_the_draw_of_calls_is_the_same_every_time():
    def drawn():
        return [(name, {key: label for key, (label, _) in changed.items()}) for name, _, changed in calls(5, 50)]

    state = random.getstate()
    assert drawn() == drawn()
    assert random.getstate() == state
