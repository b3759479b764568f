"""Which completions of a generation batch to keep, from their advantages and as few log-probs as possible."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from sparkjoy.baselines import centred, precise
from sparkjoy.gates import KondoGate
from sparkjoy.scores import sequence_delight
from sparkjoy.signs import undecided

LEAST_SURPRISAL = 1e-30
"""Stands for a surprisal of 0, so that a delight's sign is its advantage's and signs alone can settle a decision."""


def centred_advantages(rewards_per_func: Tensor, weights: Tensor, group_size: int) -> Tensor:
    """Weighted reward less its group's mean; 0 where the group's are equal up to float32's rounding, or there is none.

    >>> centred_advantages(torch.tensor([[1.0], [0.0], [2.0], [2.0]]), torch.ones(1), group_size=2)
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])

    Args:
        rewards_per_func: (N, F); NaN where a reward function gave none.
        weights: (F,).
        group_size: completions of a prompt, which stand beside one another.

    Returns:
        (N,)
    """
    terms = precise(rewards_per_func) * precise(weights)
    unscored = terms.isnan().all(dim=1).view(-1, group_size)
    groups = terms.nansum(dim=1).view(-1, group_size).masked_fill(unscored, torch.nan)
    scored = groups.where(~unscored, groups.nanmean(dim=1, keepdim=True))
    size = terms.abs().nansum(dim=1).view(-1, group_size)
    advantages = centred(scored, torch.finfo(torch.float32).eps, size).masked_fill(unscored, 0)
    return advantages.flatten().to(rewards_per_func.dtype)


def worth(advantages: Tensor, own_advantages: Tensor, mask: Tensor) -> Tensor:
    """(B,) what tells a row's sign: its advantage to the gate, 0 where it has no token or nothing of its own to teach.

    Args:
        advantages: (B,) or (B, T), those the gate ranks by; of the latter the sum, or the size where that cancels.
        own_advantages: (B,) or (B, T), those of the loss.
        mask: (B, T), 1 for tokens that count.
    """
    teaches = mask.any(dim=1) & (own_advantages != 0).reshape(len(mask), -1).any(dim=1)
    if advantages.dim() == 2:
        total = (advantages * mask).sum(dim=1)
        advantages = torch.where(total == 0, (advantages * mask).abs().sum(dim=1), total)
    return advantages * teaches


def in_doubt(gate: KondoGate, advantages: Tensor) -> Tensor:
    """(N,) bool: the rows whose surprisal can change what a hard gate on delight keeps; signs settle the others.

    >>> in_doubt(KondoGate(rate=0.25), torch.tensor([1.0, 2.0, -1.0, 0.0]))
    tensor([ True,  True, False, False])
    >>> in_doubt(KondoGate(rate=0.5), torch.tensor([1.0, 2.0, -1.0, 0.0])).any()
    tensor(False)

    Args:
        advantages: (N,), 0 where a row teaches nothing.
    """
    return undecided(gate.rule, advantages).open


def delight_score(advantages: Tensor, log_probs: Tensor, mask: Tensor) -> Tensor:
    """`sequence_delight` of rows (n, T), of the sign of the advantage even where nothing surprises; (n,)."""
    score = sequence_delight(advantages, log_probs, mask)
    if advantages.dim() == 2:
        return score
    least = advantages.sign() * LEAST_SURPRISAL
    return torch.where(score.abs() < LEAST_SURPRISAL, least, score)


@dataclass(frozen=True)
class Scored:
    """N completions, of all processes, as the gate sees them.

    Args:
        advantages: (N,), 0 where a row teaches nothing.
        known: (N,) bool, whose delight is in `delights`.
        delights: (N,)
        other: (N,), another score to decide on than delight.
    """

    advantages: Tensor
    known: Tensor
    delights: Tensor
    other: Tensor | None = None

    @property
    def score(self) -> Tensor:
        """(N,), what the gate decides on: where the delight is not known it does not matter, but for its sign."""
        return torch.where(self.known, self.delights, self.advantages) if self.other is None else self.other

    def figures(self, keep: Tensor) -> dict[str, float]:
        """What to log about a decision; NaN where there is nothing to tell."""
        delights = self.delights[self.known]
        good, bad = keep[self.advantages > 0].float(), keep[self.advantages < 0].float()
        figures = {
            "kept_rate": keep.float().mean(),
            "kept_rate_positive": good.mean(),
            "kept_rate_negative": bad.mean(),
            "teaching_rate": (self.advantages != 0).float().mean(),
        }
        kept = self.score[keep].abs()
        if len(delights):
            quantiles = torch.quantile(delights, torch.tensor([0.1, 0.5, 0.9]))
            figures |= dict(zip(("delight_p10", "delight_p50", "delight_p90"), quantiles, strict=True))
            figures["delight_std"] = delights.std(unbiased=False)
        marginal = len(kept) > 0 and bool(self.known[keep][kept.argmin()])
        return {name: float(value) for name, value in figures.items()} | (
            {"price": float(kept.min())} if marginal else {}
        )


def other_score(name: str, advantages: Tensor, seed: tuple[int, int, int]) -> Tensor:
    """The scores that need no log-probs, (N,): "advantage", "absolute-advantage", "uniform"; 0 stays 0."""
    if name == "advantage":
        return advantages
    if name == "absolute-advantage":
        return advantages.abs()
    number = random.Random(repr(seed)).getrandbits(63)
    draws = torch.rand(len(advantages), generator=torch.Generator().manual_seed(number))
    return draws.clamp(min=LEAST_SURPRISAL).where(advantages != 0, 0)
