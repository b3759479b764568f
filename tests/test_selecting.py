"""`select` decides as the engine does, and its weights make a trainer's own loss the dense one on average."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparkjoy as sj

GATES = st.one_of(
    st.builds(sj.KondoGate, rate=st.sampled_from([0.05, 0.25, 0.5, 0.9, 1.0])),
    st.builds(sj.KondoGate, rate=st.sampled_from([0.25, 0.6]), negative_share=st.sampled_from([0.3, 0.5])),
    st.builds(sj.KondoGate, price=st.sampled_from([-1.0, 0.0, 0.5])),
    st.builds(sj.KondoGate, rate=st.sampled_from([0.2, 0.6]), price=st.sampled_from([-1.0, 0.0, 0.5])),
)


@settings(max_examples=200)
@given(
    gate=GATES,
    signs=st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), min_size=1, max_size=12),
    surprisals=st.lists(st.sampled_from([0.0, 0.3, 1.0, 2.0]), min_size=12, max_size=12),
    lengths=st.lists(st.integers(0, 3), min_size=12, max_size=12),
)
def test_engine_and_select_decide_alike(gate, signs, surprisals, lengths):
    count = len(signs)
    advantages = torch.tensor(signs)
    mask = torch.arange(3) < torch.tensor(lengths[:count]).unsqueeze(1)
    log_probs = -torch.tensor(surprisals[:count]).unsqueeze(1) * torch.tensor([1.0, 0.0, 2.0])
    parameter = log_probs.clone().requires_grad_()
    chosen = sj.select(gate, advantages, log_probs, mask)
    for known in (log_probs, None):
        report = sj.gated_backward(
            lambda rows: parameter[rows], torch.arange(count), advantages, gate, log_probs=known, mask=mask
        )
        assert torch.equal(report.decision.keep, chosen.decision.keep)
    assert torch.equal(chosen.rows, chosen.decision.keep.nonzero().squeeze(1))
    assert torch.equal(chosen.weights, torch.ones(len(chosen.rows)))


def test_a_delight_has_the_sign_of_its_advantage_also_where_nothing_surprises():
    advantages, log_probs = torch.tensor([1.0, 1.0, -1.0, -1.0]), -torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert sj.select(sj.KondoGate(rate=0.5), advantages, log_probs).rows.tolist() == [0, 1]
    assert sj.select(sj.KondoGate(price=0), advantages, log_probs).rows.tolist() == [0, 1]
    assert sj.select(sj.KondoGate(price=0), advantages).rows.tolist() == [0, 1]  # signs suffice


@pytest.mark.parametrize("known", [True, False])
def test_the_mean_of_the_weighted_gradients_is_the_dense_gradient(known, generator):
    logits = torch.randn(40, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(5, (40,), generator=generator)
    advantages = torch.randn(40, generator=generator, dtype=torch.float64)

    def gradient(rows, weights):
        log_probs = logits[rows].log_softmax(1).gather(1, actions[rows, None]).squeeze(1)
        return torch.autograd.grad(-(advantages[rows] * weights * log_probs).sum() / 40, logits)[0]

    sampled = logits.detach().log_softmax(1).gather(1, actions[:, None]).squeeze(1)
    gate = sj.UnbiasedGate(noise=1.0, generator=generator)
    draws = []
    for _ in range(400):
        rows, weights, _ = sj.select(gate, advantages, sampled if known else None)
        draws.append(gradient(rows, weights))
    stacked, dense = torch.stack(draws), gradient(torch.arange(40), torch.ones(40, dtype=torch.float64))
    error = stacked.std(dim=0) / len(draws) ** 0.5
    assert bool(((stacked.mean(dim=0) - dense).abs() <= 4.5 * error + 1e-12).all())
    assert min(len(draw.abs().sum(1).nonzero()) for draw in draws) < 40


def test_costs_count(generator):
    advantages, cost = torch.ones(100), torch.ones(100)
    cost[50:] = 100
    chance = sj.select(sj.UnbiasedGate(noise=1.0), advantages, cost=cost).decision.probability
    assert chance[0] > 2 * chance[-1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"gate": sj.KondoGate(rate=0.25)}, "leave 2 of 3 rows open; give the log-probs"),
        ({"gate": sj.KondoGate(price=0), "log_probs": torch.tensor([-1.0, torch.nan, -1.0])}, "log_probs has 1 of 3"),
        ({"gate": sj.KondoGate(price=0), "log_probs": torch.zeros(2)}, "expected"),
        ({"gate": sj.UnbiasedGate(), "cost": torch.ones(2)}, r"cost has shape \(2,\)"),
    ],
)
def test_wrong_input_is_refused(arguments, says):
    gate = arguments.pop("gate")
    with pytest.raises(ValueError, match=says):
        sj.select(gate, torch.tensor([1.0, 2.0, -1.0]), **arguments)


def test_advantages_may_be_on_any_device_and_of_any_kind():
    gate = sj.KondoGate(price=0)
    assert sj.select(gate, [1, 0, -1, 2]).rows.tolist() == [0, 3]
    with pytest.raises(ValueError, match="advantages is on the device meta; expected a dense tensor of values"):
        sj.select(gate, torch.ones(2, device="meta"), torch.zeros(2))
