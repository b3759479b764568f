import pytest
import torch
import torch.nn.functional as F

from sparkjoy_lab.policies import transformer
from sparkjoy_lab.policies.transformer import Transformer


def make(groups, prompt_length, answer_length, generator, shared):
    """A policy in float64, and rows whose prompts are equal within a group."""
    torch.manual_seed(0)
    policy = Transformer(3, 12, layers=2, width=24, heads=3, feed_forward=20).double()
    for parameter in policy.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)  # norms' weights are not all 1
    index = torch.tensor(groups)
    prompts = torch.randint(3, (len(groups), prompt_length), generator=generator)[index]
    rows = {"prompts": prompts, "answers": torch.randint(3, (len(groups), answer_length), generator=generator)}
    return policy, {**rows, "prompt_index": index} if shared else rows


def autograd_log_probs(policy, rows):
    """Nothing but torch's modules, and a pass over the whole sequence for all positions."""
    prompts, answers = rows["prompts"], rows["answers"]
    sequence = torch.cat([prompts, answers[:, :-1]], dim=1)
    hidden = policy.tokens(sequence) + policy.positions(torch.arange(sequence.shape[1]))
    for block in policy.blocks:
        qkv = block.qkv(block.attention_norm(hidden)).unflatten(2, (3, block.heads, -1)).transpose(1, 3)
        seen = F.scaled_dot_product_attention(*qkv.unbind(2), is_causal=True)
        hidden = hidden + block.out(seen.transpose(1, 2).flatten(2))
        hidden = hidden + block.down(F.relu(block.up(block.feed_forward_norm(hidden))))
    every = policy.head(policy.norm(hidden[:, prompts.shape[1] - 1 :])).log_softmax(dim=2)
    return every.gather(2, answers.unsqueeze(2)).squeeze(2)


GROUPS = [[0], [0, 1, 2], [2, 0, 1, 1, 0, 2, 2, 2, 0, 1], [1] * 5]
LENGTHS = [(6, 7), (1, 5), (4, 1), (1, 1)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("prompt_length", "answer_length"), LENGTHS)
def test_gradients_are_those_of_autograd(generator, groups, prompt_length, answer_length, shared):
    policy, rows = make(groups, prompt_length, answer_length, generator, shared)
    weight = torch.randn(len(groups), answer_length, generator=generator, dtype=torch.double)
    parameters = dict(policy.named_parameters())
    fused, plain = policy.log_probs(rows), autograd_log_probs(policy, rows)
    torch.testing.assert_close(fused, plain, atol=1e-12, rtol=0)
    expected = torch.autograd.grad((weight * plain).sum(), list(parameters.values()))
    for name, one, other in zip(
        parameters, torch.autograd.grad((weight * fused).sum(), list(parameters.values())), expected, strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0, msg=name)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_those_of_small_differences(generator, shared):
    policy, rows = make([0, 0, 1, 1, 0, 1], 3, 3, generator, shared)
    names, weights = zip(*policy.named_parameters(), strict=True)

    def log_probs(*weights):
        return torch.func.functional_call(policy, dict(zip(names, weights, strict=True)), (rows,))

    policy.forward = policy.log_probs
    leaves = [weight.detach().clone().requires_grad_() for weight in weights]
    assert torch.autograd.gradcheck(log_probs, leaves, fast_mode=True)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("trained", ["head", "norm", "blocks.1", "blocks.0.up", "blocks.0.out", "tokens", "positions"])
def test_frozen_weights_get_no_gradient_and_change_no_other(generator, trained, shared):
    policy, rows = make([0, 0, 1, 1, 0, 1], 4, 3, generator, shared)
    policy.log_probs(rows).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    policy.zero_grad()
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    policy.log_probs(rows).sum().backward()
    for name, parameter in policy.named_parameters():
        if name.startswith(trained):
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-12, rtol=0)
        else:
            assert parameter.grad is None


def test_a_graph_can_be_differentiated_twice_but_not_after_its_weights_changed(generator):
    policy, rows = make([0, 1], 4, 3, generator, False)
    loss = policy.log_probs(rows).sum()
    one, two = (torch.autograd.grad(loss, policy.head.weight, retain_graph=True) for _ in range(2))
    assert torch.equal(one[0], two[0])
    with torch.no_grad():
        policy.head.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_elsewhere_autograd_does_the_same(generator, monkeypatch):
    policy, rows = make([0, 0, 0, 1, 1, 1], 4, 3, generator, True)
    fused = policy.log_probs(rows)
    monkeypatch.setattr(transformer, "fits_fused", lambda states: False)
    plain = policy.log_probs(rows)
    torch.testing.assert_close(plain, fused, atol=1e-12, rtol=0)
    expected = torch.autograd.grad(fused.sum(), list(policy.parameters()))
    for one, other in zip(torch.autograd.grad(plain.sum(), list(policy.parameters())), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_autocast_still_trains(generator):
    policy, rows = make([0, 0, 0, 1, 1, 1], 4, 3, generator, True)
    policy.float()
    with torch.autocast("cpu", torch.bfloat16):
        log_probs = policy.log_probs(rows)
    torch.testing.assert_close(log_probs.float(), policy.log_probs(rows), atol=0.1, rtol=0.1)
    log_probs.sum().backward()
