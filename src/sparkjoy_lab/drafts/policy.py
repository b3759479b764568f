"""What a screener needs of a policy."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparkjoy import checks


class Policy(Protocol):
    """A module that gives log-probs of the actions taken in `rows`: (n,) or (n, T)."""

    def log_probs(self, rows: Any) -> Tensor: ...


def checked_policy(policy: Any, role: str) -> nn.Module:
    """The policy, or a ValueError that says what one is."""
    if not isinstance(policy, nn.Module) or not callable(getattr(policy, "log_probs", None)):
        raise ValueError(f"{role} is {checks.described(policy)}; expected a torch module with log_probs(rows).")
    return policy


@torch.no_grad()
def log_probs_of(policy: nn.Module, rows: Any) -> Tensor:
    """The policy's log-probs of `rows` without a graph."""
    log_probs: Tensor = policy.log_probs(rows)  # type: ignore[operator]  # checked_policy saw to it
    return log_probs.detach()


def load_into(name: str, into: Any, given: Any) -> None:
    """Have a module or an optimizer of torch take up a state.

    Raises:
        ValueError: one that does not fit it, in torch's words.
    """
    try:
        into.load_state_dict(given)
    except Exception as error:  # torch has many kinds for what is wrong with a state
        raise ValueError(f"state has {name} that does not fit this {type(into).__name__}: {error}") from error
