"""What a backward pass costs, in units of the score: a sample passes when its score is above the price.

A price is an object with state, asked once per batch, so that a price that learns from batch to batch fits the same
place as a constant one.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

ONE_ROW = 0.8
"""Of a mean row: what a budget may owe when its tolerance is less than a row, and a little below one."""

GAIN = 2.0
"""How far a debt at its limit moves a budget's level, in logits."""


@runtime_checkable
class Price(Protocol):
    """Gives the price of a batch, and may remember the batch for the next one."""

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Tensor:
        """The price for this batch, a 0-dim tensor, from its scores (N,) and what each row costs (N,), in tokens."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to give the same prices."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        ...


class FixedPrice:
    """The same price for every batch, λ = `value`; 0 is the papers' "adaptive" zero price.

    >>> FixedPrice(0.5)(torch.tensor([0.1, 0.9]))
    tensor(0.5000)

    Args:
        value: a finite number.

    Raises:
        ValueError: `value` is not a finite number.
    """

    def __init__(self, value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
            raise ValueError(
                f"price is {value!r}; expected a finite number or a Price. To keep everything, use rate=1."
            )
        self.value = float(value)

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Tensor:
        return torch.full((), self.value, dtype=score.dtype, device=score.device)

    def __repr__(self) -> str:
        return f"FixedPrice({self.value:g})"

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class BatchQuantile:
    """The (1 − ρ)-quantile of the batch's own scores (arXiv 2603.20526, "fixed rate").

    As a gate's price it keeps the scores strictly above the quantile, so ties at it can leave fewer than ρN; a gate's
    `rate` counts exactly instead.

    >>> BatchQuantile(0.25)(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    tensor(4.)

    Args:
        rate: ρ, the fraction meant to pass, in (0, 1].

    Raises:
        ValueError: `rate` outside (0, 1].
    """

    def __init__(self, rate: float) -> None:
        self.rate = checked_rate(rate)

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Tensor:
        return torch.quantile(score, 1 - self.rate)

    def __repr__(self) -> str:
        return f"BatchQuantile({self.rate:g})"

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class RollingQuantile:
    """The (1 − ρ)-quantile of the last `window` scores, this batch's included: for small batches, down to one row.

    Unlike a batch's own quantile it lets a good batch pass more rows than a poor one. Nothing pulls the rate back to ρ:
    where scores rise or fall within a window it drifts off, and `BackwardBudget` does not.

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
        self.rate = checked_rate(rate)
        self.window = _checked_window(window)
        self._scores: Tensor | None = None

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Tensor:
        self._scores = _remember(self._scores, score, self.window)
        return torch.quantile(self._scores, 1 - self.rate)

    def __repr__(self) -> str:
        return f"RollingQuantile({self.rate:g}, window={self.window})"

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self._scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scores = state["scores"]


class BackwardBudget:
    """Holds the cost of all kept rows at a fraction ρ of the cost of all rows, however the scores drift.

    It keeps an account: its debt is the cost kept so far minus ρ times the cost seen so far. The price is the quantile
    of the last `window` scores, weighted by cost, at the level σ(logit ρ − 2 debt / limit), so a good batch may spend
    more and later ones pay. The limit is `tolerance` times what was allowed so far, or four fifths of a mean row while
    that is more; where the debt would leave it, the price moves to a quantile of the batch itself. Only ranks decide,
    so neither heavy tails nor a change of scale matter (integral control of a quantile's level: arXiv 2106.00193).

    What it cannot spend, it forgets: scores of exactly 0 are never kept, so where fewer rows than ρ have another one
    all those are kept, `achieved` stays below ρ, and no more than the tolerance is made up for later. Rows of equal
    score are kept or skipped together, which can take more than one batch to pay off.

    >>> budget = BackwardBudget(0.25)
    >>> scores, tokens = torch.randn(200, 8), torch.randint(1, 100, (200, 8))
    >>> kept = [tokens[i][scores[i] > budget(scores[i], tokens[i])].sum().item() for i in range(200)]
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

    def __init__(self, rate: float, tolerance: float = 0.015, window: int = 1024) -> None:
        self.rate = checked_rate(rate)
        if isinstance(tolerance, bool) or not 0 < tolerance < math.inf:
            raise ValueError(f"tolerance is {tolerance!r}; expected a number above 0, such as 0.02 for 2%.")
        self.tolerance = float(tolerance)
        self.window = _checked_window(window)
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
        return f"BackwardBudget({self.rate:g}, tolerance={self.tolerance:g}, window={self.window})"

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Tensor:
        cost = _checked_cost(cost, score)
        self._scores = _remember(self._scores, score, self.window)
        self._costs = _remember(self._costs, cost, self.window)
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
        return {name: getattr(self, f"_{name}") for name in ("scores", "costs", "seen", "spent", "rows", "debt")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, f"_{name}", value)


def _ranked(score: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
    """The scores, best first, and what keeping all down to each would spend: a score of 0 is never kept."""
    ranked, order = score.sort(descending=True, stable=True)
    return ranked, cost[order].where(ranked != 0, 0).cumsum(0)


def _spending_at_most(amount: float, ranked: Tensor, spending: Tensor) -> Tensor:
    """The lowest price of which the rows above spend no more than `amount`."""
    affordable = int((spending <= amount).count_nonzero())
    return ranked[affordable] if affordable < len(ranked) else _just_below(ranked[-1])


def _spending_at_least(amount: float, ranked: Tensor, spending: Tensor) -> Tensor:
    """The highest price of which the rows above spend no less than `amount`, or all they can."""
    if amount <= 0:
        return torch.full_like(ranked[0], math.inf)
    return _just_below(ranked[min(int((spending < amount).count_nonzero()), len(ranked) - 1)])


def _just_below(score: Tensor) -> Tensor:
    return torch.nextafter(score, torch.full_like(score, -math.inf))


def _logit(rate: float) -> float:
    return math.inf if rate == 1 else math.log(rate / (1 - rate))


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _remember(earlier: Tensor | None, now: Tensor, window: int) -> Tensor:
    """The last `window` values, or all of `now` where it has more."""
    both = now if earlier is None else torch.cat((earlier.to(now), now))
    return both[-max(window, len(now)) :].clone()


def _checked_cost(cost: Tensor | None, score: Tensor) -> Tensor:
    """`cost` in float64, 1 for each row where there is none."""
    if cost is None:
        return torch.ones_like(score, dtype=torch.float64)
    if cost.shape != score.shape or not bool((cost.isfinite() & (cost >= 0)).all()):
        raise ValueError(
            f"cost has shape {tuple(cost.shape)} and values {cost.tolist()[:3]} ...; expected a finite number of at "
            f"least 0 for each of {len(score)} scores, such as its tokens."
        )
    return cost.to(score.device, torch.float64)


def _checked_window(window: int) -> int:
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window is {window!r}; expected a number of rows of at least 1.")
    return window


def checked_rate(rate: float) -> float:
    """`rate` as a float, or a ValueError that says what a rate is."""
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.number) or not 0 < rate <= 1:
        raise ValueError(f"rate is {rate!r}; expected the fraction to keep, a number in (0, 1], such as 0.03 for 3%.")
    return float(rate)
