import pytest
import torch

from sparkjoy_lab.tasks.mnist import MnistConfig, MnistTask


@pytest.fixture(scope="module")
def task():
    return MnistTask(MnistConfig())


def test_rollout_rewards_the_label_and_knows_its_log_probs(task):
    torch.manual_seed(0)
    policy = task.policy()
    rollout = task.rollout(policy, torch.Generator().manual_seed(0), graph=False)
    images, labels = task.sample(100, torch.Generator().manual_seed(0))
    assert torch.equal(rollout.batch["inputs"], images)
    assert 0 <= images.min() < images.max() == 1
    logits = policy(images)
    probabilities = logits.softmax(1)
    right = (rollout.batch["actions"] == labels).float()
    torch.testing.assert_close(rollout.advantages, right - probabilities.square().sum(1).detach())
    torch.testing.assert_close(rollout.log_probs, policy.log_probs(rollout.batch).detach())
    assert not rollout.log_probs.requires_grad
    assert rollout.reward.item() == pytest.approx(right.mean().item())


def test_rollout_with_a_graph_draws_the_same(task):
    policy = task.policy()
    plain, graph = (task.rollout(policy, torch.Generator().manual_seed(1), graph=graph) for graph in (False, True))
    assert graph.log_probs.requires_grad
    assert torch.equal(plain.batch["actions"], graph.batch["actions"])
    assert torch.equal(plain.advantages, graph.advantages)


def test_batch_mean_baseline_centres_the_rewards():
    task = MnistTask(MnistConfig(baseline="batch-mean", batch_size=50))
    rollout = task.rollout(task.policy(), torch.Generator().manual_seed(0), graph=False)
    assert rollout.advantages.shape == (50,)
    assert rollout.advantages.sum().item() == pytest.approx(0, abs=1e-5)


def test_error_is_the_fraction_of_wrong_greedy_actions(task):
    class Always(torch.nn.Module):
        def forward(self, inputs):
            return torch.eye(10)[torch.full((len(inputs),), 3)]

    assert task.error(Always()) == pytest.approx(0.9)


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="batch-size"):
        MnistConfig(batch_size=0)
