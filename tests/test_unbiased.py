"""The unbiased gate: probabilities that sum to the rate, weights that undo them, and DG's own gradient on average."""

import pytest
import torch
from engine_cases import SHAPES, make_case

from sparkjoy import GatedBackward, UnbiasedGate, delightful, update_size
from sparkjoy.gates.unbiased import inclusion_probabilities


def test_probabilities_are_proportional_up_to_one_and_sum_to_the_count(generator):
    for expected in (0.5, 1, 3, 7.3, 19, 20):
        size = torch.rand(20, generator=generator).exp().pow(6)
        probability, price = inclusion_probabilities(size, expected)
        assert float(probability.sum()) == pytest.approx(expected)
        torch.testing.assert_close(probability, (size.double() / price).clamp(max=1))


def test_fewer_than_asked_for_are_kept_for_certain():
    probability, _ = inclusion_probabilities(torch.tensor([0.0, 2.0, 0.0, 1e-9]), 3)
    assert probability.tolist() == [0, 1, 0, 1]
    decision = UnbiasedGate(rate=0.5)(torch.zeros(4))
    assert not decision.keep.any()
    assert decision.price is None


def test_each_is_kept_as_often_as_its_probability_says(generator):
    score = torch.tensor([5.0, -3.0, 1.0, -1.0, 0.5, 0.0, 0.2, -0.1])
    gate = UnbiasedGate(rate=0.375, generator=generator)
    draws = [gate(score) for _ in range(4000)]
    often = torch.stack([draw.keep.float() for draw in draws]).mean(0)
    error = (draws[0].probability * (1 - draws[0].probability) / 4000).sqrt()
    assert bool(((often - draws[0].probability).abs() <= 4 * error).all())
    for draw in draws[:10]:
        torch.testing.assert_close(draw.weight, draw.keep / draw.probability.clamp(min=1e-9))
    assert {int(draw.keep.sum()) for draw in draws} == {3}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mean_gradient_is_that_of_dg(shape, generator):
    policy, batch, advantages, mask = make_case(shape)

    def gradient(gate, score=update_size):
        GatedBackward(gate, loss=delightful(), score=score)(policy.log_probs, batch, advantages, mask=mask)
        flat = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in policy.parameters()])
        policy.zero_grad(set_to_none=True)
        return flat

    dense = gradient(None)
    gate = UnbiasedGate(rate=0.3, generator=generator)
    draws = torch.stack([gradient(gate) for _ in range(300)])
    error = draws.std(dim=0) / len(draws) ** 0.5
    assert bool(((draws.mean(0) - dense).abs() <= 4 * error + 1e-9).all())
    assert float(draws.std(dim=0).max()) > 0  # it does skip


def test_systematic_draws_vary_less(generator):
    advantages = torch.randn(100, generator=generator)
    log_probs = -1 - torch.randn(100, generator=generator).abs()
    score, value = update_size(advantages, log_probs), -torch.sigmoid(-advantages * log_probs) * advantages
    gate = UnbiasedGate(rate=0.1, generator=generator)
    systematic = [gate(score).weight for _ in range(500)]
    chance = gate(score).probability
    independent = [(torch.rand(100, generator=generator) < chance) / chance for _ in range(500)]
    spread = [torch.stack([(weight * value).sum() for weight in draws]).std() for draws in (systematic, independent)]
    assert spread[0] < 0.7 * spread[1]


def test_update_size_bounds_the_gradient_at_the_logits(generator):
    logits = torch.randn(50, 6, generator=generator)
    actions = torch.randint(6, (50,), generator=generator)
    advantages = torch.randn(50, generator=generator)
    probabilities = logits.softmax(1)
    taken = probabilities.gather(1, actions[:, None]).squeeze(1).log()
    residual = torch.nn.functional.one_hot(actions, 6) - probabilities
    exact = (torch.sigmoid(-advantages * taken) * advantages).abs() * residual.norm(dim=1)
    size = update_size(advantages, taken)
    assert torch.equal(size.sign(), advantages.sign())
    assert bool((size.abs() <= exact * (1 + 1e-5)).all() & (exact <= 2**0.5 * size.abs() * (1 + 1e-5)).all())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rate": 0}, "rate is 0"),
        ({"noise": 0}, "noise is 0; expected a number above 0"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"noise": "0.3"}, "noise is '0.3'"),
        ({"noise": True}, "noise is True"),
        ({"noise": 0.3, "rate": 0.1}, "expected one of them"),
        ({"noise": 0.3, "floor": 1.0}, "floor is 1.0; expected a probability"),
    ],
)
def test_wrong_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        UnbiasedGate(**options)


def test_a_score_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="score has 1 of 2 values NaN"):
        UnbiasedGate(rate=0.5)(torch.tensor([1.0, torch.nan]))
