"""The noise that skipping adds to a gradient: how much a price allows, and how much there really was.

Row i has a size s_i, a stand-in for the length g_i of its term of the gradient. Kept with probability q_i and
weighted by 1 / q_i, its term adds g_i² (1/q_i − 1) to the second moment of the gradient, whose own is at most Σ g_i²
where rows do not agree. Noise is the one over the other: 0.3 means that gating adds three tenths of what the batch
itself has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparkjoy import checks

LARGEST = 1e150
"""Of sizes whose squares are added: what is larger, such as an outlier of 1e155, counts as this."""


def price_for_noise(size: Tensor, root_cost: Tensor, allowed: float) -> Tensor:
    """The largest λ of which q = min(1, s / (λ√c)) adds no more than is allowed: Σ_{s < λ√c} s (λ√c − s) = allowed.

    These probabilities cost least, Σ c q, of all that add as little. The left side rises with λ and is linear between
    the values of s/√c, so one sort and two running sums give λ exactly.

    >>> price_for_noise(torch.tensor([3.0, 1.0, 1.0]), torch.ones(3), allowed=2.0)
    tensor(2., dtype=torch.float64)

    Args:
        size: (N,), at least 0.
        root_cost: (N,), above 0: the square root of what each row costs.
        allowed: at least 0, in squared units of the sizes.

    Returns:
        0-dim, in double precision; 0 where all sizes are 0. With nothing allowed it is the least s/√c: all are kept.
    """
    size, root_cost = size.double(), root_cost.double()
    ratio, order = (size / root_cost).sort()
    linear, squares = (size * root_cost)[order].cumsum(0), size[order].square().cumsum(0)
    some = (ratio <= 0).count_nonzero() + 1  # a row of no size is never kept; the smallest other one may not be
    below = torch.maximum((ratio * linear - squares <= allowed).count_nonzero(), some)  # not kept for certain
    last = (below.clamp(max=len(size)) - 1).view(1)  # an index that the host need not know
    price = torch.maximum((allowed + squares[last]) / linear[last], ratio[last])
    return price.where(ratio[-1:] > 0, 0).squeeze(0)


def noise_ratio(added: float, own: float, expected_added: float, expected_own: float) -> float:
    """Times as much noise as the sizes decided on let expect, from `noise_sums`; 1 where nothing tells otherwise.

    >>> noise_ratio(2.0, 4.0, 1.0, 4.0)
    2.0
    """
    if min(added, own, expected_added, expected_own) <= 0:
        return 1.0
    return (added / own) / (expected_added / expected_own)


def noise_sums(exact: Tensor, used: Tensor, weight: Tensor) -> Tensor:
    """What the rows kept in one step tell of the noise, by their exact sizes g and the sizes s that were decided on.

    (4,) Σ g² (1/q − 1)/q, Σ g²/q, and the same two of s, over the kept rows, whose expectations are the sums over all
    rows; in double precision, so that several processes can add theirs.

    >>> noise_sums(torch.ones(1), torch.ones(1), torch.full((1,), 2.0)).tolist()
    [2.0, 2.0, 2.0, 2.0]

    Args:
        exact: (K,) sizes of the kept rows by the log-probs they were differentiated with.
        used: (K,) sizes that the gate decided on.
        weight: (K,) 1/q.
    """
    exact, used = (size.double().clamp(-LARGEST, LARGEST).square() for size in (exact, used))
    weight = weight.double()
    return torch.stack([(part * factor).sum() for part in (exact, used) for factor in (weight * (weight - 1), weight)])


def expected_noise(size: Tensor, probability: Tensor) -> float:
    """Σ s² (1/q − 1) / Σ s²: what a decision adds if its sizes are right; 0 where all are 0.

    >>> expected_noise(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.5]))
    0.2

    Args:
        size: (N,).
        probability: (N,); a row of 0 is never kept, and adds nothing.
    """
    size, probability = size.double(), probability.double()
    squares = (size / size.abs().max().clamp(min=torch.finfo(size.dtype).tiny)).square()
    own, added = checks.read(squares.sum(), torch.where(probability > 0, squares * (1 / probability - 1), 0).sum())
    return added / own if own > 0 else 0.0
