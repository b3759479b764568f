"""How good a draft is: its scores beside the exact ones, on the rows of now and then a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparkjoy import checks
from sparkjoy.signs import rate_count


@dataclass(frozen=True)
class Audit:
    """When a draft is compared with an exact forward pass, and when it is given up.

    >>> Audit(every=10, rows=32, floor=0.7)
    Audit(every=10, rows=32, floor=0.7, window=5)

    Args:
        every: steps from one audit to the next.
        rows: how many rows of the batch to draw for one; None: all.
        floor: mean recall of the last `window` audits under which the draft is replaced by exact screening, in [0, 1];
            0: never.
        window: audits in that mean, and the number before which no draft is given up.

    Raises:
        ValueError: one of them outside its range.
    """

    every: int = 20
    rows: int | None = None
    floor: float = 0.5
    window: int = 5

    def __post_init__(self) -> None:
        for name in ("every", "rows", "window"):
            if name != "rows" or self.rows is not None:
                checks.whole(f"audit {name}", getattr(self, name))
        expected = "a recall in [0, 1], 0 for never"
        checks.number("audit floor", self.floor, expected, lambda floor: 0 <= floor <= 1)


@dataclass(frozen=True)
class AuditResult:
    """One audit.

    Args:
        recall: of the rows of highest exact score, as many as the rate keeps, the fraction that the draft would let
            through: kept, or proposed where proposals are verified.
        draft_recall: the same at the rate itself, as if nothing were verified.
        spearman: rank correlation of drafted and exact scores; NaN where all of one are equal.
        draft_seconds: the draft's seconds over the audited rows; None at every other audit, which counts FLOPs.
        exact_seconds: an exact forward pass's over the same rows.
        draft_flops: FLOPs of the first; None where seconds were measured.
        exact_flops: FLOPs of the second.
    """

    recall: float
    draft_recall: float
    spearman: float
    draft_seconds: float | None
    exact_seconds: float | None
    draft_flops: int | None
    exact_flops: int | None


def recall(exact: Tensor, drafted: Tensor, rate: float, oversample: float = 1.0) -> float:
    """Of the ⌈ρN⌉ rows of highest exact score the fraction among the ⌈ρN · oversample⌉ of highest drafted score.

    A row whose exact score ties with the last of the best counts as one of them, since any of the tied could be kept.
    Rows with an exact score of 0 are no survivors.

    >>> exact = torch.tensor([4.0, 3.0, 2.0, 1.0])
    >>> recall(exact, torch.tensor([4.0, 1.0, 3.0, 2.0]), rate=0.5), recall(exact, -exact, rate=0.5, oversample=2)
    (0.5, 1.0)

    Args:
        exact: (N,).
        drafted: (N,).
        rate: ρ in (0, 1].
        oversample: at least 1.
    """
    true = exact.masked_fill(exact == 0, -torch.inf).sort(descending=True).values
    survivors = min(rate_count(rate, len(exact)), int(exact.count_nonzero()))
    if survivors == 0:
        return 1.0
    least = true[survivors - 1]
    proposed = drafted.sort(descending=True, stable=True).indices[: rate_count(rate * oversample, len(exact))]
    found = int((exact[proposed] >= least - 1e-6 * least.abs()).sum())
    return min(found, survivors) / survivors


def spearman(left: Tensor, right: Tensor) -> float:
    """Spearman's rank correlation of two (N,): Pearson's of their ranks, ties having their mean rank.

    >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 20.0]))
    0.8660254037844387
    """
    ranks = torch.stack([_ranks(left), _ranks(right)])
    centred = ranks - ranks.mean(dim=1, keepdim=True)
    return float((centred[0] * centred[1]).sum() / centred.square().sum(dim=1).prod().sqrt())


def _ranks(values: Tensor) -> Tensor:
    """0-based ranks (N,), in double precision."""
    _, group, sizes = values.unique(return_inverse=True, return_counts=True)
    last = sizes.cumsum(0).double()
    ranks: Tensor = last - (sizes + 1) / 2
    return ranks[group]
