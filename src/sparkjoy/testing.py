"""For your own tests: count the rows that really reached a backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def assert_backward_rows(module: nn.Module, rows: int) -> Iterator[None]:
    """Fail unless exactly `rows` rows pass backward through `module`, counted by a hook on its output.

    >>> layer = nn.Linear(2, 1)
    >>> with assert_backward_rows(layer, 3):
    ...     layer(torch.ones(3, 2)).sum().backward()

    Args:
        module: a module whose output is a tensor with the rows as leading dimension.
        rows: the number expected.

    Raises:
        AssertionError: another number of rows.
    """
    seen = 0

    def gradient_arrived(gradient: Tensor) -> None:
        nonlocal seen
        seen += len(gradient)

    def watch(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(gradient_arrived)

    handle = module.register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()
    if seen != rows:
        raise AssertionError(f"{seen} rows passed backward through {type(module).__name__}; expected {rows}")


class TinyPolicy(nn.Module):
    """A softmax policy over K actions from one linear layer, seeded: the smallest thing with a gradient.

    >>> policy = TinyPolicy(4, 3)
    >>> policy.log_probs({"state": torch.ones(2, 4), "action": torch.tensor([0, 2])}).shape
    torch.Size([2])
    """

    def __init__(self, width: int, actions: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layer = nn.utils.skip_init(nn.Linear, width, actions, dtype=dtype)
        for parameter in self.layer.parameters():
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5, generator)

    def forward(self, state: Tensor) -> Tensor:
        """(..., width) -> (..., K) log-probabilities."""
        logits: Tensor = self.layer(state)
        return logits.log_softmax(-1)

    def log_probs(self, rows: dict[str, Tensor]) -> Tensor:
        """Log-probs of `rows["action"]` in `rows["state"]`: (n,) or (n, T)."""
        every: Tensor = self(rows["state"])
        return every.gather(-1, rows["action"].unsqueeze(-1)).squeeze(-1)
