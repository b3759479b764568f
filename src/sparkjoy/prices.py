"""A price that moves with the batch: what `KondoGate(price=...)` takes besides a number is any `score -> number`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparkjoy import checks


class EffectiveSize:
    """Lets a fraction of the effective number of positive scores pass: n = (Σ χ₊)² / Σ χ₊², a rate that moves.

    Equal scores count in full, a lone large one counts as one: concentrated signal keeps few rows, spread-out many. A
    hard gate at this price is as biased as at any other; `UnbiasedGate` moves its rate the same way without bias.

    >>> EffectiveSize(0.5)(torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0])) < 1  # four equal ones stay together
    tensor(True)
    >>> torch.tensor([9.0, 1.0, 0.5]) > EffectiveSize(0.5)(torch.tensor([9.0, 1.0, 0.5]))
    tensor([ True, False, False])

    Args:
        fraction: of the effective number, in (0, 1].

    Raises:
        ValueError: `fraction` outside (0, 1].
    """

    def __init__(self, fraction: float = 0.5) -> None:
        self.fraction = checks.rate(fraction, "fraction")

    def __call__(self, score: Tensor) -> Tensor:
        ranked, shares = ranked_shares(score)
        squares = float(shares.square().sum())
        effective = float(shares.sum()) ** 2 / squares if squares > 0 else 0.0
        return price_of_best(ranked, math.ceil(self.fraction * effective - 1e-9))

    def __repr__(self) -> str:
        return f"EffectiveSize({self.fraction:g})"


def ranked_shares(score: Tensor) -> tuple[Tensor, Tensor]:
    """Scores, the greatest first, 0 for negative ones, and each over the greatest: their squares do not overflow."""
    ranked = checks.row("score", score).clamp(min=0).sort(descending=True).values
    checks.finite("score", ranked)
    return ranked, ranked.double() / ranked[0].double().clamp(min=torch.finfo(torch.float64).tiny)


def price_of_best(ranked: Tensor, count: int) -> Tensor:
    """A price that the `count` best pass, and those equal to the last of them; never below 0."""
    return just_below(ranked[max(0, min(count, len(ranked)) - 1)]).clamp(min=0)


def just_below(score: Tensor) -> Tensor:
    """The next smaller number."""
    return torch.nextafter(score, torch.full_like(score, -math.inf))
