"""The policy as it was a few steps ago."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sparkjoy import checks, states
from sparkjoy_lab.drafts.policy import checked_policy, load_into, log_probs_of


class StaleWeights:
    """Screen with a copy of the policy that is renewed every n steps.

    No cheaper than the policy in itself: it pays where the copy lives elsewhere, on another device or in a sampler that
    is not sent new weights at every step.

    >>> import torch
    >>> from sparkjoy.testing import TinyPolicy
    >>> policy = TinyPolicy(4, 3)
    >>> rows = {"state": torch.ones(2, 4), "action": torch.tensor([0, 2])}
    >>> screen = StaleWeights(policy, every=10)
    >>> bool((screen(rows) == policy.log_probs(rows)).all())
    True

    Args:
        policy: a module with `log_probs(rows)`.
        every: steps that a copy is used for; 1 is the policy itself.

    Raises:
        ValueError: no such policy, or fewer steps than one.
    """

    def __init__(self, policy: nn.Module, every: int) -> None:
        self.every = checks.whole("every", every, "a whole number of at least 1 step")
        self._policy = checked_policy(policy, "policy")
        self._copy = copy.deepcopy(policy).requires_grad_(False)
        self._age = 0

    def __call__(self, rows: Any) -> Tensor:
        """Log-probs (n,) or (n, T) by the copy, which is renewed first if it is due."""
        if self._age >= self.every:
            self._copy.load_state_dict(self._policy.state_dict())
            self._age = 0
        return log_probs_of(self._copy, rows)

    def learn(self, seen: Sequence[tuple[Any, Tensor]]) -> None:
        """Grow a step older."""
        self._age += 1

    def state_dict(self) -> dict[str, Any]:
        return {"copy": self._copy.state_dict(), "age": self._age}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states.check("StaleWeights", state, copy=states.is_state, age=states.is_count)
        load_into("copy", self._copy, state["copy"])
        self._age = state["age"]
