"""Prices to compare with: of a stream's last scores, and of the fewest scores that hold a share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparkjoy import checks, states
from sparkjoy.gates.budget import remember
from sparkjoy.gates.soft import quantile
from sparkjoy.prices import price_of_best, ranked_shares
from sparkjoy.scores import at_least_float32


class RollingQuantile:
    """The (1 − ρ)-quantile of the last `window` scores, this batch's included: for small batches, down to one row.

    Unlike a batch's own quantile it lets a good batch pass more rows than a poor one. Nothing pulls the rate back to ρ:
    where scores rise or fall within a window it drifts off, and `BudgetGate` does not.

    >>> import torch
    >>> price = RollingQuantile(0.25, window=5)
    >>> [price(torch.tensor([score])).item() for score in (1.0, 2.0, 3.0, 4.0, 5.0)][-1]
    4.0

    Args:
        rate: ρ, the fraction meant to pass, in (0, 1].
        window: scores remembered; a batch that is larger is taken whole.

    Raises:
        ValueError: `rate` outside (0, 1], or a window below 1.
    """

    def __init__(self, rate: float, window: int = 1024) -> None:
        self.rate = checks.rate(rate)
        self.window = checks.whole("window", window, "a number of rows of at least 1")
        self._scores: Tensor | None = None

    def __call__(self, score: Tensor) -> Tensor:
        self._scores = remember(self._scores, checks.row("score", score), self.window)
        return quantile(at_least_float32(self._scores), 1 - self.rate)

    def __repr__(self) -> str:
        return f"RollingQuantile({self.rate:g}, window={self.window})"

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self._scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states.check(repr(self), state, scores=states.is_row)
        self._scores = state["scores"]


class Nucleus:
    """Lets the fewest scores pass that hold a share of the sum of positive ones, a rate that moves.

    >>> import torch
    >>> torch.tensor([5.0, 4.0, 1.0, -3.0]) > Nucleus(0.5)(torch.tensor([5.0, 4.0, 1.0, -3.0]))
    tensor([ True, False, False, False])

    Args:
        share: in (0, 1].

    Raises:
        ValueError: `share` outside (0, 1].
    """

    def __init__(self, share: float = 0.5) -> None:
        self.share = checks.rate(share, "share")

    def __call__(self, score: Tensor) -> Tensor:
        ranked, shares = ranked_shares(score)
        held = shares.cumsum(0)
        return price_of_best(ranked, int((held < self.share * held[-1] * (1 - 1e-9)).count_nonzero()) + 1)

    def __repr__(self) -> str:
        return f"Nucleus({self.share:g})"
