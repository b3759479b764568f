"""Holds the average cost of what is kept, in tokens, at a given fraction, however the scores drift."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparkjoy import checks, states
from sparkjoy.gates.decision import Decision, Final
from sparkjoy.prices import just_below
from sparkjoy.scores import checked_score

ONE_ROW = 0.8
"""Of a mean row: what a budget may owe when its tolerance is less than a row, and a little below one."""

GAIN = 2.0
"""How far a debt at its limit moves a budget's level, in logits."""

STATE = {
    "scores": states.is_row,
    "costs": states.is_row,
    "seen": checks.is_number,
    "spent": checks.is_number,
    "rows": states.is_count,
    "debt": checks.is_number,
}
"""What it remembers, and what each may be."""


class BudgetGate(Final):
    """Keep the rows whose score is above a price that holds their cost at a fraction ρ of the cost of all rows.

    It keeps an account: its debt is the cost kept so far minus ρ times the cost seen so far. The price is the quantile
    of the last `window` scores, weighted by cost, at the level σ(logit ρ − 2 debt / limit), so a good batch may spend
    more and later ones pay. The limit is `tolerance` times what was allowed so far, or four fifths of a mean row while
    that is more; where the debt would leave it, the price moves to a quantile of the batch itself. Only ranks decide,
    so neither heavy tails nor a change of scale matter (integral control of a quantile's level: arXiv 2106.00193).

    What it cannot spend, it forgets: scores of exactly 0 are never kept, so where fewer rows than ρ have another one
    all those are kept, `achieved` stays below ρ, and no more than the tolerance is made up for later. Rows of equal
    score are kept or skipped together, which can take more than one batch to pay off.

    >>> budget = BudgetGate(0.25)
    >>> scores, tokens = torch.randn(200, 8), torch.randint(1, 100, (200, 8))
    >>> kept = [tokens[i][budget(scores[i], tokens[i]).keep].sum().item() for i in range(200)]
    >>> abs(sum(kept) / tokens.sum().item() - 0.25) < 0.02 * 0.25
    True

    Args:
        rate: ρ, in (0, 1]; in tokens where rows have a mask, else in rows.
        tolerance: the largest relative error of the achieved rate, above 0; a larger one lets the price follow the
            scores more freely.
        window: rows remembered; a batch that is larger is taken whole.

    Raises:
        ValueError: an argument outside its range; costs that are negative, not finite or not one per score.
    """

    weighted = False

    def __init__(self, rate: float, tolerance: float = 0.015, window: int = 1024) -> None:
        self.rate = checks.rate(rate)
        expected = "a number above 0, such as 0.02 for 2%"
        self.tolerance = checks.number("tolerance", tolerance, expected, lambda tolerance: tolerance > 0)
        self.window = checks.whole("window", window, "a number of rows of at least 1")
        self._scores: Tensor | None = None
        self._costs: Tensor | None = None
        self._seen = 0.0
        self._spent = 0.0
        self._rows = 0
        self._debt = 0.0

    @property
    def achieved(self) -> float | None:
        """Cost kept so far, as a fraction of the cost seen; None before anything is seen."""
        return self._spent / self._seen if self._seen else None

    def __repr__(self) -> str:
        return f"BudgetGate({self.rate:g}, tolerance={self.tolerance:g}, window={self.window})"

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Decision:
        """Decide which of N samples to keep.

        Args:
            score: (N,), finite.
            cost: (N,), what each sample costs, in tokens; None: 1 each.

        Raises:
            ValueError: an empty, non-finite or misshapen score or cost.
        """
        score = checked_score(score)
        price = self._price(score, _checked_cost(cost, score))
        keep = (score > price) & (score != 0)
        return Decision(keep, price if bool(keep.any()) else None, keep.to(score.dtype), torch.ones_like(score))

    def _price(self, score: Tensor, cost: Tensor) -> Tensor:
        self._scores = remember(self._scores, score, self.window)
        self._costs = remember(self._costs, cost, self.window)
        total = float(cost.sum())
        self._seen += total
        self._rows += len(score)
        allowed = self.rate * self._seen
        limit = max(self.tolerance * allowed, ONE_ROW * self._seen / self._rows) or 1.0
        level = _logistic(_logit(self.rate) - GAIN * self._debt / limit)
        price = _spending_at_most(level * float(self._costs.sum()), *_ranked(self._scores, self._costs))
        owed = self.rate * total - self._debt
        scores, spending = _ranked(score, cost)
        price = torch.maximum(price, _spending_at_most(owed + limit, scores, spending))
        price = torch.minimum(price, _spending_at_least(owed - limit, scores, spending))
        spent = float(cost.where((score > price) & (score != 0), 0).sum())
        self._spent += spent
        self._debt = max(spent - owed, -limit)
        return price

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, f"_{name}") for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states.check(repr(self), state, **STATE)
        scores, costs = state["scores"], state["costs"]
        if (scores is None) != (costs is None) or (scores is not None and scores.shape != costs.shape):
            raise ValueError("state has scores and costs of different length; load one that state_dict() returned.")
        for name, value in state.items():
            setattr(self, f"_{name}", value)


def remember(earlier: Tensor | None, now: Tensor, window: int) -> Tensor:
    """The last `window` values, or all of `now` where it has more."""
    both = now if earlier is None else torch.cat((earlier.to(now), now))
    return both[-max(window, len(now)) :].clone()


def _ranked(score: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
    """The scores, best first, and what keeping all down to each would spend: a score of 0 is never kept."""
    ranked, order = score.sort(descending=True, stable=True)
    return ranked, cost[order].where(ranked != 0, 0).cumsum(0)


def _spending_at_most(amount: float, ranked: Tensor, spending: Tensor) -> Tensor:
    """The lowest price of which the rows above spend no more than `amount`."""
    affordable = int((spending <= amount).count_nonzero())
    return ranked[affordable] if affordable < len(ranked) else just_below(ranked[-1])


def _spending_at_least(amount: float, ranked: Tensor, spending: Tensor) -> Tensor:
    """The highest price of which the rows above spend no less than `amount`, or all they can."""
    if amount <= 0:
        return torch.full_like(ranked[0], math.inf)
    return just_below(ranked[min(int((spending < amount).count_nonzero()), len(ranked) - 1)])


def _logit(rate: float) -> float:
    return math.inf if rate == 1 else math.log(rate / (1 - rate))


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _checked_cost(cost: Tensor | None, score: Tensor) -> Tensor:
    """`cost` (N,) in float64, 1 for each row where there is none, or a ValueError."""
    if cost is None:
        return torch.ones_like(score, dtype=torch.float64)
    return checks.cost(cost, score).to(score.device, torch.float64)
