"""The expected gradient as it is: kept rows are weighted up to stand in for skipped ones (Horvitz and Thompson 1952).

A sample of size s is kept with probability q = min(1, s / price) and its term multiplied by 1 / q, so the mean over the
gate's draws is the dense sum. Sizes near the length of a term's gradient make the added noise small.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparkjoy import checks, states
from sparkjoy.gates.decision import Decision, Final
from sparkjoy.noise import LARGEST, price_for_noise
from sparkjoy.scores import at_least_float32, checked_score

RECENT = 10
"""Batches that are remembered, of those that have a signal: the budget is relative to their mean second moment."""

MOST = 1.3
"""What one of them counts for at most, over the third largest: outliers would hold the price for long."""

UNLIKE = 2.0
"""A batch of more than this many times that mean tells nothing of how far the sizes of others are off."""


GAIN = 0.1
"""How far an excess of noise as large as the budget lowers the next step's allowance, in logarithms."""

LARGEST_EXCESS = 20.0
"""In budgets: what one step's draws may tell, since a row of a tiny size and a large gradient tells of hundreds."""


class UnbiasedGate(Final):
    """Keep each sample with probability q ∝ |score|, at most 1, and multiply what is kept by 1 / q.

    The expected gradient is that of the whole batch, whatever the scores are, as long as none is 0 where the gradient
    is not. The engine asks it about the size of a row's gradient in the loss it has (`sj.update_size` for
    `delightful`), and it picks by one uniform number at equal steps along the samples ordered by score (systematic
    sampling), so that what is kept is spread over gains and losses alike.

    - `noise` τ: the budget. It finds its own rate: the highest price that adds at most τ times the batch's own second
      moment, Σ s² (1/q − 1) = τ Σ s², the right side a mean over the last ten batches in which outliers count little.
      Spread-out signal keeps many rows, concentrated signal few, dead groups none. Rows that cost more tokens are kept
      more seldom, q ∝ s/√cost. Where scores are approximate (stale log-probs, a draft), the exact sizes of what was
      kept correct the price.
    - `rate` ρ: the expected number kept is ρN, and the number itself that, rounded up or down at random.

    >>> gate = UnbiasedGate(rate=0.5, generator=torch.Generator().manual_seed(0))
    >>> decision = gate(torch.tensor([8.0, 1.0, -1.0, 0.0]))
    >>> decision.probability, decision.weight
    (tensor([1.0000, 0.5000, 0.5000, 0.0000]), tensor([1., 0., 2., 0.]))
    >>> UnbiasedGate(noise=0.3)(torch.tensor([8.0, 1.0, -1.0, 0.0])).probability
    tensor([0.9324, 0.1166, 0.1166, 0.0000])

    Args:
        noise: τ, above 0; 0.3 where neither is given.
        rate: ρ, fraction to keep, in (0, 1], instead of a noise.
        floor: the least q of a row, in [0, 1): give 0.02 or so where a score may be 0 although the gradient is not,
            such as stale log-probs and tokens that were not sampled from the policy.
        generator: source of the draws; None: torch's global one.

    Raises:
        ValueError: noise and rate together, or one of the three outside its range.
    """

    weighted = True

    def __init__(
        self,
        noise: float | None = None,
        rate: float | None = None,
        floor: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        if noise is not None and rate is not None:
            raise ValueError(f"UnbiasedGate got noise={noise!r} and rate={rate!r}; expected one of them.")
        noise = 0.3 if noise is None and rate is None else noise
        self.noise = noise
        if noise is not None:
            expected = "a number above 0, such as 0.3"
            self.noise = checks.number("noise", noise, expected, lambda noise: noise > 0)
        self.rate = None if rate is None else checks.rate(rate)
        self.floor = checks.number(
            "floor", floor, "a probability in [0, 1), such as 0.02", lambda floor: 0 <= floor < 1
        )
        self.generator = checks.generator(generator)
        self._sizes: list[float] = []  # roots of the mean squared sizes of the last batches
        self._ratios: list[float] = []  # roots of the mean squared sizes of what was kept, exact ones over used ones
        self._allowance = 0.0  # logarithm of what the budget is multiplied by, so that approximate sizes hold it
        self._own = 0.0  # root of the last batch's second moment, as the budget has it

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Decision:
        """Decide which of N samples to keep.

        Args:
            score: (N,), finite; its size counts, and its sign orders the draws.
            cost: (N,), what each sample costs, in tokens, for a noise budget; None: all the same.

        Returns:
            The `Decision`; its price is the size from which on a sample of mean cost is kept for certain.

        Raises:
            ValueError: an empty, non-finite or misshapen score or cost.
        """
        score = checked_score(score, looks=self.noise is None)
        size = score.abs().double()
        if self.noise is None:
            assert self.rate is not None  # the constructor saw to it
            probability, price = inclusion_probabilities(size, self.rate * len(score))
        else:
            probability, price = self._within_budget(size, self.noise, cost)
        if self.floor:
            probability = probability.clamp(min=self.floor)
        device = score.device if self.generator is None else self.generator.device
        start = torch.rand((), generator=self.generator, device=device, dtype=torch.float64)
        keep = _systematic(probability, score.sort(descending=True, stable=True).indices, start.to(score.device))
        weight = torch.where(keep, 1 / probability, 0).to(score.dtype)
        return Decision(keep, price.to(score.dtype), probability.to(score.dtype), weight)

    def _within_budget(self, size: Tensor, noise: float, cost: Tensor | None) -> tuple[Tensor, Tensor]:
        costs = None
        if cost is not None:
            costs = checks.one_each("cost", cost, size).to(size.device, torch.float64)
        of_costs = () if costs is None else (costs.mean(), costs.min())
        total, of_batch, *mean_and_least = checks.read(size.sum(), size.square().mean().sqrt(), *of_costs)
        if not math.isfinite(total):
            checks.finite("score", size)
        if cost is not None and not (math.isfinite(mean_and_least[0]) and min(mean_and_least) >= 0):
            checks.cost(cost, size)
        if not 1e-150 < of_batch < math.inf:
            of_batch = _root_mean_square(size)
        root_cost = torch.ones_like(size)
        if costs is not None and mean_and_least[0] > 0:  # rows that cost nothing count as cheap, not as free
            root_cost = (costs / mean_and_least[0]).clamp(min=1e-6).sqrt()
        if of_batch == 0:
            return torch.zeros_like(size), torch.zeros_like(size[0])
        self._sizes = [*self._sizes, of_batch][-RECENT:]
        usual = _usual(self._sizes)
        self._own = usual * math.sqrt(len(size))
        allowed = noise * math.exp(self._allowance) * len(size)
        price = usual * price_for_noise((size / usual).clamp(max=LARGEST), root_cost, allowed)
        ratio = size / root_cost
        return torch.where(ratio > 0, (ratio / price).clamp(max=1), 0), price

    def learn(self, added: float, own: float, expected_added: float, expected_own: float) -> None:
        """Take up what the last step's draws really added, where the scores decided on were approximate.

        Integral control: the allowance falls while more noise arrives than the budget has, so that in the long run the
        two are the same. What chance alone brings, exact sizes and used ones share, and it cancels.

        Args:
            added: of the `noise_sums` of what was kept; the others likewise.
        """
        if self.noise is None or not 0 < math.sqrt(expected_own) <= math.sqrt(UNLIKE) * self._own:
            return
        if own > 0:
            self._ratios = [*self._ratios, math.sqrt(own / expected_own)][-RECENT:]
        scale = _usual(self._ratios) ** 2 if self._ratios else 0.0
        if scale == 0:
            return
        surprise = (added / scale - expected_added) / self.noise - (own / scale - expected_own)
        excess = math.exp(self._allowance) - 1 + surprise / expected_own
        self._allowance -= GAIN * min(max(excess, -LARGEST_EXCESS), LARGEST_EXCESS)
        self._allowance = min(max(self._allowance, -12.0), 5.0)

    def __repr__(self) -> str:
        given = f"noise={self.noise:g}" if self.noise is not None else f"rate={self.rate:g}"
        return f"UnbiasedGate({given}{f', floor={self.floor:g}' if self.floor else ''})"

    def state_dict(self) -> dict[str, Any]:
        """What it remembers of earlier batches; the generator is the caller's to save."""
        return {name: getattr(self, f"_{name}") for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        states.check(repr(self), state, **STATE)
        for name, value in state.items():
            setattr(self, f"_{name}", list(value) if isinstance(value, list) else value)


def _is_size(value: Any) -> bool:
    return checks.is_number(value) and value >= 0


def _are_recent(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= RECENT and all(map(_is_size, value))


STATE = {
    "sizes": _are_recent,
    "ratios": _are_recent,
    "allowance": lambda value: checks.is_number(value) and -12 <= value <= 5,
    "own": _is_size,
}
"""What it remembers, and what each may be."""


def _usual(sizes: list[float]) -> float:
    """Root mean square of the sizes of batches, of which an outlier or two count little more than the third largest.

    >>> _usual([2.0]), round(_usual([1.0, 1.0, 1e9]), 2), round(_usual([1.0] * 9 + [1e9]), 2)
    (2.0, 1.05, 1.01)
    """
    most = math.sqrt(MOST) * sorted(sizes)[7 * (len(sizes) - 1) // 9]
    return most * math.sqrt(sum(min(size / most, 1.0) ** 2 for size in sizes) / len(sizes))


def _root_mean_square(size: Tensor) -> float:
    """Of sizes whose own squares vanish or overflow."""
    largest = float(size.max())
    return largest and largest * float((size / largest).square().mean().sqrt())


def inclusion_probabilities(size: Tensor, expected: float) -> tuple[Tensor, Tensor]:
    """q = min(1, size / price) with the price at which they sum to `expected`, exactly: the water level.

    >>> inclusion_probabilities(torch.tensor([8.0, 1.0, 1.0, 0.0]), expected=2)
    (tensor([1.0000, 0.5000, 0.5000, 0.0000], dtype=torch.float64), tensor(2., dtype=torch.float64))

    Args:
        size: (N,), at least 0.
        expected: how many to keep on average, above 0; where fewer are above 0, these are kept for certain.

    Returns:
        (N,) and 0-dim, in double precision.
    """
    size = at_least_float32(size).double()
    ranked = size.sort(descending=True).values
    if expected >= int(ranked.count_nonzero()):
        return (size > 0).double(), ranked[ranked > 0].min() if bool(ranked[0] > 0) else ranked[0]
    left = expected - torch.arange(len(size), device=size.device)  # for the others, when so many are certain
    price = ranked.flip(0).cumsum(0).flip(0) / left
    certain = int(((left <= 0) | (ranked <= price)).int().argmax())  # the first that fits
    return (size / price[certain]).clamp(max=1), price[certain]


def _systematic(probability: Tensor, order: Tensor, start: Tensor) -> Tensor:
    """Keep those of the given order in whose share of the running sum a point of start, start + 1, ... falls."""
    certain = probability >= 1
    shares = probability.masked_fill(certain, 0)[order]
    passed = (shares.cumsum(0) - start).ceil()
    drawn = passed.diff(prepend=passed.new_zeros(1)) > 0
    return certain | torch.zeros_like(certain).index_put_((order,), drawn & (shares > 0))
