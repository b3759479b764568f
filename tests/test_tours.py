"""What a reader adds in under 40 lines each: a loss with its size, a price, a trainer of one's own, a task."""

import inspect

import pytest
import torch
from engine_cases import make_case

import sparkjoy as sj
from sparkjoy.scores import per_row, says, surprisal
from sparkjoy.selecting import learn
from sparkjoy.testing import TinyPolicy
from sparkjoy_lab.tasks.frictions import Frictions
from sparkjoy_lab.tasks.rollouts import Rollout
from sparkjoy_lab.training.loop import Training
from sparkjoy_lab.training.settings import Settings


@says(is_size=True)
def half_as_bad_size(advantages, log_probs):
    return half(per_row(advantages, log_probs)) * -torch.expm1(-surprisal(log_probs))


def half_as_bad(log_probs, advantages, behavior_log_probs, mask):
    """REINFORCE in which failures count half."""
    return -half(per_row(advantages, log_probs)) * log_probs


def half(advantages):
    return torch.where(advantages < 0, advantages / 2, advantages)


half_as_bad.size = half_as_bad_size


class SlowQuantile:
    """The mean of the batches' own quantiles so far: a price that remembers, and goes into checkpoints."""

    def __init__(self, rate):
        self.rate, self.total, self.batches = rate, 0.0, 0

    def __call__(self, score):
        self.total += float(score.quantile(1 - self.rate))
        self.batches += 1
        return self.total / self.batches

    def __repr__(self):
        return f"SlowQuantile({self.rate:g})"

    def state_dict(self):
        return {"total": self.total, "batches": self.batches}

    def load_state_dict(self, state):
        self.total, self.batches = state["total"], state["batches"]


class OwnTrainer:
    """A loop that owns its passes and samples with older weights: the budget learns how far those are off."""

    def __init__(self, policy, gate, learning_rate=0.1):
        self.policy, self.gate = policy, gate
        self.optimizer = torch.optim.SGD(policy.parameters(), learning_rate)

    def step(self, batch, advantages, sampled_log_probs):
        rows, weights, _ = sj.select(self.gate, advantages, sampled_log_probs)
        if len(rows) == 0:
            return 0
        log_probs = self.policy.log_probs({name: values[rows] for name, values in batch.items()})
        loss = -(advantages[rows] * weights * log_probs).sum() / len(advantages)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        learn(self.gate, weights, advantages[rows], sampled_log_probs[rows], log_probs.detach())
        return len(rows)


class Signs:
    """A task of the laboratory: say whether a number is positive."""

    name, frictions, samples_with_graph, trim = "signs", Frictions(), False, None

    def policy(self):
        return TinyPolicy(1, 2)

    def rollout(self, policy, generator, graph):
        state = torch.randn(100, 1, generator=generator)
        with torch.no_grad():
            every = policy(state)
        action = torch.multinomial(every.exp(), 1, generator=generator).squeeze(1)
        reward = (action == (state[:, 0] > 0)).float()
        log_probs = every.gather(1, action[:, None]).squeeze(1)
        batch = {"state": state, "action": action}
        return Rollout(batch, reward - reward.mean(), log_probs, None, reward.mean())

    def error(self, policy):
        state = torch.linspace(-2, 2, 100)[:, None]
        return float((policy(state).argmax(1) != (state[:, 0] > 0)).float().mean())


@pytest.mark.parametrize("parts", [(half_as_bad_size, half_as_bad, half), SlowQuantile, OwnTrainer, Signs])
def test_each_is_under_40_lines(parts):
    parts = parts if isinstance(parts, tuple) else (parts,)
    assert sum(len(inspect.getsource(part).splitlines()) for part in parts) < 40


def test_a_budget_samples_by_the_losss_own_size_and_its_mean_gradient_is_the_dense_one():
    policy, batch, advantages, _ = make_case("rows")
    report = sj.gated_backward(policy.log_probs, batch, advantages, sj.UnbiasedGate(noise=0.3), loss=half_as_bad)
    size = half_as_bad_size(advantages, policy.log_probs(batch).detach())
    expected = sj.UnbiasedGate(noise=0.3)(size).probability
    torch.testing.assert_close(report.decision.probability, expected)
    policy.zero_grad()
    sj.gated_backward(policy.log_probs, batch, advantages, None, loss=half_as_bad)
    dense, total, draws = policy.layer.weight.grad.clone(), 0.0, 500
    step = sj.GatedBackward(sj.UnbiasedGate(noise=1.0, generator=torch.Generator().manual_seed(0)), loss=half_as_bad)
    for _ in range(draws):
        policy.zero_grad()
        step(policy.log_probs, batch, advantages)
        total = total + (0 if policy.layer.weight.grad is None else policy.layer.weight.grad)
    assert (total / draws - dense).norm() < 4 * dense.norm() * (1.0 / draws) ** 0.5


def test_a_price_is_asked_once_a_batch_and_resumed():
    policy, batch, advantages, _ = make_case("rows")
    known = policy.log_probs(batch).detach()
    unbroken, first, second = (sj.GatedBackward(sj.KondoGate(price=SlowQuantile(0.3))) for _ in range(3))
    scales = (1.0, 0.2, 3.0, 0.1)
    kept = [unbroken(policy.log_probs, batch, scale * advantages, log_probs=known).kept for scale in scales]
    halves = [first(policy.log_probs, batch, scale * advantages, log_probs=known).kept for scale in scales[:2]]
    second.load_state_dict(first.state_dict())
    halves += [second(policy.log_probs, batch, scale * advantages, log_probs=known).kept for scale in scales[2:]]
    assert halves == kept
    assert unbroken.gate.price.batches == 4


def test_a_trainer_of_ones_own_learns_as_the_engine_does():
    policy, batch, advantages, _ = make_case("rows")
    stale = 2 * policy.log_probs(batch).detach()
    gates = [sj.UnbiasedGate(noise=0.3, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    own, step = OwnTrainer(policy, gates[0], learning_rate=0.0), sj.GatedBackward(gates[1], normalizer="samples")
    for _ in range(5):
        kept = own.step(batch, advantages, stale)
        gradient = policy.layer.weight.grad.clone()
        policy.zero_grad()
        assert step(policy.log_probs, batch, advantages, log_probs=stale).kept == kept
        torch.testing.assert_close(policy.layer.weight.grad, gradient)
    assert gates[0].state_dict() == gates[1].state_dict()
    assert gates[0].state_dict()["allowance"] != 0


def test_a_task_of_ones_own_is_learnt_with_every_method():
    for method in ({"method": "pg"}, {"method": "kondo", "rate": 0.1}, {"method": "unbiased"}):
        training = Training(Signs(), Settings(**method, steps=60, learning_rate=0.1))
        before = training.evaluate()["error"]
        while not training.finished:
            training.step()
        assert training.evaluate()["error"] < min(0.1, before)
