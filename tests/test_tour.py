"""A gate that a reader of the tour in `sparkjoy.gates` writes, and what there is to check about it."""

import inspect

import pytest
import torch
from engine_cases import ROWS, SHAPES, make_case
from reference import masked_gradient

import sparkjoy as sj
from sparkjoy import states
from sparkjoy.checks import is_number


class TokenPurse:
    """The greatest positive scores, while their tokens fit in a purse. What is left in it stays for the next batch.

    Args:
        tokens: put into the purse at every batch.
    """

    weighted = False

    def __init__(self, tokens):
        self.tokens = tokens
        self.left = 0.0

    def __call__(self, score, cost=None):
        cost = torch.ones_like(score) if cost is None else cost.to(score.dtype)
        purse = self.left + self.tokens
        order = score.argsort(descending=True, stable=True)
        keep = torch.zeros_like(score, dtype=torch.bool)
        keep[order] = (cost[order].cumsum(0) <= purse) & (score[order] > 0)
        self.left = purse - float(cost[keep].sum())
        price = score[keep].min() if keep.any() else None
        return sj.Decision(keep, price, probability=keep.to(score.dtype), weight=torch.ones_like(score))

    def __repr__(self):
        return f"TokenPurse({self.tokens})"

    def state_dict(self):
        return {"left": self.left}

    def load_state_dict(self, state):
        states.check(repr(self), state, left=is_number)
        self.left = state["left"]


def test_a_gate_of_a_readers_own_is_under_40_lines():
    assert len(inspect.getsource(TokenPurse).splitlines()) < 40


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_its_gradient_is_that_of_the_masked_full_batch(shape, known, micro_batch_size):
    policy, batch, advantages, mask = make_case(shape)
    report = sj.GatedBackward(TokenPurse(6), micro_batch_size=micro_batch_size, normalizer="samples")(
        policy.log_probs,
        batch,
        advantages,
        log_probs=policy.log_probs(batch).detach() if known else None,
        mask=mask,
    )
    keep, weight = report.decision.keep, report.decision.weight
    assert 0 < report.kept == int(keep.sum()) < ROWS
    parameters = list(policy.parameters())
    expected = masked_gradient(policy.log_probs, sj.reinforce, batch, advantages, mask, keep, weight, ROWS, parameters)
    for parameter, reference in zip(parameters, expected, strict=True):
        assert (parameter.grad - reference).norm() / reference.norm() < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_it_spends_its_tokens_and_no_more(shape):
    policy, batch, advantages, mask = make_case(shape)
    step, spent = sj.GatedBackward(TokenPurse(6)), 0
    for steps in range(1, 5):
        report = step(policy.log_probs, batch, advantages, log_probs=policy.log_probs(batch).detach(), mask=mask)
        spent += report.kept if mask is None else report.backward_tokens  # without a mask every row costs 1
        assert 0 < spent <= 6 * steps


@pytest.mark.parametrize("shape", SHAPES)
def test_select_decides_as_the_engine_does(shape):
    policy, batch, advantages, mask = make_case(shape)
    log_probs = policy.log_probs(batch).detach()
    report = sj.gated_backward(policy.log_probs, batch, advantages, TokenPurse(6), log_probs=log_probs, mask=mask)
    chosen = sj.select(TokenPurse(6), advantages, log_probs, mask)
    assert torch.equal(chosen.rows, report.decision.keep.nonzero().squeeze(1))


def test_a_resumed_run_decides_as_an_unbroken_one():
    policy, batch, advantages, _ = make_case("rows")
    unbroken = sj.GatedBackward(TokenPurse(0.75))
    for _ in range(2):  # 0.75 of a row is left of the first step, half of a row of the second
        unbroken(policy.log_probs, batch, advantages)
    resumed = sj.GatedBackward(TokenPurse(0.75))
    resumed.load_state_dict(unbroken.state_dict())
    fresh = sj.GatedBackward(TokenPurse(0.75))
    kept = [step(policy.log_probs, batch, advantages).kept for step in (unbroken, resumed, fresh)]
    assert kept == [1, 1, 0]


def test_another_gates_state_is_refused():
    step = sj.GatedBackward(TokenPurse(6))
    state = sj.GatedBackward(sj.BudgetGate(0.1)).state_dict()
    with pytest.raises(ValueError, match=r"state_dict\(\) of TokenPurse\(6\)"):
        step.load_state_dict(state)


def test_the_frontier_measures_it_and_never_recommends_what_is_not_weighted():
    policy, batch, advantages, _ = make_case("rows")
    found = sj.frontier(policy.log_probs, batch, advantages, gates={"purse": TokenPurse(3)}, rounds=3)
    purse = found.settings[1]
    assert (purse.gate, purse.kind, purse.noise) == ("TokenPurse(3)", "biased", None)
    assert 0 < purse.rows < ROWS
    assert found.recommend().setting.name == "dense"
