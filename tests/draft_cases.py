"""What tests of drafts share."""

from engine_cases import ACTIONS, WIDTH

from sparkjoy.testing import TinyPolicy


def gradients(policy):
    found = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    return found


def draft_of(policy, seed=7):
    return TinyPolicy(WIDTH, ACTIONS, seed=seed, dtype=next(policy.parameters()).dtype)
