"""The Kondo gate before its temperature goes to 0: it keeps at random, the more likely the more a sample is worth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparkjoy import checks, states
from sparkjoy.gates.decision import Decision, Final, load_state, state_of
from sparkjoy.gates.kondo import Price, checked_price, in_words, price_of
from sparkjoy.scores import checked_score

LARGEST_QUANTILE = 2**24
"""Numbers that torch.quantile takes."""


class SoftGate(Final):
    """Keep ~ Bernoulli(σ((χ − λ) / η)), λ the price or the (1 − ρ)-quantile (arXiv 2603.20526).

    The sigmoid is what maximises w(χ − λ) + η H(w) over w in [0, 1], H the binary entropy. It does not hold the rate:
    where η exceeds the spread of the scores it keeps about half. What it keeps is not weighted, so its expected update
    is that of DG at this price and temperature, not the dense one; `UnbiasedGate` has that.

    >>> gate = SoftGate(temperature=1.0, price=0.0, generator=torch.Generator().manual_seed(0))
    >>> gate(torch.tensor([10.0, -10.0])).keep
    tensor([ True, False])

    Args:
        temperature: η, above 0; `KondoGate` is the limit of 0.
        rate: ρ, in (0, 1].
        price: λ, a finite number, or `scores (N,) -> number` of each batch; exactly one of rate and price.
        generator: source of the N uniform draws; None: torch's global one.

    Raises:
        ValueError: neither rate nor price or both, or one of the three outside its range.
    """

    weighted = False

    def __init__(
        self,
        temperature: float,
        rate: float | None = None,
        price: Price | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.temperature = checks.number(
            "temperature",
            temperature,
            "a number above 0. KondoGate is the hard gate",
            lambda temperature: temperature > 0,
        )
        if (rate is None) == (price is None):
            raise ValueError(f"SoftGate got rate={rate!r} and price={price!r}; expected exactly one of them.")
        self.rate = None if rate is None else checks.rate(rate)
        self.price = None if price is None else checked_price(price)
        self.generator = checks.generator(generator)

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Decision:
        """Decide which of N samples to keep, as `KondoGate` does.

        Raises:
            ValueError: an empty, non-finite or misshapen score.
        """
        score = checked_score(score)
        price = quantile(score, 1 - self.rate) if self.rate is not None else price_of(self.price or 0.0, score)
        probability = ((score - price) / self.temperature).sigmoid()
        device = score.device if self.generator is None else self.generator.device
        uniforms = torch.rand(len(score), generator=self.generator, device=device, dtype=score.dtype)
        keep = uniforms.to(score.device) < probability
        return Decision(keep, price if bool(keep.any()) else None, probability, weight=torch.ones_like(score))

    def __repr__(self) -> str:
        given = f"rate={self.rate:g}" if self.rate is not None else f"price={in_words(self.price or 0.0)}"
        return f"SoftGate(temperature={self.temperature:g}, {given})"

    def state_dict(self) -> dict[str, Any]:
        """The price's state, of one that looks at batches; the generator is the caller's to save."""
        return {"price": state_of(self.price)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        states.check(repr(self), state, price=states.is_state)
        load_state(self.price, state["price"])


def quantile(score: Tensor, level: float) -> Tensor:
    """`torch.quantile`, which refuses more than 2²⁴ numbers, of any number of them.

    >>> quantile(torch.arange(5.0), 0.25)
    tensor(1.)
    """
    if len(score) <= LARGEST_QUANTILE:
        return torch.quantile(score, level)
    ranked, place = score.sort().values, level * (len(score) - 1)
    below = min(int(place), len(score) - 2)
    return torch.lerp(ranked[below], ranked[below + 1], place - below)
