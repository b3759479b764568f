"""Keep or skip: the Kondo gate compares what a sample is worth with what a backward pass costs (arXiv 2603.20526)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparkjoy import checks, states
from sparkjoy.gates.decision import Decision
from sparkjoy.gates.inputs import checked_score
from sparkjoy.prices import FixedPrice, Price, as_price
from sparkjoy.signs import Rule


class KondoGate:
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
        price: λ, a finite number or a `Price`.
        negative_share: ς, in [0, 1); with a price of at least 0.

    Raises:
        ValueError: neither rate nor price, or one of the three outside its range.
    """

    weighted = False

    def __init__(
        self, rate: float | None = None, price: float | Price | None = None, negative_share: float = 0.0
    ) -> None:
        if rate is None and price is None:
            raise ValueError("KondoGate got neither rate nor price; give one, for instance rate=0.03 or price=0.")
        self.rate = None if rate is None else checks.rate(rate)
        self.price = None if price is None else as_price(price)
        self.negative_share = checks.number(
            "negative_share", negative_share, "a fraction in [0, 1), such as 0.25", lambda share: 0 <= share < 1
        )
        if self.negative_share > 0 and isinstance(self.price, FixedPrice) and self.price.value < 0:
            raise ValueError(f"price is {self.price.value:g}, below 0, where a negative_share means nothing; give 0.")

    @property
    def rule(self) -> Rule | None:
        """What signs may decide: nothing under a price that looks at the scores of a batch."""
        floor = self.price.value if isinstance(self.price, FixedPrice) else None
        return Rule(self.rate, floor, self.negative_share) if self.price is None or floor is not None else None

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Decision:
        """Decide which of N samples to keep.

        Args:
            score: (N,), finite; moved to float32 when it is of lower precision.
            cost: (N,), what each sample costs, in tokens; only a `Price` of your own may read it.

        Returns:
            The `Decision`. With no sample kept, its price is None.

        Raises:
            ValueError: an empty, non-finite or misshapen score.
        """
        score = checked_score(score)
        ones = torch.ones_like(score)
        if self.rate == 1 and self.price is None:
            return Decision(keep=ones.bool(), price=score.min(), probability=ones, weight=ones)
        price = None if self.price is None else self.price(score, cost)
        if self.negative_share > 0:
            return self._both_signs(score, price, ones)
        keep = score != 0
        if price is not None:
            keep &= score > price
        if self.rate is not None:
            ranked, order = score.masked_fill(~keep, -math.inf).sort(descending=True, stable=True)
            count = min(Rule(self.rate).quota(len(score)) or 0, int(keep.count_nonzero()))
            keep = keep.zero_().index_fill_(0, order[:count], True)
            price = ranked[count - 1] if count else None
        elif not bool(keep.any()):
            price = None
        return Decision(keep, price, probability=keep.to(score.dtype), weight=ones)

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
        parts += [f"price={self.price!r}"] if self.price is not None else []
        parts += [f"negative_share={self.negative_share:g}"] if self.negative_share else []
        return f"KondoGate({', '.join(parts)})"

    def state_dict(self) -> dict[str, Any]:
        """The price's state."""
        return {} if self.price is None else {"price": self.price.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        states.check(repr(self), state, **({} if self.price is None else {"price": states.is_state}))
        if self.price is not None:
            self.price.load_state_dict(state["price"])


def _greatest(score: Tensor, count: int) -> Tensor:
    """(N,) bool: the `count` greatest scores, ties to the earlier position."""
    order = score.sort(descending=True, stable=True).indices
    return torch.zeros_like(score, dtype=torch.bool).index_fill_(0, order[:count], True)
