"""A transformer's first layers, as a draft of the whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparkjoy import checks
from sparkjoy_lab.policies.transformer import Transformer


class EarlyExit:
    """Screen with a transformer's first layers, whose states the shared norm and output layer read as the last ones'.

    >>> policy = Transformer(vocab_size=2, positions=7, layers=3)
    >>> rows = {"prompts": torch.zeros(5, 4, dtype=torch.long), "answers": torch.ones(5, 4, dtype=torch.long)}
    >>> EarlyExit(policy, layers=1)(rows).shape
    torch.Size([5, 4])

    Args:
        policy: a `Transformer`.
        layers: how many to read, fewer than it has.

    Raises:
        ValueError: another policy, or another number of layers.
    """

    def __init__(self, policy: nn.Module, layers: int) -> None:
        if not isinstance(policy, Transformer):
            raise ValueError(f"policy is {checks.described(policy)}, which has no layers to exit early from.")
        if checks.whole("layers", layers) >= len(policy.layers):
            raise ValueError(
                f"layers is {layers}; expected at least 1 and fewer than the {len(policy.layers)} there are."
            )
        self.layers = layers
        self._policy = policy

    @torch.no_grad()
    def __call__(self, rows: Any) -> Tensor:
        """Log-probs (n, T)."""
        return self._policy.log_probs(rows, layers=self.layers)
