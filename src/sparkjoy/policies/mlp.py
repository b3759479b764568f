"""A multi-layer perceptron over K actions."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Sequential):
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
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        super().__init__(*layers[:-1])

    def log_probs(self, rows: dict[str, Tensor]) -> Tensor:
        """Log-probs (n,) of `rows["actions"]` (n,) at `rows["inputs"]` (n, D)."""
        return -F.cross_entropy(self(rows["inputs"]), rows["actions"], reduction="none")
