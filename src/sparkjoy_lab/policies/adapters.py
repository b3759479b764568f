"""A frozen body with low-rank adapters (LoRA, arXiv 2106.09685): few weights learn, the others need no gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparkjoy_lab.policies.transformer import Transformer


class LowRankAdapter(nn.Module):
    """A frozen linear layer plus a product of two narrow ones, W x + B A x; B begins at zero and so changes nothing.

    >>> import torch
    >>> linear = nn.Linear(8, 6, bias=False)
    >>> adapted, inputs = LowRankAdapter(linear, rank=2), torch.randn(3, 8)
    >>> torch.equal(adapted(inputs), linear(inputs))
    True
    >>> [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    ['down', 'up']

    Args:
        linear: the layer, whose weights are frozen: an `nn.Linear`, or one that holds its weight (inputs, outputs), as
            GPT-2's do in transformers.
        rank: width in between.

    Raises:
        ValueError: a rank below 1.
    """

    def __init__(self, linear: nn.Module, rank: int) -> None:
        if rank < 1:
            raise ValueError(f"rank is {rank}; expected at least 1.")
        super().__init__()
        self.linear = linear.requires_grad_(False)
        weight = linear.get_parameter("weight")
        outputs, inputs = weight.shape if isinstance(linear, nn.Linear) else weight.t().shape
        self.down = nn.Parameter(torch.randn(rank, inputs) * inputs**-0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., outputs) of (..., inputs)."""
        adapted: Tensor = self.linear(inputs) + (inputs @ self.down.t()) @ self.up.t()
        return adapted


def add_adapters(policy: Transformer, rank: int) -> None:
    """Freeze a policy and put an adapter on every linear layer of its blocks; only these learn from now on."""
    policy.requires_grad_(False)
    for block in policy.layers:
        for name in ("qkv", "out", "up", "down"):
            setattr(block, name, LowRankAdapter(getattr(block, name), rank))
