"""Which way to the same gradient is cheapest, from counts alone, so that a seed reproduces a run.

A forward pass of a row costs 1 and a backward pass r. Surprisal is never negative, so the sign of a row's delight is
its advantage's: often some rows are kept or skipped whatever their log-probs, and only the others need screening.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparkjoy.signs import Undecided

Plan = Literal["known", "signs", "draft", "screen", "dense"]

BACKWARD_OVER_FORWARD = 2.0
"""r of full training, until it is measured: two matrix products backward for each one forward."""


@dataclass(frozen=True)
class Choice:
    """A plan, and the counts it was chosen by.

    Args:
        plan: "known": the log-probs are given. "signs": the advantages' signs decide. "draft": a draft decides, or
            proposes what the policy then decides about. "screen": a forward pass without a graph decides, survivors are
            recomputed. "dense": one differentiable pass over all that may be kept, skipped rows at weight zero.
        reason: why, in a sentence.
    """

    plan: Plan
    reason: str


EVERYTHING = Choice("dense", "Every row is kept.")
KNOWN = Choice("known", "The log-probs to decide on were given.")


def choose(
    rows: Undecided,
    total: int,
    quota: int | None,
    undivided: bool,
    kept_fraction: float | None,
    backward_over_forward: float,
    narrowed_by: str = "signs of the advantages",
) -> Choice:
    """The cheapest exact plan.

    Args:
        rows: what is left to decide.
        total: B.
        quota: rows that the gate keeps at most; None: no rate.
        undivided: what may be kept is one micro-batch; a dense pass over several would hold all their graphs until the
            decision.
        kept_fraction: kept of late, for gates without a rate; None: not known yet.
        backward_over_forward: r, as measured.
        narrowed_by: what has decided about the others, in words.
    """
    kept, open_ = int(rows.kept.count_nonzero()), int(rows.open.count_nonzero())
    settled = f"{narrowed_by} keep {kept} and skip {total - kept - open_} of {total} rows"
    if open_ == 0:
        return Choice("signs", f"The {settled}.")
    expected = open_ if quota is None else min(open_, quota - kept)
    if quota is None and kept_fraction is not None:
        expected = min(open_, max(0, round(kept_fraction * total) - kept))
    known = quota is not None or kept_fraction is not None
    pass_cost = 1 + backward_over_forward
    screen = open_ + (kept + expected) * pass_cost
    dense = (kept + open_) * pass_cost
    plan: Plan = "dense" if undivided and known and dense < screen else "screen"
    divided = "" if undivided else ", which several micro-batches rule out"
    return Choice(
        plan,
        f"The {settled}; of the other {open_} about {expected} are kept. At r = {backward_over_forward:.3g} "
        f"screening costs {screen:.4g} forward passes of a row, a dense pass {dense:.4g}{divided}.",
    )
