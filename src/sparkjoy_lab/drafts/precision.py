"""The policy's own forward pass in fewer bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparkjoy import checks
from sparkjoy_lab.drafts.policy import checked_policy, log_probs_of


class LowerPrecision:
    """Screen with the policy under autocast: its matrix products in `dtype`.

    >>> from sparkjoy.testing import TinyPolicy
    >>> policy = TinyPolicy(4, 3)
    >>> rows = {"state": torch.ones(2, 4), "action": torch.tensor([0, 2])}
    >>> bool(torch.isclose(LowerPrecision(policy)(rows), policy.log_probs(rows), atol=0.02).all())
    True

    Args:
        policy: a module with `log_probs(rows)`.
        dtype: torch.bfloat16 or torch.float16.

    Raises:
        ValueError: no such policy, or another type.
    """

    def __init__(self, policy: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        if not isinstance(dtype, torch.dtype) or dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype is {checks.described(dtype)}; expected torch.bfloat16 or torch.float16.")
        self.dtype = dtype
        self._policy = checked_policy(policy, "policy")

    def __call__(self, rows: Any) -> Tensor:
        """Log-probs (n,) or (n, T), at most 0."""
        device = next(self._policy.parameters()).device
        # Rounding in a short type can leave a log-prob a little above 0, which a delight would refuse.
        with torch.autocast(device.type, self.dtype):
            return log_probs_of(self._policy, rows).float().clamp(max=0)
