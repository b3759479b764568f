"""Options in words: the same on processes that were told the same."""

import pickle
from functools import partial

import pytest
import torch
from engine_cases import make_case

import sparkjoy as sj
from sparkjoy.processes.meeting import in_words
from sparkjoy.testing import TinyPolicy
from sparkjoy_lab.losses import weighted_by
from sparkjoy_lab.scores import additive_score, noisy_score, uniform_score


class Plain:
    def __call__(self, rows):
        return rows


def test_the_same_options_are_the_same_words_and_others_are_not():
    def options(temperature, rate):
        function = partial(sj.delight, temperature)
        return in_words({"gate": sj.KondoGate(rate=rate), "loss": sj.delightful(temperature), "screen": function})

    assert options(2.0, 0.1) == options(2.0, 0.1)
    assert options(2.0, 0.1) | {"gate": "KondoGate(rate=0.2)"} == options(2.0, 0.2)
    differ = [name for name, value in options(2.0, 0.1).items() if options(3.0, 0.1)[name] != value]
    assert differ == ["loss", "screen"]


def test_words_hold_no_address():
    drawn = uniform_score(torch.Generator())
    plain = (Plain(), Plain().__call__, TinyPolicy(4, 3), lambda rows: rows, object())
    objects = (*plain, sj.SoftGate(1.0, price=0.0), drawn, noisy_score(drawn, 0.5, generator=torch.Generator()))
    assert "0x" not in str(in_words({str(number): value for number, value in enumerate(objects)}))


@pytest.mark.parametrize(
    "make",
    [
        lambda: sj.GatedBackward(sj.KondoGate(rate=0.3), loss=sj.clipped(), score=additive_score(0.5), compare_every=2),
        lambda: sj.GatedBackward(sj.UnbiasedGate(generator=torch.Generator().manual_seed(1)), loss=sj.delightful(2.0)),
        lambda: sj.GatedBackward(sj.BudgetGate(0.3), score=noisy_score(sj.delight, 0.5), loss=weighted_by(sj.delight)),
    ],
)
def test_a_step_goes_to_another_process(make):
    """By pickle, as joblib's and spawned processes get it, after it has learnt something."""
    policy, batch, advantages, _ = make_case("rows")
    step = make()
    step(policy.log_probs, batch, advantages)
    there = pickle.loads(pickle.dumps(step))
    found = []
    for one in (step, there):
        torch.manual_seed(0)
        policy.zero_grad()
        decision = one(policy.log_probs, batch, advantages).decision
        found.append((decision.keep, decision.weight, policy.layer.weight.grad))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
