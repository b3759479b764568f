"""How far a row moves the policy in a loss: the sizes that `UnbiasedGate` keeps rows in proportion to.

A term U log π(a) has a gradient of length |U| · ‖e_a − π‖ at the logits, which lies between |U| (1 − π(a)) and √2 times
that; 1 − π(a) needs the taken action's log-prob only. Sizes have the sign of U, by which draws are ordered. A size
that is off costs noise, never a bias, unless it is 0 where the gradient is not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sparkjoy.scores import per_row, surprisal


def policy_gradient_size(advantages: Tensor, log_probs: Tensor) -> Tensor:
    """Size of a term of REINFORCE, PPO and GRPO: U (1 − π(a)).

    Of a clipped loss it is the size while the policy is the one that sampled; later, rows that the clip stops keep
    theirs, which costs a few rows and can never drop one that the clip lets through.

    >>> policy_gradient_size(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.75]).log())
    tensor([ 0.5000, -0.2500])

    Args:
        advantages: (B,), or (B, T) when `log_probs` is (B, T).
        log_probs: (B,) or (B, T), log-probabilities of the actions taken.

    Returns:
        The shape of `log_probs`, detached; over a row's tokens the engine adds squares.

    Raises:
        ValueError: shapes that do not go together, or a log-probability above 0.
    """
    return -per_row(advantages, log_probs) * torch.expm1(-surprisal(log_probs))


def update_size(advantages: Tensor, log_probs: Tensor) -> Tensor:
    """Size of a term of DG: σ(χ) U (1 − π(a)), χ the delight (arXiv 2603.14608).

    >>> update_size(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5]).log())
    tensor([ 0.3333, -0.1667])

    Args:
        advantages: (B,), or (B, T) when `log_probs` is (B, T).
        log_probs: (B,) or (B, T), log-probabilities of the actions taken.

    Returns:
        The shape of `log_probs`, detached; over a row's tokens the engine adds squares.

    Raises:
        ValueError: shapes that do not go together, or a log-probability above 0.
    """
    return _delightful_size(advantages, log_probs, 1.0, "token")


def delightful_size(temperature: float, unit: Literal["token", "sample"]) -> Callable[[Tensor, Tensor], Tensor]:
    """`update_size` at another temperature, or with the delight of the whole answer."""
    return as_size(partial(_delightful_size, temperature=temperature, unit=unit))


def advantage_size(advantages: Tensor, log_probs: Tensor) -> Tensor:
    """|U| alone, for each token: a size that needs no log-probs, and so no forward pass; more rows are kept by it.

    >>> advantage_size(torch.tensor([1.0, -1.0]), torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """
    return per_row(advantages, log_probs).expand_as(log_probs)


def as_size(size: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Say of a function that it gives sizes: those of a row's tokens add as squares, whatever their signs."""
    size.__dict__["is_size"] = True
    return size


def is_size(score: Any) -> bool:
    """Whether a score function gives sizes.

    >>> from sparkjoy.scores import delight
    >>> is_size(update_size), is_size(delight)
    (True, False)
    """
    return bool(getattr(score, "is_size", False))


def _delightful_size(advantages: Tensor, log_probs: Tensor, temperature: float, unit: str) -> Tensor:
    advantages, surprised = per_row(advantages, log_probs), surprisal(log_probs)
    chi = advantages * surprised
    if unit == "sample" and chi.dim() == 2:
        chi = chi.sum(dim=1, keepdim=True)
    return -torch.sigmoid(chi / temperature) * advantages * torch.expm1(-surprised)


for _size in (policy_gradient_size, update_size, advantage_size):
    as_size(_size)
advantage_size.__dict__["reads_log_probs"] = False
