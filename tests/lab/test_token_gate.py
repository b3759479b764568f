import pytest
import torch

import sparkjoy as sj
from sparkjoy.testing import TinyPolicy
from sparkjoy_lab.token_gate import TokenGatedBackward

ROWS, TOKENS = 12, 6


def trim(batch, length):
    return {key: value[:, :length] for key, value in batch.items()}


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_gradient_is_that_of_the_full_batch_with_the_skipped_tokens_at_zero(trimmed, ragged):
    generator = torch.Generator().manual_seed(0)
    policy = TinyPolicy(4, 5, dtype=torch.float64)
    state = torch.randn(ROWS, TOKENS, 4, generator=generator, dtype=torch.float64)
    batch = {"state": state, "action": torch.randint(5, (ROWS, TOKENS), generator=generator)}
    advantages = torch.randn(ROWS, generator=generator, dtype=torch.float64)
    mask = torch.rand(ROWS, TOKENS, generator=generator) < 0.7 if ragged else None
    log_probs = policy.log_probs(batch).detach()
    step = TokenGatedBackward(sj.KondoGate(rate=0.1), trim=trim if trimmed else None)
    report = step(policy.log_probs, batch, advantages, log_probs=log_probs, mask=mask)
    valid = torch.ones(ROWS, TOKENS, dtype=torch.bool) if mask is None else mask
    score = (sj.delight(advantages, log_probs) * valid).flatten()
    keep = sj.KondoGate(rate=0.1)(score).keep.view(ROWS, TOKENS)
    assert int(keep.sum()) == 8
    expected = -(advantages.unsqueeze(1) * policy.log_probs(batch) * keep).sum() / valid.sum()
    reference = torch.autograd.grad(expected, list(policy.parameters()))
    for parameter, gradient in zip(policy.parameters(), reference, strict=True):
        assert (parameter.grad - gradient).norm() < 1e-6 * gradient.norm()
    length = int(keep.any(0).nonzero()[-1]) + 1 if trimmed else TOKENS
    assert report.backward_rows == report.kept == int(keep.any(1).sum())
    assert report.backward_tokens == report.kept * length
    assert torch.equal(report.decision.keep, keep.flatten())


def test_no_token_kept_touches_nothing():
    policy = TinyPolicy(4, 5)
    batch = {"state": torch.ones(2, 3, 4), "action": torch.zeros(2, 3, dtype=torch.long)}
    report = TokenGatedBackward(sj.KondoGate(price=0), trim=trim)(
        policy.log_probs, batch, -torch.ones(2), log_probs=policy.log_probs(batch).detach()
    )
    assert (report.kept, report.backward_rows) == (0, 0)
    assert policy.layer.weight.grad is None
