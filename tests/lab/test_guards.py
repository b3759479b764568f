"""Guards: statistics of repeated draws, and the score built from them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparkjoy as sj
from sparkjoy_lab.guards import GuardedDelight, RepeatedDraws


@given(seed=st.integers(0, 1000), batches=st.lists(st.integers(0, 20), min_size=1, max_size=5))
@settings(derandomize=True, max_examples=50)
def test_statistics_equal_those_of_all_draws_at_once(seed, batches):
    generator = torch.Generator().manual_seed(seed)
    draws = RepeatedDraws(keys=3)
    keys = [torch.randint(3, (size,), generator=generator) for size in batches]
    rewards = [1e3 + torch.randn(size, generator=generator, dtype=torch.float64) for size in batches]
    for key, reward in zip(keys, rewards, strict=True):
        draws.update(key, reward)
    everything, all_rewards = torch.cat(keys), torch.cat(rewards)
    for key in range(3):
        mine = all_rewards[everything == key]
        assert draws.count[key] == len(mine)
        assert float(draws.mean[key]) == pytest.approx(float(mine.mean()) if len(mine) else 0, rel=1e-12)
        expected = float(mine.std()) if len(mine) > 1 else 0
        assert float(draws.deviation[key]) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_a_memory_forgets_what_changed():
    long, short = RepeatedDraws(keys=1), RepeatedDraws(keys=1, memory=10)
    for reward in [0.0] * 100 + [1.0] * 30:
        for draws in (long, short):
            draws.update(torch.zeros(1, dtype=torch.long), torch.tensor([reward]))
    assert float(long.mean) == pytest.approx(30 / 130)
    assert float(short.mean) > 0.9


def test_without_noise_the_guard_is_delight_exactly():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(4, (50,), generator=generator)
    rewards = torch.tensor([0.0, 1.0, 0.3, -2.0])[keys]
    advantages = rewards - torch.rand(50, generator=generator)  # a baseline of each row's own
    log_probs = -torch.rand(50, generator=generator)
    guard = GuardedDelight(RepeatedDraws(keys=4))
    guard.observe(keys, rewards)
    assert torch.allclose(guard(advantages, log_probs), sj.delight(advantages, log_probs), atol=1e-7)


def test_the_engine_skips_the_lucky_draw():
    logits = torch.zeros(2, requires_grad=True)
    actions, rewards = torch.tensor([0, 1, 1, 1]), torch.tensor([0.5, -2.0, -2.0, 3.0])
    guard = GuardedDelight(RepeatedDraws(keys=2))
    for score, kept in ((sj.delight, [True, False, False, True]), (guard, [True, False, False, False])):
        guard.observe(actions, rewards)
        gated = sj.GatedBackward(sj.KondoGate(price=0), score=score)
        report = gated(lambda rows: logits.log_softmax(0)[rows], actions, rewards)
        assert report.decision.keep.tolist() == kept


def test_a_saved_guard_goes_on_as_before():
    guard, resumed = GuardedDelight(RepeatedDraws(2)), GuardedDelight(RepeatedDraws(2))
    keys, rewards = torch.tensor([0, 1, 1]), torch.tensor([1.0, 2.0, 4.0])
    guard.observe(keys, rewards)
    resumed.load_state_dict(guard.state_dict())
    for each in (guard, resumed):
        each.observe(keys, rewards + 1)
    assert torch.equal(guard.draws.mean, resumed.draws.mean)
    assert torch.equal(guard.draws.deviation, resumed.draws.deviation)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="keys is 0; expected a whole number of at least 1"):
        RepeatedDraws(keys=0)
    with pytest.raises(ValueError, match="memory is 0; expected at least 1 draw"):
        RepeatedDraws(keys=1, memory=0)
    with pytest.raises(ValueError, match="keys from 0 to 2; expected 0 to 1"):
        RepeatedDraws(keys=2).update(torch.tensor([0, 2]), torch.zeros(2))
    guard = GuardedDelight(RepeatedDraws(2))
    with pytest.raises(ValueError, match="call observe"):
        guard(torch.zeros(2), torch.zeros(2))
    guard.observe(torch.tensor([0]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="the rows observed are"):
        guard(torch.zeros(2), torch.zeros(2))
