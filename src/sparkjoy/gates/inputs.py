"""Scores and costs as a gate takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.scores import at_least_float32


def checked_score(score: Tensor) -> Tensor:
    """The score (N,) without its graph and at least in float32, or a ValueError that says what is wrong with it."""
    score = at_least_float32(checks.without_graph(checks.row("score", score)))
    checks.finite("score", score)
    return score


def checked_cost(cost: Tensor | None, score: Tensor) -> Tensor:
    """`cost` (N,) in float64, 1 for each row where there is none, or a ValueError."""
    if cost is None:
        return torch.ones_like(score, dtype=torch.float64)
    return checks.cost(cost, score).to(score.device, torch.float64)
