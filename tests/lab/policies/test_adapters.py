import pytest
import torch

from sparkjoy_lab.policies.adapters import LowRankAdapter, add_adapters
from sparkjoy_lab.policies.transformer import Transformer


def make():
    torch.manual_seed(0)
    return Transformer(3, positions=12, layers=2, width=16, heads=2, feed_forward=24).double()


def rows_of(generator, count=6):
    return {
        "prompts": torch.randint(3, (count, 5), generator=generator),
        "answers": torch.randint(3, (count, 7), generator=generator),
    }


def adapted_and_merged():
    """A policy with adapters that change something, and one whose weights contain them."""
    adapted, merged = make(), make()
    add_adapters(adapted, rank=3)
    adapted.double()
    for block, whole in zip(adapted.layers, merged.layers, strict=True):
        for name in ("qkv", "out", "up", "down"):
            adapter = getattr(block, name)
            torch.nn.init.normal_(adapter.up, std=0.3)
            getattr(whole, name).weight.data += (adapter.up @ adapter.down).detach()
    return adapted, merged


def test_adapters_count_in_log_probs_and_in_sampling(generator):
    adapted, merged = adapted_and_merged()
    rows = rows_of(generator)
    torch.testing.assert_close(adapted.log_probs(rows), merged.log_probs(rows), atol=1e-12, rtol=0)
    assert not torch.allclose(adapted.log_probs(rows), make().log_probs(rows))
    draws = [policy.sample(rows["prompts"], 4, 7, torch.Generator().manual_seed(0)) for policy in (adapted, merged)]
    assert torch.equal(draws[0][0], draws[1][0])
    torch.testing.assert_close(draws[0][1], draws[1][1], atol=1e-12, rtol=0)


def test_only_adapters_learn(generator):
    adapted, _ = adapted_and_merged()
    adapted.log_probs(rows_of(generator)).sum().backward()
    learned = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert len(learned) == 2 * 4 * 2
    assert all(name.endswith((".down", ".up")) for name in learned)


def test_a_hook_on_a_block_is_called(generator):
    policy, seen = make(), []
    expected = policy.log_probs(rows_of(torch.Generator().manual_seed(3)))
    policy.layers[0].qkv.register_forward_hook(lambda *_: seen.append(1))
    given = policy.log_probs(rows_of(torch.Generator().manual_seed(3)))
    assert seen
    torch.testing.assert_close(given, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("ragged", [False, True])
def test_checkpointing_changes_no_gradient_and_runs_blocks_twice(generator, ragged):
    policy = make()
    policy.fused = False
    rows = rows_of(generator)
    if ragged:
        rows["prompt_lengths"] = torch.randint(1, 6, (6,), generator=generator)
    runs, gradients = [], []
    policy.layers[0].up.register_forward_hook(lambda *_: runs.append(1))
    for checkpointed in (False, True):
        policy.checkpointed = checkpointed
        policy.zero_grad()
        policy.log_probs(rows).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in policy.parameters()])
    assert len(runs) == 1 + 2
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="rank is 0; expected at least 1"):
        LowRankAdapter(torch.nn.Linear(2, 2, bias=False), 0)
