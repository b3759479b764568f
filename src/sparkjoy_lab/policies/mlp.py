"""A multi-layer perceptron over K actions."""

from __future__ import annotations

import itertools
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between, from an input (B, D) to logits (B, K), torch's default initialisation.

    >>> import torch
    >>> policy = MLP(784, 100, 100, 10)
    >>> policy(torch.zeros(2, 784)).shape
    torch.Size([2, 10])
    >>> policy.log_probs({"inputs": torch.zeros(2, 784), "actions": torch.tensor([3, 1])}).shape
    torch.Size([2])

    Args:
        widths: input width D, the hidden widths, number of actions K.

    Raises:
        ValueError: fewer than two widths.
    """

    def __init__(self, *widths: int) -> None:
        if len(widths) < 2:
            raise ValueError(f"an MLP of widths {widths} has no layer; give at least the input's and the output's.")
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, K) of inputs (B, D)."""
        # Without a call per module, which would cost as much as the products of a few rows. In place, since a linear
        # layer's backward does not read its output.
        *hidden, last = cast("list[nn.Linear]", list(self.layers))
        for layer in hidden:
            inputs = F.linear(inputs, layer.weight, layer.bias).relu_()
        return F.linear(inputs, last.weight, last.bias)

    def log_probs(self, rows: dict[str, Tensor]) -> Tensor:
        """Log-probs (n,) of `rows["actions"]` (n,) at `rows["inputs"]` (n, D)."""
        return -F.cross_entropy(self(rows["inputs"]), rows["actions"], reduction="none")
