"""Losses of the studies: importance weights, and DG by another score than delight."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.losses import Loss, checked_temperature, ratio
from sparkjoy.scores import SCORE, ScoreFunction, per_row


def importance_weighted(
    log_probs: Tensor,
    advantages: Tensor,
    behavior_log_probs: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The policy gradient of what another policy sampled: −ρU, ρ = π/π_behavior, each token by its own ratio.

    The gradient is −ρU ∇log π. Exact over whole answers only with the product of their tokens' ratios, whose variance
    grows with their length; a token's own is the usual compromise.

    >>> importance_weighted(torch.tensor([-0.5]), torch.tensor([2.0]), torch.tensor([-0.5]))
    tensor([-2.])

    Args:
        log_probs: (B,) or (B, T), differentiable.
        advantages: (B,), or (B, T) with (B, T).
        behavior_log_probs: the shape of `log_probs`, those the actions were sampled with.
        mask: not used.

    Returns:
        Terms to minimise, the shape of `log_probs`.

    Raises:
        ValueError: no `behavior_log_probs`.
    """
    return -ratio(log_probs, behavior_log_probs, "importance_weighted") * per_row(advantages, log_probs)


def weighted_by(score: ScoreFunction, temperature: float = 1.0) -> Loss:
    """DG by another score than the exact delight: −σ(s/η) U log π, s the score of the row, detached.

    >>> loss = weighted_by(lambda advantages, log_probs: torch.zeros(2))
    >>> loss(torch.tensor([-3.0, -3.0]), torch.tensor([1.0, -1.0]), None, None)
    tensor([ 1.5000, -1.5000])

    Args:
        score: `(advantages, log_probs) -> (B,)`.
        temperature: η > 0.

    Returns:
        A loss: `(log_probs, advantages, behavior_log_probs, mask) -> terms`.

    Raises:
        ValueError: a temperature that is not above 0.
    """
    score = checks.function("score", score, SCORE, ..., ...)
    temperature = checked_temperature(temperature)

    return partial(_weighted_by, score=score, temperature=temperature)


def _weighted_by(
    log_probs: Tensor,
    advantages: Tensor,
    behavior_log_probs: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    score: ScoreFunction,
    temperature: float,
) -> Tensor:
    advantages = checks.advantages(advantages)
    shaped = per_row(advantages, log_probs)
    found = score(advantages, log_probs.detach())
    checks.tensor("what score returned", found, (1,), checks.FLOATING, "(B,)")
    if len(found) != len(log_probs):
        raise ValueError(f"score returned shape {tuple(found.shape)} for {len(log_probs)} rows; expected (B,).")
    weight = torch.sigmoid(found / temperature)
    weight = weight.unsqueeze(1) if log_probs.dim() == 2 else weight
    return -weight * shaped * log_probs
