"""Slow, obvious versions of what the engine does, for tests and benchmarks to compare with."""

import torch
from torch import Tensor


def keep_by_rate(scores: list[float], rate: float) -> list[bool]:
    """The ⌈ρN⌉ greatest scores other than 0, the earlier of equals first."""
    count = -int(-(rate * len(scores) - 1e-9) // 1)
    ranked = sorted((i for i, score in enumerate(scores) if score != 0), key=lambda i: (-scores[i], i))
    return [i in ranked[:count] for i in range(len(scores))]


def keep_by_price(scores: list[float], price: float) -> list[bool]:
    return [score > price and score != 0 for score in scores]


def masked_gradient(log_prob_fn, loss, batch, advantages, mask, keep, weight, denominator, parameters) -> list[Tensor]:
    """The full batch's gradient with skipped rows multiplied by zero: what research code does, and pays for."""
    log_probs = log_prob_fn(batch)
    expanded = advantages if advantages.shape == log_probs.shape else advantages.unsqueeze(1).expand_as(log_probs)
    terms = loss(log_probs, expanded, None, mask)
    row_weight = keep.to(terms) * weight.to(terms)
    terms = terms * (row_weight.unsqueeze(1) if terms.dim() == 2 else row_weight)
    if mask is not None:
        terms = terms * mask
    return list(torch.autograd.grad(terms.sum() / denominator, parameters))
