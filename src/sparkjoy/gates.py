"""Keep or skip: the Kondo gate compares what a sample is worth with what a backward pass costs (arXiv 2603.20526)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sparkjoy.prices import BackwardBudget, BatchQuantile, FixedPrice, Price, checked_rate
from sparkjoy.scores import at_least_float32, without_graph


@dataclass(frozen=True)
class Decision:
    """What a gate decided about N samples. Values stay tensors on their device until read.

    Args:
        keep: (N,) bool, which samples get a backward pass.
        price: 0-dim, in units of the score: the smallest kept score of a hard rate gate (the smallest kept |score| of
            one with a negative share), else the price used; None when nothing is kept, or when no score was computed
            because everything is.
        probability: (N,), with which each sample was kept; 0 or 1 when the gate is hard.
        weight: (N,), what a kept term is multiplied by: 1, unless a gate that samples corrects for it.
    """

    keep: Tensor
    price: Tensor | None
    probability: Tensor
    weight: Tensor


@runtime_checkable
class StatefulGate(Protocol):
    """A gate that a resumed run has to put back as it was."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Gate(Protocol):
    """Any callable of this shape is a gate."""

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Decision:
        """Decide on N samples from their scores (N,) and, where known, what each costs (N,), in tokens."""
        ...


class KondoGate:
    """Keep the samples whose score exceeds the price of a backward pass: G = 1[χ > λ], or its soft version.

    - `rate`: keep the ⌈ρN⌉ samples of greatest score, negative ones too when positive ones are too few; ties go to the
      earlier position.
    - `price`: keep score > price, strictly. 0 is the papers' zero price.
    - both: first the price, then the best of those up to the rate.
    - `temperature` η > 0, with one of the two: keep ~ Bernoulli(σ((χ − λ) / η)), λ the given price or the
      (1 − ρ)-quantile. A soft gate does not hold the rate: where η exceeds the spread of the scores it keeps
      about half.

    - `negative_share` ς > 0: of the samples kept, round(ςK) are those of the most negative scores, χ < −λ: the worst
      surprises, which a gate for successes never sees. The other places go to the greatest scores; what one side lacks,
      the other fills (under a price, positive scores only). Without a rate, K is as many as make all of the positive
      ones the share 1 − ς.

    A hard gate never keeps a score of exactly 0: such a sample has no gradient. The exception is `rate=1` without a
    price, which keeps everything: the plain, dense step.

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
        temperature: η, at least 0; 0 is the hard gate.
        generator: source of a soft gate's N uniform draws; None: torch's global one.
        negative_share: ς, in [0, 1); hard gates only, with a price of at least 0.

    Raises:
        ValueError: neither rate nor price, both together with a temperature, one of them outside its range, or a
            `BackwardBudget` with a rate or temperature.
    """

    def __init__(
        self,
        rate: float | None = None,
        price: float | Price | None = None,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        negative_share: float = 0.0,
    ) -> None:
        if rate is None and price is None:
            raise ValueError("KondoGate got neither rate nor price; give one, for instance rate=0.03 or price=0.")
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
            raise ValueError(f"temperature is {temperature!r}; expected a number of at least 0 (0 is the hard gate).")
        if temperature > 0 and rate is not None and price is not None:
            raise ValueError("a soft gate (temperature > 0) takes rate or price, not both.")
        if isinstance(price, BackwardBudget) and (temperature > 0 or rate is not None or negative_share):
            raise ValueError(
                "a BackwardBudget counts every row above its price as kept; it takes no rate, temperature or "
                "negative_share beside it."
            )
        if (
            isinstance(negative_share, bool)
            or not isinstance(negative_share, int | float)
            or not 0 <= negative_share < 1
        ):
            raise ValueError(f"negative_share is {negative_share!r}; expected a fraction in [0, 1), such as 0.25.")
        if negative_share > 0 and temperature > 0:
            raise ValueError("negative_share goes with a hard gate; leave temperature at 0.")
        self.rate = None if rate is None else checked_rate(rate)
        self.price = price if price is None or isinstance(price, Price) else FixedPrice(price)
        self.temperature = float(temperature)
        self.generator = generator
        self.negative_share = float(negative_share)
        if self.negative_share > 0 and isinstance(self.price, FixedPrice) and self.price.value < 0:
            raise ValueError(f"price is {self.price.value:g}, below 0, where a negative_share means nothing; give 0.")

    @property
    def keeps_everything(self) -> bool:
        """Whether this is the plain, dense step: rate 1 without a price."""
        return self.rate == 1 and self.price is None

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Decision:
        """Decide which of N samples to keep.

        Args:
            score: (N,), finite; moved to float32 when it is of lower precision.
            cost: (N,), what each sample costs, in tokens; only prices that count a budget read it.

        Returns:
            The `Decision`. With no sample kept, its price is None.

        Raises:
            ValueError: an empty, non-finite or misshapen score.
        """
        score = checked_score(score)
        ones = torch.ones_like(score)
        if self.keeps_everything:
            return Decision(keep=ones.bool(), price=score.min(), probability=ones, weight=ones)
        if self.temperature > 0:
            return self._soft(score, cost, ones)
        return self._hard(score, cost, ones)

    def _hard(self, score: Tensor, cost: Tensor | None, ones: Tensor) -> Decision:
        keep = score != 0
        price = None if self.price is None else self.price(score, cost)
        if self.negative_share > 0:
            return self._both_signs(score, price, ones)
        if price is not None:
            keep &= score > price
        if self.rate is not None:
            ranked, order = score.masked_fill(~keep, -math.inf).sort(descending=True, stable=True)
            count = min(rate_count(self.rate, score.shape[0]), int(keep.count_nonzero()))
            keep = keep.zero_().index_fill_(0, order[:count], True)
            price = ranked[count - 1] if count else None
        elif not bool(keep.any()):
            price = None
        return Decision(keep, price, probability=keep.to(score.dtype), weight=ones)

    def _both_signs(self, score: Tensor, price: Tensor | None, ones: Tensor) -> Decision:
        floor = 0 if price is None else price.clamp(min=0)
        good, bad = score > floor, score < -floor
        of_good, of_bad = self.kept_by_sign(int(good.count_nonzero()), int(bad.count_nonzero()), len(score))
        size = score.abs()
        keep = _greatest(size.where(good, -math.inf), of_good) | _greatest(size.where(bad, -math.inf), of_bad)
        paid = size[keep].min() if of_good + of_bad else None
        return Decision(keep, paid, probability=keep.to(score.dtype), weight=ones)

    def kept_by_sign(self, good: int, bad: int, total: int) -> tuple[int, int]:
        """How many positive and negative scores a hard gate keeps of those that its price leaves in the running.

        >>> KondoGate(rate=0.1, negative_share=0.25).kept_by_sign(good=50, bad=50, total=80)
        (6, 2)

        Args:
            good: positive scores above the price.
            bad: negative scores; with a price, those below minus the price.
            total: all scores, N.
        """
        kept = total if self.rate is None else rate_count(self.rate, total)
        if self.price is not None:
            kept = min(kept, round(good / (1 - self.negative_share)))
            bad = bad if self.negative_share > 0 else 0
        of_bad = min(bad, max(round(self.negative_share * kept), kept - good))
        return min(good, kept - of_bad), of_bad

    def _soft(self, score: Tensor, cost: Tensor | None, ones: Tensor) -> Decision:
        quantile_or_given = BatchQuantile(self.rate) if self.rate is not None else self.price
        assert quantile_or_given is not None  # the constructor saw to it
        price = quantile_or_given(score, cost)
        probability = ((score - price) / self.temperature).sigmoid()
        device = score.device if self.generator is None else self.generator.device
        uniforms = torch.rand(len(score), generator=self.generator, device=device, dtype=score.dtype)
        keep = uniforms.to(score.device) < probability
        return Decision(keep, price if bool(keep.any()) else None, probability, weight=ones)

    def __repr__(self) -> str:
        parts = [f"rate={self.rate:g}"] if self.rate is not None else []
        parts += [f"price={self.price!r}"] if self.price is not None else []
        parts += [f"temperature={self.temperature:g}"] if self.temperature else []
        parts += [f"negative_share={self.negative_share:g}"] if self.negative_share else []
        return f"KondoGate({', '.join(parts)})"

    def state_dict(self) -> dict[str, Any]:
        """The price's state; the generator is the caller's to save."""
        return {} if self.price is None else {"price": self.price.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        if self.price is not None:
            self.price.load_state_dict(state["price"])


def checked_score(score: Tensor) -> Tensor:
    """The score (N,) without its graph and at least in float32, or a ValueError that says what is wrong with it."""
    if score.dim() != 1 or score.shape[0] == 0 or not score.is_floating_point():
        raise ValueError(
            f"score has shape {tuple(score.shape)}, {score.dtype}; expected floating-point (N,) of at least one."
        )
    score = at_least_float32(without_graph(score))
    if not math.isfinite(score.sum().item()) and not bool(score.isfinite().all()):
        bad = int((~score.isfinite()).sum())
        raise ValueError(f"score has {bad} of {len(score)} values NaN or infinite; expected finite numbers.")
    return score


def _greatest(score: Tensor, count: int) -> Tensor:
    """(N,) bool: the `count` greatest scores, ties to the earlier position."""
    order = score.sort(descending=True, stable=True).indices
    return torch.zeros_like(score, dtype=torch.bool).index_fill_(0, order[:count], True)


def rate_count(rate: float, total: int) -> int:
    """How many of `total` a rate keeps: ⌈rate · total⌉, forgiving the float product's last digits.

    >>> rate_count(0.03, 100), rate_count(0.1, 30), rate_count(0.001, 100)
    (3, 3, 1)
    """
    return math.ceil(rate * total - 1e-9)
