"""What a backward pass costs, in units of the score: a sample passes when its score is above the price.

A price is an object with state, asked once per batch, so that a price that learns from batch to batch fits the same
place as a constant one.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sparkjoy import checks, states
from sparkjoy.scores import at_least_float32

LARGEST_QUANTILE = 2**24


@runtime_checkable
class Price(Protocol):
    """Gives the price of a batch, and may remember the batch for the next one.

    >>> isinstance(FixedPrice(0.5), Price), isinstance(0.5, Price)
    (True, False)
    """

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
        self.value = checks.number("price", value, "a finite number or a Price. To keep everything, use rate=1")

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Tensor:
        checks.row("score", score)
        most = torch.finfo(score.dtype).max
        return torch.full((), min(max(self.value, -most), most), dtype=score.dtype, device=score.device)

    def __repr__(self) -> str:
        return f"FixedPrice({self.value:g})"

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states.check(repr(self), state)


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
        self.rate = checks.rate(rate)

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Tensor:
        return quantile(checks.row("score", score), 1 - self.rate)

    def __repr__(self) -> str:
        return f"BatchQuantile({self.rate:g})"

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states.check(repr(self), state)


class RollingQuantile:
    """The (1 − ρ)-quantile of the last `window` scores, this batch's included: for small batches, down to one row.

    Unlike a batch's own quantile it lets a good batch pass more rows than a poor one. Nothing pulls the rate back to ρ:
    where scores rise or fall within a window it drifts off, and `BudgetGate` does not.

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
        self.window = checked_window(window)
        self._scores: Tensor | None = None

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Tensor:
        self._scores = remember(self._scores, checks.row("score", score), self.window)
        return quantile(self._scores, 1 - self.rate)

    def __repr__(self) -> str:
        return f"RollingQuantile({self.rate:g}, window={self.window})"

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self._scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states.check(repr(self), state, scores=states.is_row)
        self._scores = state["scores"]


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

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Tensor:
        ranked = checks.row("score", score).clamp(min=0).sort(descending=True).values
        shares = _shares(ranked)
        squares = float(shares.square().sum())
        effective = float(shares.sum()) ** 2 / squares if squares > 0 else 0.0
        return _price_of_best(ranked, math.ceil(self.fraction * effective - 1e-9))

    def __repr__(self) -> str:
        return f"EffectiveSize({self.fraction:g})"

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states.check(repr(self), state)


class Nucleus:
    """Lets the fewest scores pass that hold a share of the sum of positive ones, a rate that moves.

    >>> torch.tensor([5.0, 4.0, 1.0, -3.0]) > Nucleus(0.5)(torch.tensor([5.0, 4.0, 1.0, -3.0]))
    tensor([ True, False, False, False])

    Args:
        share: in (0, 1].

    Raises:
        ValueError: `share` outside (0, 1].
    """

    def __init__(self, share: float = 0.5) -> None:
        self.share = checks.rate(share, "share")

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Tensor:
        ranked = checks.row("score", score).clamp(min=0).sort(descending=True).values
        held = _shares(ranked).cumsum(0)
        return _price_of_best(ranked, int((held < self.share * held[-1] * (1 - 1e-9)).count_nonzero()) + 1)

    def __repr__(self) -> str:
        return f"Nucleus({self.share:g})"

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states.check(repr(self), state)


def _shares(ranked: Tensor) -> Tensor:
    """Scores, the greatest first, over the greatest, whose squares and sums neither overflow nor vanish."""
    checks.finite("score", ranked)
    return ranked.double() / ranked[0].double().clamp(min=torch.finfo(torch.float64).tiny)


def _price_of_best(ranked: Tensor, count: int) -> Tensor:
    """A price that the `count` best pass, and those equal to the last of them; never below 0."""
    return just_below(ranked[max(0, min(count, len(ranked)) - 1)]).clamp(min=0)


def just_below(score: Tensor) -> Tensor:
    """The next smaller number."""
    return torch.nextafter(score, torch.full_like(score, -math.inf))


def remember(earlier: Tensor | None, now: Tensor, window: int) -> Tensor:
    """The last `window` values, or all of `now` where it has more."""
    both = now if earlier is None else torch.cat((earlier.to(now), now))
    return both[-max(window, len(now)) :].clone()


def as_price(price: Any) -> Price:
    """A number as the same price for every batch; a `Price` as it is.

    >>> as_price(0)
    FixedPrice(0)
    """
    from sparkjoy.gates import BudgetGate, KondoGate, SoftGate, UnbiasedGate  # which import this module

    if isinstance(price, BudgetGate | KondoGate | SoftGate | UnbiasedGate):
        raise ValueError(f"price is {checks.described(price)}, which is a gate of its own; give it as the gate.")
    return price if isinstance(price, Price) and not isinstance(price, type) else FixedPrice(price)


def quantile(score: Tensor, level: float) -> Tensor:
    """`torch.quantile`, which refuses more than 2²⁴ numbers, of any number of them.

    >>> quantile(torch.arange(5.0), 0.25)
    tensor(1.)
    """
    score = at_least_float32(score)
    if len(score) <= LARGEST_QUANTILE:
        return torch.quantile(score, level)
    ranked, place = score.sort().values, level * (len(score) - 1)
    below = min(int(place), len(score) - 2)
    return torch.lerp(ranked[below], ranked[below + 1], place - below)


def checked_window(window: int) -> int:
    return checks.whole("window", window, "a number of rows of at least 1")
