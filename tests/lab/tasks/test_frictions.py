"""Actors that are late, broken, corrupted or lucky: what each does to a batch, and that a run with them is one run."""

import copy
from dataclasses import asdict, replace

import pytest
import torch

from sparkjoy_lab.tasks.frictions import Actors, Frictions
from sparkjoy_lab.tasks.mnist import MnistConfig, MnistTask
from sparkjoy_lab.tasks.reversal import ReversalConfig, ReversalTask
from sparkjoy_lab.training import loop
from sparkjoy_lab.training.checkpoint import load_checkpoint, save_checkpoint
from sparkjoy_lab.training.loop import Training, train
from sparkjoy_lab.training.processes import Share
from sparkjoy_lab.training.settings import Settings

SMALL = ReversalConfig(
    prompt_length=4, vocab_size=5, prompts=3, answers=4, held_out=10, layers=1, width=8, feed_forward=8
)
ALL = replace(SMALL, delay=3, bug=0.3, corrupt=0.3, discover=0.3)


def rolled_out(config, seed=0):
    task = ReversalTask(config)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(seed)
    return task, task.rollout(task.policy(), generator, graph=False), generator


def test_no_friction_draws_nothing_and_changes_nothing():
    task, rollout, generator = rolled_out(SMALL)
    assert not rollout.foreign
    torch.manual_seed(0)
    policy, by_hand = task.policy(), torch.Generator().manual_seed(0)
    prompts = task.sample(3, by_hand)
    answers, log_probs = policy.sample(prompts, 4, 4, noise=policy.noise(4, 12, by_hand))
    assert torch.equal(rollout.batch["answers"], answers)
    assert torch.equal(rollout.log_probs, log_probs)
    assert torch.equal(generator.get_state(), by_hand.get_state())
    assert Training(task, Settings()).actors is None


def test_a_bug_writes_zeros_and_a_discovery_the_right_answer_recorded_as_certain():
    config = replace(SMALL, prompts=200, bug=0.3, discover=0.2)
    task, rollout, _ = rolled_out(config)
    answers, right = rollout.batch["answers"], task.target(rollout.batch["prompts"])
    injected = (rollout.log_probs == 0).all(dim=1)
    found = injected & (answers == right).all(dim=1)
    broken = injected & ~found
    assert (answers[broken] == 0).all()
    # A discovery comes before a bug: 0.2 of all, and 0.3 of the other 0.8; 800 answers.
    assert found.float().mean().item() == pytest.approx(0.2, abs=0.05)
    assert broken.float().mean().item() == pytest.approx(0.24, abs=0.05)
    assert (rollout.log_probs[~injected] < 0).all()
    assert rollout.foreign
    rewards = task.reward(rollout.batch["prompts"], answers).view(-1, 4)
    torch.testing.assert_close(rollout.advantages.view(-1, 4), rewards - rewards.mean(dim=1, keepdim=True))


def test_corruption_makes_rewards_a_fair_coin_and_leaves_answers_and_error_alone():
    clean, corrupted = rolled_out(SMALL)[1], rolled_out(replace(SMALL, corrupt=1.0))[1]
    assert torch.equal(clean.batch["answers"], corrupted.batch["answers"])
    assert not corrupted.foreign
    coins = Frictions(corrupt=1.0).rewards(torch.full((1000,), 0.5), torch.Generator().manual_seed(0))
    assert set(coins.tolist()) == {0.0, 1.0}
    assert coins.mean().item() == pytest.approx(0.5, abs=0.05)
    some = Frictions(corrupt=0.2).rewards(torch.full((1000,), 0.5), torch.Generator().manual_seed(0))
    assert (some != 0.5).float().mean().item() == pytest.approx(0.2, abs=0.04)


def test_actors_hold_the_last_weights_and_the_first_ones_at_the_start():
    learner = torch.nn.Linear(1, 1, bias=False)
    generator = torch.Generator().manual_seed(0)
    oldest, any_age = (Actors(learner, Frictions(delay=2, delay_kind=kind)) for kind in ("oldest", "uniform"))
    first = learner.weight.item()
    ages = []
    for step in range(1, 40):
        learner.weight.data.fill_(step)
        oldest.follow()
        any_age.follow()
        assert oldest.draw(generator).weight.item() == (first if step <= 2 else step - 2)
        ages.append(step - any_age.draw(generator).weight.item())
    assert learner.weight.item() == 39
    assert set(ages[3:]) == {0, 1, 2}


def test_recorded_log_probs_are_those_of_the_actor():
    training = Training(ReversalTask(replace(SMALL, delay=5, delay_kind="oldest")), Settings(method="dg", steps=9))
    first = copy.deepcopy(training.policy)
    for _ in range(4):
        training.step()
    rollout = training._sampled()
    torch.testing.assert_close(rollout.log_probs, first.log_probs(rollout.batch).detach(), atol=1e-5, rtol=0)
    assert not torch.allclose(rollout.log_probs, training.policy.log_probs(rollout.batch), atol=1e-4)


@pytest.mark.parametrize("kind", ["uniform", "oldest"])
@pytest.mark.parametrize("method", [{"method": "importance"}, {"method": "unbiased"}, {"method": "ppo"}, {}])
def test_a_run_with_every_friction_goes_on_to_the_same_bit(kind, method, tmp_path):
    settings = Settings(steps=9, evaluate_every=3, **method)
    config = replace(ALL, delay_kind=kind)
    whole = Training(ReversalTask(config), settings)
    for _ in range(9):
        whole.step()
    part = Training(ReversalTask(config), settings)
    for _ in range(5):
        part.step()
        if part.steps_done == 3:
            part.evaluate()
    save_checkpoint(tmp_path / "checkpoint.pt", part.state_dict())
    resumed = Training(ReversalTask(config), settings)
    resumed.load_state_dict(load_checkpoint(tmp_path / "checkpoint.pt"))
    for _ in range(4):
        resumed.step()
    for one, other in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(whole.generator.get_state(), resumed.generator.get_state())


def test_a_checkpoint_with_actors_of_another_delay_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    settings = Settings(steps=4, evaluate_every=2, method="dg")
    train(ReversalTask(ALL), settings, tmp_path, asdict(ALL))
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    state["actors"]["snapshots"] = state["actors"]["snapshots"][:2].clone()
    with pytest.raises(ValueError, match="snapshots is not what such a run has there"):
        Training(ReversalTask(ALL), settings).load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"rate": 0.25}, True),
        ({}, True),
        ({"screen": "recorded"}, False),  # of size 0, for good
        ({"screen": "recorded", "floor": 0.5}, True),
    ],
)
def test_an_injected_answer_is_kept_by_the_learners_own_log_probs_or_by_a_floor(settings, kept):
    method = "kondo" if "rate" in settings else "unbiased"
    training = Training(ReversalTask(replace(SMALL, prompts=20, discover=0.3)), Settings(method, steps=3, **settings))
    step, seen = training.backward, []

    def spy(*arguments, **known):
        report = step(*arguments, **known)
        seen.append((report.decision.keep, known))
        return report

    training.backward = spy
    training.step()
    keep, known = seen[0]
    name = "log_probs" if "screen" in settings else "behavior_log_probs"
    assert list(known) == ["mask", name]
    injected = known[name][:, 0] == 0
    assert injected.any()
    assert (keep & injected).any() == kept


def test_mnist_acts_with_old_weights_and_learns_by_its_own():
    config = MnistConfig(batch_size=20, delay=3, corrupt=0.2)
    training = Training(MnistTask(config), Settings(method="pg", steps=5))
    assert not training.differentiates_rollout
    for _ in range(3):
        training.step()
    assert training.actors is not None
    assert MnistTask(MnistConfig(corrupt=0.2)).frictions.foreign is False


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (ReversalConfig, {"delay": -1}, "--delay -1: expected a number of steps, 0 or more"),
        (MnistConfig, {"delay": -1}, "--delay -1"),
        (ReversalConfig, {"bug": 1.5}, "--bug 1.5: expected a chance"),
        (MnistConfig, {"corrupt": -0.1}, "--corrupt -0.1"),
        (ReversalConfig, {"discover": float("nan")}, "--discover nan"),
        (ReversalConfig, {"delay_kind": "new"}, "--delay-kind new: expected uniform or oldest"),
        (ReversalConfig, {"delay": 10**9}, "takes .* GB of memory or more"),
        (ReversalConfig, {"credit": "token", "corrupt": 0.1}, "--corrupt 0.1 replaces the reward of a whole answer"),
    ],
)
def test_impossible_frictions_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_gating_tokens_refuses_answers_of_others():
    with pytest.raises(ValueError, match="--unit token decides on its own log-probs"):
        Training(ReversalTask(replace(SMALL, bug=0.1)), Settings(unit="token"))


def test_processes_have_together_what_one_process_would_have():
    frictions = Frictions(bug=0.3, corrupt=0.3, discover=0.3)
    answers, right, log_probs = torch.full((40, 2), 1), torch.full((40, 2), 2), torch.full((40, 2), -1.0)
    rewards = torch.full((40,), 0.5)

    def of(share):
        generator = torch.Generator().manual_seed(0)
        mine = share.rows(40)
        injected, recorded = frictions.answers(answers[mine], log_probs[mine], right[mine], generator, share)
        return injected, recorded, frictions.rewards(rewards[mine], generator, share)

    parts = [of(Share(rank, 4)) for rank in range(4)]
    for together, whole in zip(zip(*parts, strict=True), of(Share()), strict=True):
        assert torch.equal(torch.cat(together), whole)
    assert len(of(Share())[0].unique()) == 3
