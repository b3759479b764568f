"""Keep or skip: the Kondo gate compares what a sample is worth with what a backward pass costs (arXiv 2603.20526)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparkjoy import checks, states
from sparkjoy.gates.decision import Decision, Final, load_state, state_of
from sparkjoy.scores import checked_score
from sparkjoy.signs import Rule, rate_count

Price = float | Callable[[Tensor], Tensor | float]
"""λ, or what gives it for a batch of scores (N,); what remembers batches has a state_dict and a load_state_dict."""


class KondoGate(Final):
    """Keep the samples whose score exceeds the price of a backward pass: G = 1[χ > λ].

    - `rate`: keep the ⌈ρN⌉ samples of greatest score, negative ones too when positive ones are too few; ties go to the
      earlier position.
    - `price`: keep score > price, strictly. 0 is the papers' zero price: it keeps what was better than expected.
    - both: first the price, then the best of those up to the rate.
    - `negative_share` ς > 0: of the samples kept, round(ςK) are those of the most negative scores, χ < −λ: the worst
      surprises, which a gate for successes never sees. The other places go to the greatest scores; what one side lacks,
      the other fills (under a price, positive scores only). Without a rate, K is as many as make all of the positive
      ones the share 1 − ς.

    A score of exactly 0 is never kept: such a sample has no gradient. The exception is `rate=1` without a price, which
    keeps everything: the plain, dense step.

    >>> gate = KondoGate(rate=0.5)
    >>> gate(torch.tensor([0.1, 2.0, -1.0, 0.7])).keep
    tensor([False,  True, False,  True])
    >>> KondoGate(price=0)(torch.tensor([0.1, 0.0, -1.0, 0.7])).keep
    tensor([ True, False, False,  True])
    >>> KondoGate(rate=0.5, negative_share=0.5)(torch.tensor([0.1, 2.0, -1.0, 0.7])).keep
    tensor([False,  True,  True, False])

    Args:
        rate: ρ, fraction to keep, in (0, 1].
        price: λ, a finite number, or `scores (N,) -> number` of each batch.
        negative_share: ς, in [0, 1); with a price of at least 0.

    Raises:
        ValueError: neither rate nor price, or one of the three outside its range.
    """

    weighted = False

    def __init__(self, rate: float | None = None, price: Price | None = None, negative_share: float = 0.0) -> None:
        if rate is None and price is None:
            raise ValueError("KondoGate got neither rate nor price; give one, for instance rate=0.03 or price=0.")
        self.rate = None if rate is None else checks.rate(rate)
        self.price = None if price is None else checked_price(price)
        self.negative_share = checks.number(
            "negative_share", negative_share, "a fraction in [0, 1), such as 0.25", lambda share: 0 <= share < 1
        )
        if self.negative_share > 0 and isinstance(self.price, float) and self.price < 0:
            raise ValueError(f"price is {self.price:g}, below 0, where a negative_share means nothing; give 0.")

    @property
    def rule(self) -> Rule | None:
        """What signs may decide: nothing under a price that looks at the scores of a batch."""
        return None if callable(self.price) else Rule(self.rate, self.price, self.negative_share)

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Decision:
        """Decide which of N samples to keep.

        Args:
            score: (N,), finite; moved to float32 when it is of lower precision.
            cost: not read.

        Returns:
            The `Decision`. With no sample kept, its price is None.

        Raises:
            ValueError: an empty, non-finite or misshapen score.
        """
        score = checked_score(score, looks=False)
        price = None if self.price is None else price_of(self.price, score)
        keep = score != 0 if price is None else (score != 0) & (score > price)
        total, above = checks.read(score.sum(), keep.count_nonzero())
        if not math.isfinite(total):
            checks.finite("score", score)
        ones = torch.ones_like(score)
        if self.rate == 1 and price is None:
            return Decision(keep=ones.bool(), price=score.min(), probability=ones, weight=ones)
        if self.negative_share > 0:
            return self._both_signs(score, price, ones)
        if self.rate is not None:
            possible = score if above == len(score) else score.masked_fill(~keep, -math.inf)
            ranked, order = possible.sort(descending=True, stable=True)
            count = min(rate_count(self.rate, len(score)), int(above))
            keep = keep.zero_().index_fill_(0, order[:count], True)
            price = ranked[count - 1] if count else None
        return Decision(keep, price if above else None, probability=keep.to(score.dtype), weight=ones)

    def _both_signs(self, score: Tensor, price: Tensor | None, ones: Tensor) -> Decision:
        floor = 0 if price is None else price.clamp(min=0)
        good, bad = score > floor, score < -floor
        rule = Rule(self.rate, None if price is None else float(floor), self.negative_share)
        of_good, of_bad = rule.kept_by_sign(int(good.count_nonzero()), int(bad.count_nonzero()), len(score))
        size = score.abs()
        keep = _greatest(size.where(good, -math.inf), of_good) | _greatest(size.where(bad, -math.inf), of_bad)
        paid = size[keep].min() if of_good + of_bad else None
        return Decision(keep, paid, probability=keep.to(score.dtype), weight=ones)

    def __repr__(self) -> str:
        parts = [f"rate={self.rate:g}"] if self.rate is not None else []
        parts += [f"price={in_words(self.price)}"] if self.price is not None else []
        parts += [f"negative_share={self.negative_share:g}"] if self.negative_share else []
        return f"KondoGate({', '.join(parts)})"

    def state_dict(self) -> dict[str, Any]:
        """The price's state, of one that looks at batches."""
        return {"price": state_of(self.price)} if callable(self.price) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        states.check(repr(self), state, **({"price": states.is_state} if callable(self.price) else {}))
        if callable(self.price):
            load_state(self.price, state["price"])


def checked_price(price: Any) -> Price:
    """A finite number, or a function of scores (N,), or a ValueError."""
    if isinstance(price, Final):
        raise ValueError(f"price is {checks.described(price)}, which is a gate of its own; give it as the gate.")
    if callable(price) and not isinstance(price, type):
        found: Price = checks.function("price", price, "a finite number, or a function of scores (N,)", ...)
        return found
    return checks.number("price", price, "a finite number or a function of scores (N,). To keep everything, use rate=1")


def price_of(price: Price, score: Tensor) -> Tensor:
    """0-dim: the price for these scores, on their device, within the range of their dtype."""
    value = price(score) if callable(price) else price
    if isinstance(value, Tensor):
        return checks.tensor("what the price returned", value, (0,), shape="one number, ()").to(score.device)
    value = checks.number("what the price returned", value, "a number")
    most = torch.finfo(score.dtype).max
    return torch.full((), min(max(float(value), -most), most), dtype=score.dtype, device=score.device)


def in_words(price: Price) -> str:
    return repr(price) if callable(price) else f"{price:g}"


def _greatest(score: Tensor, count: int) -> Tensor:
    """(N,) bool: the `count` greatest scores, ties to the earlier position."""
    order = score.sort(descending=True, stable=True).indices
    return torch.zeros_like(score, dtype=torch.bool).index_fill_(0, order[:count], True)
