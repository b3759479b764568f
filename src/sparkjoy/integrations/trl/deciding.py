"""Which completions of a generation batch to keep, from their advantages and as few log-probs as possible."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from sparkjoy.gates import KondoGate
from sparkjoy.prices import FixedPrice
from sparkjoy.scores import sequence_delight

LEAST_SURPRISAL = 1e-30
"""Stands for a surprisal of 0, so that a delight's sign is its advantage's and signs alone can settle a decision."""


def centred_advantages(rewards_per_func: Tensor, weights: Tensor, group_size: int) -> Tensor:
    """Weighted reward less its group's mean; exactly 0 where the group's rewards are equal up to rounding, or missing.

    >>> centred_advantages(torch.tensor([[1.0], [0.0], [2.0], [2.0]]), torch.ones(1), group_size=2)
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])

    Args:
        rewards_per_func: (N, F); NaN where a reward function gave none.
        weights: (F,).
        group_size: completions of a prompt, which stand beside one another.

    Returns:
        (N,)
    """
    unscored = rewards_per_func.isnan().all(dim=1)
    rewards = (rewards_per_func * weights).nansum(dim=1)
    groups = rewards.masked_fill(unscored, torch.nan).view(-1, group_size)
    centred = groups - groups.nanmean(dim=1, keepdim=True)
    terms = (rewards_per_func * weights).abs().nansum(dim=1).view(-1, group_size)
    return centred.masked_fill(groups.isnan() | equal_up_to_rounding(groups, terms), 0).flatten()


def equal_up_to_rounding(groups: Tensor, terms: Tensor) -> Tensor:
    """(G, 1) bool: groups whose values, NaN aside, differ by no more than rounding of what they were summed from.

    Args:
        groups: (G, n).
        terms: (G, n), the sizes of each value's terms, summed.
    """
    least = groups.nan_to_num(nan=torch.inf).amin(dim=1, keepdim=True)
    most = groups.nan_to_num(nan=-torch.inf).amax(dim=1, keepdim=True)
    return most - least <= 4 * torch.finfo(groups.dtype).eps * terms.amax(dim=1, keepdim=True)


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
    good, bad = advantages > 0, advantages < 0
    price = gate.price.value if isinstance(gate.price, FixedPrice) else 0.0
    if price != 0:  # how many pass depends on the scores
        return good | bad if price < 0 or gate.negative_share > 0 else good
    goods, bads = int(good.count_nonzero()), int(bad.count_nonzero())
    of_good, of_bad = gate.kept_by_sign(goods, bads, len(advantages))
    doubt = torch.zeros_like(good)
    if 0 < of_good < goods:
        doubt |= good
    if 0 < of_bad < bads:
        doubt |= bad
    return doubt


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
