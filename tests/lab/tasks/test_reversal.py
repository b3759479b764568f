import pytest
import torch

from sparkjoy_lab.tasks.reversal import ReversalConfig, ReversalTask

SMALL = {"prompt_length": 4, "vocab_size": 5, "prompts": 3, "answers": 2, "layers": 1, "width": 8, "feed_forward": 8}

PROMPT = torch.tensor([[0, 1, 2, 4]])


@pytest.mark.parametrize(
    ("target", "expected"), [("reverse", [4, 2, 1, 0]), ("copy", [0, 1, 2, 4]), ("increment", [1, 2, 3, 0])]
)
def test_targets(target, expected):
    task = ReversalTask(ReversalConfig(**SMALL, target=target))
    assert task.target(PROMPT).tolist() == [expected]
    assert task.reward(PROMPT, torch.tensor([expected])).tolist() == [1.0]


@pytest.mark.parametrize(
    ("shaping", "expected"),
    # the target is 4 2 1 0: all right; the third wrong; the first wrong; all wrong
    [
        ("fraction", [1.0, 0.75, 0.75, 0.0]),
        ("first-error", [1.0, 0.5, 0.0, 0.0]),
        ("all-or-nothing", [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_rewards(shaping, expected):
    task = ReversalTask(ReversalConfig(**SMALL, shaping=shaping))
    answers = torch.tensor([[4, 2, 1, 0], [4, 2, 0, 0], [3, 2, 1, 0], [0, 0, 0, 4]])
    assert task.reward(PROMPT.expand(4, 4), answers).tolist() == expected


def test_rollout_compares_the_answers_of_a_prompt():
    task = ReversalTask(ReversalConfig(**SMALL))
    torch.manual_seed(0)
    policy = task.policy()
    rollout = task.rollout(policy, torch.Generator().manual_seed(0), graph=False)
    prompts, answers = rollout.batch["prompts"], rollout.batch["answers"]
    assert prompts.shape == answers.shape == rollout.log_probs.shape == (6, 4)
    assert rollout.mask is None
    assert torch.equal(prompts[0::2], prompts[1::2])
    assert torch.equal(prompts[0::2], task.sample(3, torch.Generator().manual_seed(0)))
    rewards = task.reward(prompts, answers)
    torch.testing.assert_close(rollout.advantages, (rewards.view(3, 2) - rewards.view(3, 2).mean(1, True)).flatten())
    torch.testing.assert_close(rollout.log_probs, policy.log_probs(rollout.batch).detach(), atol=1e-5, rtol=0)
    assert rollout.reward.item() == pytest.approx(rewards.mean().item())


def test_a_seed_reproduces_a_rollout():
    task = ReversalTask(ReversalConfig(**SMALL))
    policy = task.policy()
    one, two, other = (task.rollout(policy, torch.Generator().manual_seed(seed), False) for seed in (1, 1, 2))
    assert torch.equal(one.batch["answers"], two.batch["answers"])
    assert torch.equal(one.log_probs, two.log_probs)
    assert not torch.equal(one.batch["prompts"], other.batch["prompts"])


def test_rollouts_keep_no_graph():
    task = ReversalTask(ReversalConfig(**SMALL))
    assert not task.samples_with_graph
    with pytest.raises(ValueError, match="keeps no graph"):
        task.rollout(task.policy(), torch.Generator(), graph=True)


def test_error_is_the_fraction_of_wrong_tokens_and_the_same_every_time():
    task = ReversalTask(ReversalConfig(**SMALL))
    policy = task.policy()
    assert task.error(policy) == task.error(policy) == pytest.approx(0.8, abs=0.05)

    class HalfRight(torch.nn.Module):
        def sample(self, prompts, answers_per_prompt, answer_length, generator):
            answers = task.target(prompts).clone()
            answers[:, ::2] = (answers[:, ::2] + 1) % 5
            return answers, torch.zeros(answers.shape)

    assert task.error(HalfRight()) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_length": 0}, "--prompt-length 0: expected at least 1"),
        ({"vocab_size": 1}, "--vocab-size 1: expected at least 2"),
        ({"answers": 0}, "--answers 0"),
        ({"feed_forward": -1}, "--feed-forward -1"),
        ({"target": "sort"}, "--target sort: expected one of reverse, copy, increment"),
        ({"shaping": "none"}, "--shaping none: expected one of"),
        ({"width": 10}, "--width 10: expected a multiple of --heads 4"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ReversalConfig(**change)


def test_credit_by_token_is_the_position_over_its_group():
    task = ReversalTask(ReversalConfig(prompt_length=4, prompts=3, answers=5, credit="token"))
    rollout = task.rollout(task.policy(), torch.Generator().manual_seed(0), graph=False)
    right = (rollout.batch["answers"] == task.target(rollout.batch["prompts"])).float()
    whole = ReversalTask(ReversalConfig(prompt_length=4, prompts=3, answers=5))
    expected = right - right.view(3, 5, 4).mean(1).repeat_interleave(5, 0)
    torch.testing.assert_close(rollout.advantages, expected / 4)
    # Summed over its tokens, an answer's advantage is that of its whole reward.
    rewards = whole.reward(rollout.batch["prompts"], rollout.batch["answers"]).view(3, 5)
    torch.testing.assert_close(rollout.advantages.sum(1).view(3, 5), rewards - rewards.mean(1, keepdim=True))
    with pytest.raises(ValueError, match="credit token"):
        ReversalConfig(credit="token", shaping="first-error")
