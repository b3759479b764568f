"""A gate that leaves the expected update as it is: survivors count for the skipped (Horvitz and Thompson 1952).

A sample of size s is kept with probability q = min(1, s / price) and its term multiplied by 1 / q, so the mean over
the gate's draws is the dense sum. Sizes near the length of a term's gradient make the variance small.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sparkjoy.gates import Decision, checked_score
from sparkjoy.prices import checked_rate
from sparkjoy.scores import at_least_float32, per_row, surprisal

Sampling = Literal["systematic", "independent"]


def update_size(advantages: Tensor, log_probs: Tensor) -> Tensor:
    """How much a sample moves a policy in DG: σ(χ) U (1 − π(a)), about the length of its gradient at the logits.

    The exact length there is |σ(χ) U| · ‖e_a − π‖, which lies between this one's size and √2 times it; 1 − π(a) needs
    the taken action's log-prob only. It has the sign of U, which `UnbiasedGate` orders its draws by.

    >>> update_size(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5]).log())
    tensor([ 0.3333, -0.1667])

    Args:
        advantages: (B,), or (B, T) when `log_probs` is (B, T).
        log_probs: (B,) or (B, T), log-probabilities of the actions taken.

    Returns:
        The shape of `log_probs`, detached; the engine sums it over a row's tokens.

    Raises:
        ValueError: shapes that do not go together, or a log-probability above 0.
    """
    advantages, surprised = per_row(advantages, log_probs), surprisal(log_probs)
    return -torch.sigmoid(advantages * surprised) * advantages * torch.expm1(-surprised.clamp(min=0))


class UnbiasedGate:
    """Keep each sample with probability q ∝ |score|, at most 1, and multiply what is kept by 1 / q.

    With `score=update_size` and `loss=delightful()` the expected gradient is that of DG over the whole batch. The
    expected number kept is ρN exactly, with systematic sampling the number itself too (rounded up or down at random
    where ρN is no whole number). A score of 0 is never kept: its gradient has to be 0.

    >>> gate = UnbiasedGate(rate=0.5, generator=torch.Generator().manual_seed(0))
    >>> decision = gate(torch.tensor([8.0, 1.0, -1.0, 0.0]))
    >>> decision.probability, decision.weight
    (tensor([1.0000, 0.5000, 0.5000, 0.0000]), tensor([1., 0., 2., 0.]))

    Args:
        rate: ρ, fraction to keep, in (0, 1].
        sampling: "systematic": one uniform number picks at equal steps along the samples ordered by score, so that
            those kept are spread over gains and losses alike; "independent": a uniform number for each.
        generator: source of the draws; None: torch's global one.

    Raises:
        ValueError: a rate outside (0, 1], or an unknown sampling.
    """

    def __init__(
        self, rate: float, sampling: Sampling = "systematic", generator: torch.Generator | None = None
    ) -> None:
        if sampling not in ("systematic", "independent"):
            raise ValueError(f"sampling is {sampling!r}; expected 'systematic' or 'independent'.")
        self.rate = checked_rate(rate)
        self.sampling = sampling
        self.generator = generator

    def __call__(self, score: Tensor, cost: Tensor | None = None) -> Decision:
        """Decide which of N samples to keep.

        Args:
            score: (N,), finite; its size counts, and its sign orders systematic draws.
            cost: not used.

        Returns:
            The `Decision`; its price is the size from which on a sample is kept for certain, None when nothing is kept.

        Raises:
            ValueError: an empty, non-finite or misshapen score.
        """
        score = checked_score(score)
        probability, price = inclusion_probabilities(score.abs(), self.rate * len(score))
        device = score.device if self.generator is None else self.generator.device
        if self.sampling == "independent":
            uniforms = torch.rand(len(score), generator=self.generator, device=device, dtype=torch.float64)
            keep = uniforms.to(score.device) < probability
        else:
            start = torch.rand((), generator=self.generator, device=device, dtype=torch.float64)
            keep = _systematic(probability, score.sort(descending=True, stable=True).indices, start.to(score.device))
        weight = torch.where(keep, 1 / probability, 0).to(score.dtype)
        kept_price = price.to(score.dtype) if bool(keep.any()) else None
        return Decision(keep, kept_price, probability.to(score.dtype), weight)

    def __repr__(self) -> str:
        return f"UnbiasedGate(rate={self.rate:g}, sampling={self.sampling!r})"


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
